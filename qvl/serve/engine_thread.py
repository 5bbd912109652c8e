"""The engine in a thread of its own: requests go in from the event loop, tokens come back to it."""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field

from qvl.engine.engine import Engine, EngineStats, QueueFull
from qvl.engine.request import Event, Finish, Request, ended
from qvl.serve.errors import Refusal, busy, draining, safe_sentence

log = logging.getLogger("qvl.serve")

BROKEN = "The model failed on this request."
STOPPED = "The engine has stopped; restart the server."


@dataclass
class Ticket:
    """A request on its way: its tokens arrive in `events`."""

    request: Request
    model: str
    loop: asyncio.AbstractEventLoop
    accepted: asyncio.Future[None]
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    left: int = 1
    """Answers whose end has not been read here yet."""
    finished: set[int] = field(default_factory=set)
    """Answers that have their end; touched by the thread alone."""

    def rest(self, finish: Finish, said: str | None = None) -> list[Event]:
        """The end of all other answers."""
        return [ended(self.request.id, i, finish, said) for i in range(self.request.n) if i not in self.finished]


class EngineThread:
    """Owns one engine for each served name (the model, and one for each adapter) and alone calls them.

    What the event loop wants done lies in a list of commands, read between two steps: a cancellation takes effect within one step.
    """

    def __init__(self, engines: Mapping[str, Engine], *, on_stats: Callable[[str, EngineStats], None]) -> None:
        self.engines = dict(engines)
        self._on_stats = on_stats
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._tickets: dict[str, Ticket] = {}
        """Touched by the thread alone."""
        self._is_stopping = self._is_over = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.is_draining = False
        """New requests are turned away at the gate; what it let in may still be submitted."""
        self.failure: str | None = None
        """Why the engine can no longer be used; None while it can."""

    # ---- called from the event loop

    def start(self) -> None:
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and self.failure is None

    async def submit(self, model: str, request: Request) -> Ticket:
        """The request is queued once this returns; Refusal where the engine does not take it. Whoever holds the ticket either reads its
        `events` to the end or calls `cancel`."""
        if not self.is_alive:
            raise Refusal(503, STOPPED, code="engine")
        loop = asyncio.get_running_loop()
        ticket = Ticket(request, model, loop, loop.create_future(), left=request.n)
        self._command(lambda: self._submit(ticket))
        try:
            await ticket.accepted
        except asyncio.CancelledError:
            self.cancel(ticket)
            raise
        return ticket

    async def events(self, ticket: Ticket) -> AsyncIterator[Event]:
        """Tokens and ends of all answers as they come."""
        while ticket.left:
            event = await ticket.events.get()
            ticket.left -= event.finish is not None
            yield event

    def cancel(self, ticket: Ticket) -> None:
        """Nothing happens to one that has ended."""
        if ticket.left:
            self._command(lambda: self._cancel(ticket))

    def stop(self) -> None:
        """Cancels what runs and ends the thread."""
        self._is_stopping = True
        self._command(lambda: None)
        if self._thread.is_alive():
            self._thread.join(timeout=30)

    def _command(self, command: Callable[[], None]) -> None:
        with self._wake:
            if not self._is_over:
                self._commands.append(command)
                self._wake.notify()
                return
        command()  # nobody else will: it refuses, or finds nothing to do

    # ---- in the thread

    def _run(self) -> None:
        while not self._is_stopping:
            with self._wake:
                while not self._commands and not self._has_work():
                    self._wake.wait()
                commands = list(self._commands)
                self._commands.clear()
            for command in commands:
                command()
            for name, engine in self.engines.items():
                if engine.has_work:
                    self._step(name, engine)
        for ticket in list(self._tickets.values()):
            self._cancel(ticket)
            self._send(ticket, ticket.rest("cancelled"))
        with self._wake:
            self._is_over = True
        for command in self._commands:
            command()

    def _has_work(self) -> bool:
        return any(engine.has_work for engine in self.engines.values())

    def _submit(self, ticket: Ticket) -> None:
        if ticket.accepted.cancelled():  # went away while it waited for the step to end
            return
        error: Exception | None = None
        try:
            if self._is_stopping:
                raise draining() if self.failure is None else Refusal(503, STOPPED, code="engine")
            self.engines[ticket.model].submit(ticket.request)
            self._tickets[ticket.request.id] = ticket
        except Refusal as refused:
            error = refused
        except QueueFull:
            error = busy("The queue is full; try again later.")
        except ValueError as refused:
            error = Refusal(400, safe_sentence(refused), code="does_not_fit")
        except Exception:
            log.exception("a request could not be queued")
            error = Refusal(500, BROKEN)
        self._report(ticket.model)

        def tell() -> None:
            if ticket.accepted.done():
                return
            if error is None:
                ticket.accepted.set_result(None)
            else:
                ticket.left = 0
                ticket.accepted.set_exception(error)

        _call(ticket.loop, tell)

    def _cancel(self, ticket: Ticket) -> None:
        if self._tickets.pop(ticket.request.id, None) is not None:
            self.engines[ticket.model].cancel(ticket.request.id)
            self._report(ticket.model)

    def _step(self, name: str, engine: Engine) -> None:
        try:
            events = engine.step()
        except Exception:
            # The engine fails requests one by one; what reaches us is a fault of its own. Those in it are lost, the next are not.
            log.exception("a step of the engine failed")
            events = []
            for ticket in [t for t in self._tickets.values() if t.model == name]:
                events += ticket.rest("error", BROKEN)
                try:
                    engine.cancel(ticket.request.id)
                except Exception:
                    log.exception("the engine cannot let go of a request")
                    self.failure = "the engine is in no known state"
                    self._is_stopping = True
        sorted_events: dict[str, list[Event]] = {}
        for event in events:
            sorted_events.setdefault(event.request, []).append(event)
        for id, mine in sorted_events.items():
            if (ticket := self._tickets.get(id)) is not None:
                self._send(ticket, mine)
        self._report(name)

    def _send(self, ticket: Ticket, events: list[Event]) -> None:
        ticket.finished |= {event.index for event in events if event.finish is not None}
        if len(ticket.finished) >= ticket.request.n:
            self._tickets.pop(ticket.request.id, None)

        def put() -> None:
            for event in events:
                ticket.events.put_nowait(event)

        _call(ticket.loop, put)

    def _report(self, name: str) -> None:
        self._on_stats(name, self.engines[name].stats())


def _call(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    try:
        loop.call_soon_threadsafe(function)
    except RuntimeError:  # the loop is closed: nobody is left to hear it
        log.debug("an event came after the server had closed")
