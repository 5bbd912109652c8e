"""Saying what happens: one logger, and JSON lines for everything a program may want to read again."""

import json
import logging
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

log = logging.getLogger("qvl")
_said: set[str] = set()


def set_up(level: str = "info", stream: TextIO | None = None) -> None:
    """Sends the house's log lines to `stream` (stderr): short lines to a person at a terminal, dated ones to a file or pipe."""
    names = ("debug", "info", "warning", "error")
    if level not in names:
        raise ValueError(f"log level is {level!r}; expected one of {', '.join(names)}")
    out = sys.stderr if stream is None else stream
    handler = logging.StreamHandler(out)
    dated = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    handler.setFormatter(logging.Formatter("%(message)s") if out.isatty() else dated)
    log.handlers[:] = [handler]
    log.setLevel(level.upper())
    log.propagate = False


def say_once(message: str) -> None:
    """Logs a warning the first time it comes up in this process: a slower kernel, another dtype than asked for."""
    if message not in _said:
        _said.add(message)
        log.warning(message)


class JsonlWriter:
    """Appends one JSON object a line and flushes each, so that a killed run leaves whole lines behind.

    Numbers that JSON does not have (nan, inf) are written as null: the key stays, the line stays readable. Half a line at the end of the
    file, left by a run that was killed while writing, is cut off when the file is opened again.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _cut_half_line(self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(_json(row), ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_jsonl(path: Path | str) -> list[dict[str, Any]]:
    """All rows of a file of JSON lines; an absent file has none."""
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(
        path.read_text(encoding="utf-8").split("\n"), 1
    ):  # not splitlines: U+2028 may stand in a text
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} of {path} is not JSON ({error.msg}); mend or delete it") from error
    return rows


def _json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_json(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if hasattr(value, "item"):  # a torch or numpy number
        return _json(value.item())
    raise ValueError(
        f"a row for a JSON lines file holds {type(value).__name__}; expected text, numbers, lists, dicts or None"
    )


def _cut_half_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("rb+") as file:
        text = file.read()
        if text and not text.endswith(b"\n"):
            whole = text.rfind(b"\n") + 1
            try:
                json.loads(text[whole:])
            except ValueError:
                file.truncate(whole)
            else:  # a whole row that only lacks its line end
                file.seek(0, os.SEEK_END)
                file.write(b"\n")
