"""qvl score: scores answers in a JSONL file with the rules that rewards and benchmarks use."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from qvl.core.files import writing
from qvl.scoring.rows import RowScore, score_row
from qvl.show.terminal import printable, telling


@dataclass(frozen=True, kw_only=True)
class Score:
    """qvl score ROWS.jsonl --out OUT.jsonl

    A row is {"id", "scorer", "input"}; what comes out is {"id", "value", "path", "reason"}, in the same order. A row that cannot be scored
    has the path "failed", no value, and a reason.
    """

    rows: Annotated[Path, tyro.conf.Positional]
    """JSONL file."""
    out: Path
    """The scores, written whole or not at all."""


def run(args: Score) -> int:
    counted: Counter[str] = Counter()
    first: RowScore | None = None
    with telling() as say, writing(args.out) as new, new.open("w", encoding="utf-8") as file:
        for number, row in enumerate(read_rows(args.rows), 1):
            say(f"row {number:,}")
            scored = row if isinstance(row, RowScore) else score_row(row)
            counted[scored.path] += 1
            if scored.path == "failed" and first is None:
                first = scored
            file.write(json.dumps(asdict(scored), ensure_ascii=False) + "\n")
    print(f"{counted['rule']:,} of {counted.total():,} rows are scored: {args.out}")
    if first is not None:
        print(f"{counted['failed']:,} are not, the first ({first.id}): {printable(first.reason)}")
    return 0


def read_rows(path: Path) -> Iterator[Any]:
    """The rows; a line that is no JSON is a failed score already."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                yield RowScore(id=None, value=None, path="failed", reason=f"line {number} of {path.name} is no JSON.")
