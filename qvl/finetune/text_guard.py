"""The judge beside a tuning run: what it forgot of text, what it learned of held-out records, and when to stop."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from rich.table import Table

from qvl.core.batch import Batch
from qvl.core.config import read_object
from qvl.core.files import write_text
from qvl.core.log import log, read_jsonl
from qvl.data.loader import MicroBatch
from qvl.parallel.data_parallel import World
from qvl.prompt.tokenizer import Tokenizer
from qvl.train.language import bits_per_byte
from qvl.train.loop import StepReport
from qvl.train.objective import NextToken

BUILT_IN_BYTES = 16_000
MOST_BYTES = 64_000
"""Of a given text, so that a judgement stays short beside the steps between two."""
REPORT = "report.json"
TEXT_RATIO = "bits per byte of held-out text, ratio to the start"


@dataclass(frozen=True, kw_only=True)
class Judgement:
    step: int
    bits_per_byte: float
    """Of the held-out text."""
    held_out_loss: float | None
    """Mean loss a token on held-out records; None where none are held out."""
    train_loss: float | None = None
    """Mean of the steps since the judgement before, or since the run went on, replay included; None before the first."""


class TextLostError(Exception):
    """The model's text ability fell below what the run allows. Says so in one sentence."""


class TextGuard:
    """A watcher of `qvl.train.loop.fit`: judges the model at each checkpoint and at the end, writes report.json, raises TextLostError.

    Every rank must call it together, and asks the objective, whose forward is the one that sharded weights can be reached through.
    """

    def __init__(
        self,
        objective: NextToken,
        tokenizer: Tokenizer,
        text: str,
        world: World,
        out: Path,
        *,
        every: int,
        most: float,
        held_out: Callable[[], Iterable[MicroBatch]] = tuple,
        facts: dict[str, Any] | None = None,
    ) -> None:
        if most != 0 and most <= 1:
            raise ValueError(f"max_text_loss is {most}; expected a ratio above 1, such as 1.05, or 0 to never stop.")
        self.objective, self.tokenizer, self.text, self.world, self.out = objective, tokenizer, text, world, out
        self.every, self.most, self.held_out = every, most, held_out
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.facts = {"text": {"bytes": len(text.encode()), "sha256": digest}, "max_text_loss": most, **(facts or {})}
        self.rows: dict[int, Judgement] = {}
        self.stopped: str | None = None
        self._losses: list[float] = []

    # ---- the run

    def begin(self, first: int) -> None:
        """Before the first step; `first` is the step of the checkpoint that will be gone on from, 0 without one.

        Judges the untrained model, unless the run that is gone on with did so on the same text.
        """
        before = read_object(self.out / REPORT, "the report of the run") if (self.out / REPORT).exists() else {}
        if first and before.get("text") == self.facts["text"]:
            self.rows = {row["step"]: Judgement(**row) for row in before["rows"] if row["step"] <= first}
        if 0 not in self.rows:
            self.rows = {0: self.judge(0)}
        self.world.barrier()  # everyone has read before rank 0 writes
        self.write()

    def __call__(self, report: StepReport) -> None:
        if report.skipped is None:
            self._losses.append(report.values["loss"])
        # Every checkpoint, those of a pause too: what was lost must never be gone on from, nor stand in the way of what was good.
        if report.step % self.every and report.step != report.steps and not report.is_saved:
            return
        mean = sum(self._losses) / len(self._losses) if self._losses else None
        row = self.rows[report.step] = replace(self.judge(report.step), train_loss=mean)
        self._losses.clear()
        ratio = row.bits_per_byte / self.before.bits_per_byte
        held_out = "" if row.held_out_loss is None else f", held-out loss {row.held_out_loss:.3f}"
        log.info("step %d: text %.3f bits a byte, %.3f of before%s", report.step, row.bits_per_byte, ratio, held_out)
        # Rank 0 decides for all, should their last digits differ. A text that is no number is lost too.
        is_lost = self.world.sum(float(self.most > 0 and not ratio <= self.most) * (self.world.rank == 0)) > 0
        if is_lost:
            self.stopped = (
                f"stopped at step {report.step}: held-out text costs {row.bits_per_byte:.3f} bits a byte, {ratio:.2f} times the "
                f"{self.before.bits_per_byte:.3f} of before, and --max-text-loss allows {self.most:g}; replay more (--replay-share, or "
                "--replay with text and chats of your own) or lower --lr, in another --out folder"
            )
        self.write()
        if is_lost:
            raise TextLostError(self.stopped)

    @property
    def before(self) -> Judgement:
        return self.rows[0]

    @property
    def good_steps(self) -> set[int]:
        """Steps that were judged and found within the limit."""
        most = self.most * self.before.bits_per_byte if self.most else float("inf")
        return {step for step, row in self.rows.items() if row.bits_per_byte <= most}

    def found(self) -> dict[str, float]:
        """What is expected of a run, at its last judgement."""
        return {TEXT_RATIO: self.rows[max(self.rows)].bits_per_byte / self.before.bits_per_byte}

    # ---- measuring

    @torch.no_grad()
    def judge(self, step: int) -> Judgement:
        was_training = self.objective.training
        self.objective.eval()
        bits = bits_per_byte(self.objective.model, self.tokenizer, self.text, nats=self._nats)
        sums = [self._sums(micro) for micro in self.held_out()]
        count = sum(n for _, n in sums)
        self.objective.train(was_training)
        return Judgement(
            step=step, bits_per_byte=bits, held_out_loss=sum(total for total, _ in sums) / count if count else None
        )

    def _nats(self, batch: Batch) -> float:
        """As `qvl.train.language.nats_of`, of weights that can only be reached through the objective."""
        names = ("",) * len(batch.lengths)
        return self._sums(MicroBatch(batch, names, names))[0]

    def _sums(self, micro: MicroBatch) -> tuple[float, float]:
        """(summed loss, targets) of a pack."""
        total, count = self.objective(self.objective.prepare(micro), 1.0, self.world).sums["loss"]
        return float(total), count

    # ---- telling

    def write(self, **more: Any) -> None:
        """report.json: the text, the limit, and a row for each judgement."""
        self.facts |= more
        if self.world.rank > 0:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        rows = [asdict(row) for _, row in sorted(self.rows.items())]
        report = {**self.facts, "rows": rows, "stopped": self.stopped}
        write_text(self.out / REPORT, json.dumps(report, indent=2) + "\n")


def table_of(rows: Iterable[Judgement]) -> Table:
    """Before, between, after."""
    table = Table(title="before and after", title_justify="left")
    for name in ("step", "text, bits a byte", "of before", "held-out loss", "training loss"):
        table.add_column(name, justify="right")
    ordered = sorted(rows, key=lambda row: row.step)
    for row in ordered:
        ratio = row.bits_per_byte / ordered[0].bits_per_byte
        losses = ("-" if loss is None else f"{loss:.3f}" for loss in (row.held_out_loss, row.train_loss))
        table.add_row(str(row.step), f"{row.bits_per_byte:.3f}", f"{ratio:.3f}", *losses)
    return table


# ---- the text -----------------------------------------------------------------------------------------------------


def held_out_text(path: Path | None) -> str:
    """A plain text, or the `text` of each row of a .jsonl file, at most MOST_BYTES of it; without a path, built-in English prose."""
    if path is None:
        return built_in_text()
    try:
        if path.suffix == ".jsonl":
            rows = [row.get("text") for row in read_jsonl(path)]
            text = "\n\n".join(row for row in rows if isinstance(row, str))
        else:
            text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as UTF-8 text ({error}).") from None
    if not path.exists() or not text.strip():
        raise ValueError(f"{path} holds no text; give a plain text, or .jsonl rows with the key text.")
    return text.encode()[:MOST_BYTES].decode("utf-8", errors="ignore")


def built_in_text() -> str:
    """Prose of Python's own reference manual, which every Python carries: real English that is in no mixture by accident of ours.

    It judges one language and one kind of text; what matters to you may be another, so give your own.
    """
    paragraphs = [p for _, text in sorted(topics.topics.items()) for p in text.split("\n\n")]
    prose = list(dict.fromkeys(" ".join(p.split()) for p in paragraphs if is_prose(p)))
    step = max(1, sum(map(len, prose)) // BUILT_IN_BYTES)  # from all parts of the manual
    return "\n\n".join(prose[::step]).encode()[:BUILT_IN_BYTES].decode("utf-8", errors="ignore")


def is_prose(paragraph: str) -> bool:
    """A paragraph of whole sentences: no grammar, no code, no heading."""
    is_flush = all(not line.startswith(" ") for line in paragraph.splitlines())
    return len(paragraph) > 200 and is_flush and re.match(r"[A-Z]\w* ", paragraph) is not None and paragraph[-1] == "."
