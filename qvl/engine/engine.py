"""Requests in, events out: each step takes the running answers one token further and reads a little more of the prompts that wait."""

from dataclasses import dataclass

import torch

from qvl.core.log import log
from qvl.engine.answer import Answer
from qvl.engine.blocks import BlockManager
from qvl.engine.encoder import Encoder, visuals_of
from qvl.engine.kv_cache import KVCache, bytes_per_block, new_cache
from qvl.engine.request import Event, Request, check, ended, rows_of_visuals
from qvl.engine.runner import Failure, Mode, Prompt, Runner, prompt_of
from qvl.engine.sampling import Best
from qvl.engine.scheduler import QueueFull, Scheduler
from qvl.engine.sequence import Sequence, Span
from qvl.engine.tower import vision_block
from qvl.model.config import ModelConfig
from qvl.model.layers import run_plainly
from qvl.model.positions import placeholder_runs
from qvl.model.qwen3vl import Qwen3VL

__all__ = ["Capacity", "Engine", "EngineSettings", "EngineStats", "QueueFull"]

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    memory_gib: float = 1.0
    """For keys and values."""
    num_blocks: int | None = None
    """Cache blocks, in place of what memory_gib makes."""
    block_size: int = 64
    """Tokens in a cache block."""
    max_running: int = 64
    """Answers that run at once."""
    max_queue: int = 256
    """Requests that may wait; one more is refused with QueueFull."""
    max_step_tokens: int = 2048
    """Tokens that go through the model in a step: every running answer's next one, and prompts in chunks of what is left."""
    mode: Mode = "fast"
    """exact: a request's numbers are the same to the bit alone or in any company, at the cost of speed."""
    kernels: bool = True
    """In fast mode on a CPU that multiplies bf16 itself: the engine's own kernels (kernels.cpp) where they fit the model."""
    prefix_cache: bool = True
    """Beginnings of prompts that were seen before are not computed again."""
    encoder_cache_gib: float = 0.25
    """For visual tokens of pictures and films that were seen before."""
    isolate_faults: bool = True
    """A fault in one request ends that request with an event; False raises it (a program that wants to see its mistakes)."""

    def __post_init__(self) -> None:
        for name in ("block_size", "max_running", "max_queue", "max_step_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.encoder_cache_gib < 0:
            raise ValueError(f"encoder_cache_gib is {self.encoder_cache_gib}; it must be 0 or above.")
        if self.mode not in ("exact", "fast"):
            raise ValueError(f"mode is {self.mode!r}; expected exact or fast.")


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What fits."""

    num_blocks: int
    block_size: int
    gib: float
    """Of keys and values."""
    longest_context: int
    """Tokens of prompt and answer that one request may have."""
    max_running: int
    """Answers at once, whatever fits."""

    def requests(self, tokens: int) -> int:
        """How many requests of so many tokens (prompt and answer) fit at once, when they share nothing."""
        # The last token is drawn and never read.
        return self.num_blocks // max(1, -(-(tokens - 1) // self.block_size))

    @property
    def sentence(self) -> str:
        short = min(4096, self.longest_context)
        return (
            f"the cache takes {self.gib:.2f} GiB: one request of up to {self.longest_context:,} tokens, "
            f"or {min(self.requests(short), self.max_running):,} of {short:,} at once."
        )


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    running: int
    """Answers."""
    waiting: int
    """Answers and requests: those in the queue and those pushed out for a while."""
    blocks_free: int
    """Free, or idle with content that nobody holds."""
    blocks_total: int
    prefix_tokens_asked: int
    prefix_tokens_found: int
    encoder_asked: int
    """Groups of frames."""
    encoder_found: int
    encoder_bytes: int
    tokens_prefilled: int
    """Computed again after a preemption included."""
    tokens_decoded: int
    preemptions: int


@dataclass
class _Task:
    """A request and its answers that are not over."""

    request: Request
    prompt: Prompt
    answers: dict[int, Answer]
    is_forked: bool = False

    def unfinished(self) -> list[int]:
        return list(self.answers) if self.is_forked else list(range(self.request.n))


class Engine:
    """All methods from one thread. `submit` and `cancel` between steps; `step` while `has_work`."""

    def __init__(self, model: Qwen3VL, settings: EngineSettings | None = None, *, cache: KVCache | None = None) -> None:
        self.model, self.settings = model, settings or EngineSettings()
        self.cache = cache or _cache_for(model, self.settings)
        self.num_blocks = len(self.cache.free)
        self.blocks = BlockManager(self.cache, block_size=self.cache.block_size, reuse=self.settings.prefix_cache)
        self.scheduler = Scheduler(
            self.blocks,
            max_running=self.settings.max_running,
            max_queue=self.settings.max_queue,
            max_step_tokens=self.settings.max_step_tokens,
            # In exact mode an answer's tokens go through tiles of another shape than a prompt's, so they are not each other's equal.
            prompt_names_only=self.settings.mode == "exact",
        )
        own = self.settings.kernels and self.settings.mode == "fast"
        run_block = vision_block(model) if own else run_plainly
        self.encoder = Encoder(model, int(self.settings.encoder_cache_gib * GIB), run_block)
        self.runner = Runner(model, self.cache, mode=self.settings.mode, encoder=self.encoder, kernels=own)
        self._tasks: dict[str, _Task] = {}
        self._pending: list[Event] = []
        self._arrived = 0
        self._prefilled = self._decoded = 0

    # ---- what is asked

    def submit(self, request: Request) -> None:
        """Raises ValueError in one sentence if it can never be answered; QueueFull when the queue is at its bound."""
        if request.id in self._tasks:
            raise ValueError(f"a request with the id {request.id!r} is under way; ids must differ.")
        config = self.model.config
        check(request, config)
        rows = rows_of_visuals(request, config)
        sample = request.sample
        # Found again only under the same salt: how soon a picture is answered would tell that somebody has shown it.
        keys = tuple(repr((request.salt, key)).encode() for key in request.media_keys)
        prompt = prompt_of(sample, config, visuals_of(sample, config, keys, rows))
        sequence = Sequence(
            request=request.id,
            number=self._arrived,
            tokens=sample.token_T.tolist(),
            num_prompt=sample.num_tokens,
            max_length=min(sample.num_tokens + request.sampling.max_tokens, config.text.max_position_embeddings),
            spans=_spans(request, rows, config),
            salt=request.salt,
        )
        answer = Answer(request, sequence, config.text.vocab_size)
        self.scheduler.add(sequence)
        self._arrived += 1
        self._tasks[request.id] = _Task(request, prompt, {0: answer})

    def cancel(self, id: str) -> None:
        """Its blocks are free at once; the next step reports its answers as cancelled. Unknown and finished ids are passed over."""
        task = self._tasks.pop(id, None)
        if task is None:
            return
        for answer in task.answers.values():
            self.scheduler.remove(answer.sequence)
        self._pending += [ended(id, index, "cancelled") for index in task.unfinished()]

    def reset_caches(self) -> None:
        """Forgets the beginnings of prompts and the encoded images: after a change of the weights they are the old ones'. Raises
        ValueError while requests are under way."""
        if self._tasks:
            raise ValueError(
                f"{len(self._tasks)} requests are under way and read the caches; let them end or cancel them before a reset."
            )
        self.blocks.forget_all()
        self.encoder.forget_all()

    # ---- what comes back

    @property
    def has_work(self) -> bool:
        return bool(self._pending or self._tasks)

    def step(self) -> list[Event]:
        """One forward: a token for each running answer, a chunk of the prompts behind them. [] when there is nothing to do."""
        events, self._pending = self._pending, []
        chunks = self.scheduler.schedule()
        outcome = self.runner.run(chunks, lambda sequence: self._tasks[sequence.request].prompt)
        self.scheduler.computed(outcome.computed)
        for chunk in outcome.computed:
            self._decoded += chunk.is_answer
            self._prefilled += 0 if chunk.is_answer else chunk.count
        for sequence, failure in outcome.failed.items():
            events += self._fail(sequence, failure)
        for sequence, logits_V in outcome.logits.items():
            events += self._draw(sequence, logits_V, outcome.best.get(sequence))
        return events

    def _draw(self, sequence: Sequence, logits_V: torch.Tensor, best: Best | None) -> list[Event]:
        """The next token of one answer; of all a request's answers when its prompt has just been read."""
        task = self._tasks[sequence.request]
        events = [] if task.is_forked else self._fork(task, sequence, logits_V, best)
        return self._take(task, task.answers[sequence.index], logits_V, best) + events

    def _fork(self, task: _Task, parent: Sequence, logits_V: torch.Tensor, best: Best | None) -> list[Event]:
        task.is_forked = True
        events: list[Event] = []
        for index in range(1, task.request.n):
            child = parent.fork(index)
            task.answers[index] = Answer(task.request, child, self.model.config.text.vocab_size)
            copied = self.scheduler.fork(parent, child)
            if copied is not None:
                self.runner.copy(*copied)
            events += self._take(task, task.answers[index], logits_V, best)
        return events

    def _take(self, task: _Task, answer: Answer, logits_V: torch.Tensor, best: Best | None) -> list[Event]:
        try:
            event = answer.take(logits_V, best)
        except Exception as error:
            return self._fail(answer.sequence, Failure(error, "its next token could not be drawn"))
        if event.finish is not None:
            self.scheduler.remove(answer.sequence)
            self._drop(task, answer.sequence.index)
        return [event]

    def _fail(self, sequence: Sequence, failure: Failure) -> list[Event]:
        """End one answer, or the whole request when its prompt has not been read, and let nobody find what it left in the cache."""
        if not self.settings.isolate_faults:
            raise failure.error
        task = self._tasks[sequence.request]
        self.scheduler.remove(sequence, is_broken=True)
        lost = [sequence.index] if task.is_forked else task.unfinished()
        sentence = _sentence(failure)
        task.is_forked = True
        self._drop(task, sequence.index)
        return [ended(sequence.request, index, "error", sentence) for index in lost]

    def _drop(self, task: _Task, index: int) -> None:
        del task.answers[index]
        if not task.answers:
            del self._tasks[task.request.id]

    # ---- what there is

    def describe(self) -> Capacity:
        text, size = self.model.config.text, self.cache.block_size
        return Capacity(
            num_blocks=self.num_blocks,
            block_size=size,
            gib=self.num_blocks * bytes_per_block(text, size, self.model.dtype) / GIB,
            longest_context=min(text.max_position_embeddings, self.num_blocks * size + 1),
            max_running=self.settings.max_running,
        )

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            blocks_free=self.blocks.num_available,
            blocks_total=self.num_blocks,
            prefix_tokens_asked=self.scheduler.num_asked_tokens,
            prefix_tokens_found=self.scheduler.num_found_tokens,
            encoder_asked=self.encoder.num_asked,
            encoder_found=self.encoder.num_found,
            encoder_bytes=self.encoder.num_bytes,
            tokens_prefilled=self._prefilled,
            tokens_decoded=self._decoded,
            preemptions=self.scheduler.num_preemptions,
        )


def _cache_for(model: Qwen3VL, settings: EngineSettings) -> KVCache:
    text, size = model.config.text, settings.block_size
    num_blocks = settings.num_blocks
    if num_blocks is None:
        num_blocks = int(settings.memory_gib * GIB) // bytes_per_block(text, size, model.dtype)
        if num_blocks < 1:
            least = bytes_per_block(text, size, model.dtype) / GIB
            raise ValueError(
                f"memory_gib is {settings.memory_gib}; one block of {size} tokens takes {least:.4f} GiB. Give the cache more."
            )
    return new_cache(text, num_blocks=num_blocks, block_size=size, dtype=model.dtype, device=model.device)


def _spans(request: Request, rows_of_key: tuple[int, ...], config: ModelConfig) -> tuple[Span, ...]:
    """Where each row of grid_I3 stands among the tokens, and what names it."""
    sample = request.sample
    if sample.grid_I3 is None:
        return ()
    runs = placeholder_runs(sample.token_T, (sample.num_tokens,), config)
    keys: list[bytes | None] = [None] * len(sample.grid_I3)
    if rows_of_key:
        # A row's shape and seconds decide its rotary ids, whatever the digest covers.
        shapes = sample.grid_I3.tolist()
        seconds = [0.0] * len(shapes) if sample.second_I is None else sample.second_I.tolist()
        parts = [(key, part) for key, n in zip(request.media_keys, rows_of_key, strict=True) for part in range(n)]
        keys = [
            key + repr((part, shape, second)).encode()
            for (key, part), shape, second in zip(parts, shapes, seconds, strict=True)
        ]
    starts, lengths = runs.start_I.tolist(), runs.length_I.tolist()
    return tuple(Span(s, s + n, key) for s, n, key in zip(starts, lengths, keys, strict=True))


def _sentence(failure: Failure) -> str:
    """ValueErrors are our own sentences; what else an exception says may name files and shapes, so it goes to the log alone."""
    error = failure.error
    if isinstance(error, ValueError):
        return str(error)
    log.error("a request failed", exc_info=error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "the request failed: memory ran out."
    return f"the request failed: {failure.what}."
