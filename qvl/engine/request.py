"""What is asked of the engine and what comes back: requests, thoughts with a budget, grammars, events."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, Protocol

from torch import Tensor

from qvl.core.batch import Sample
from qvl.engine.sampling import Draw, Sampling
from qvl.engine.text import TextStream
from qvl.model.config import ModelConfig

Finish = Literal["stop", "length", "cancelled", "error"]
MAX_ANSWERS = 16


class Grammar(Protocol):
    """What an answer may look like (the server makes one from a JSON schema)."""

    def allowed(self, tokens: Sequence[int]) -> Tensor:
        """bool, one a token of the vocabulary (a shorter mask forbids the rest): what may follow `tokens`, the answer so far without its
        thought. A function of `tokens` alone: the answers of one request ask the same object in turn."""
        ...


@dataclass(frozen=True, kw_only=True)
class ThinkingBudget:
    """What a thought is, and how long it may be. A prompt whose last mark is `open` starts inside one."""

    open: int
    """Id of <think>."""
    close: int
    """Id of </think>."""
    max_tokens: int | None = None
    """Tokens of thought until it is closed by force; None lets it end by itself (a grammar still starts only after it)."""
    last_words: tuple[int, ...] = ()
    """What is said before a close by force."""

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 0:
            raise ValueError(f"a thinking budget of {self.max_tokens} tokens came; it must be 0 or above.")


@dataclass(frozen=True, kw_only=True)
class Request:
    id: str
    sample: Sample
    sampling: Sampling
    end_tokens: frozenset[int] = frozenset()
    text_stream: Callable[[], TextStream] | None = None
    """Makes a fresh one for each answer."""
    n: int = 1
    """Answers. They share the prompt's cache blocks; with a seed, answer i draws with seed + i."""
    salt: str = ""
    """Prompts with different salts never share cached blocks or encoded pictures (one for each tenant)."""
    media_keys: tuple[bytes, ...] = ()
    """A digest of each visual: pixels, size, mode, processor arguments. Without them nothing visual is reused from another request."""
    media_rows: tuple[int, ...] = ()
    """Rows of grid_I3 that each visual has (an image 1, a video its slices). Needed only where two videos of one size touch."""
    thinking: ThinkingBudget | None = None
    grammar: Grammar | None = None


@dataclass(frozen=True, kw_only=True)
class Event:
    """One new token of one answer, or its end."""

    request: str
    index: int
    """Which of the request's n answers."""
    draw: Draw | None
    """None only where the answer was cancelled or failed."""
    text: str
    """What became safe to show: whole characters, no possible beginning of a stop string."""
    finish: Finish | None
    error: str | None = None
    """One sentence, safe to show."""
    num_cached_tokens: int = 0
    """Prompt tokens whose keys and values came from the prefix cache."""


def ended(request: str, index: int, finish: Finish, error: str | None = None) -> Event:
    """The end of an answer that gets no further token."""
    return Event(request=request, index=index, draw=None, text="", finish=finish, error=error)


def check(request: Request, config: ModelConfig, name: str = "the prompt") -> None:
    """Raises ValueError in one sentence where a request can never be answered, whatever the cache's size."""
    sample, text = request.sample, config.text
    length = sample.num_tokens
    if length == 0:
        raise ValueError(f"{name} is empty; give at least one token.")
    low, high = int(sample.token_T.min()), int(sample.token_T.max())
    if low < 0 or high >= text.vocab_size:
        raise ValueError(
            f"{name} has token ids from {low} to {high}, the model knows 0 to {text.vocab_size - 1}; use its own tokenizer."
        )
    if length >= text.max_position_embeddings:
        raise ValueError(
            f"{name} has {length} tokens, the model reads {text.max_position_embeddings} with its answer; shorten it, or "
            "lower the budget of its pictures or video."
        )
    if not 1 <= request.n <= MAX_ANSWERS:
        raise ValueError(f"n is {request.n}; a request may ask for 1 to {MAX_ANSWERS} answers.")
    if request.sampling.stop and request.text_stream is None:
        raise ValueError("stop strings need a text_stream to look for them in.")
    _check_patches(sample, config, name)


def _check_patches(sample: Sample, config: ModelConfig, name: str) -> None:
    found = 0 if sample.patch_PX is None else sample.patch_PX.shape[0]
    expected = 0 if sample.grid_I3 is None else int(sample.grid_I3.prod(1).sum())
    if found != expected:
        raise ValueError(f"{name} brings {found} patches, but its grids say {expected}.")
    if found and config.vision is None:
        raise ValueError(
            "this checkpoint is text-only, but the prompt holds images or video. Load a Qwen3-VL checkpoint."
        )


def rows_of_visuals(request: Request, config: ModelConfig) -> tuple[int, ...]:
    """Rows of grid_I3 that each media key speaks of. Raises ValueError where keys and rows do not fit together."""
    sample, keys = request.sample, request.media_keys
    if not keys or sample.grid_I3 is None:
        return ()
    num_rows = len(sample.grid_I3)
    rows = request.media_rows
    if not rows and len(keys) == num_rows:
        rows = (1,) * num_rows
    if not rows:
        # Where that gives as many visuals as keys, no two of them were one.
        rows = _rows_by_size(sample, config)
    if len(rows) != len(keys) or sum(rows) != num_rows:
        raise ValueError(
            f"{len(keys)} media keys came for {num_rows} grids; give media_rows, the number of grids of each visual."
        )
    return rows


def visual_keys(sample: Sample, config: ModelConfig) -> tuple[tuple[bytes, ...], tuple[int, ...]]:
    """(media_keys, media_rows) of a prompt by what its patches say."""
    if sample.grid_I3 is None or sample.patch_PX is None:
        return (), ()
    rows = _rows_by_size(sample, config)
    counts, keys, row, patch = sample.grid_I3.prod(1).tolist(), [], 0, 0
    for number in rows:
        end = patch + sum(counts[row : row + number])
        keys.append(media_key(sample.grid_I3[row : row + number], sample.patch_PX[patch:end]))
        row, patch = row + number, end
    return tuple(keys), rows


def media_key(grid_I3: Tensor, patch_PX: Tensor, kind: str = "") -> bytes:
    """A digest of what the network sees of a visual, so that one size, mode or rate is never taken for another (CVE-2025-46722: a picture
    of 30x100 was one of 100x30)."""
    shapes = (kind, grid_I3.tolist(), tuple(patch_PX.shape), str(patch_PX.dtype))
    digest = hashlib.blake2b(repr(shapes).encode(), digest_size=32)
    digest.update(patch_PX.contiguous().numpy().data)
    return digest.digest()


def _rows_by_size(sample: Sample, config: ModelConfig) -> tuple[int, ...]:
    """Neighbouring slices of one size are one video."""
    assert sample.grid_I3 is not None
    is_video = [id == config.video_token_id for id in sample.token_T.tolist() if id in _placeholders(config)]
    grids, first = sample.grid_I3.tolist(), 0
    kinds = []
    for number, (frames, height, width) in enumerate(grids):
        video = is_video[first]
        kinds.append(("video", height, width) if video else ("image", number, 0))
        first += frames * height * width // (config.vision.merge_area if config.vision else 4)
    return tuple(len(list(group)) for _, group in groupby(kinds))


def _placeholders(config: ModelConfig) -> set[int | None]:
    return {config.image_token_id, config.video_token_id}
