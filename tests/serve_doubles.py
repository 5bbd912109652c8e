"""A server over a tiny model on a free loopback port, in a thread of its own, and what tests of the door send it and ask of it."""

import asyncio
import base64
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from media_files import encoded, gradient
from qvl.commands.serve import Serve, build
from qvl.engine.engine import Engine
from qvl.serve.app import Service
from qvl.serve.limits import Limits
from qvl.serve.run import Server

CHAT = "/v1/chat/completions"
TELLTALE = re.compile(r"/tmp|/usr|\.py\b|Traceback|0x[0-9a-f]{6}|site-packages|Error\b|line \d+")
CLIENT = httpx.Client(timeout=60, verify=False)
"""One for all: each new one reads the certificates of the whole internet."""
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


def service(server: Server) -> Service:
    return server.config.app.state.service  # type: ignore[union-attr]


def engine_of(server: Server) -> Engine:
    return next(iter(service(server).thread.engines.values()))


def holds_nothing(server: Server) -> bool:
    """No request is under way, and no block, patch or byte of one is held."""
    stats = engine_of(server).stats()
    idle = not engine_of(server).has_work and stats.running == stats.waiting == 0
    return idle and stats.blocks_free == stats.blocks_total and service(server).held_bytes == 0


@dataclass
class Beats:
    """How the event loop came round while something else was done."""

    count: int = 0
    worst: float = 0.0
    """Seconds between two rounds."""


@contextmanager
def heartbeat(server: Server) -> Iterator[Beats]:
    beats, loop, stop = Beats(), server._loop, threading.Event()
    assert loop is not None

    async def beat() -> None:
        while not stop.is_set():
            start = time.monotonic()
            await asyncio.sleep(0.002)
            beats.count, beats.worst = beats.count + 1, max(beats.worst, time.monotonic() - start - 0.002)

    future = asyncio.run_coroutine_threadsafe(beat(), loop)
    try:
        yield beats
    finally:
        stop.set()
        future.result(60)


# ---- what is sent


def user(*parts: Any) -> list[Any]:
    """A conversation of one message; plain words become parts."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return [{"role": "user", "content": content or "Hi"}]


def image(url: Any, **wishes: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}, **wishes}


def video(url: Any, **wishes: Any) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url}, **wishes}


def body(*parts: Any, **asked: Any) -> dict[str, Any]:
    return {"messages": user(*parts), "max_tokens": 2, **asked}


def post(server: Server, data: Any, path: str = CHAT, **options: Any) -> httpx.Response:
    return CLIENT.post(address(server) + path, json=data, **options)


# ---- what comes back


def refused(reply: httpx.Response, status: int) -> str:
    """The sentence of a refusal in OpenAI's shape, which tells nothing about the machine."""
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["type"].endswith("_error")
    assert not TELLTALE.search(reply.text), reply.text
    return error["message"]


def eventually(is_so: Callable[[], bool], seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if is_so():
            return True
        time.sleep(0.01)
    return is_so()
