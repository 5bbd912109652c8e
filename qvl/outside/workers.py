"""Decoding in a process that can be killed: wall time, memory and size are bounded, and nothing it sends back is executed."""

import json
import os
import queue
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, Protocol, Self, cast

from qvl.core.device import child_environment
from qvl.outside.decode import JOBS, run_job
from qvl.outside.media import MediaError, MediaLimits, Message
from qvl.outside.worker_main import HEADER

_MAIN = Path(__file__).with_name("worker_main.py")


class Decoder(Protocol):
    """Runs the jobs of qvl.outside.decode on an open file."""

    @property
    def limits(self) -> MediaLimits: ...

    def run(self, job: str, stream: BinaryIO, **options: Any) -> Generator[Message]: ...


class InProcess:
    """Decodes here and now. For files you trust (training data): a hostile one can hang or crash the process."""

    def __init__(self, limits: MediaLimits | None = None) -> None:
        self.limits = limits or MediaLimits()

    def run(self, job: str, stream: BinaryIO, **options: Any) -> Generator[Message]:
        return run_job(JOBS, job, stream, self.limits, options)


class WorkerPool:
    """`size` processes that decode, started when first needed and again after each kill. Threads may share a pool.

    A job that keeps its caller waiting longer than `limits.max_seconds` in all costs its process, not the caller. So does a caller that
    stops reading half-way. The worker gets the file as an open descriptor and has no environment; it answers in JSON and raw bytes.
    """

    def __init__(self, limits: MediaLimits | None = None, *, size: int = 1, jobs: str = "qvl.outside.decode") -> None:
        if not hasattr(socket, "send_fds"):
            raise ValueError(
                "worker processes need a system that passes open files over sockets (Linux, macOS); decode in process."
            )
        if size < 1:
            raise ValueError(f"a pool of {size} workers was asked for; it needs at least one.")
        self.limits = limits or MediaLimits()
        self._jobs = jobs
        self._free: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(size):
            self._free.put(None)
        self._size = size
        self._live: set[_Worker] = set()
        self._is_stopped = False

    def run(self, job: str, stream: BinaryIO, **options: Any) -> Generator[Message]:
        worker = self._free.get()
        healthy = False
        try:
            if worker is not None and not worker.usable():
                self._end(worker)
                worker = None
            if worker is None:
                worker = _Worker(self.limits, self._jobs)
                self._live.add(worker)
            if self._is_stopped:
                raise MediaError("decoding has been stopped; send the file again later.")
            with _descriptor(stream) as file:
                yield from worker.run(job, file.fileno(), options)
            healthy = True
        except MediaError:
            healthy = worker is not None and worker.usable() and not self._is_stopped
            raise
        finally:
            if not healthy and worker is not None:
                self._end(worker)
            self._free.put(worker if healthy else None)

    def close(self) -> None:
        """Ends the processes; waits for running jobs to finish first."""
        for _ in range(self._size):
            if worker := self._free.get():
                self._end(worker)
        for _ in range(self._size):
            self._free.put(None)

    def stop(self) -> None:
        """Ends the processes now and for good: running jobs are MediaErrors, and so are later ones."""
        self._is_stopped = True
        for worker in tuple(self._live):
            worker.process.kill()
            worker.process.wait()

    def _end(self, worker: "_Worker") -> None:
        worker.kill()
        self._live.discard(worker)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Worker:
    def __init__(self, limits: MediaLimits, jobs: str) -> None:
        self.limits = limits
        self.owner = os.getpid()
        self.wire, theirs = socket.socketpair()
        life_end, life = os.pipe()
        self.life = os.fdopen(life, "wb")  # closed with us, which ends the worker
        # -I keeps this folder's files and the surroundings out; where our packages lie is told instead, after the interpreter's own.
        settings = json.dumps(
            {"limits": asdict(limits), "jobs": jobs, "path": [p for p in sys.path if os.path.isabs(p)]}
        )
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-I", str(_MAIN), str(theirs.fileno()), str(life_end), settings],
                pass_fds=(theirs.fileno(), life_end),
                env={**child_environment("LD_LIBRARY_PATH"), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        os.close(life_end)

    def usable(self) -> bool:
        # A forked data loader worker must not talk over its parent's socket.
        return self.owner == os.getpid() and self.process.poll() is None

    def kill(self) -> None:
        self.wire.close()
        self.life.close()
        if self.owner == os.getpid():
            self.process.kill()
            self.process.wait()

    def run(self, job: str, fd: int, options: dict[str, Any]) -> Iterator[Message]:
        self.waited = 0.0
        text = json.dumps({"name": job, "options": options}).encode()
        try:
            self.wire.settimeout(self.limits.max_seconds)
            socket.send_fds(self.wire, [b"j"], [fd])
            self.wire.sendall(struct.pack(">I", len(text)) + text)
            while True:
                size, body = HEADER.unpack(self._receive(HEADER.size))
                # The worker is not trusted either: it may not make us allocate what the limits forbid.
                if size > 64 * 1024**2 or body > max(4 * self.limits.max_pixels, 16 * self.limits.max_frames):
                    raise self._dead("the decoding process sent more than the limits allow")
                header = json.loads(self._receive(size))
                buffer = self._receive(body)
                if "refused" in header:
                    error = MediaError(header["refused"])
                    error.add_note(f"cause in the decoding process: {header['cause']}")
                    raise error
                if "end" in header:
                    return
                yield header, buffer
        except TimeoutError:
            raise self._dead(f"decoding the file took longer than {self.limits.max_seconds:g} seconds") from None
        except (ConnectionError, EOFError) as error:
            raise self._dead("decoding the file crashed its process or ran out of memory") from error

    def _dead(self, sentence: str) -> MediaError:
        self.process.kill()
        self.process.wait()
        return MediaError(f"{sentence}; the process was ended. Send another file.")

    def _receive(self, length: int) -> bytearray:
        """Exactly so many bytes. Only waiting counts against the time limit, not what the caller does in between."""
        data = bytearray(length)
        view, got = memoryview(data), 0
        while got < length:
            left = self.limits.max_seconds - self.waited
            if left <= 0:
                raise TimeoutError
            self.wire.settimeout(left)
            start = time.monotonic()
            read = self.wire.recv_into(view[got:])
            self.waited += time.monotonic() - start
            if read == 0:
                raise EOFError
            got += read
        return data


def _descriptor(stream: BinaryIO) -> BinaryIO:
    """The same bytes behind a descriptor that can be handed to another process; the caller closes it."""
    try:
        return os.fdopen(os.dup(stream.fileno()), "rb")
    except (AttributeError, OSError):
        pass  # bytes in memory: BytesIO has no descriptor
    if hasattr(os, "memfd_create"):
        file = cast(BinaryIO, os.fdopen(os.memfd_create("media", os.MFD_CLOEXEC), "w+b"))
    else:
        file = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115 - the caller closes it
    stream.seek(0)
    while chunk := stream.read(1024**2):
        file.write(chunk)
    file.flush()
    return file
