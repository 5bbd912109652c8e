"""Jobs that misbehave, run by a real worker process in test_workers.py."""

import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from qvl.outside.decode import JOBS as REAL
from qvl.outside.media import MediaError


def echo(stream: Any, limits: Any) -> Iterator[Any]:
    del limits
    yield {"said": "bytes follow"}, stream.read()


def facts(stream: Any, limits: Any) -> Iterator[Any]:
    del stream, limits
    loaded = [name for name in ("torch", "qvl.model", "qvl.prompt") if name in sys.modules]
    yield (
        {
            "pid": os.getpid(),
            "environment": dict(os.environ),
            "loaded": loaded,
            "files": sorted(os.listdir("/proc/self/fd")),
        },
        b"",
    )


def hang(stream: Any, limits: Any) -> Iterator[Any]:
    del stream, limits
    time.sleep(3600)
    yield {}, b""


def drip(stream: Any, limits: Any) -> Iterator[Any]:
    del stream, limits
    while True:
        time.sleep(0.05)
        yield {}, b""


def grow(stream: Any, limits: Any, *, native: bool) -> Iterator[Any]:
    del stream, limits
    if native:
        import numpy as np

        held = [np.ones(10_000_000) for _ in range(1000)]
        yield {"held": len(held)}, b""
    held = []
    while True:
        held.append(bytearray(10_000_000))


def crash(stream: Any, limits: Any) -> Iterator[Any]:
    del stream, limits
    os.abort()
    yield {}, b""


def flood(stream: Any, limits: Any) -> Iterator[Any]:
    del stream, limits
    yield {}, bytes(50_000_000)


def blab(stream: Any, limits: Any) -> Iterator[Any]:
    del stream, limits
    raise RuntimeError("secret 0x7f001234 in /home/someone")
    yield {}, b""


def refuse(stream: Any, limits: Any) -> Iterator[Any]:
    del stream, limits
    raise MediaError("this file is refused; send another.")
    yield {}, b""


def write(stream: Any, limits: Any, *, path: str) -> Iterator[Any]:
    del stream, limits
    with open(path, "wb") as file:
        file.write(b"here I am")
        file.flush()
    yield {}, b""


JOBS: dict[str, Any] = {
    f.__name__: f for f in (echo, facts, hang, drip, grow, crash, flood, blab, refuse, write)
} | REAL
