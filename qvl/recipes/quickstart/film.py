"""Chapter S2: frames with their times; when does an object appear?"""

from qvl.recipes.made_stream import of_world
from qvl.recipes.quickstart.language import hay, parts, replay
from qvl.recipes.quickstart.pictures import asked_again, note
from qvl.recipes.quickstart.story import Lesson, Pupil, Story
from qvl.train.objective import NextToken
from qvl.train.parameters import Rates
from qvl.worlds import clips


def watch(story: Story, pupil: Pupil) -> None:
    """S2 (report 3.1): longer samples, more text, video; pictures stay in the mixture."""
    world = clips.appear()
    makers = asked_again(story, pupil, 0.35)
    makers["clips.appear"] = (of_world(world, pupil.processor, seed=story.seed), 0.8)
    makers["needle"] = (of_world(hay(story, pupil, 1024, ask_all=True), pupil.processor, seed=story.seed + 1), 0.045)
    makers |= parts(replay(story, pupil), 0.025)
    lesson = Lesson(name="S2", steps=story.size.watch, samples=32, lr=1e-3, rates=Rates(vision=0.1))
    seconds = story.teach(NextToken(pupil.model), makers, lesson, seed=30)
    got, without = story.ask(pupil, world)
    aims = (0.80, story.size.promise(0.86, 0.98))
    note(story, "S2", "second at which an object appears, within 0.5 s", aims, got, without, world, seconds)
