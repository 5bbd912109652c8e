"""Chapter: the folder goes to transformers, which must give the same answers; then pictures nobody made for it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qvl.engine.generate import generate
from qvl.engine.sampling import Sampling
from qvl.model.qwen3vl import Qwen3VL
from qvl.prompt.message import Image, Message, Text, Video
from qvl.prompt.processor import Processor
from qvl.recipes.quickstart.story import HELD_OUT_SEED, Pupil, Story
from qvl.worlds import clips
from qvl.worlds.world import Example, World


def same_answers(
    story: Story, pupil: Pupil, folder: Path, pictures: dict[str, World], *, max_tokens: int = 48
) -> list[tuple[Example, str, bool]]:
    """(held-out example, our greedy answer, transformers gives the same ids) for each picture world and a clip."""
    examples = [world(HELD_OUT_SEED, 1, "heldout") for world in (*pictures.values(), clips.appear())]
    theirs = their_answers(folder, pupil.processor, examples, max_tokens)
    end = pupil.processor.tokenizer.control_id("<|im_end|>")
    rows = []
    for example, ids in zip(examples, theirs, strict=True):
        (ours,) = generate(
            pupil.model,
            [pupil.processor(example.messages[:1]).sample],
            Sampling(temperature=0, max_tokens=max_tokens),
            end_tokens=frozenset({end}),
            text_stream=lambda: pupil.processor.tokenizer.stream(skip_special=True),
        )
        is_same = [id for id in ours.tokens if id != end] == [id for id in ids if id != end]
        verdict = "same" if is_same else "[red]DIFFERENT[/red]"
        story.console.print(f"{example.id}: {ours.text!r} (right: {example.answer!r}); transformers: {verdict}")
        rows.append((example, ours.text, is_same))
    return rows


@torch.no_grad()
def their_answers(folder: Path, processor: Processor, examples: Sequence[Example], max_tokens: int) -> list[list[int]]:
    """Greedy ids of transformers' own network, loaded from the folder, for the prompts of our processor."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model: Any = transformers.AutoModelForImageTextToText.from_pretrained(str(folder), dtype=torch.float32).eval()
    answers = []
    for example in examples:
        encoded = processor(example.messages[:1])
        ids = encoded.sample.token_T[None]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for visual in encoded.visuals:
            kind = "" if visual.kind == "image" else "_videos"
            grid = visual.grid_I3
            if visual.kind == "video":
                grid = torch.tensor([[len(grid), *grid[0, 1:].tolist()]])
            inputs |= {f"pixel_values{kind}": visual.values_PX, f"{visual.kind}_grid_thw": grid}
        config = model.config
        inputs["mm_token_type_ids"] = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
        out = model.generate(**inputs, do_sample=False, max_new_tokens=max_tokens)
        answers.append(out[0, ids.shape[1] :].tolist())
    return answers


def answer(story: Story, model: Qwen3VL, processor: Processor, part: Image | Video, question: str) -> str:
    """Prints what went in and what came out."""
    encoded = processor([Message("user", (part, Text(question)))])
    (visual,) = encoded.visuals
    steps = f"{len(visual.seconds)} time steps, " if visual.seconds else ""
    story.console.print(
        f"{Path(str(part.source)).name}: {visual.source_width}x{visual.source_height} -> {visual.width}x{visual.height}, {steps}"
        f"{visual.num_tokens} visual tokens in a prompt of {encoded.sample.num_tokens}"
    )
    (generation,) = generate(
        model,
        [encoded.sample],
        Sampling(temperature=0, max_tokens=16),
        end_tokens=frozenset({processor.tokenizer.control_id("<|im_end|>")}),
        text_stream=lambda: processor.tokenizer.stream(skip_special=True),
    )
    story.console.print("  ->", repr(generation.text), markup=False)
    return generation.text
