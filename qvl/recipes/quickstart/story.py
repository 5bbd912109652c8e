"""What every chapter shares: the folder, the tokenizer and network as they stand, and the promises kept or broken."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console

from qvl.engine.generate import generate
from qvl.engine.sampling import Sampling
from qvl.model.qwen3vl import Qwen3VL
from qvl.prompt.processor import Processor
from qvl.scoring.registry import score
from qvl.worlds.world import Example, World, blind


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


@dataclass
class Story:
    work: Path
    console: Console = field(default_factory=Console)
    skills: list[Skill] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)

    @contextmanager
    def chapter(self, title: str, why: str) -> Iterator[None]:
        start = time.perf_counter()
        self.console.print(f"\n[bold]{title}[/bold]\n[dim]{why}[/dim]")
        yield
        self.console.print(f"[dim]{time.perf_counter() - start:.1f} s[/dim]")

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
            f"[{colour}]{skill.verdict}[/{colour}]"
        )

    def write_report(self) -> Path:
        """report.json: one entry for each promise."""
        path = self.work / "report.json"
        chapters = [asdict(s) | {"verdict": s.verdict} for s in self.skills]
        path.write_text(
            json.dumps({"chapters": chapters, "seconds": time.perf_counter() - self.began}, indent=2) + "\n"
        )
        return path


def judge(model: Qwen3VL, processor: Processor, world: World, *, count: int, seed: int) -> tuple[float, float]:
    """(mean score, blind mean score) of greedy answers on the world's held-out split."""
    examples = [world(seed, i, "heldout") for i in range(count)]
    return tuple(mean_score(model, processor, group) for group in (examples, blind(examples)))  # type: ignore[return-value]


def mean_score(model: Qwen3VL, processor: Processor, examples: Sequence[Example], *, max_tokens: int = 48) -> float:
    tokenizer = processor.tokenizer
    answers = generate(
        model,
        [processor(example.messages[:1]).sample for example in examples],
        Sampling(temperature=0, max_tokens=max_tokens),
        end_tokens=frozenset({tokenizer.control_id("<|im_end|>")}),
        text_stream=lambda: tokenizer.stream(skip_special=True),
    )
    scores = [score(e.scorer, a.text, e.truth) for e, a in zip(examples, answers, strict=True)]
    return sum(scores) / len(scores)
