"""The state of one answer as the scheduler sees it: its tokens, what of them is cached, where, and what names its prefix."""

import hashlib
from collections.abc import Sequence as Many
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Span:
    """A run of placeholders: one image, or one slice of a video."""

    start: int
    end: int
    key: bytes | None
    """Names what is seen there; None where nobody said, and then nothing from here on is found again."""


@dataclass(eq=False, kw_only=True)
class Sequence:
    """One answer. `missing` tokens go through the model before its next token can be drawn: the prompt at first, then 1 a step."""

    request: str
    index: int = 0
    number: int = 0
    """The request's place in the order of arrival."""
    tokens: list[int]
    """Prompt and answer."""
    num_prompt: int
    max_length: int
    """Tokens of prompt and answer at most."""
    spans: tuple[Span, ...] = ()
    salt: str = ""
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    """Tokens whose keys and values lie in the blocks."""
    num_named: int = 0
    """Blocks whose name the block manager was told."""
    num_found: int = 0
    """Prompt tokens that came from the prefix cache when the request was taken up."""
    was_running: bool = False
    names: list[bytes] = field(default_factory=list)
    """A digest for each full block: of its tokens, what is seen there, and all blocks before it."""
    _next_span: int = 0

    @property
    def missing(self) -> int:
        return len(self.tokens) - self.num_computed

    @property
    def order(self) -> tuple[int, int]:
        """First come, first served."""
        return self.number, self.index

    def name_blocks(self, block_size: int, *, prompt_only: bool) -> None:
        """Make `names` as long as the full blocks are many; they stop for good at a visual without a key."""
        length = self.num_prompt if prompt_only else len(self.tokens)
        while (end := (len(self.names) + 1) * block_size) <= length:
            start = end - block_size
            while self._next_span < len(self.spans) and self.spans[self._next_span].end <= start:
                self._next_span += 1
            seen = []
            for span in self.spans[self._next_span :]:
                if span.start >= end:
                    break
                if span.key is None:
                    return
                seen.append(span.key)
            before = self.names[-1] if self.names else self.salt.encode()
            self.names.append(name_of_block(before, self.tokens[start:end], seen))

    def outside_spans(self, end: int, block_size: int) -> int:
        """The last block boundary at or before `end` that cuts no visual."""
        for span in reversed(self.spans):
            if span.start < end < span.end:
                end = span.start // block_size * block_size
        return end

    def fork(self, index: int) -> "Sequence":
        """Another answer to the same prompt. It has no blocks yet."""
        return Sequence(
            request=self.request,
            index=index,
            number=self.number,
            tokens=self.tokens[: self.num_prompt],
            num_prompt=self.num_prompt,
            max_length=self.max_length,
            spans=self.spans,
            salt=self.salt,
            num_found=self.num_found,
            was_running=True,
            names=self.names[:],
            _next_span=self._next_span,
        )


def name_of_block(before: bytes, tokens: Many[int], seen: Many[bytes]) -> bytes:
    """Every part is told by its length, so that no two lists of parts read alike."""
    parts = (before, b"".join(t.to_bytes(4, "little") for t in tokens), *seen)
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()
