"""A server over a tiny model on a free loopback port, in a thread of its own, for tests of the door."""

import base64
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from media_files import encoded, gradient
from qvl.commands.serve import Serve, build
from qvl.serve.limits import Limits
from qvl.serve.run import Server

KEY = "sk-0123456789abcdef0123456789abcdef"


def picture(height: int = 64, width: int = 96, format: str = "PNG") -> str:
    """A data URI."""
    return data_uri(encoded(gradient(height, width), format), f"image/{format.lower()}")


def noise(seed: int, side: int = 64) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return data_uri(encoded(pixels, "PNG"), "image/png")


def data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


@contextmanager
def running(
    folder: Path,
    *,
    keys: tuple[str, ...] = (),
    adapters: dict[str, Path] | None = None,
    limits: Limits | None = None,
    **flags: Any,
) -> Iterator[Server]:
    """A server that listens; it drains at the end."""
    flags = {"name": "tiny", "memory_gib": 0.02, "dtype": "float32", "device": "cpu", "max_tokens": 8} | flags
    app = build(Serve(model=str(folder), port=0, **flags), folder, adapters or {}, keys, limits)
    server = Server(app, host="127.0.0.1", port=0, drain_seconds=20)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise AssertionError("the server did not start")
        time.sleep(0.01)
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive()


def address(server: Server) -> str:
    return f"http://127.0.0.1:{server.port}"
