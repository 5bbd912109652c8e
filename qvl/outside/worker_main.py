"""The worker process: takes a job and an open file from a socket, decodes, streams bytes back. Knows neither torch nor the model."""

import importlib
import json
import os
import socket
import struct
import sys
import threading
from pathlib import Path
from typing import Any

HEADER = struct.Struct(">IQ")  # bytes of JSON, bytes of buffer


def main(socket_fd: int, life_fd: int, settings: dict[str, Any]) -> None:
    _limit_myself(settings["limits"]["memory_bytes"])
    threading.Thread(target=_die_with_parent, args=(life_fd,), daemon=True).start()
    sys.path += [
        entry for entry in (*settings["path"], str(Path(__file__).resolve().parents[2])) if entry not in sys.path
    ]
    with socket.socket(fileno=socket_fd) as wire:
        try:
            from PIL import Image

            from qvl.outside.decode import run_job
            from qvl.outside.media import MediaError, MediaLimits

            limits = MediaLimits(**settings["limits"])
            jobs = importlib.import_module(settings["jobs"]).JOBS
        except ImportError as error:
            return _refuse_all(
                wire, f"the decoding process cannot import {error.name or error}; install it beside qvl."
            )
        # Our own limit is checked on the header, and says the size; past twice as many Pillow stops by itself, also half-way in a file.
        Image.MAX_IMAGE_PIXELS = limits.max_pixels
        while request := _receive(wire):
            job, fd = request
            try:
                with os.fdopen(fd, "rb") as stream:
                    for header, buffer in run_job(jobs, job["name"], stream, limits, job["options"]):
                        _send(wire, header, buffer)
                _send(wire, {"end": True})
            except MediaError as error:
                _send(wire, {"refused": str(error), "cause": type(error.__cause__).__name__})
            except MemoryError:
                _send(
                    wire,
                    {
                        "refused": "decoding the file needs more memory than it may have; send a smaller one.",
                        "cause": "MemoryError",
                    },
                )
            except OSError as error:
                if isinstance(error, BrokenPipeError | ConnectionError):
                    return
                _send(wire, {"refused": "the file could not be decoded.", "cause": type(error).__name__})
            except Exception as error:
                _send(wire, {"refused": "the file could not be decoded.", "cause": type(error).__name__})


def _refuse_all(wire: socket.socket, sentence: str) -> None:
    while request := _receive(wire):
        os.close(request[1])
        _send(wire, {"refused": sentence, "cause": "ImportError"})


def _limit_myself(memory_bytes: int) -> None:
    try:
        import resource
    except ImportError:  # Windows has neither limits nor descriptors sent over sockets; the pool refuses before
        return
    # DATA counts memory that is written; AS also counts reserved addresses, which thread arenas take 64 MiB at a time.
    wanted = {"RLIMIT_DATA": memory_bytes, "RLIMIT_AS": memory_bytes + 2 * 1024**3, "RLIMIT_FSIZE": 0, "RLIMIT_CORE": 0}
    for name, value in wanted.items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        limit = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (limit, limit))


def _die_with_parent(life_fd: int) -> None:
    """The parent holds the other end and never writes: the read returns when the parent is gone, however it went."""
    os.read(life_fd, 1)
    os._exit(1)


def _receive(wire: socket.socket) -> tuple[dict[str, Any], int] | None:
    _, fds, _, _ = socket.recv_fds(wire, 1, 1)
    if not fds:
        return None
    (length,) = struct.unpack(">I", _exactly(wire, 4))
    return json.loads(_exactly(wire, length)), fds[0]


def _exactly(wire: socket.socket, length: int) -> bytearray:
    data = bytearray(length)
    view, got = memoryview(data), 0
    while got < length:
        read = wire.recv_into(view[got:])
        if read == 0:
            os._exit(0)
        got += read
    return data


def _send(wire: socket.socket, header: dict[str, Any], buffer: Any = b"") -> None:
    text = json.dumps(header).encode()
    body = memoryview(buffer).cast("B") if memoryview(buffer).nbytes else memoryview(b"")
    wire.sendall(HEADER.pack(len(text), body.nbytes) + text)
    wire.sendall(body)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
