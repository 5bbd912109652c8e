"""The terminal: what is going on, text that cannot steer it, an answer's thought and words as they come."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.text import Text

Say = Callable[[str], None]
"""Told what is going on while somebody waits."""


class Output(Protocol):
    def write(self, text: str, /) -> Any: ...
    def flush(self) -> Any: ...


@contextmanager
def telling() -> Iterator[Say]:
    """One line on stderr that says what is going on, where stderr is a terminal; nothing otherwise."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda words: None
        return
    with console.status("") as status:
        yield lambda words: status.update(Text(printable(words), style="dim"))


# What a model or a file name writes must not steer the terminal: every control character but tab and line break.
CONTROLS = {i: "\ufffd" for i in (*range(32), *range(127, 160)) if chr(i) not in "\n\t"} | {13: None}


def printable(text: str) -> str:
    return text.translate(CONTROLS)


class Voices:
    """Parts an answer into thought and words while it comes, as qvl.prompt.answer does when it is whole.

    `marks`: the ids of <think> and </think>. `in_thought`: the prompt ended inside a thought.
    """

    def __init__(self, marks: Mapping[int, str], *, in_thought: bool) -> None:
        self.marks, self.in_thought = marks, in_thought
        self.has_thought = in_thought
        self._awaited: str | None = None
        self._is_blank = True
        self._is_start = True
        self._held = ""

    def push(self, token: int, text: str) -> list[tuple[bool, str]]:
        """(is it thought, text) in order. Line breaks around the thought are left out."""
        mark = self.marks.get(token)
        if (mark == "<think>" and self._is_blank) or (mark == "</think>" and self.in_thought):
            self._awaited = mark
        pieces = []
        if self._awaited is not None and self._awaited in text:
            before, _, text = text.partition(self._awaited)
            pieces.append((self.in_thought, self._trimmed(before)))
            self.in_thought = self._awaited == "<think>"
            self.has_thought = True
            self._awaited, self._is_start, self._held = None, True, ""
            self._is_blank = False
        pieces.append((self.in_thought, self._trimmed(text)))
        self._is_blank = self._is_blank and not text.strip()
        return [(is_thought, piece) for is_thought, piece in pieces if piece]

    def _trimmed(self, text: str) -> str:
        if self._is_start and self.has_thought:
            text = text.lstrip("\n")
        self._is_start = self._is_start and not text
        if not self.in_thought:
            return text
        text = self._held + text
        shown = text.rstrip("\n")
        self._held = text[len(shown) :]
        return shown


class Printer:
    """Words to stdout, the thought to stderr (dim on a terminal), both as they come."""

    def __init__(self, voices: Voices, *, hide_thinking: bool, out: Output | None = None) -> None:
        self.voices, self.hide_thinking = voices, hide_thinking
        self.out = out or sys.stdout
        self.aside = Console(stderr=True, highlight=False, soft_wrap=True)
        self.num_thought = 0
        self.words = ""
        self._was_thought = False

    def push(self, token: int, text: str) -> None:
        self.num_thought += self.voices.in_thought
        for is_thought, piece in self.voices.push(token, text):
            if is_thought:
                self._was_thought = True
                if not self.hide_thinking:
                    self.aside.print(Text(printable(piece), style="dim"), end="")
                continue
            self._end_thought()
            self.words += piece
            self.out.write(printable(piece))
            self.out.flush()

    def end(self, *, cut_off: bool = False) -> None:
        self._end_thought()
        if not self.words.endswith("\n"):
            self.out.write("\n")
        self.out.flush()
        if cut_off:
            self.aside.print("[dim]the answer was cut off: max_tokens is reached[/]")

    def _end_thought(self) -> None:
        if self._was_thought:
            words = f"(thought: {self.num_thought:,} tokens)" if self.hide_thinking else "\n"
            self.aside.print(Text(words, style="dim"))
            self._was_thought = False
