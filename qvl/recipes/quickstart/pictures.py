"""Chapters S0 and S1: the mergers learn to hand pictures over, then everything learns to answer about them."""

from qvl.recipes.made_stream import Maker, of_world
from qvl.recipes.quickstart.language import parts, replay
from qvl.recipes.quickstart.story import Lesson, Pupil, Skill, Story
from qvl.recipes.quickstart.vision import SIZE, written
from qvl.train.objective import NextToken
from qvl.train.parameters import Rates
from qvl.worlds import shapes
from qvl.worlds.world import Split, World

SAMPLES = 64
"""A step's fixed cost, Muon's products, is shared by so many."""


def connect(story: Story, pupil: Pupil) -> None:
    """S0 (report 3.1): tower and language stand still, only the mergers learn."""
    lesson = Lesson(name="S0", steps=story.size.connect, samples=32, lr=3e-3, rates=Rates(vision=0.0, language=0.0))
    # No boxes: a language that stands still cannot learn to say them, and the mergers would lose what they hold of places over it.
    makers = {kind: maker for kind, maker in asked(story, pupil).items() if kind != "shapes.box"}
    makers["shapes.name"] = (makers["shapes.name"][0], 0.5)
    seconds = story.teach(NextToken(pupil.model), makers, lesson, seed=10)
    name = worlds()["shapes.name"]
    got, without = story.ask(pupil, name)
    # A frozen tower and a frozen language model meet halfway: enough to tell that the mergers carry something.
    note(story, "S0", "colour and shape through the mergers alone", (0.12, 0.3), got, without, name, seconds)


def see(story: Story, pupil: Pupil) -> None:
    """S1 (report 3.1): everything learns, with a sixth of text so that the language stays. Boxes have a lesson of their own before.

    Ours: where an edge lies is said in twelve digits, and among easier questions only their hundreds are learned (dev/LOG.md).
    """
    words, makers = replay(story, pupil), asked(story, pupil)
    boxes, everything = story.size.see
    # The tower hardly moves: what it knows of places is fine, and at the language's rate it is lost before that has learned to read it.
    first = Lesson(name="S1 boxes", steps=boxes, samples=SAMPLES, lr=2e-3, rates=Rates(vision=0.1, mergers=0.5))
    mostly_boxes = makers | {"shapes.box": (makers["shapes.box"][0], 2.0)}
    seconds = story.teach(NextToken(pupil.model), mostly_boxes | parts(words, 0.06), first, seed=15)
    lesson = Lesson(name="S1", steps=everything, samples=SAMPLES, lr=2e-3, rates=Rates(vision=0.1))
    seconds += story.teach(NextToken(pupil.model), makers | parts(words, 0.025), lesson, seed=20)
    for name, (skill, split, floor, promise, most) in SKILLS.items():
        got, without = story.ask(pupil, worlds()[name], split=split)
        note(
            story, "S1", skill, (floor, story.size.promise(promise, most)), got, without, worlds()[name], seconds, split
        )


def kept(story: Story, pupil: Pupil, *, after: str) -> None:
    """The picture skills once more, later: their mean over what it was after S1."""
    before = [skill.got for skill in story.skills if skill.chapter == "S1"]
    now = [story.mean_score(pupil, story.examples(worlds()[name], split)) for name, (_, split, *_) in SKILLS.items()]
    each = ", ".join(f"{name.removeprefix('shapes.')} {got:.3f}" for name, got in zip(SKILLS, now, strict=True))
    skill = f"pictures kept: mean of the four skills after {after} over after S1 ({each})"
    story.note(
        Skill(
            chapter=after,
            skill=skill,
            floor=0.93,
            promise=story.size.promise(0.95, 0.98),
            got=sum(now) / sum(before) if any(before) else 0.0,
            seconds=0.0,
        )
    )


SKILLS: dict[str, tuple[str, Split, float, float, float]] = {
    "shapes.name": ("colour and shape, pairs never named of a picture", "novel", 0.85, 0.88, 0.99),
    "shapes.box": ("one object's box, mean IoU", "heldout", 0.60, 0.76, 0.92),
    "shapes.count": ("how many objects, 1 to 5", "heldout", 0.70, 0.81, 0.95),
    "digits": ("handwritten digit, scans never shown", "heldout", 0.75, 0.88, 0.96),
}
"""World -> what is judged, on which split, with floor, promise, and the long story's promise. The quickstart's is what three seeds kept
(dev/LOG.md)."""


def note(
    story: Story,
    chapter: str,
    skill: str,
    aims: tuple[float, float],
    got: float,
    without: float,
    world: World,
    seconds: float,
    split: Split = "heldout",
) -> None:
    floor, promise = aims
    story.note(
        Skill(
            chapter=chapter,
            skill=skill,
            floor=floor,
            promise=promise,
            got=got,
            blind=without,
            constant=world.find_prior(split).score,
            seconds=seconds,
        )
    )


def worlds() -> dict[str, World]:
    return {
        "shapes.name": shapes.name(SIZE),
        "shapes.shape": shapes.shape(SIZE),
        "shapes.box": shapes.box(SIZE),
        "shapes.count": shapes.count(SIZE),
        "digits": written(),
    }


def asked(story: Story, pupil: Pupil) -> dict[str, tuple[Maker, float]]:
    """The picture worlds as conversations.

    Pairs of colour and shape that are kept for the end are never named as a pair, but their shapes are asked for like all others:
    without that the model takes every colour for a proof against the one shape it never came with (dev/LOG.md).
    """
    shares = {"shapes.name": 0.1, "shapes.shape": 0.12, "shapes.box": 0.26, "shapes.count": 0.26, "digits": 0.2}
    makers = {
        name: (of_world(world, pupil.processor, seed=story.seed), shares[name]) for name, world in worlds().items()
    }
    alone = of_world(worlds()["shapes.shape"], pupil.processor, seed=story.seed, split="novel")
    return makers | {"shapes.shape/all": (alone, 0.12)}


def asked_again(story: Story, pupil: Pupil, factor: float) -> dict[str, tuple[Maker, float]]:
    """The same for later lessons, at so many times their shares; counting, which fades first, half again as often."""
    makers = parts(asked(story, pupil), factor)
    count, share = makers["shapes.count"]
    return makers | {"shapes.count": (count, 1.5 * share)}
