"""Answers as text that may be shown: whole characters, and nothing that may still become a stop string."""

from typing import Protocol


class TextStream(Protocol):
    """Turns ids into text as they come (qvl.prompt.tokenizer.TextStream)."""

    def push(self, id: int) -> str: ...
    def end(self) -> str: ...


class TextOutput:
    """Text that may be shown: holds back what could still become a stop string, and ends before one."""

    def __init__(self, stop: tuple[str, ...], text_stream: TextStream | None) -> None:
        self.stop, self.text_stream = stop, text_stream
        self.held = ""
        self.is_stopped = False

    def push(self, token: int) -> str:
        return self._release(self.text_stream.push(token)) if self.text_stream else ""

    def end(self) -> str:
        """What was held back; nothing after a stop string."""
        if self.is_stopped or self.text_stream is None:
            return ""
        text = self._release(self.text_stream.end())
        held, self.held = self.held, ""
        return text if self.is_stopped else text + held

    def _release(self, text: str) -> str:
        self.held += text
        # The one complete first, and of those the longest: what a letter-by-letter search finds, however the text is cut into tokens.
        found = [(at + len(stop), at) for stop in self.stop if (at := self.held.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            text, self.held = self.held[: min(found)[1]], ""
            return text
        keep = max((overlap(self.held, stop) for stop in self.stop), default=0)
        cut = len(self.held) - keep
        text, self.held = self.held[:cut], self.held[cut:]
        return text


def overlap(text: str, stop: str) -> int:
    """Longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
