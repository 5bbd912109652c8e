"""The plan: which records make which pack, in one global order that follows from the seed and a few counters alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qvl.data.order import key_of, permuted
from qvl.data.packing import PackBudget, Packer

VERSION = 1
WINDOW = 64
"""Packs that are shuffled among each other: best-fit choice gives neighbours of like lengths."""
CHUNK = 1024
"""Draws of a source whose records are computed at once."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """A source as the planner sees it: one row for each usable record."""

    token_S: np.ndarray
    patch_S: np.ndarray
    square_S: np.ndarray
    is_text_S: np.ndarray
    """bool: a pretraining document without media, which may come in pieces."""
    max_epochs: float | None = None

    @property
    def num_records(self) -> int:
        return len(self.token_S)


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """A place in a pack: piece `piece` of the record that draw number `draw` of a source brings."""

    source: int
    draw: int
    piece: int
    record: int
    tokens: int
    patches: int
    square: int
    is_long: bool
    """Larger than a pack as it stands: cut, split or re-budgeted when it is read."""


Pack = tuple[Item, ...]


class Plan:
    """Draws samples by tokens, packs them, shuffles packs in windows, and gives `packs_per_step` at a time.

    Every rank plans everything: it costs microseconds a sample and no communication, and it makes the global batch independent of how
    many ranks and workers share it.
    """

    def __init__(
        self,
        sources: Sequence[Lengths],
        stages: Sequence[tuple[int | None, Sequence[float]]],
        budget: PackBudget,
        *,
        packs_per_step: int,
        seed: int,
        window: int = WINDOW,
    ) -> None:
        """`window`: packs that are shuffled among each other."""
        if packs_per_step < 1:
            raise ValueError(f"packs_per_step is {packs_per_step}; expected at least 1.")
        for i, source in enumerate(sources):
            if source.num_records == 0 and any(weights[i] > 0 for _, weights in stages):
                raise ValueError(f"source {i} has no usable records; look at what qvl data index said about it.")
        self.sources, self.stages, self.budget = sources, stages, budget
        self.packs_per_step, self.seed, self.window_packs = packs_per_step, seed, window
        self._chunks: dict[int, tuple[int, np.ndarray]] = {}
        count = len(sources)
        self._load(
            {
                "draws": [0] * count,
                "tokens": [0] * count,
                "stage": 0,
                "stage_tokens": [0] * count,
                "waiting": [],
                "packs": 0,
                "window": 0,
                "samples": 0,
                "is_over": False,
                "is_filling": False,
            }
        )

    # ---- steps

    def next_step(self) -> list[Pack]:
        """The packs of the next optimizer step; empty at the end of the data.

        The last step is filled up with records that come once more, so that it is as large as the others and nothing is left out.
        """
        packs: list[Pack] = []
        while len(packs) < self.packs_per_step:
            if self._place == len(self._packs):
                self._start = self._save()
                self._packs, self._place = self._next_window(), 0
                if not self._packs:
                    assert not packs, "the last window ends with a whole step"
                    return []
            packs.append(self._packs[self._place])
            self._place += 1
        return packs

    def state(self) -> dict[str, Any]:
        """JSON-able: the counters at the start of the running window, and how many of its packs are out."""
        return {"version": VERSION, "seed": self.seed, "start": self._start, "place": self._place}

    def restore(self, state: dict[str, Any]) -> None:
        if state.get("version") != VERSION or state.get("seed") != self.seed:
            raise ValueError(
                f"the state was saved with seed {state.get('seed')} and version {state.get('version')}, this plan has seed "
                f"{self.seed} and version {VERSION}; continue with the same."
            )
        if len(state["start"]["draws"]) != len(self.sources):
            raise ValueError(
                f"the state counts {len(state['start']['draws'])} sources and the mixture has {len(self.sources)}; use the same mixture."
            )
        self._load(state["start"])
        if state["place"]:
            self._packs, self._place = self._next_window(), state["place"]

    def _load(self, start: dict[str, Any]) -> None:
        self._start = start
        self.draws, self.tokens = list(start["draws"]), list(start["tokens"])
        self.stage, self.stage_tokens = start["stage"], list(start["stage_tokens"])
        self.num_packs, self.window, self.num_samples = start["packs"], start["window"], start["samples"]
        self.is_over, self.is_filling = start["is_over"], start["is_filling"]
        waiting = [self._item(*entry) for entry in start["waiting"]]
        self._packer: Packer[Item] = Packer(self.budget, waiting)
        self._packs: list[Pack] = []
        self._place = 0

    def _save(self) -> dict[str, Any]:
        return {
            "draws": list(self.draws),
            "tokens": list(self.tokens),
            "stage": self.stage,
            "stage_tokens": list(self.stage_tokens),
            "waiting": [[item.source, item.draw, item.piece] for item in self._packer],
            "packs": self.num_packs,
            "window": self.window,
            "samples": self.num_samples,
            "is_over": self.is_over,
            "is_filling": self.is_filling,
        }

    # ---- packs

    def _next_window(self) -> list[Pack]:
        packs: list[Pack] = []
        while len(packs) < self.window_packs and (pack := self._next_pack()):
            packs.append(pack)
        if not packs:
            return []
        order_S = permuted(np.arange(len(packs)), len(packs), key_of(self.seed, "window", self.window))
        self.window += 1
        return [packs[i] for i in order_S]

    def _next_pack(self) -> Pack:
        is_whole = self.num_packs % self.packs_per_step == 0
        if self.is_filling and is_whole:
            return ()  # who still waits came for the last step only
        while not self._packer.is_full and not self.is_over:
            self._draw()
        if not len(self._packer) and is_whole:
            return ()
        self.is_filling |= not len(self._packer)
        while self.is_filling and not self._packer.is_full:
            self._draw()
        pack = tuple(self._packer.pop())
        self.num_packs += 1
        self.num_samples += len(pack)
        return pack

    # ---- draws

    def _draw(self) -> None:
        source = self._choose()
        if source is None:
            self.is_over = True
            return
        draw = self.draws[source]
        self.draws[source] += 1
        for piece in range(self._num_pieces(source, draw)):
            item = self._item(source, draw, piece)
            self._packer.push(item)
            self.tokens[source] += item.tokens
            self.stage_tokens[source] += item.tokens

    def _choose(self) -> int | None:
        """The source that is furthest behind its share of tokens; the first of equals. None when the data is over."""
        limit, weights = self.stages[self.stage]
        while not self.is_filling and limit is not None and sum(self.stage_tokens) >= limit:
            if self.stage + 1 == len(self.stages):
                return None
            self.stage, self.stage_tokens = self.stage + 1, [0] * len(self.sources)
            limit, weights = self.stages[self.stage]
        total = sum(self.stage_tokens) + 1
        best, furthest = None, 0.0
        for i, weight in enumerate(weights):
            if weight <= 0 or (not self.is_filling and self._is_spent(i, self.draws[i])):
                continue
            behind = weight * total - self.stage_tokens[i]
            if best is None or behind > furthest:
                best, furthest = i, behind
        if best is None and self.stage + 1 < len(self.stages):
            self.stage, self.stage_tokens = self.stage + 1, [0] * len(self.sources)
            return self._choose()
        return best

    def _is_spent(self, source: int, draw: int) -> bool:
        lengths = self.sources[source]
        return lengths.max_epochs is not None and draw >= lengths.max_epochs * lengths.num_records

    def record_of(self, source: int, draw: int) -> int:
        """Which record a draw brings: each epoch is another permutation of all."""
        count = self.sources[source].num_records
        size = min(CHUNK, count)  # of a small source one epoch
        chunk, offset = divmod(draw, size)
        kept = self._chunks.get(source)
        if kept is None or kept[0] != chunk:
            draws_S = np.arange(chunk * size, (chunk + 1) * size)
            records_S = np.empty(size, np.int64)
            for epoch in range(int(draws_S[0]) // count, int(draws_S[-1]) // count + 1):
                inside = draws_S // count == epoch
                records_S[inside] = permuted(draws_S[inside] % count, count, key_of(self.seed, "epoch", source, epoch))
            kept = self._chunks[source] = (chunk, records_S)
        return int(kept[1][offset])

    def _num_pieces(self, source: int, draw: int) -> int:
        lengths, record = self.sources[source], self.record_of(source, draw)
        tokens = int(lengths.token_S[record])
        return -(-tokens // self.budget.tokens) if bool(lengths.is_text_S[record]) else 1

    def _item(self, source: int, draw: int, piece: int) -> Item:
        lengths, record = self.sources[source], self.record_of(source, draw)
        tokens, patches = int(lengths.token_S[record]), int(lengths.patch_S[record])
        is_long = tokens > self.budget.tokens or patches > self.budget.patches
        return Item(
            source=source,
            draw=draw,
            piece=piece,
            record=record,
            tokens=min(tokens - piece * self.budget.tokens, self.budget.tokens),
            patches=min(patches, self.budget.patches),
            square=int(lengths.square_S[record]),
            is_long=is_long,
        )
