"""What every chapter shares: its length, the pupil as it stands, one way to teach, and the promises kept or broken."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from qvl.core.device import facts
from qvl.model.qwen3vl import Qwen3VL
from qvl.parallel.data_parallel import World as Ranks
from qvl.prompt.example import Example
from qvl.prompt.processor import Processor
from qvl.prompt.tokenizer import Tokenizer
from qvl.recipes.made_stream import ALONE, Assemble, MadeStream, Maker, num_tokens, packed
from qvl.recipes.quickstart.checkpoint import write_checkpoint
from qvl.scoring.registry import score_answers
from qvl.session import Session
from qvl.train.loop import LoopConfig, StepReport, Watcher, fit
from qvl.train.objective import Objective
from qvl.train.optimizer import OptimizerConfig
from qvl.train.parameters import Rates
from qvl.train.schedule import Schedule
from qvl.worlds.needle import Hay
from qvl.worlds.world import Split, World, blind


@dataclass(frozen=True, kw_only=True)
class Skill:
    """One promise. Below the floor the chapter is red; between floor and promise it is said so."""

    chapter: str
    skill: str
    floor: float
    promise: float
    got: float
    blind: float | None = None
    """The same model, shown the evidence of another example; None where there is no evidence to take away."""
    constant: float | None = None
    """The best answer that never changes."""
    seconds: float
    is_less_better: bool = False

    @property
    def holds(self) -> bool:
        return self.got <= self.floor if self.is_less_better else self.got >= self.floor

    @property
    def keeps_promise(self) -> bool:
        return self.got <= self.promise if self.is_less_better else self.got >= self.promise

    @property
    def verdict(self) -> str:
        return "kept" if self.keeps_promise and self.holds else "above the floor" if self.holds else "BROKEN"


@dataclass(frozen=True, kw_only=True)
class Size:
    """How long the chapters train, in steps, and how many questions judge a skill."""

    name: Literal["quickstart", "story"]
    language: int
    vision: int
    connect: int
    see: tuple[int, int]
    """S1's steps with boxes before all else, and with everything."""
    watch: int
    remember: tuple[int, int]
    """S3's longest text in tokens, and its steps."""
    questions: int
    answers: int
    """Colours that a needle may have."""

    def promise(self, quick: float, story: float) -> float:
        """The longer story promises more."""
        return quick if self.name == "quickstart" else story


QUICK = Size(
    name="quickstart",
    language=800,
    vision=1350,
    connect=100,
    see=(260, 400),
    watch=320,
    remember=(2048, 90),
    questions=160,
    answers=6,
)
LONG = Size(
    name="story",
    language=2400,
    vision=6000,
    connect=300,
    see=(1400, 2900),
    watch=1500,
    remember=(4096, 600),
    questions=400,
    answers=10,
)


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """One stretch of training. Rates and batch are ours, found by trial at this size (dev/LOG.md)."""

    name: str
    steps: int
    samples: int
    lr: float
    rates: Rates = field(default_factory=Rates)


@dataclass(kw_only=True, eq=False)
class Pupil:
    """The model as it stands, and the prose it reads: real text, a twentieth of which is held out."""

    model: Qwen3VL
    processor: Processor
    prose: Sequence[str]
    held_out: Sequence[str]

    @cached_property
    def hay(self) -> Hay:
        """A third of a megabyte of the prose, in sentences measured by the pupil's own tokenizer."""
        size_of = self.processor.tokenizer.encode_text
        return Hay(["\n\n".join(self.prose)[:300_000]], lambda text: len(size_of(text)))

    @cached_property
    def prose_T(self) -> Tensor:
        return torch.tensor(self.processor.tokenizer.encode_text("\n\n".join(self.prose)))


@dataclass
class Story:
    work: Path
    size: Size = QUICK
    seed: int = 0
    ranks: Ranks = ALONE
    """Ranks share each step's examples and the questions of each exam; the first one speaks and writes."""
    console: Console = field(default_factory=Console)
    skills: list[Skill] = field(default_factory=list)
    curves: dict[str, Path] = field(default_factory=dict)
    """Lesson -> its log.jsonl."""
    began: float = field(default_factory=time.perf_counter)

    @contextmanager
    def chapter(self, title: str, why: str) -> Iterator[None]:
        start = time.perf_counter()
        self.console.print(f"\n[bold]{title}[/bold]\n[dim]{why}[/dim]")
        yield
        self.console.print(f"[dim]{time.perf_counter() - start:.1f} s[/dim]")

    @property
    def speaks(self) -> bool:
        return self.ranks.rank == 0

    def teach(
        self,
        objective: Objective,
        makers: Mapping[str, tuple[Maker, float]],
        lesson: Lesson,
        *,
        seed: int,
        assemble: Assemble = packed,
        size_of: Callable[[Any], int] = num_tokens,
    ) -> float:
        """Runs the one loop over what the makers make; returns seconds."""
        start = time.perf_counter()
        stream = MadeStream(
            makers,
            objective.model.config,
            samples=lesson.samples,
            seed=self.seed + seed,
            assemble=assemble,
            size_of=size_of,
            ranks=self.ranks,
        )
        config = LoopConfig(
            steps=lesson.steps,
            optimizer=OptimizerConfig(
                name="muon",
                lr=lesson.lr,
                weight_decay=0.02,
                rates=lesson.rates,
            ),
            schedule=Schedule(kind="wsd", warmup_steps=20, decay_part=0.4, final=0.05),
            seed=self.seed,
        )
        out = self.work / "lessons" / lesson.name
        self.curves[lesson.name] = out / "log.jsonl"
        try:
            with self._progress(lesson) as callback:
                fit(objective, stream, config, out, self.ranks, watchers=[callback])
        finally:
            stream.close()
        return time.perf_counter() - start

    @contextmanager
    def _progress(self, lesson: Lesson) -> Iterator[Watcher]:
        """On a terminal one bar with the time left; elsewhere LINES lines."""
        if not self.console.is_terminal or not self.speaks:
            yield self._lines(lesson)
            return
        columns = (
            TextColumn(lesson.name),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[now]}"),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(lesson.name, total=lesson.steps, now="")

            def show(report: StepReport) -> None:
                progress.update(task, completed=report.step, now=report.skipped or f"loss {report.values['loss']:.3f}")

            yield show

    def _lines(self, lesson: Lesson) -> Watcher:
        every = -(-lesson.steps // LINES)

        def show(report: StepReport) -> None:
            if report.step % every and report.step != report.steps:
                return
            values = report.values
            losses = "  ".join(f"{k.removeprefix('loss/')} {v:.2f}" for k, v in values.items() if k.startswith("loss/"))
            speed = lesson.samples / values["seconds"]
            self.console.print(
                f"[dim]{lesson.name} {report.step:4}/{report.steps}  {losses}  {speed:,.0f} samples/s[/dim]",
                soft_wrap=True,
            )

        return show

    def ask(self, pupil: Pupil, world: World, *, split: Split = "heldout") -> tuple[float, float]:
        """(mean score, blind mean score) of greedy answers on examples that no lesson has shown; blind on a quarter of them."""
        examples = self.examples(world, split)
        return self.mean_score(pupil, examples), self.mean_score(pupil, blind(examples)[: len(examples) // 4])

    def examples(self, world: World, split: Split) -> list[Example]:
        return [world(HELD_OUT_SEED, i, split) for i in range(self.size.questions)]

    def mean_score(self, pupil: Pupil, examples: Sequence[Example]) -> float:
        """Over all examples; each rank answers its share."""
        mine = examples[self.ranks.rank :: self.ranks.size]
        said = answers(pupil.model, pupil.processor, mine)
        total = sum(score_answers(e, [text])[0].value for e, text in zip(mine, said, strict=True))
        return self.ranks.sum(total) / len(examples)

    def note(self, skill: Skill) -> None:
        """Keep and print one measured promise."""
        self.skills.append(skill)
        sign = "<=" if skill.is_less_better else ">="
        others = [
            f"{name} {value:.3f}"
            for name, value in (("blind", skill.blind), ("constant", skill.constant))
            if value is not None
        ]
        colour = "green" if skill.keeps_promise and skill.holds else "yellow" if skill.holds else "red"
        beside = f" ({', '.join(others)})" if others else ""
        self.console.print(
            f"{skill.skill}: [{colour}]{skill.got:.3f}[/{colour}]{beside}, promised {sign} {skill.promise:g}, floor {skill.floor:g}: "
            f"[{colour}]{skill.verdict}[/{colour}]",
            soft_wrap=True,
        )

    def save(self, folder: Path, model: Qwen3VL, tokenizer: Tokenizer) -> None:
        """The model as a Hugging Face folder, once for all ranks."""
        if self.speaks:
            write_checkpoint(folder, model, tokenizer)
        self.ranks.barrier()

    def write_report(self) -> Path:
        """report.json: one entry for each promise, and what decides the rounding: seed, steps, ranks, CPU."""
        path = self.work / "report.json"
        if not self.speaks:
            return path
        chapters = [asdict(s) | {"verdict": s.verdict} for s in self.skills]
        run = {
            "ranks": self.ranks.size,
            "cpu": facts().cpu_name,
            "instructions": torch.backends.cpu.get_cpu_capability(),
        }
        size = {name: value for name, value in asdict(self.size).items() if name != "name"}
        told = {"size": self.size.name, "seed": self.seed, "seconds": time.perf_counter() - self.began, "steps": size}
        path.write_text(json.dumps({"chapters": chapters, **told, **run}, indent=2) + "\n")
        return path


HELD_OUT_SEED = 4242
LINES = 6
"""Of progress for each lesson where no bar can be drawn: a chapter, its skills included, stays below twenty."""


def answers(model: Qwen3VL, processor: Processor, examples: Sequence[Example], *, max_tokens: int = 48) -> list[str]:
    """Greedy answers to the examples' first questions."""
    session = Session.greedy(model, processor, max_tokens=max_tokens)
    made: list[str] = []
    for low in range(0, len(examples), 32):  # so many at once that their keys and values stay in cache
        samples = [processor(example.messages[:1]).sample for example in examples[low : low + 32]]
        made += [answer.text for answer in session.generate(samples)]
    return made
