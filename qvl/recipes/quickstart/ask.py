"""Chapter: the folder goes to transformers, which must give the same answers; then pictures nobody made for it."""

from pathlib import Path

from qvl.eval.parity import their_answers
from qvl.model.qwen3vl import Qwen3VL
from qvl.prompt.example import Example
from qvl.prompt.message import Image, Message, Text, Video
from qvl.prompt.processor import Processor
from qvl.recipes.quickstart.story import HELD_OUT_SEED, Pupil, Story
from qvl.session import Session
from qvl.worlds.world import World


def same_answers(
    story: Story, pupil: Pupil, folder: Path, pictures: dict[str, World], *, max_tokens: int = 48
) -> list[tuple[Example, str, bool]]:
    """(held-out example, our greedy answer, transformers gives the same ids) for each world."""
    examples = [world(HELD_OUT_SEED, 1, "heldout") for world in pictures.values()]
    theirs = their_answers(folder, [pupil.processor(example.messages[:1]) for example in examples], max_tokens)
    end = pupil.processor.tokenizer.control_id("<|im_end|>")
    session = Session.greedy(pupil.model, pupil.processor, max_tokens=max_tokens)
    rows = []
    for example, ids in zip(examples, theirs, strict=True):
        (ours,) = session.generate([pupil.processor(example.messages[:1]).sample])
        is_same = [id for id in ours.tokens if id != end] == [id for id in ids if id != end]
        verdict = "same" if is_same else "[red]DIFFERENT[/red]"
        story.console.print(f"{example.id}: {ours.text!r} (right: {example.answer!r}); transformers: {verdict}")
        rows.append((example, ours.text, is_same))
    return rows


def answer(story: Story, model: Qwen3VL, processor: Processor, part: Image | Video, question: str) -> str:
    """Prints what went in and what came out."""
    encoded = processor([Message("user", (part, Text(question)))])
    (visual,) = encoded.visuals
    steps = f"{len(visual.seconds)} time steps, " if visual.seconds else ""
    story.console.print(
        f"{Path(str(part.source)).name}: {visual.source_width}x{visual.source_height} -> {visual.width}x{visual.height}, {steps}"
        f"{visual.num_tokens} visual tokens in a prompt of {encoded.sample.num_tokens}"
    )
    (generation,) = Session.greedy(model, processor, max_tokens=16).generate([encoded.sample])
    story.console.print("  ->", repr(generation.text), markup=False)
    return generation.text
