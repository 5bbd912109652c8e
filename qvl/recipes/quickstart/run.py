"""The story from a tokenizer to a model that sees, watches and remembers; each chapter keeps its promises or the run fails."""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console

from qvl.core.device import num_cores, place
from qvl.eval.parity import compare
from qvl.parallel.data_parallel import join_world, leave_world
from qvl.parallel.launch import run_ranks
from qvl.prompt.message import Image, Video
from qvl.prompt.processor import Processor
from qvl.recipes.quickstart.ask import answer, same_answers
from qvl.recipes.quickstart.corpus import documents, split
from qvl.recipes.quickstart.film import watch
from qvl.recipes.quickstart.language import judged_prose, small_model, tell
from qvl.recipes.quickstart.long import remember
from qvl.recipes.quickstart.media import film, photograph
from qvl.recipes.quickstart.page import write_page
from qvl.recipes.quickstart.pictures import connect, kept, see, worlds
from qvl.recipes.quickstart.story import HELD_OUT_SEED, LONG, QUICK, Pupil, Skill, Story
from qvl.recipes.quickstart.vision import look
from qvl.recipes.quickstart.vocabulary import spoken, train_tokenizer
from qvl.train.language import bits_per_byte
from qvl.worlds import clips


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train a small Qwen3-VL on this machine, from random weights to answers about pictures, film and long text."""

    long: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """The long version: the same chapters with more steps, about two hours."""
    seed: int = 0
    ranks: int | None = None
    """Processes of one thread that share each step; None: two where there are two cores, for the model is too small for threads."""
    out: Path = Path("runs/quickstart")
    """Emptied first. The checkpoint, report.json and index.html are written there."""

    def __post_init__(self) -> None:
        if abs(self.seed - HELD_OUT_SEED) < 100:
            raise ValueError(
                f"seed is {self.seed}; the questions that judge are drawn from {HELD_OUT_SEED}, take another."
            )


def start(options: Options) -> int:
    """The exit code: 0, 1 for a broken floor, 2 for a request that cannot be met, each but the first after one sentence."""
    try:
        if options.ranks is not None and options.ranks < 1:
            raise ValueError(f"ranks is {options.ranks}; expected at least 1.")
        if place().rank == 0:
            _prepare(options.out)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return run_ranks(main, options.ranks or min(2, num_cores()), options)


def _prepare(folder: Path) -> None:
    """Empties the folder, which must be one that a story has written, and puts the real video there."""
    is_ours = any((folder / name).exists() for name in ("bikes.mp4", "lessons", "report.json"))
    if folder.exists() and not is_ours and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} holds other things and would be emptied; give --out a new folder.")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    photograph()
    film(folder)  # what is missing is reported now, not a quarter of an hour later


def main(options: Options) -> int:
    """One rank's part. Returns 1 when a floor is broken or transformers answers differently."""
    # Matrices this small lose by being split over threads: a rank is a process of one thread.
    torch.set_num_threads(1)
    ranks = join_world(torch.device("cpu"), replicates=True)
    story = Story(
        options.out,
        size=LONG if options.long else QUICK,
        seed=options.seed,
        ranks=ranks,
        console=Console(quiet=ranks.rank > 0),
    )
    work, folder = story.work, story.work / "checkpoint"
    pictures = worlds() | {"clips.appear": clips.appear()}
    with story.chapter(
        "A tokenizer from real text", "Byte-level BPE with Qwen3-VL's pipeline and its 26 control tokens."
    ):
        texts = documents(("sklearn",))
        tokenizer = train_tokenizer([*texts, *spoken()])
        sizes = [(len(t.encode()), len(tokenizer.encode_text(t))) for t in texts[:20]]
        ratio = sum(b for b, _ in sizes) / sum(n for _, n in sizes)
        story.console.print(f"{len(texts)} documents, {tokenizer.num_ids} ids, {ratio:.2f} bytes a token")
        story.console.print(f"What it will learn to see, and later its answers: {write_page(story, pictures)}")

    with story.chapter(
        "A small network, saved as Hugging Face saves it", "Qwen3-VL's shape at a thousandth of the size."
    ):
        model = small_model(tokenizer, seed=options.seed)
        story.save(folder, model, tokenizer)
        # The tokenizer has counted its pairs over all documents; the network never reads what is held out.
        learned, held_out = split(texts)
        pupil = Pupil(model=model, processor=Processor.from_folder(folder), prose=learned, held_out=held_out)
        story.console.print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {folder}")

    with story.chapter(
        "Is it the same network as transformers' Qwen3-VL?", "Text, pictures, video and a padded batch."
    ):
        rows = compare(folder) if story.speaks else []
        for row in rows:
            errors = f"logits {row.logit_error:.0e}  gradients {row.gradient_error:.0e}  bf16 {row.bf16_ratio:.2f}"
            story.console.print(f"{row.case:8} {errors}  {'same' if row.passed else '[red]DIFFERENT[/red]'}")

    with story.chapter(
        "A small language model",
        "Before it sees, it reads: prose for the words, told scenes for answering, tags and repeats for looking back.",
    ):
        tell(story, pupil)
        write_page(story, pictures)
    before = bits_per_byte(model, tokenizer, judged_prose(pupil))

    with story.chapter(
        "V0: the vision pre-stage",
        "Each patch, and each token of four patches, learns to say what it shows and where; SigLIP-2 stands here at real size.",
    ):
        look(story, pupil)
        write_page(story, pictures)

    with story.chapter("S0: the mergers", "Tower and language stand still; the mergers learn to translate."):
        connect(story, pupil)
        write_page(story, pictures, pupil)

    with story.chapter(
        "S1: everything learns",
        "Boxes first, then name, box, count and read digits; a sixth of text keeps the language.",
    ):
        see(story, pupil)
        story.save(folder, model, tokenizer)
        write_page(story, pictures, pupil)

    with story.chapter("S2: video", "Frames come with their times; the answer is a time."):
        watch(story, pupil)
        story.save(folder, model, tokenizer)
        write_page(story, pictures, pupil)

    with story.chapter("S3: long context", "A tagged fact anywhere among thousands of tokens, and nothing forgotten."):
        remember(story, pupil, before=before)
        kept(story, pupil, after="S3")
        story.save(folder, model, tokenizer)

    with story.chapter("Export and ask", "transformers loads the folder and must answer alike on held-out pictures."):
        same = not story.speaks or all(is_same for *_, is_same in same_answers(story, pupil, folder, pictures))
        for part in (Image(str(photograph())), Video(str(film(work)))) if story.speaks else ():
            answer(story, model, pupil.processor, part, "How many objects are there?")
        story.console.print(
            "[dim]A real photograph is far from anything it has seen; it answers in the words it has.[/dim]"
        )

    page = write_page(story, pictures, pupil)
    story.console.print(f"\n{story.write_report()} holds the figures, {page} shows them. Try it:")
    example = worlds()["shapes.name"](HELD_OUT_SEED, 0, "heldout").messages[0].text
    story.console.print("  .venv/bin/qvl chat", markup=False)
    story.console.print(
        f"  .venv/bin/qvl generate --model {folder} --image {work / 'pictures' / 'shapes.name-0.png'} --prompt '{example}'",
        markup=False,
        soft_wrap=True,
    )
    broken = broken_floors(story.skills)
    broken += [f"the network differs from transformers' on {row.case}" for row in rows if not row.passed]
    broken += [] if same else ["transformers answers differently from the exported folder"]
    for sentence in broken:
        story.console.print(f"[red]BROKEN[/red] {sentence}; see {page}", soft_wrap=True)
    code = 1 if broken else 0
    leave_world(code)
    return code


def broken_floors(skills: Sequence[Skill]) -> list[str]:
    """A sentence for each floor that does not hold: chapter, value, floor."""
    return [
        f"{skill.chapter}: {skill.skill} is {skill.got:.3f}, {'above' if skill.is_less_better else 'below'} its floor {skill.floor:g}"
        for skill in skills
        if not skill.holds
    ]
