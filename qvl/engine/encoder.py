"""Visual tokens of prompts as they are needed: encoded in groups of frames, kept for the next request that shows the same."""

from collections import OrderedDict
from dataclasses import dataclass, field

import torch

from qvl.core.batch import Batch, Sample
from qvl.model.config import ModelConfig
from qvl.model.layers import RunBlock, run_plainly
from qvl.model.pack import frame_lengths
from qvl.model.qwen3vl import Qwen3VL
from qvl.model.vision import VisualFeatures, frame_chunks, joined

GROUP_PATCHES = 4096
"""Patches that go through the vision tower at once, in whole frames: a picture of 1024 x 1024, or 17 s of a small video. Bounds memory,
and how long the others wait for a step in which a film goes by."""


@dataclass(frozen=True)
class Group:
    """Neighbouring rows of grid_I3 that are encoded together."""

    rows: slice
    patches: slice
    low: int
    """First of its visual tokens among the prompt's."""
    high: int
    key: tuple[bytes, int] | None
    """(the visual's digest, which part of it); None where it cannot be found again."""


@dataclass(frozen=True)
class Visuals:
    """What a prompt shows. `held` are the groups that a chunk has begun and not ended."""

    sample: Sample
    groups: tuple[Group, ...] = ()
    held: dict[int, VisualFeatures] = field(default_factory=dict)


def visuals_of(
    sample: Sample, config: ModelConfig, keys: tuple[bytes, ...] = (), rows_of_key: tuple[int, ...] = ()
) -> Visuals:
    """Groups never mix two visuals with keys, so that a visual's features are the same to the bit wherever it stands."""
    if sample.grid_I3 is None or config.vision is None:
        return Visuals(sample)
    counts = sample.grid_I3.prod(1).tolist()
    groups: list[Group] = []
    row = patch = 0
    for number, num_rows in enumerate(rows_of_key or (len(counts),)):
        part = 0
        for lengths in frame_chunks(tuple(counts[row : row + num_rows]), GROUP_PATCHES):
            end, area = patch + sum(lengths), config.vision.merge_area
            groups.append(
                Group(
                    rows=slice(row + part, row + part + len(lengths)),
                    patches=slice(patch, end),
                    low=patch // area,
                    high=end // area,
                    key=(keys[number], part) if keys else None,
                )
            )
            part, patch = part + len(lengths), end
        row += num_rows
    return Visuals(sample, tuple(groups))


class Encoder:
    """The vision tower behind a cache bounded in bytes, least recently used out first."""

    def __init__(self, model: Qwen3VL, max_bytes: int, run_block: RunBlock = run_plainly) -> None:
        self.model, self.max_bytes, self.run_block = model, max_bytes, run_block
        self.kept: OrderedDict[tuple[bytes, int], VisualFeatures] = OrderedDict()
        self.num_bytes = 0
        self.num_asked = 0
        self.num_found = 0

    def forget_all(self) -> None:
        """What was encoded is encoded anew."""
        self.kept.clear()
        self.num_bytes = 0

    def features(self, visuals: Visuals, low: int, high: int) -> VisualFeatures:
        """Those of the prompt's visual tokens [low, high). Groups that end there are let go."""
        pieces = []
        for number, group in enumerate(visuals.groups):
            if group.high <= low or group.low >= high:
                continue
            if number not in visuals.held:
                visuals.held[number] = self._group(visuals.sample, group)
            pieces.append(visuals.held[number].part(max(low, group.low) - group.low, min(high, group.high) - group.low))
            if group.high <= high:
                del visuals.held[number]
        return joined(pieces)

    def _group(self, sample: Sample, group: Group) -> VisualFeatures:
        self.num_asked += 1
        if group.key is not None and group.key in self.kept:
            self.num_found += 1
            self.kept.move_to_end(group.key)
            return self.kept[group.key]
        features = self._encode(sample, group)
        if group.key is not None:
            self._keep(group.key, features)
        return features

    def _encode(self, sample: Sample, group: Group) -> VisualFeatures:
        assert sample.patch_PX is not None and sample.grid_I3 is not None
        grid_I3 = sample.grid_I3[group.rows]
        batch = Batch(
            token_T=torch.zeros(0, dtype=torch.int64),
            position_3T=torch.zeros(3, 0, dtype=torch.int64),
            lengths=(),
            patch_PX=sample.patch_PX[group.patches],
            grid_I3=grid_I3,
            frame_lengths=frame_lengths(grid_I3),
        )
        return self.model.encode(batch.to(self.model.device), max_patches=GROUP_PATCHES, run_block=self.run_block)

    def _keep(self, key: tuple[bytes, int], features: VisualFeatures) -> None:
        size = num_bytes(features)
        if size > self.max_bytes:
            return
        self.kept[key] = features
        self.num_bytes += size
        while self.num_bytes > self.max_bytes:
            _, old = self.kept.popitem(last=False)
            self.num_bytes -= num_bytes(old)


def num_bytes(features: VisualFeatures) -> int:
    return sum(x.numel() * x.element_size() for x in (features.merged_MD, *features.deepstack))
