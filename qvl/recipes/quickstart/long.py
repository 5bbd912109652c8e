"""Chapter S3: a tagged fact anywhere in a long text, with the earlier skills kept."""

from qvl.recipes.made_stream import of_world
from qvl.recipes.quickstart.language import hay, judged_prose, parts, replay
from qvl.recipes.quickstart.pictures import asked_again
from qvl.recipes.quickstart.story import HELD_OUT_SEED, Lesson, Pupil, Skill, Story
from qvl.train.language import bits_per_byte
from qvl.train.objective import NextToken
from qvl.train.parameters import Rates
from qvl.worlds import clips
from qvl.worlds.world import blind

DEPTHS = tuple(i / 7 for i in range(8))
SHARES = {2: 0.03, 1: 0.09}
"""Half of the longest text, and all of it: S2 has taught 1,024 tokens. Shares count samples, and the longest is as long as dozens of
pictures."""


def remember(story: Story, pupil: Pupil, *, before: float) -> None:
    """S3 (report 3.1): the longest samples, half of the tokens. `before`: bits a byte of the prose before S0."""
    longest, steps = story.size.remember
    makers = asked_again(story, pupil, 0.55)
    makers["clips.appear"] = (of_world(clips.appear(), pupil.processor, seed=story.seed + 2), 0.1)
    makers |= parts(replay(story, pupil), 0.025)
    for part, share in SHARES.items():
        world = hay(story, pupil, longest // part, ask_all=True)
        makers[f"needle{longest // part}"] = (of_world(world, pupil.processor, seed=story.seed + 3), share)
    lesson = Lesson(name="S3", steps=steps, samples=24, lr=7e-4, rates=Rates(vision=0.1))
    seconds = story.teach(NextToken(pupil.model), makers, lesson, seed=40)
    got, without, constant = find(story, pupil, longest)
    story.note(
        Skill(
            chapter="S3",
            skill=f"tagged needle in {longest:,} tokens, 8 depths",
            floor=0.75,
            promise=story.size.promise(0.90, 0.95),
            got=got,
            blind=without,
            constant=constant,
            seconds=seconds,
        )
    )
    after = bits_per_byte(pupil.model, pupil.processor.tokenizer, judged_prose(pupil))
    story.note(
        Skill(
            chapter="S3",
            skill=f"text kept: bits a byte of held-out prose, after S3 ({after:.3f}) over before S0 ({before:.3f})",
            floor=1.05,
            promise=story.size.promise(1.03, 1.02),
            got=after / before,
            seconds=seconds,
            is_less_better=True,
        )
    )


def find(story: Story, pupil: Pupil, length: int) -> tuple[float, float, float]:
    """(score, blind score, constant score), each depth as often as the others; blind on a quarter."""
    each = max(12, story.size.questions // 20)
    worlds = [hay(story, pupil, length, depth=depth) for depth in DEPTHS]
    # Each depth has needles of its own: with the same ones at all eight, a dozen would decide.
    examples = [world(HELD_OUT_SEED, d * each + i, "heldout") for d, world in enumerate(worlds) for i in range(each)]
    got, without = (story.mean_score(pupil, group) for group in (examples, blind(examples)[::4]))
    return got, without, hay(story, pupil, length).prior.score
