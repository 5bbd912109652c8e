"""Chunks of sequences through the model: batches and layouts made, visual tokens fetched, logits of those who draw next returned."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from qvl.core.batch import Batch, Sample
from qvl.engine.encoder import Encoder, Visuals
from qvl.engine.exact import ANSWER_ROWS, EXACT_BLOCKS, PROMPT_QUERIES, PROMPT_ROWS, Segment, Tiled, check_rows
from qvl.engine.kernels import MOST_ROWS, KernelPaged, Kernels, Next, fits
from qvl.engine.kv_cache import KVCache, NewTokens
from qvl.engine.sampling import Best
from qvl.engine.scheduler import Chunk
from qvl.engine.sequence import Sequence
from qvl.model.attention import Paged
from qvl.model.config import ModelConfig
from qvl.model.pack import visual_places
from qvl.model.positions import positions
from qvl.model.qwen3vl import Qwen3VL
from qvl.model.vision import VisualFeatures, joined

Mode = Literal["exact", "fast"]
_NONE = torch.zeros(0, dtype=torch.int64)


@dataclass(frozen=True)
class Prompt:
    """What the model needs of a request's prompt, once for all its answers."""

    position_3T: Tensor
    visual_M: Tensor
    """Places of its visual tokens, ascending; empty without any."""
    next_position: int
    """Rotary id of the first answer token: one more than the prompt's largest (not its length, pictures save ids)."""
    visuals: Visuals


def prompt_of(sample: Sample, config: ModelConfig, visuals: Visuals) -> Prompt:
    """Raises ValueError where placeholders and grids disagree."""
    position_3T = positions(sample.token_T, (sample.num_tokens,), sample.grid_I3, config, second_I=sample.second_I)
    visual_M = _NONE if sample.grid_I3 is None else visual_places(sample.token_T, config)
    return Prompt(position_3T, visual_M, int(position_3T.max()) + 1, visuals)


@dataclass(frozen=True)
class Failure:
    error: Exception
    what: str
    """The end of a sentence that says nothing of the inside."""


@dataclass
class Outcome:
    """What became of the chunks."""

    logits: dict[Sequence, Tensor] = field(default_factory=dict)
    """(V,) on the CPU, for each sequence whose next token can be drawn."""
    best: dict[Sequence, Best] = field(default_factory=dict)
    """What greedy draws need of the logits, where the kernels found it."""
    computed: list[Chunk] = field(default_factory=list)
    failed: dict[Sequence, Failure] = field(default_factory=dict)


@dataclass(frozen=True)
class _Piece:
    """A chunk's part of one forward."""

    chunk: Chunk
    token_T: Tensor
    position_3T: Tensor
    visual_M: Tensor
    """Counted from the chunk's first token."""
    features: VisualFeatures | None


class Runner:
    def __init__(self, model: Qwen3VL, cache: KVCache, *, mode: Mode, encoder: Encoder, kernels: bool = False) -> None:
        """`kernels`: the engine's own (kernels.cpp) where they know the model, for fast mode."""
        self.model, self.cache, self.mode, self.encoder = model, cache, mode, encoder
        self.kernels = Kernels(model, cache) if kernels and fits(model) else None
        if mode == "exact":
            check_rows(model)

    @torch.inference_mode()
    def run(self, chunks: Iterable[Chunk], prompt_of: Callable[[Sequence], Prompt]) -> Outcome:
        """A chunk whose pictures cannot be encoded, or at which the model fails, fails alone; the rest goes on."""
        outcome, pieces = Outcome(), []
        for chunk in chunks:
            try:
                pieces.append(self._piece(chunk, prompt_of(chunk.sequence)))
            except Exception as error:
                outcome.failed[chunk.sequence] = Failure(error, "its pictures or video could not be encoded")
        try:
            if pieces:
                self._forward(pieces, outcome)
        except Exception as error:
            outcome.logits.clear()
            outcome.best.clear()
            outcome.computed.clear()
            if len(pieces) == 1:
                outcome.failed[pieces[0].chunk.sequence] = Failure(error, "the model failed on it")
            else:
                # Keys and values that were written are written again, so each can be tried alone.
                for piece in pieces:
                    self._forward_alone(piece, outcome)
        return outcome

    @torch.inference_mode()
    def copy(self, source: int, target: int) -> None:
        """A block's keys and values, for an answer that goes another way in it."""
        for pool_LBZKH in (self.cache.key_LBZKH, self.cache.value_LBZKH):
            pool_LBZKH[:, target] = pool_LBZKH[:, source]

    def _forward_alone(self, piece: _Piece, outcome: Outcome) -> None:
        try:
            self._forward([piece], outcome)
        except Exception as error:
            outcome.failed[piece.chunk.sequence] = Failure(error, "the model failed on it")

    def _piece(self, chunk: Chunk, prompt: Prompt) -> _Piece:
        sequence, start, end = chunk.sequence, chunk.start, chunk.start + chunk.count
        token_T = torch.tensor(sequence.tokens[start:end])
        if start >= sequence.num_prompt:
            # Most pieces are one answer's next token, and every small tensor costs.
            first = start - sequence.num_prompt + prompt.next_position
            return _Piece(chunk, token_T, torch.arange(first, first + chunk.count).expand(3, -1), _NONE, None)
        in_prompt = min(sequence.num_prompt - start, chunk.count)
        later = torch.arange(chunk.count - in_prompt) + prompt.next_position
        position_3T = torch.cat((prompt.position_3T[:, start : start + in_prompt], later.expand(3, -1)), dim=1)
        low, high = torch.searchsorted(prompt.visual_M, torch.tensor([start, end])).tolist()
        features = self.encoder.features(prompt.visuals, low, high) if high > low else None
        return _Piece(chunk, token_T, position_3T, prompt.visual_M[low:high] - start, features)

    def _forward(self, pieces: list[_Piece], outcome: Outcome) -> None:
        if self.mode == "fast":
            self._forward_fast(pieces, outcome)
        else:
            for kind, rows in (("prompt", PROMPT_ROWS), ("answer", ANSWER_ROWS)):
                for tile in _tiles(_of_kind(pieces, kind), rows):
                    self._forward_tile(tile, rows, outcome)
        outcome.computed += [piece.chunk for piece in pieces]

    def _forward_fast(self, pieces: list[_Piece], outcome: Outcome) -> None:
        """All in one forward, or answers by the kernels and the rest in one forward."""
        if self.kernels is not None:
            answers = [piece for piece in pieces if piece.chunk.is_answer]
            for low in range(0, len(answers), MOST_ROWS):
                self._decode(self.kernels, answers[low : low + MOST_ROWS], outcome)
            pieces = [piece for piece in pieces if not piece.chunk.is_answer]
            if not pieces:
                return
        chunks = [piece.chunk for piece in pieces]
        news = [NewTokens(tuple(c.sequence.blocks), c.start, c.count) for c in chunks]
        layout = self.cache.layout(news, Paged if self.kernels is None else KernelPaged)
        batch, features = self._batch(pieces, sum(c.count for c in chunks))
        forward = self.model if self.kernels is None else self.kernels.forward
        hidden_TD = forward(batch, layout=layout, features=features)
        last = _last_rows(pieces)
        for low in range(0, len(last), MOST_ROWS):
            part = last[low : low + MOST_ROWS]
            rows = torch.tensor([row for _, row in part], device=hidden_TD.device)
            self._give([sequence for sequence, _ in part], hidden_TD[rows], outcome)

    def _decode(self, kernels: Kernels, answers: list[_Piece], outcome: Outcome) -> None:
        chunks = [piece.chunk for piece in answers]
        positions = [int(piece.position_3T[0, 0]) for piece in answers]
        news = [
            Next(token=c.sequence.tokens[-1], position=position, context=c.start + 1, blocks=c.sequence.blocks)
            for c, position in zip(chunks, positions, strict=True)
        ]
        self._give([c.sequence for c in chunks], kernels.decode(news), outcome)

    def _give(self, sequences: list[Sequence], hidden_SD: Tensor, outcome: Outcome) -> None:
        if self.kernels is None:
            logits_SV = self.model.logits(hidden_SD).cpu()
        else:
            logits_SV = self.kernels.logits(hidden_SD)
            outcome.best |= zip(sequences, self.kernels.best(logits_SV), strict=True)
        outcome.logits |= zip(sequences, logits_SV.unbind(0), strict=True)

    def _forward_tile(self, pieces: list[_Piece], rows: int, outcome: Outcome) -> None:
        """One tile; rows without a token are filled with token 0, which sees nothing and writes nothing."""
        segments, row = [], 0
        for piece in pieces:
            chunk = piece.chunk
            slots = self.cache.slots(chunk.sequence.blocks, chunk.start + chunk.count)
            segments.append(Segment(row, chunk.start, chunk.count, slots))
            row += chunk.count
        batch, features = self._batch(pieces, rows)
        queries = PROMPT_QUERIES if rows == PROMPT_ROWS else 1
        layout = Tiled(self.cache.key_LBZKH, self.cache.value_LBZKH, tuple(segments), queries)
        hidden_TD = self.model(batch, layout=layout, features=features, blocks=EXACT_BLOCKS)
        last = _last_rows(pieces)
        for low in range(0, len(last), ANSWER_ROWS):
            part = last[low : low + ANSWER_ROWS]
            own = torch.tensor([row for _, row in part] + [0] * (ANSWER_ROWS - len(part)), device=hidden_TD.device)
            logits = self.model.logits(hidden_TD[own])
            outcome.logits |= zip((s for s, _ in part), logits[: len(part)].cpu().unbind(0), strict=True)

    def _batch(self, pieces: list[_Piece], rows: int) -> tuple[Batch, VisualFeatures | None]:
        """The pieces end to end, filled up to `rows`."""
        lengths = [piece.chunk.count for piece in pieces]
        spare = rows - sum(lengths)
        visual, start = [], 0
        for piece in pieces:
            if piece.features is not None:
                visual.append(piece.visual_M + start)
            start += piece.chunk.count
        features = [piece.features for piece in pieces if piece.features is not None]
        batch = Batch(
            token_T=torch.cat([*(p.token_T for p in pieces), _NONE.new_zeros(spare)]),
            position_3T=torch.cat([*(p.position_3T for p in pieces), _NONE.new_zeros(3, spare)], dim=1),
            lengths=(*lengths, *([spare] if spare else [])),
            visual_M=torch.cat(visual) if visual else None,
        )
        return batch.to(self.model.device), joined(features) if features else None


def _last_rows(pieces: list[_Piece]) -> list[tuple[Sequence, int]]:
    """Who draws next, and the row that says what."""
    found, row = [], 0
    for piece in pieces:
        row += piece.chunk.count
        if piece.chunk.is_last:
            found.append((piece.chunk.sequence, row - 1))
    return found


def _of_kind(pieces: list[_Piece], kind: str) -> list[_Piece]:
    """The parts of the pieces that lie in the prompt, or after it."""
    found = []
    for piece in pieces:
        cut = min(max(piece.chunk.sequence.num_prompt - piece.chunk.start, 0), piece.chunk.count)
        low, high = (0, cut) if kind == "prompt" else (cut, piece.chunk.count)
        if high > low:
            found.append(_cut(piece, low, high))
    return found


def _tiles(pieces: list[_Piece], rows: int) -> list[list[_Piece]]:
    """The pieces cut and laid into tiles of at most `rows` tokens, in order: a sequence's later tokens see the earlier ones."""
    tiles: list[list[_Piece]] = []
    left = 0
    for piece in pieces:
        start = 0
        while start < piece.chunk.count:
            if left == 0:
                tiles.append([])
                left = rows
            end = min(piece.chunk.count, start + left)
            tiles[-1].append(_cut(piece, start, end))
            left, start = left - (end - start), end
    return tiles


def _cut(piece: _Piece, low: int, high: int) -> _Piece:
    """Tokens [low, high) of a piece."""
    chunk = Chunk(piece.chunk.sequence, piece.chunk.start + low, high - low)
    first, last = torch.searchsorted(piece.visual_M, torch.tensor([low, high])).tolist()
    features = None
    if piece.features is not None and last > first:
        features = piece.features.part(first, last)
    return _Piece(
        chunk, piece.token_T[low:high], piece.position_3T[:, low:high], piece.visual_M[first:last] - low, features
    )
