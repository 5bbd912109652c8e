"""Prompts in, answers out, in one call: an engine that grows with what is asked of it and may live on between the calls."""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qvl.core.batch import Sample
from qvl.engine.engine import GIB, Engine, EngineSettings
from qvl.engine.kv_cache import bytes_per_block, new_cache
from qvl.engine.request import Event as EngineEvent
from qvl.engine.request import Request, ThinkingBudget, check, visual_keys
from qvl.engine.runner import Mode
from qvl.engine.sampling import Draw, Sampling
from qvl.engine.text import TextOutput, TextStream
from qvl.model.qwen3vl import Qwen3VL

__all__ = ["Event", "FinishReason", "Generation", "OfflineEngine", "TextOutput", "TextStream", "generate", "stream"]

MANY = 2**30
"""Requests that wait or run: as many as are asked."""

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Event:
    """One new token of one answer."""

    request: int
    """Which of the prompts."""
    draw: Draw
    text: str
    """What became safe to show: whole characters, no possible beginning of a stop string."""
    finish: FinishReason | None
    index: int = 0
    """Which of the prompt's n answers."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    tokens: tuple[int, ...]
    """With the end token where the model gave one."""
    logprobs: tuple[float, ...]
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...]
    is_forced: tuple[bool, ...]
    """Tokens that a rule put there, not the model."""
    text: str
    """Without end token and stop string; empty when no TextStream was given."""
    finish: FinishReason


class OfflineEngine:
    """An engine for a program that asks and waits, from one thread. Streams may be read in turns and left unread.

    `memory_gib` is for keys and values; None takes what the largest call so far needed. With `reuse`, beginnings of prompts and images
    that were seen before are not computed again, which changes the last digits of answers in fast mode.
    """

    def __init__(
        self,
        model: Qwen3VL,
        *,
        end_tokens: frozenset[int] = frozenset(),
        text_stream: Callable[[], TextStream] | None = None,
        memory_gib: float | None = None,
        reuse: bool = False,
        max_prefill_tokens: int = 2048,
        block_size: int = 64,
        mode: Mode = "fast",
    ) -> None:
        if max_prefill_tokens < 1:
            raise ValueError(
                f"max_prefill_tokens is {max_prefill_tokens}; at least 1 token of a prompt must go through at once."
            )
        self.model, self.end_tokens, self.text_stream = model, end_tokens, text_stream
        self.memory_gib, self.block_size = memory_gib, block_size
        self.settings = EngineSettings(
            max_running=MANY,
            max_queue=MANY,
            max_step_tokens=max_prefill_tokens,
            mode=mode,
            prefix_cache=reuse,
            encoder_cache_gib=EngineSettings().encoder_cache_gib if reuse else 0.0,
            isolate_faults=False,
        )
        self.engine: Engine | None = None
        self._asked = 0
        self._unread: dict[str, deque[EngineEvent]] = {}
        """Of requests whose stream is open."""

    def generate(
        self,
        samples: Sequence[Sample],
        sampling: Sampling | Sequence[Sampling],
        *,
        n: int = 1,
        thinking: ThinkingBudget | None = None,
    ) -> list[Generation]:
        """All answers; the n of a prompt stand together. See `stream`."""
        events: list[list[Event]] = [[] for _ in range(len(samples) * n)]
        for event in self.stream(samples, sampling, n=n, thinking=thinking):
            events[event.request * n + event.index].append(event)
        return [_whole(answer) for answer in events]

    def stream(
        self,
        samples: Sequence[Sample],
        sampling: Sampling | Sequence[Sampling],
        *,
        n: int = 1,
        thinking: ThinkingBudget | None = None,
    ) -> Generator[Event]:
        """Tokens of all answers as they come. The n answers of a prompt share its reading: its images are encoded once; with a seed,
        answer i draws with seed + i. What is still running when the iterator is closed is cancelled."""
        requests = self._requests(samples, sampling, n, thinking)
        if not requests:
            return
        engine = self._engine_for(requests)
        left = {request.id: n for request in requests}
        place = {request.id: number for number, request in enumerate(requests)}
        for request in requests:
            self._unread[request.id] = deque()
        try:
            for request in requests:
                engine.submit(request)
            while left:
                for id in list(left):
                    while self._unread[id]:
                        event = self._unread[id].popleft()
                        if event.finish is not None:
                            left[id] -= 1
                        assert event.draw is not None and event.finish not in ("cancelled", "error")
                        yield Event(
                            request=place[id],
                            index=event.index,
                            draw=event.draw,
                            text=event.text,
                            finish=event.finish,
                        )
                    if not left[id]:
                        del left[id]
                if left and not any(self._unread[id] for id in left):
                    self._step(engine)
        finally:
            for id in place:
                engine.cancel(id)
                self._unread.pop(id, None)

    def _step(self, engine: Engine) -> None:
        try:
            events = engine.step()
        except BaseException:  # Ctrl-C too: its state is not known any more, and the next call gets a new one
            self.engine = None
            raise
        for event in events:
            if event.request in self._unread:
                self._unread[event.request].append(event)

    def reset_caches(self) -> None:
        """After a change of the weights: nothing that the old ones computed is used again."""
        if self.engine is not None:
            self.engine.reset_caches()

    def _requests(
        self,
        samples: Sequence[Sample],
        sampling: Sampling | Sequence[Sampling],
        n: int,
        thinking: ThinkingBudget | None,
    ) -> list[Request]:
        each = [sampling] * len(samples) if isinstance(sampling, Sampling) else list(sampling)
        if len(each) != len(samples):
            raise ValueError(
                f"{len(each)} sampling settings came for {len(samples)} prompts; give one, or one for each."
            )
        requests = []
        for number, (sample, own) in enumerate(zip(samples, each, strict=True)):
            keys, rows = visual_keys(sample, self.model.config) if self.settings.prefix_cache else ((), ())
            request = Request(
                id=str(self._asked + number),
                sample=sample,
                sampling=own,
                end_tokens=self.end_tokens,
                text_stream=self.text_stream,
                n=n,
                media_keys=keys,
                media_rows=rows,
                thinking=thinking,
            )
            check(request, self.model.config, f"prompt {number}")
            requests.append(request)
        self._asked += len(requests)
        return requests

    def _engine_for(self, requests: Sequence[Request]) -> Engine:
        """The engine there is, or a larger one where nobody reads from it and it is too small for all at once."""
        longest = self.model.config.text.max_position_embeddings
        needed = 0
        for request in requests:
            length = min(request.sample.num_tokens + request.sampling.max_tokens, longest)
            needed += request.n * -(-length // self.block_size)
        if self.engine is not None and (
            self.memory_gib is not None or self._unread or self.engine.num_blocks >= needed
        ):
            return self.engine
        text, size = self.model.config.text, self.block_size
        if self.memory_gib is not None:
            needed = int(self.memory_gib * GIB) // bytes_per_block(text, size, self.model.dtype)
            if needed < 1:
                raise ValueError(f"memory is {self.memory_gib} GiB, less than one block of {size} tokens; give more.")
        self.engine = None  # its cache goes before the next one comes
        cache = new_cache(
            text, num_blocks=max(1, needed), block_size=size, dtype=self.model.dtype, device=self.model.device
        )
        self.engine = Engine(self.model, self.settings, cache=cache)
        return self.engine


def generate(
    model: Qwen3VL,
    samples: Sequence[Sample],
    sampling: Sampling | Sequence[Sampling],
    **settings: Any,
) -> list[Generation]:
    """All answers from an engine that lives as long as they take; the settings are OfflineEngine's."""
    return OfflineEngine(model, **settings).generate(samples, sampling)


def stream(
    model: Qwen3VL,
    samples: Sequence[Sample],
    sampling: Sampling | Sequence[Sampling],
    **settings: Any,
) -> Generator[Event]:
    """Tokens of all requests as they come. Prompts go through the model in chunks of about `max_prefill_tokens`.

    Each answer is the one the request would get alone: up to fp32 rounding of matmuls of another size, or to the bit in mode "exact".
    """
    return OfflineEngine(model, **settings).stream(samples, sampling)


def _whole(answer: Sequence[Event]) -> Generation:
    return Generation(
        tokens=tuple(e.draw.token for e in answer),
        logprobs=tuple(e.draw.logprob for e in answer),
        top_logprobs=tuple(e.draw.top for e in answer),
        is_forced=tuple(e.draw.is_forced for e in answer),
        text="".join(e.text for e in answer),
        finish=answer[-1].finish or "length",
    )
