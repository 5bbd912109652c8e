"""Prompts in, answers out: prefill in chunks, then one token a step for every sequence still running."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from qvl.core.batch import Batch, Sample
from qvl.engine.kv_cache import KVCache, NewTokens, new_cache
from qvl.engine.sampling import Draw, Sampler, Sampling
from qvl.model.pack import pack
from qvl.model.qwen3vl import Qwen3VL
from qvl.model.vision import VisualFeatures

FinishReason = Literal["stop", "length"]
ENCODE_PATCHES = 16384
"""Patches that go through the vision tower at once, in whole frames: bounds its memory on a long video and changes nothing else."""


class TextStream(Protocol):
    """Turns ids into text as they come (qvl.prompt.tokenizer.TextStream)."""

    def push(self, id: int) -> str: ...
    def end(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Event:
    """One new token of one request."""

    request: int
    draw: Draw
    text: str
    """What became safe to show: whole characters, no possible beginning of a stop string."""
    finish: FinishReason | None


@dataclass(frozen=True, kw_only=True)
class Generation:
    tokens: tuple[int, ...]
    """With the end token where the model gave one."""
    logprobs: tuple[float, ...]
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...]
    text: str
    """Without end token and stop string; empty when no TextStream was given."""
    finish: FinishReason


def generate(
    model: Qwen3VL,
    samples: Sequence[Sample],
    sampling: Sampling | Sequence[Sampling],
    *,
    end_tokens: frozenset[int] = frozenset(),
    text_stream: Callable[[], TextStream] | None = None,
    max_prefill_tokens: int = 2048,
) -> list[Generation]:
    """All answers; see `stream`."""
    events: list[list[Event]] = [[] for _ in samples]
    for event in stream(
        model,
        samples,
        sampling,
        end_tokens=end_tokens,
        text_stream=text_stream,
        max_prefill_tokens=max_prefill_tokens,
    ):
        events[event.request].append(event)
    return [
        Generation(
            tokens=tuple(e.draw.token for e in answer),
            logprobs=tuple(e.draw.logprob for e in answer),
            top_logprobs=tuple(e.draw.top for e in answer),
            text="".join(e.text for e in answer),
            finish=answer[-1].finish or "length",
        )
        for answer in events
    ]


@torch.inference_mode()
def stream(
    model: Qwen3VL,
    samples: Sequence[Sample],
    sampling: Sampling | Sequence[Sampling],
    *,
    end_tokens: frozenset[int] = frozenset(),
    text_stream: Callable[[], TextStream] | None = None,
    max_prefill_tokens: int = 2048,
    block_size: int = 64,
) -> Iterator[Event]:
    """Tokens of all requests as they come. Prompts go through the model in chunks of at most `max_prefill_tokens`.

    Each answer is the one the request would get alone, up to fp32 rounding of matmuls of another size.
    """
    each = [sampling] * len(samples) if isinstance(sampling, Sampling) else list(sampling)
    if len(each) != len(samples):
        raise ValueError(f"{len(each)} sampling settings came for {len(samples)} prompts; give one, or one for each.")
    if max_prefill_tokens < 1:
        raise ValueError(
            f"max_prefill_tokens is {max_prefill_tokens}; at least 1 token of a prompt must go through at once."
        )
    if any(s.stop for s in each) and text_stream is None:
        raise ValueError("stop strings need a text_stream to look for them in.")
    requests = [
        _Request.new(number, sample, settings, model, end_tokens, text_stream)
        for number, (sample, settings) in enumerate(zip(samples, each, strict=True))
    ]
    cache = new_cache(
        model.config.text,
        num_blocks=sum(-(-r.max_length // block_size) for r in requests),
        block_size=block_size,
        dtype=model.dtype,
        device=model.device,
    )
    for request in requests:
        request.blocks = cache.take(cache.num_blocks_for(request.max_length))
    running = list(requests)
    while running:
        chosen = _next_chunk(running, max_prefill_tokens)
        logits = _forward(model, cache, chosen)
        for request, row in zip((r for r, count in chosen if r.past + count >= r.prompt_length), logits, strict=True):
            request.is_answering = True
            yield request.take(request.sampler(row))
        for request, count in chosen:
            request.past += count
            if request.past >= request.prompt_length:
                request.features = None
        for request in [r for r in running if r.finish is not None]:
            cache.give_back(request.blocks)
            running.remove(request)


@dataclass
class _Request:
    number: int
    sampling: Sampling
    sampler: Sampler
    batch: Batch
    """The prompt alone, packed."""
    prompt_length: int
    max_length: int
    next_position: int
    """Rotary id of the first answer token: one more than the prompt's largest (not its length, pictures save ids)."""
    end_tokens: frozenset[int]
    output: "TextOutput"
    blocks: tuple[int, ...] = ()
    features: VisualFeatures | None = None
    past: int = 0
    """Tokens whose keys and values are cached."""
    answer: list[int] = field(default_factory=list)
    is_answering: bool = False
    finish: FinishReason | None = None

    @classmethod
    def new(
        cls,
        number: int,
        sample: Sample,
        sampling: Sampling,
        model: Qwen3VL,
        end_tokens: frozenset[int],
        text_stream: Callable[[], TextStream] | None,
    ) -> "_Request":
        text = model.config.text
        batch = pack([sample], model.config)
        length = sample.num_tokens
        if length == 0:
            raise ValueError(f"prompt {number} is empty; give at least one token.")
        low, high = int(sample.token_T.min()), int(sample.token_T.max())
        if low < 0 or high >= text.vocab_size:
            raise ValueError(
                f"prompt {number} has token ids from {low} to {high}, the model knows 0 to {text.vocab_size - 1}; use its own tokenizer."
            )
        if length >= text.max_position_embeddings:
            raise ValueError(
                f"prompt {number} has {length} tokens, the model reads {text.max_position_embeddings} with its answer; shorten it, or "
                "lower the budget of its pictures or video."
            )
        return cls(
            number=number,
            sampling=sampling,
            sampler=Sampler(sampling, sample.token_T, text.vocab_size),
            batch=batch,
            prompt_length=length,
            max_length=min(length + sampling.max_tokens, text.max_position_embeddings),
            next_position=int(batch.position_3T.max()) + 1,
            end_tokens=frozenset() if sampling.ignore_eos else end_tokens,
            output=TextOutput(sampling.stop, text_stream() if text_stream else None),
        )

    def take(self, draw: Draw) -> Event:
        """Note a drawn token and say what came of it."""
        self.answer.append(draw.token)
        is_end = draw.token in self.end_tokens
        text = "" if is_end else self.output.push(draw.token)
        if is_end or self.output.is_stopped:
            self.finish = "stop"
        elif self.prompt_length + len(self.answer) >= self.max_length:
            self.finish = "length"
        if self.finish is not None:
            text += self.output.end()
        return Event(request=self.number, draw=draw, text=text, finish=self.finish)


def _next_chunk(running: list[_Request], max_tokens: int) -> list[tuple[_Request, int]]:
    """Whose tokens go through the model next, and how many: prompts first, up to `max_tokens`, then one for each answer."""
    chosen, left = [], max_tokens
    for request in running:
        count = min(request.prompt_length - request.past, left)
        if not request.is_answering and count > 0:
            chosen.append((request, count))
            left -= count
    return chosen or [(request, 1) for request in running]


def _forward(model: Qwen3VL, cache: KVCache, chosen: list[tuple[_Request, int]]) -> list[Tensor]:
    """Logits (on the CPU) of each request whose next token can now be drawn."""
    device = cache.key_LBZKH.device
    pieces = [_piece(model, request, count, device) for request, count in chosen]
    ends, visual, start = [], [], 0
    for (request, count), piece in zip(chosen, pieces, strict=True):
        if piece.visual_M is not None:
            visual.append(piece.visual_M + start)
        start += count
        if request.past + count >= request.prompt_length:
            ends.append(start - 1)
    features = [p.features for p in pieces if p.features is not None]
    batch = Batch(
        token_T=torch.cat([p.token_T for p in pieces]),
        position_3T=torch.cat([p.position_3T for p in pieces], dim=1),
        lengths=tuple(count for _, count in chosen),
        visual_M=torch.cat(visual) if visual else None,
    ).to(device)
    layout = cache.layout([NewTokens(r.blocks, r.past, count) for r, count in chosen])
    hidden_TD = model(batch, layout=layout, features=_joined(features))
    if not ends:
        return []
    return list(model.logits(hidden_TD[torch.tensor(ends, device=device)]).cpu().unbind(0))


@dataclass(frozen=True)
class _Piece:
    """The part of one request that takes part in one forward."""

    token_T: Tensor
    position_3T: Tensor
    visual_M: Tensor | None = None
    features: VisualFeatures | None = None


def _piece(model: Qwen3VL, request: _Request, count: int, device: torch.device) -> _Piece:
    if request.is_answering:
        place = request.next_position + request.past - request.prompt_length
        return _Piece(torch.tensor(request.answer[-1:]), torch.full((3, 1), place))
    rows = slice(request.past, request.past + count)
    batch = request.batch
    if batch.visual_M is None:
        return _Piece(batch.token_T[rows], batch.position_3T[:, rows])
    if request.features is None:
        request.features = model.encode(batch.to(device), max_patches=ENCODE_PATCHES)
    low, high = torch.searchsorted(batch.visual_M, torch.tensor([rows.start, rows.stop])).tolist()
    features = None
    if high > low:
        whole = request.features
        features = VisualFeatures(whole.merged_MD[low:high], tuple(level[low:high] for level in whole.deepstack))
    visual_M = batch.visual_M[low:high] - rows.start if high > low else None
    return _Piece(batch.token_T[rows], batch.position_3T[:, rows], visual_M, features)


def _joined(features: list[VisualFeatures]) -> VisualFeatures | None:
    if not features:
        return None
    levels = zip(*(f.deepstack for f in features), strict=True)
    return VisualFeatures(torch.cat([f.merged_MD for f in features]), tuple(torch.cat(level) for level in levels))


class TextOutput:
    """Text that may be shown: holds back what could still become a stop string, and ends before one."""

    def __init__(self, stop: tuple[str, ...], text_stream: TextStream | None) -> None:
        self.stop, self.text_stream = stop, text_stream
        self.held = ""
        self.is_stopped = False

    def push(self, token: int) -> str:
        return self._release(self.text_stream.push(token)) if self.text_stream else ""

    def end(self) -> str:
        """What was held back; nothing after a stop string."""
        if self.is_stopped or self.text_stream is None:
            return ""
        text = self._release(self.text_stream.end())
        held, self.held = self.held, ""
        return text if self.is_stopped else text + held

    def _release(self, text: str) -> str:
        self.held += text
        # The one complete first, and of those the longest: what a letter-by-letter search finds, however the text is cut into tokens.
        found = [(at + len(stop), at) for stop in self.stop if (at := self.held.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            text, self.held = self.held[: min(found)[1]], ""
            return text
        keep = max((_overlap(self.held, stop) for stop in self.stop), default=0)
        cut = len(self.held) - keep
        text, self.held = self.held[:cut], self.held[cut:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
