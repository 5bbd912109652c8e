"""A model that is ready to answer: network, processor, sampling and end tokens in one object, which everything that asks a model shares."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from qvl.core.batch import Sample
from qvl.core.config import did_you_mean
from qvl.core.device import pick_device, pick_dtype
from qvl.engine.generate import Event, FinishReason, Generation, OfflineEngine
from qvl.engine.prepare import Weights, prepare, sync_weights
from qvl.engine.request import ThinkingBudget
from qvl.engine.sampling import Preset, Sampling, defaults, end_tokens
from qvl.model.lora import load_adapter, merge
from qvl.model.qwen3vl import Qwen3VL
from qvl.model.weights import load as load_weights
from qvl.outside.hub import resolve
from qvl.prompt.answer import Answer, parse_answer
from qvl.prompt.message import Image, Message, Text, Video, user
from qvl.prompt.openai import messages_from_dicts
from qvl.prompt.processor import Processor

Say = Callable[[str], None]
Dtype = Literal["auto", "float32", "bfloat16"]
Conversation = str | Message | Sequence[Message] | Sequence[Mapping[str, Any]]
"""A question, a message, or messages: ours, or OpenAI's dictionaries."""


def load(
    model: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
    memory: float | None = None,
    sampling: Preset = "model",
    weights: Weights = "plain",
) -> "Session":
    """A session on a checkpoint folder or a name on the hub (extra `hub`); `qvl.load` is this.

        import qvl
        model = qvl.load("DIR")
        print(model.chat("What is this?", images=["cat.png"]))

    `adapter`: a LoRA folder in PEFT's format, merged into the weights. `dtype` auto: bfloat16 where the hardware multiplies it. `memory`:
    GiB for keys and values; None takes what is needed. `sampling`: where unset values come from (the folder's own settings, the report's,
    the official evaluation's). The session keeps what it has read: a conversation that goes on is not read again from its beginning.
    """
    processor = Processor.from_folder(resolve(str(model)))
    session = Session.open(
        processor,
        adapter=None if adapter is None else Path(adapter),
        dtype=dtype,
        device=device,
        sampling=sampling,
        weights=weights,
    )
    return replace(session, memory=memory, reuse=True)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the model answered; printed, it is the answer's words."""

    message: Message
    """The assistant's message: words, thought, tool calls. It may be put behind the conversation that was asked."""
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    is_forced: tuple[bool, ...]
    """Tokens that ended a thought by force; the model did not sample them."""
    finish: FinishReason

    @property
    def text(self) -> str:
        return self.message.text

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, kw_only=True)
class Session:
    model: Qwen3VL
    processor: Processor
    sampling: Sampling
    """Of an answer whose question says nothing else."""
    end_tokens: frozenset[int]
    skips_special: bool = False
    """Whether control tokens are left out of an answer's text."""
    memory: float | None = None
    """GiB for keys and values; None takes what the largest call so far needed."""
    reuse: bool = False
    """Whether prompts' beginnings and images that were seen before are computed again: not, with it, at the cost of last digits."""

    @classmethod
    def open(
        cls,
        processor: Processor,
        *,
        adapter: Path | None = None,
        dtype: Dtype = "auto",
        device: str = "auto",
        sampling: Preset = "model",
        weights: Weights = "plain",
        say: Say = lambda _: None,
    ) -> "Session":
        """Loads the weights of the processor's folder, and orders them for answering."""
        folder, place = processor.folder.path, pick_device(device)
        say(f"loading {folder}")
        model = load_weights(folder, dtype=pick_dtype(place, dtype), device=place)
        if adapter is not None:
            load_adapter(model, adapter)
            merge(model, keep_base=False)
        prepare(model, free=True, weights=weights)
        return cls.over(model, processor, sampling=sampling)

    @classmethod
    def over(cls, model: Qwen3VL, processor: Processor, *, sampling: Preset = "model") -> "Session":
        """On a model in memory, with the sampling and the end tokens of the processor's folder."""
        return cls(
            model=model,
            processor=processor,
            sampling=preset_sampling(sampling, processor.folder.path, model, processor),
            end_tokens=end_tokens(processor.folder.path, model.config.text.eos_token_id),
        )

    @classmethod
    def greedy(cls, model: Qwen3VL, processor: Processor, *, max_tokens: int) -> "Session":
        """On a model in memory, with its likeliest tokens until the turn ends; control tokens are no part of the text."""
        end = frozenset({processor.tokenizer.control_id("<|im_end|>")})
        sampling = Sampling(temperature=0, max_tokens=max_tokens)
        return cls(model=model, processor=processor, sampling=sampling, end_tokens=end, skips_special=True)

    # ---- conversations

    def chat(
        self, conversation: Conversation, *, images: Sequence[Any] = (), videos: Sequence[Any] = (), **sampling: Any
    ) -> Reply:
        """The answer. `images` and `videos` (paths, bytes, PIL images, arrays) stand before the words of a lone question; keywords are
        fields of Sampling (temperature, max_tokens, seed, stop, ...) and `thinking_budget`."""
        (reply,) = self.chat_many([self._messages(conversation, images, videos)], **sampling)
        return reply

    def chat_many(
        self,
        conversations: Sequence[Conversation],
        *,
        n: int = 1,
        thinking_budget: int | None = None,
        **sampling: Any,
    ) -> list[Reply]:
        """The answers, worked out together; each is what it would be alone, up to rounding. With `n`, the n answers of a conversation stand
        together. `thinking_budget`: tokens after which a thought is closed by force."""
        samples = [self.processor(self._messages(conversation)).sample for conversation in conversations]
        chosen = self._sampling(sampling)
        return [
            Reply(
                message=self._parsed(made.tokens, made.text, chosen).message,
                tokens=made.tokens,
                logprobs=made.logprobs,
                is_forced=made.is_forced,
                finish=made.finish,
            )
            for made in self.generate(samples, chosen, n=n, thinking_budget=thinking_budget)
        ]

    def stream(
        self, conversation: Conversation, *, images: Sequence[Any] = (), videos: Sequence[Any] = (), **sampling: Any
    ) -> Generator[str]:
        """The answer's text as it comes, a thought with its marks included; joined it is what a whole answer's tokens say."""
        sample = self.processor(self._messages(conversation, images, videos)).sample
        with closing(self.events([sample], self._sampling(sampling))) as events:
            for event in events:
                yield event.text

    def _messages(
        self, conversation: Conversation, images: Sequence[Any] = (), videos: Sequence[Any] = ()
    ) -> Sequence[Message]:
        if isinstance(conversation, str):
            return [user(*map(Image, images), *map(Video, videos), Text(conversation))]
        if images or videos:
            raise ValueError("images and videos came beside messages; put them into the message that shows them.")
        if isinstance(conversation, Message):
            return [conversation]
        if conversation and all(isinstance(message, Message) for message in conversation):
            return conversation  # type: ignore[return-value]
        return messages_from_dicts(conversation)  # type: ignore[arg-type]

    def _sampling(self, given: Mapping[str, Any]) -> Sampling:
        known = vars(self.sampling)
        if unknown := next((name for name in given if name not in known), None):
            raise ValueError(f"there is no sampling setting {unknown!r}{did_you_mean(unknown, known)}.")
        return replace(self.sampling, **given)

    @cached_property
    def thinking(self) -> ThinkingBudget | None:
        """How a thought is marked, without a budget; None where the vocabulary has no marks."""
        tokenizer = self.processor.tokenizer
        if not (tokenizer.has_control("<think>") and tokenizer.has_control("</think>")):
            return None
        return ThinkingBudget(open=tokenizer.control_id("<think>"), close=tokenizer.control_id("</think>"))

    # ---- weights

    def sync_weights(self, model: Qwen3VL) -> None:
        """Answers with the weights of a model in training from here on (`prepare.sync_weights`); nothing the old ones computed is kept."""
        self.engine.reset_caches()  # refuses while answers are under way, before a weight is changed
        sync_weights(self.model, dict(model.named_parameters()))

    def reset_caches(self) -> None:
        """Where `model` itself was trained on: forgets the beginnings of prompts and the images that the old weights read."""
        self.engine.reset_caches()

    # ---- samples

    @cached_property
    def engine(self) -> OfflineEngine:
        """Made by the first call; it lives as long as the session."""
        return OfflineEngine(
            self.model,
            end_tokens=self.end_tokens,
            text_stream=lambda: self.processor.tokenizer.stream(skip_special=self.skips_special),
            memory_gib=self.memory,
            reuse=self.reuse,
        )

    def generate(
        self,
        samples: Sequence[Sample],
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        n: int = 1,
        thinking_budget: int | None = None,
    ) -> list[Generation]:
        """All answers to prompts that are ids and patches already; the n of a prompt stand together."""
        thinking = None
        if thinking_budget is not None:
            if self.thinking is None:
                raise ValueError("this model has no thoughts; leave out thinking_budget.")
            thinking = replace(self.thinking, max_tokens=thinking_budget)
        return self.engine.generate(samples, sampling or self.sampling, n=n, thinking=thinking)

    def events(
        self, samples: Sequence[Sample], sampling: Sampling | Sequence[Sampling] | None = None, *, n: int = 1
    ) -> Generator[Event]:
        """Tokens of all answers as they come."""
        return self.engine.stream(samples, sampling or self.sampling, n=n)

    def answer(self, sample: Sample, say: Say) -> Generator[Event]:
        """Tokens as they come. `say` is told what happens until the first."""
        events = self.events([sample])
        with reading(self.model, sample.num_tokens, say):
            first = next(events)
        yield first
        yield from events

    def parse(self, events: Sequence[Event]) -> Answer:
        """The answer as a message."""
        tokens, text = [event.draw.token for event in events], "".join(event.text for event in events)
        return self._parsed(tokens, text, self.sampling)

    def _parsed(self, tokens: Sequence[int], text: str, sampling: Sampling) -> Answer:
        """A stop text can only be cut off the text; without one the ids are read, which are surer."""
        if sampling.stop:
            return parse_answer(text, starts_in_thought=self.processor.starts_in_thought)
        return self.processor.parse_answer(tokens)


def preset_sampling(preset: Preset, folder: Path, model: Qwen3VL, processor: Processor) -> Sampling:
    """The preset's values for a model of this size, make and template."""
    return defaults(
        folder,
        preset,
        is_thinking=processor.starts_in_thought,
        is_large=sum(p.numel() for p in model.language_model.parameters()) >= 25e9,  # between 8B and 30B-A3B
        is_moe=model.config.text.moe is not None,
    )


@contextmanager
def reading(model: Qwen3VL, num_tokens: int, say: Say) -> Iterator[None]:
    """Says how far the prompt has been read."""
    done = 0

    def on_vision(_: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        say(f"looking at {int(inputs[1].prod(dim=1).sum()) // 4:,} visual tokens")

    def on_text(_: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal done
        say(f"reading token {done:,} of {num_tokens:,}")
        done += inputs[0].shape[0]

    hooks = [model.language_model.register_forward_pre_hook(on_text)]
    if model.config.vision is not None:
        hooks.append(model.visual.register_forward_pre_hook(on_vision))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
