"""Pair v0: part of the pictures goes to a vision pre-stage with dense labels, or all of them to answers."""

from collections.abc import Mapping
from pathlib import Path

from qvl.model.qwen3vl import Qwen3VL
from qvl.recipes.ablate.ablation import Ablation, Material, answers_right, surprise
from qvl.recipes.ablate.arm import Arm, maker_of
from qvl.recipes.ablate.runner import loop_config
from qvl.recipes.ablate.toy import toy_processor
from qvl.recipes.made_stream import ALONE, MadeStream, Maker
from qvl.recipes.quickstart.dense import Dense
from qvl.recipes.quickstart.vision import labelled, labelled_pack
from qvl.train.contrastive import V0_RATES
from qvl.train.loop import fit
from qvl.worlds import shapes
from qvl.worlds.paint import COLOURS, SHAPES

NAME, COUNT = shapes.name(64), shapes.count(64)
SHARE = 0.5


def pre_stage(model: Qwen3VL, material: Material, seed: int, steps: int, folder: Path, samples: int) -> int:
    """Half of the steps on labelled pictures of the same worlds; the vision tower alone learns."""
    taken = max(1, round(steps * SHARE))
    objective = Dense(model, colours=len(COLOURS), shapes=len(SHAPES), seed=seed)
    # Pictures of their own: none is seen twice by an arm.
    makers = {world.name: (labelled(world, material.processor, seed=500 + seed), 1.0) for world in (NAME, COUNT)}
    stream = MadeStream(makers, model.config, samples=samples, seed=500 + seed, assemble=labelled_pack)
    try:
        fit(objective, stream, loop_config(taken, V0.lr, seed=seed, rates=V0_RATES), folder, ALONE)
    finally:
        stream.close()
    objective.hand_over()
    return taken


def prepare() -> Material:
    return Material(processor=toy_processor([NAME, COUNT]))


def learn(material: Material, arm: Arm, seed: int) -> Mapping[str, tuple[Maker, float]]:
    return {
        "name": (maker_of(NAME, material.processor, arm, seed=seed), 1.0),
        "count": (maker_of(COUNT, material.processor, arm, seed=seed), 1.0),
    }


V0 = Ablation(
    name="v0",
    question="Is half of the pictures well spent on a vision pre-stage before any answer is learned?",
    expectation=(
        "Report 1.2 and 13: the tower goes through a stage of its own before the decoder meets it. Here it begins at random, so without "
        "the stage it learns to see only through the few tokens of an answer. Both arms see equally many pictures."
    ),
    arms={"with": Arm(), "without": Arm(pre_stage=False)},
    prepare=prepare,
    learn=learn,
    pre_stage=pre_stage,
    probes={
        "colour and shape, right": answers_right(NAME, 192),
        "colour and shape, nats": surprise(NAME, 192),
        "count, right": answers_right(COUNT, 192),
        "count, nats": surprise(COUNT, 192),
    },
    steps=300,
    samples=64,
    notes=(
        "The pre-stage has exact labels at every patch (qvl.recipes.quickstart.dense), more than any caption says: equal pictures are not "
        "equal information, and a step of the pre-stage costs less, because the decoder does not run.",
    ),
)
