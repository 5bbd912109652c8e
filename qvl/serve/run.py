"""uvicorn with an orderly end: on SIGTERM nothing new begins, what runs is finished, and only then the door closes."""

import asyncio
import logging
import signal
from types import FrameType

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from qvl.serve.app import Service
from qvl.serve.engine_thread import EngineThread

log = logging.getLogger("qvl.serve")

HEADER_BYTES = 16 * 1024
"""Request line and headers together (CVE-2025-48956)."""
HEAD_SECONDS = 15.0
"""How long they may take to come, or twice that after an earlier request."""


class Protocol(H11Protocol):
    """Sends away who is connected and does not bring a whole head: uvicorn's own clock ends with the first byte that drips in."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._seen: object = self
        self._look()

    def _look(self) -> None:
        # Between two looks a head must have come.
        waits = self.cycle is None or self.cycle.response_complete
        if waits and self._seen is self.cycle:
            self.transport.close()
            return
        self._seen = self.cycle if waits else self
        self._next_look = self.loop.call_later(HEAD_SECONDS, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        self._next_look.cancel()
        super().connection_lost(exc)


class Server(uvicorn.Server):
    """The first signal drains, the second breaks off."""

    def __init__(self, app: FastAPI, *, host: str, port: int, drain_seconds: float = 30.0, backlog: int = 128) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                http=Protocol,
                ws="none",
                loop="asyncio",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=backlog,
                timeout_keep_alive=10,
                timeout_graceful_shutdown=5,
                h11_max_incomplete_event_size=HEADER_BYTES,
            )
        )
        service: Service = app.state.service
        self.thread: EngineThread = service.thread
        self.drain_seconds = drain_seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()

    @property
    def port(self) -> int:
        """The one that was bound, where 0 was asked for."""
        return self.servers[0].sockets[0].getsockname()[1]

    async def startup(self, sockets: list | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started and self.servers:
            host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
            log.info("listening at http://%s:%d/ (the chat page), /v1 for OpenAI clients", host, self.port)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Not uvicorn's own, which stops listening at once and raises the signal again at the end, so that the exit status is no 0."""
        if self._loop is None:
            self.should_exit = True
            return
        self._loop.call_soon_threadsafe(self.drain, signal.Signals(sig).name)

    def drain(self, reason: str = "asked to") -> None:
        if self._draining is not None:
            self._hurry.set()
            return
        log.info("%s: finishing what runs, taking nothing new; once more breaks it off", reason)
        self.thread.is_draining = True
        self._draining = asyncio.ensure_future(self._drained())

    async def _drained(self) -> None:
        deadline = asyncio.get_running_loop().time() + self.drain_seconds
        while self.server_state.tasks and not self._hurry.is_set() and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
        if self.server_state.tasks:
            log.warning("%d requests are broken off", len(self.server_state.tasks))
            await asyncio.get_running_loop().run_in_executor(None, self.thread.stop)
            await asyncio.sleep(0.2)  # the cancelled answers' last lines
        self.should_exit = True
