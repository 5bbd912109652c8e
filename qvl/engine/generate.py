"""Prompts in, answers out, in one call: an engine of the right size that lives as long as the answers take."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from qvl.core.batch import Sample
from qvl.engine.engine import Engine, EngineSettings
from qvl.engine.kv_cache import new_cache
from qvl.engine.request import Request, check
from qvl.engine.runner import Mode
from qvl.engine.sampling import Draw, Sampling
from qvl.engine.text import TextOutput, TextStream
from qvl.model.qwen3vl import Qwen3VL

__all__ = ["Event", "FinishReason", "Generation", "TextOutput", "TextStream", "generate", "stream"]

FinishReason = Literal["stop", "length"]


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
    mode: Mode = "fast",
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
        mode=mode,
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


def stream(
    model: Qwen3VL,
    samples: Sequence[Sample],
    sampling: Sampling | Sequence[Sampling],
    *,
    end_tokens: frozenset[int] = frozenset(),
    text_stream: Callable[[], TextStream] | None = None,
    max_prefill_tokens: int = 2048,
    block_size: int = 64,
    mode: Mode = "fast",
) -> Iterator[Event]:
    """Tokens of all requests as they come. Prompts go through the model in chunks of about `max_prefill_tokens`.

    Each answer is the one the request would get alone: up to fp32 rounding of matmuls of another size, or to the bit in mode "exact".
    """
    each = [sampling] * len(samples) if isinstance(sampling, Sampling) else list(sampling)
    if len(each) != len(samples):
        raise ValueError(f"{len(each)} sampling settings came for {len(samples)} prompts; give one, or one for each.")
    if max_prefill_tokens < 1:
        raise ValueError(
            f"max_prefill_tokens is {max_prefill_tokens}; at least 1 token of a prompt must go through at once."
        )
    requests = [
        Request(id=str(number), sample=sample, sampling=own, end_tokens=end_tokens, text_stream=text_stream)
        for number, (sample, own) in enumerate(zip(samples, each, strict=True))
    ]
    for number, request in enumerate(requests):
        check(request, model.config, f"prompt {number}")
    if not requests:
        return
    longest = model.config.text.max_position_embeddings
    lengths = [min(r.sample.num_tokens + r.sampling.max_tokens, longest) for r in requests]
    settings = EngineSettings(
        max_running=len(requests),
        max_queue=len(requests),
        max_step_tokens=max_prefill_tokens,
        mode=mode,
        prefix_cache=False,
        encoder_cache_gib=0.0,
        isolate_faults=False,
    )
    cache = new_cache(
        model.config.text,
        num_blocks=sum(-(-length // block_size) for length in lengths),
        block_size=block_size,
        dtype=model.dtype,
        device=model.device,
    )
    engine = Engine(model, settings, cache=cache)
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        for event in engine.step():
            assert event.draw is not None and event.finish not in ("cancelled", "error")
            yield Event(request=int(event.request), draw=event.draw, text=event.text, finish=event.finish)
