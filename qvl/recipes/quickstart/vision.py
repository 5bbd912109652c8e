"""Chapter V0, the vision pre-stage: a tower and a merger that know what they show, before any language model looks through them."""

import time
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qvl.model.config import ModelConfig
from qvl.prompt.processor import Processor
from qvl.prompt.tokenizer import Tokenizer
from qvl.recipes.made_stream import Maker
from qvl.recipes.quickstart.dense import Dense, DenseLabels, DensePack, accuracy, join
from qvl.recipes.quickstart.story import Lesson, Pupil, Skill, Story
from qvl.train.contrastive import V0_RATES, picture_batch
from qvl.worlds import digits, shapes
from qvl.worlds.labels import PatchLabels, patch_labels
from qvl.worlds.paint import COLOURS, SHAPES
from qvl.worlds.world import Split, World, enlarged

SIZE = 96
"""Pixels a side of a made picture: 36 patches, 9 visual tokens."""


def written() -> World:
    """Handwriting on 64 painted pixels a side, each shown as 2 x 2: a stroke is as thin as the scan, and 64 patches of 8 x 8 painted pixels
    tell digits apart that 16 patches of 16 x 16 do not (dev/LOG.md)."""
    return enlarged(digits.digit(), 2)


def look(story: Story, pupil: Pupil) -> None:
    """Train the tower and its merger; judge patches of held-out scenes at the size it learned, at two thirds of it and at twice it."""
    start = time.perf_counter()
    objective = Dense(
        pupil.model, colours=len(COLOURS), shapes=len(SHAPES), words=words(pupil.processor.tokenizer), seed=story.seed
    )
    makers = {}
    for name, (world, share) in kinds(SIZE).items():
        makers[name] = (labelled(world, pupil.processor, seed=story.seed), share)
        if world.name != "digits":
            # The tower sees every colour on every shape, as SigLIP-2 has; which pairs are ever named is decided later.
            everything = labelled(world, pupil.processor, seed=story.seed, split="novel")
            makers[f"{name}/all"] = (everything, share / 5)
    steps = story.size.vision
    lesson = Lesson(name="V0", steps=steps, samples=32, lr=5e-3, rates=V0_RATES)
    story.teach(objective, makers, lesson, seed=5, assemble=labelled_pack, size_of=lambda made: len(made[0]))
    objective.hand_over()
    seconds = time.perf_counter() - start
    got = {size: judge_patches(objective, pupil.processor, size) for size in (64, SIZE, 2 * SIZE)}
    for name, floor, promise, constant in (("shape", 0.6, 0.8, 1 / len(SHAPES)), ("digit", 0.45, 0.65, 1 / 10)):
        others = ", ".join(f"{values[name]:.2f} at {size}" for size, values in got.items() if size != SIZE)
        story.note(
            Skill(
                chapter="V0",
                skill=f"patches that name their {name} ({others} pixels)",
                floor=floor,
                promise=promise,
                got=got[SIZE][name],
                constant=constant,
                seconds=seconds,
            )
        )


def kinds(size: int) -> dict[str, tuple[World, float]]:
    """What V0 looks at, and its shares. The digits are enlarged scans, whose pictures keep their size."""
    return {
        "shapes.name": (shapes.name(size), 0.3),
        "shapes.count": (shapes.count(size), 0.2),
        "shapes.caption": (shapes.caption(size), 0.12),
        "digits": (written(), 0.38),
    }


def words(tokenizer: Tokenizer) -> dict[str, list[int]]:
    """Each class's word as told scenes have it, a token of its own: colours and shapes after a space, and the ten figures."""
    said = {"colour": [f" {name}" for name in COLOURS], "shape": [f" {name}" for name in SHAPES], "digit": "0123456789"}
    return {name: [tokenizer.encode_text(word)[0] for word in classes] for name, classes in said.items()}


def labelled(world: World, processor: Processor, *, seed: int, split: Split = "train") -> Maker:
    """The world's pictures with what each patch shows, in the order of the patches."""

    def make(index: int) -> tuple[str, tuple[Tensor, Tensor, DenseLabels]]:
        example = world(seed, index, split)
        (item,) = processor.media_loader().load(example.messages[0].parts[0])  # type: ignore[arg-type]
        visual = item.visual
        side = int(visual.grid_I3[0, 1])
        labels = patch_labels(example.facts, side)
        order_P = merge_order(side, len(visual.grid_I3))
        named = {f.name: torch.from_numpy(getattr(labels, f.name)[order_P]) for f in fields(PatchLabels)}
        return example.id, (visual.patch_PX, visual.grid_I3, DenseLabels(**named))

    return make


def labelled_pack(made: list[Any], ids: tuple[str, ...], categories: tuple[str, ...], config: ModelConfig) -> DensePack:
    batch = picture_batch([(patches, grid) for patches, grid, _ in made])
    return DensePack(batch=batch, ids=ids, categories=categories, labels=join([labels for *_, labels in made]))


def merge_order(side: int, frames: int) -> np.ndarray:
    """Which patch, counted in rows, stands at each place of the merge-block order (report 2: 2 x 2 patches become a token)."""
    one = np.arange(side * side).reshape(side // 2, 2, side // 2, 2).transpose(0, 2, 1, 3).reshape(-1)
    return (np.arange(frames)[:, None] * side * side + one).reshape(-1)


def judge_patches(objective: Dense, processor: Processor, size: int, *, count: int = 48) -> dict[str, float]:
    """Share of held-out patches named right, by head. Digits keep their size: their scans are as large as they are."""
    packs = []
    for world, _ in kinds(size).values():
        make = labelled(world, processor, seed=7, split="heldout")
        made = [make(i) for i in range(count)]
        packs.append(
            labelled_pack(
                [m for _, m in made], tuple(id for id, _ in made), (world.name,) * count, objective.model.config
            )
        )
    return accuracy(objective, packs)
