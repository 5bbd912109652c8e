"""The story so far: a tokenizer and a small language model from real text, in a network that equals transformers' and sees files."""

import shutil
import sys
from pathlib import Path

from qvl.engine.generate import generate
from qvl.engine.sampling import Sampling
from qvl.eval.parity import compare
from qvl.model.qwen3vl import Qwen3VL
from qvl.model.weights import load
from qvl.prompt.message import Image, Message, Text, Video
from qvl.prompt.processor import Processor
from qvl.recipes.quickstart.checkpoint import write_checkpoint
from qvl.recipes.quickstart.corpus import documents
from qvl.recipes.quickstart.language import SKILLS, small_model, tell
from qvl.recipes.quickstart.media import film, photograph
from qvl.recipes.quickstart.story import Story
from qvl.recipes.quickstart.vocabulary import train_tokenizer
from qvl.worlds.catalogue import world


def main(work: Path = Path("runs/quickstart")) -> int:
    """Returns 1 when a floor is broken or the two networks differ."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    story = Story(work)
    folder = work / "checkpoint"
    with story.chapter(
        "A tokenizer from real text", "Byte-level BPE with Qwen3-VL's pipeline and its 26 control tokens."
    ):
        texts = documents(("sklearn",))
        told = [
            part.text
            for name in SKILLS
            for i in range(150)
            for message in world(name)(1, i).messages
            for part in message.parts
            if isinstance(part, Text)
        ]
        tokenizer = train_tokenizer([*texts, *told])
        sizes = [(len(t.encode()), len(tokenizer.encode_text(t))) for t in texts[:20]]
        ratio = sum(b for b, _ in sizes) / sum(n for _, n in sizes)
        story.console.print(f"{len(texts)} documents, {tokenizer.num_ids} ids, {ratio:.2f} bytes a token")

    with story.chapter(
        "A small network, saved as Hugging Face saves it", "Qwen3-VL's shape at a thousandth of the size."
    ):
        write_checkpoint(folder, small_model(tokenizer), tokenizer)
        model = load(folder)
        story.console.print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {folder}")

    processor = Processor.from_folder(folder)
    with story.chapter(
        "A small language model",
        "Before it sees, it reads: prose for the words, told scenes for answering questions. One loop, square-root loss, Muon.",
    ):
        tell(story, model, processor, texts)
        write_checkpoint(folder, model, tokenizer)

    with story.chapter(
        "Is it the same network as transformers' Qwen3-VL?", "Text, pictures, video and a padded batch, in one folder."
    ):
        rows = compare(folder)
        for row in rows:
            errors = f"logits {row.logit_error:.0e}  gradients {row.gradient_error:.0e}  bf16 {row.bf16_ratio:.2f}"
            story.console.print(f"{row.case:8} {errors}  {'same' if row.passed else '[red]DIFFERENT[/red]'}")

    with story.chapter(
        "A photograph and a film in, an answer out", "The tower is still untrained, so these words mean nothing yet."
    ):
        for part in (Image(str(photograph())), Video(str(film(work)))):
            answer(story, model, processor, part)
    report = story.write_report()
    story.console.print(f"\n{report} holds the figures. What it can answer is what it was told; try it:")
    told = world("text.name")(7, 0, "heldout")
    question = "".join(part.text for part in told.messages[0].parts if isinstance(part, Text))
    story.console.print(
        f"  .venv/bin/qvl generate --model {folder} --max-tokens 20 --prompt ${question!r}",
        markup=False,
        soft_wrap=True,
    )
    return 0 if all(row.passed for row in rows) and all(skill.holds for skill in story.skills) else 1


def answer(story: Story, model: Qwen3VL, processor: Processor, part: Image | Video) -> None:
    """Prints what went in and the first tokens of what came out."""
    encoded = processor([Message("user", (part, Text("What is this?")))])
    (visual,) = encoded.visuals
    steps = f"{len(visual.seconds)} time steps, " if visual.seconds else ""
    story.console.print(
        f"{Path(str(part.source)).name}: {visual.source_width}x{visual.source_height} -> {visual.width}x{visual.height}, {steps}"
        f"{visual.num_tokens} visual tokens in a prompt of {encoded.sample.num_tokens}"
    )
    (generation,) = generate(
        model,
        [encoded.sample],
        Sampling(temperature=0, max_tokens=12),
        end_tokens=frozenset({processor.tokenizer.control_id("<|im_end|>")}),
        text_stream=lambda: processor.tokenizer.stream(skip_special=True),
    )
    story.console.print("  ->", repr(generation.text), markup=False)


if __name__ == "__main__":
    sys.exit(main())
