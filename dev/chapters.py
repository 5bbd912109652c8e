"""Run single chapters of the quickstart from the weights that an earlier one left: how a chapter's steps and rates are searched.

    OMP_NUM_THREADS=1 python -m dev.chapters --chapters language V0 S0 --out runs/base
    OMP_NUM_THREADS=1 python -m dev.chapters --chapters S1 --weights runs/base/S0.safetensors --seed 3 --out runs/s1-seed3

Other rounding is another run: MKL_CBWR=COMPATIBLE, ONEDNN_MAX_CPU_ISA=AVX2, ATEN_CPU_CAPABILITY=avx2 before the command, or torchrun with
two ranks; two runs differ only if their losses (lessons/*/log.jsonl) differ by step 20. `figures.json` holds the skills. What is kept of
text is counted from the weights that a run begins with, what is kept of images from an S1 of the same run.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from safetensors.torch import load_file, save_file

from qvl.parallel.data_parallel import join_world, leave_world
from qvl.prompt.processor import Processor
from qvl.recipes.quickstart.corpus import documents, split
from qvl.recipes.quickstart.film import watch
from qvl.recipes.quickstart.language import judged_prose, small_model, tell
from qvl.recipes.quickstart.long import remember
from qvl.recipes.quickstart.pictures import connect, kept, see
from qvl.recipes.quickstart.story import LONG, QUICK, Pupil, Story
from qvl.recipes.quickstart.vision import look
from qvl.recipes.quickstart.vocabulary import spoken, train_tokenizer
from qvl.train.language import bits_per_byte

Name = Literal["language", "V0", "S0", "S1", "S2", "S3"]


@dataclass(frozen=True, kw_only=True)
class Options:
    chapters: tuple[Name, ...]
    """In the order of the story."""
    out: Path
    weights: Path | None = None
    """What an earlier run of this command left; without it the model is new."""
    seed: int = 0
    """Of the chapters run here; the model's first weights have it too."""
    long: bool = False
    steps: tuple[str, ...] = ()
    """Other lengths, as NAME=STEPS: language, vision, connect, boxes and see (the two halves of S1), watch, remember."""


def main(options: Options) -> int:
    torch.set_num_threads(1)
    ranks = join_world(torch.device("cpu"), replicates=True)
    size = LONG if options.long else QUICK
    for setting in options.steps:
        name, _, value = setting.partition("=")
        if name == "boxes":
            size = replace(size, see=(int(value), size.see[1]))
        elif name == "see":
            size = replace(size, see=(size.see[0], int(value)))
        elif name == "remember":
            size = replace(size, remember=(size.remember[0], int(value)))
        else:
            size = replace(size, **{name: int(value)})
    story = Story(options.out, size=size, seed=options.seed, ranks=ranks)
    options.out.mkdir(parents=True, exist_ok=True)
    texts = documents(("sklearn",))
    tokenizer = train_tokenizer([*texts, *spoken()])
    model = small_model(tokenizer, seed=options.seed)
    if options.weights:
        model.load_state_dict(load_file(options.weights))
    story.save(options.out / "checkpoint", model, tokenizer)
    learned, held_out = split(texts)
    pupil = Pupil(
        model=model, processor=Processor.from_folder(options.out / "checkpoint"), prose=learned, held_out=held_out
    )
    before = bits_per_byte(model, tokenizer, judged_prose(pupil))
    runs: dict[Name, Callable[[], None]] = {
        "language": lambda: tell(story, pupil),
        "V0": lambda: look(story, pupil),
        "S0": lambda: connect(story, pupil),
        "S1": lambda: see(story, pupil),
        "S2": lambda: watch(story, pupil),
        "S3": lambda: remember(story, pupil, before=before),
    }
    for name in options.chapters:
        runs[name]()
        if name in ("S2", "S3") and any(skill.chapter == "S1" for skill in story.skills):
            kept(story, pupil, after=name)
        if story.speaks:
            save_file({k: v.contiguous() for k, v in model.state_dict().items()}, options.out / f"{name}.safetensors")
            figures = {"seed": options.seed, "steps": asdict(size), "skills": [asdict(skill) for skill in story.skills]}
            (options.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    code = main(tyro.cli(Options, prog="python -m dev.chapters"))
    leave_world(code)
