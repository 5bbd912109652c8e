"""One answer on its way: its draws, its thought and the thought's budget, its grammar, its text, and where it ends."""

from collections.abc import Sequence as Many
from dataclasses import replace

import torch
from torch import Tensor

from qvl.engine.request import Event, Finish, Request, ThinkingBudget
from qvl.engine.sampling import Best, Sampler
from qvl.engine.sequence import Sequence
from qvl.engine.text import TextOutput


class Answer:
    """Takes logits, gives events, and lengthens its sequence."""

    def __init__(self, request: Request, sequence: Sequence, vocab_size: int) -> None:
        self.request, self.sequence = request, sequence
        sampling = request.sampling
        if sampling.seed is not None and sequence.index:
            # Answers of one request differ; the first is the one that the seed gives alone.
            sampling = replace(sampling, seed=(sampling.seed + sequence.index) % 2**63)
        self.sampler = Sampler(sampling, request.sample.token_T, vocab_size)
        self.output = TextOutput(sampling.stop, request.text_stream() if request.text_stream else None)
        self.end_tokens = frozenset() if sampling.ignore_eos else request.end_tokens
        self.thought = Thought(request.thinking, sequence.tokens[: sequence.num_prompt])
        self.said: list[int] = []
        """The answer without its thought: what a grammar is asked about."""
        self._goes_on_V: Tensor | None = None
        if request.grammar is not None and request.thinking is not None:
            self._goes_on_V = ~torch.isin(
                torch.arange(vocab_size), torch.tensor(sorted(self.end_tokens), dtype=torch.int64)
            )

    def take(self, logits_V: Tensor, best: Best | None = None) -> Event:
        """Draw the next token and say what came of it. Raises ValueError when it cannot be drawn."""
        forced = self.thought.forced()
        allowed = None
        if self.request.grammar is not None and forced is None:
            # A thought is free, but what the grammar asks for is still to come: the answer may not end there.
            allowed = self._goes_on_V if self.thought.is_open else self.request.grammar.allowed(self.said)
        draw = self.sampler(logits_V, allowed=allowed, forced=forced, best=best)
        if self.thought.note(draw.token):
            self.said.append(draw.token)
        self.sequence.tokens.append(draw.token)
        is_end = draw.token in self.end_tokens
        text = "" if is_end else self.output.push(draw.token)
        finish: Finish | None = None
        if is_end or self.output.is_stopped:
            finish = "stop"
        elif len(self.sequence.tokens) >= self.sequence.max_length:
            finish = "length"
        if finish is not None:
            text += self.output.end()
        return Event(
            request=self.request.id,
            index=self.sequence.index,
            draw=draw,
            text=text,
            finish=finish,
            num_cached_tokens=self.sequence.num_found,
        )


class Thought:
    """Whether the answer is inside its thought, how long that is, and the tokens that end it by force."""

    def __init__(self, budget: ThinkingBudget | None, prompt: Many[int]) -> None:
        self.budget = budget
        self.is_open = budget is not None and starts_in_thought(budget, prompt)
        self.num_tokens = 0
        self.pending: list[int] = []

    def forced(self) -> int | None:
        """The token that must come next, if any."""
        budget = self.budget
        if budget is None or not self.is_open or budget.max_tokens is None:
            return None
        if not self.pending and self.num_tokens >= budget.max_tokens:
            self.pending = [*budget.last_words, budget.close]
        return self.pending[0] if self.pending else None

    def note(self, token: int) -> bool:
        """Follow the answer by one token. Returns whether it belongs to what is said, not thought."""
        if self.budget is None:
            return True
        if self.pending:
            self.pending.pop(0)
        was_open = self.is_open
        if token == self.budget.open:
            self.is_open = True
        elif token == self.budget.close:
            self.is_open = False
            self.pending = []
        elif was_open:
            self.num_tokens += 1
        return not was_open and not self.is_open and token != self.budget.close


def starts_in_thought(budget: ThinkingBudget, prompt: Many[int]) -> bool:
    """The prompt's last mark opens a thought."""
    last = next((token for token in reversed(prompt) if token in (budget.open, budget.close)), None)
    return last == budget.open
