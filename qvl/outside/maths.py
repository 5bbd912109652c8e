"""Whether two mathematical answers are equal, by math-verify: each pair in a process of its own, which its own alarm clock kills."""

import importlib.util
import io
import json
import logging
import os
import select
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, BinaryIO, Self

from qvl.outside.media import MediaError, MediaLimits, Message
from qvl.outside.workers import WorkerPool

SECONDS = 1.5
"""For one pair. math-verify's own timeouts are signals, which work in a main thread alone and not inside a C function."""
SECONDS_TO_START = 60.0
"""For a worker to import sympy on a busy machine; a second on one at rest."""
MEMORY_BYTES = 2**30


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What math-verify says of one pair."""

    equal: bool | None
    """None where it gave no verdict."""
    read: str | None = None
    """What it read in the answer."""
    reason: str = ""
    """One sentence where there is no verdict, or nothing was read."""


class MathPool:
    """`size` warm processes; each forks a child for each pair, so that a hostile one costs a fork and not an import of sympy.

    Threads may share a pool. A process that dies is started again, and the pair it had gets no verdict.
    """

    def __init__(self, *, size: int = 1, seconds: float = SECONDS) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError(
                "mathematical answers need math-verify, which is not installed; run: pip install 'qvl[eval]'"
            )
        self._seconds = seconds
        limits = MediaLimits(max_seconds=SECONDS_TO_START, memory_bytes=MEMORY_BYTES)
        self._workers = WorkerPool(limits, size=size, jobs="qvl.outside.maths")

    def verify(self, golds: Sequence[str], answers: Sequence[str]) -> Verdict:
        """Whether any of the answer's spellings equals the gold, read from the first of its spellings that can be."""
        pair = json.dumps({"golds": list(golds), "answers": list(answers)}).encode()
        try:
            # To its end: a worker that is left half-way is ended.
            [(header, _)] = list(self._workers.run("verify", io.BytesIO(pair), seconds=self._seconds))
            return Verdict(**header)
        except MediaError:
            pass
        return Verdict(
            equal=None, reason="The process that compares answers died; it is started again for the next one."
        )

    def close(self) -> None:
        self._workers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@cache
def math_pool() -> MathPool:
    """The pool of this process, started when first needed; its worker ends with us."""
    return MathPool()


# ---- inside the worker -------------------------------------------------------------------------------------------


def verify(stream: BinaryIO, limits: MediaLimits, *, seconds: float) -> Iterator[Message]:
    """The job: one message with the fields of a Verdict."""
    del limits
    pair = json.loads(stream.read())
    _warm()
    theirs, ours = os.pipe()
    child = os.fork()
    if child == 0:
        # No way leads out of here but _exit: this is a copy of a worker, with a copy of its socket.
        try:
            os.closerange(3, ours)
            os.closerange(ours + 1, 256)
            # The default action: the kernel ends the process, whatever runs in it. Also when the worker is gone.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, seconds)
            said = json.dumps(_compare(pair["golds"], pair["answers"])).encode()
            while said:
                said = said[os.write(ours, said) :]
        finally:
            os._exit(0)
    os.close(ours)
    try:
        said = b""
        while piece := _piece(theirs, seconds + 1):
            said += piece
    finally:
        os.close(theirs)
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
    if said:
        yield json.loads(said), b""
    elif os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGALRM, signal.SIGKILL):
        yield {"equal": None, "reason": f"The comparison took longer than {seconds:g} seconds."}, b""
    else:
        yield {"equal": None, "reason": "The comparison needed more memory than it may have, or crashed."}, b""


JOBS = {"verify": verify}


def _piece(fd: int, seconds: float) -> bytes:
    ready, _, _ = select.select([fd], [], [], seconds)
    return os.read(fd, 65536) if ready else b""


def _compare(golds: list[str], answers: list[str]) -> dict[str, Any]:
    from math_verify import parse, verify

    gold = next((found for text in golds if (found := parse(text, parsing_timeout=None))), None)  # pyright: ignore[reportArgumentType]
    if gold is None:
        return {"equal": None, "reason": "The gold cannot be read as mathematics."}
    read = None
    for text in answers:
        answer = parse(text, parsing_timeout=None)  # pyright: ignore[reportArgumentType]
        read = read or (str(answer[-1])[:1000] if answer else None)
        # Not symmetric: an assignment or an inequality in the gold asks for other things than one in the answer.
        if answer and verify(gold, answer, timeout_seconds=None):
            return {"equal": True, "read": str(answer[-1])[:1000]}
    return {"equal": False, "read": read, "reason": "" if read else "The answer holds no mathematics that can be read."}


@cache
def _warm() -> None:
    """Imports and first uses (of sympy's printers, of the grammar's tables), which each child then inherits."""
    logging.disable(logging.CRITICAL)
    _compare([r"$\frac{1}{2} + \sqrt{x^2}$"], [r"\boxed{(1, 2]}", "0.5", r"$\{1, 2\} \cup [3, \infty)$", r"$x = 50\%$"])
