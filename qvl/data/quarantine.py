"""Records that could not be read: written down with the reason, never met twice, and too many of them stop the run."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvl.core.log import JsonlWriter, log

FILE = "quarantine.jsonl"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One record that gave no sample."""

    id: str
    shard: str
    offset: int
    digest: int
    """The index's: a record that is mended has another, and is tried again."""
    reason: str

    @property
    def key(self) -> tuple[str, int, int]:
        return self.shard, self.offset, self.digest


class Quarantine:
    """The list of failures, in memory and in `quarantine.jsonl`."""

    def __init__(self, path: Path | str | None, *, max_rate: float, patience: int = 100) -> None:
        """`max_rate`: share of the samples that may fail; it is judged once `patience` were tried."""
        if not 0 <= max_rate <= 1:
            raise ValueError(f"max_bad_rate is {max_rate}; expected a share from 0 to 1.")
        self.max_rate, self.patience = max_rate, patience
        self.num_seen = 0
        self.num_failed = 0
        self._known: set[tuple[str, int, int]] = set()
        self.path = None if path is None else Path(path)
        # What any rank met before, however many there were.
        for file in self.path.parent.glob(f"{Path(FILE).stem}*.jsonl") if self.path else ():
            for line in file.read_text(encoding="utf-8").split("\n")[:-1]:  # after the last is half a line, or nothing
                self._known.add(_key(line))
        self._writer = None if self.path is None else JsonlWriter(self.path)

    def holds(self, key: tuple[str, int, int]) -> bool:
        return key in self._known

    def __len__(self) -> int:
        return len(self._known)

    def count(self, seen: int, failures: list[Failure]) -> None:
        """Takes in what a pack met. ValueError when too many samples failed."""
        self.num_seen += seen
        for failure in failures:
            self.num_failed += 1
            if failure.key in self._known:
                continue
            self._known.add(failure.key)
            log.warning("record %s of %s is set aside: %s", failure.id, failure.shard, failure.reason)
            if self._writer is not None:
                self._writer.write(vars(failure))
        if failures and self.num_seen >= self.patience and self.num_failed > self.max_rate * self.num_seen:
            where = f"see {self.path}" if self.path else f"the last: {failures[-1].reason}"
            raise ValueError(
                f"{self.num_failed} of {self.num_seen} samples could not be read, more than the {self.max_rate:.1%} allowed; "
                f"{where}. Mend the data or raise max_bad_rate."
            )

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _key(line: str) -> tuple[str, int, int]:
    try:
        row: Mapping[str, Any] = json.loads(line)
        return row["shard"], row["offset"], row["digest"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"the quarantine file holds {line[:80]!r}, which we did not write; remove it.") from None
