"""What an ablation is: a question, arms that differ in one switch, what they learn from, and the probes that should tell them apart."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from qvl.model.pack import pack
from qvl.model.qwen3vl import Qwen3VL
from qvl.prompt.example import Example
from qvl.prompt.processor import Processor
from qvl.recipes.ablate.arm import Arm, sample_of
from qvl.recipes.made_stream import Maker
from qvl.scoring.registry import score_answers
from qvl.session import Session
from qvl.train.language import nats_of
from qvl.worlds.world import World


@dataclass(frozen=True, kw_only=True)
class Material:
    """What all runs of an ablation share: it does not depend on arm or seed."""

    processor: Processor
    prose_T: Tensor | None = None
    """Real text to learn from, as ids."""
    held_out: str = ""
    """Real text to be judged on."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A finished run, as probes see it. `seed` is the run's: every seed is judged on other examples, its arms on the same."""

    model: Qwen3VL
    material: Material
    arm: Arm
    seed: int

    def examples(self, world: World, count: int) -> list[Example]:
        return [world(1000 + self.seed, index, "heldout") for index in range(count)]


@dataclass(frozen=True, kw_only=True)
class Probe:
    measure: Callable[[Trained], float]
    unit: str
    is_less_better: bool = False
    without_looking: Callable[[], float] | None = None
    """What the best constant answer gets, or the entropy of the answer for one who sees nothing."""


@dataclass(frozen=True, kw_only=True)
class Ablation:
    name: str
    question: str
    expectation: str
    """Where the mechanism should show, and why there."""
    arms: Mapping[str, Arm]
    """The first is Qwen3-VL's choice; the others are compared with it."""
    prepare: Callable[[], Material]
    learn: Callable[[Material, Arm, int], Mapping[str, tuple[Maker, float]]]
    """(material, arm, seed) -> what is learned from, with weights by samples."""
    probes: Mapping[str, Probe]
    steps: int
    """Optimizer steps of a run; the budget is counted in steps, so that a run can be had again."""
    samples: int
    """A step."""
    lr: float = 4e-3
    pre_stage: Callable[[Qwen3VL, Material, int, int, Path, int], int] | None = None
    """(model, material, seed, steps, folder, samples a step) -> steps it took of them; only for arms with `pre_stage`."""
    notes: Sequence[str] = field(default=())
    """What a reader should know before believing a verdict."""


def answers_right(world: World, count: int, *, max_tokens: int = 12) -> Probe:
    """Mean score of greedy answers."""

    def measure(run: Trained) -> float:
        examples = run.examples(world, count)
        session = Session.greedy(run.model, run.material.processor, max_tokens=max_tokens)
        answers = session.generate(
            [sample_of(e.messages[:1], run.material.processor, run.arm, is_prompt=True) for e in examples]
        )
        return sum(score_answers(e, [a.text])[0].value for e, a in zip(examples, answers, strict=True)) / count

    return Probe(measure=measure, unit="mean score", without_looking=lambda: world.prior.score)


def surprise(world: World, count: int) -> Probe:
    """Nats of a right answer, summed over its tokens: moves long before whole answers are right."""

    def measure(run: Trained) -> float:
        samples = [sample_of(e.messages, run.material.processor, run.arm) for e in run.examples(world, count)]
        nats = nats_of(run.model)
        return sum(nats(pack(samples[low : low + 32], run.model.config)) for low in range(0, count, 32)) / count

    return Probe(measure=measure, unit="nats an answer", is_less_better=True, without_looking=lambda: world.prior.nats)
