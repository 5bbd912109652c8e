"""The engine's thread at its end: what is finished stays so, what runs is told, and nobody waits for ever."""

import asyncio
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qvl.core.batch import Sample
from qvl.engine.request import Event, Request, ended
from qvl.engine.sampling import Sampling
from qvl.serve.engine_thread import EngineThread
from qvl.serve.errors import Refusal


class Scripted:
    """An engine that does as it is told."""

    def __init__(self, step: Callable[[], list[Event]]) -> None:
        self.step, self.requests = step, {}

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    def submit(self, request: Request) -> None:
        self.requests[request.id] = request

    def cancel(self, id: str) -> None:
        self.requests.pop(id, None)

    def stats(self) -> Any:
        return SimpleNamespace()


def two_answers(id: str = "a") -> Request:
    return Request(id=id, sample=Sample(token_T=torch.tensor([1])), sampling=Sampling(), n=2)


async def ends(thread: EngineThread, ticket: Any) -> dict[int, str | None]:
    return {event.index: event.finish async for event in thread.events(ticket)}


def test_an_answer_that_has_its_end_keeps_it_when_the_server_stops() -> None:
    first = iter([[ended("a", 0, "stop")]])
    thread = EngineThread({"m": Scripted(lambda: next(first, []))}, on_stats=lambda *_: None)  # type: ignore[dict-item]

    async def run() -> dict[int, str | None]:
        thread.start()
        ticket = await thread.submit("m", two_answers())
        while not ticket.finished:
            await asyncio.sleep(0.01)
        await asyncio.get_running_loop().run_in_executor(None, thread.stop)
        return await asyncio.wait_for(ends(thread, ticket), 10)

    assert asyncio.run(run()) == {0: "stop", 1: "cancelled"}


def test_an_answer_that_has_its_end_keeps_it_when_a_step_fails() -> None:
    def step() -> list[Event]:
        if not steps:
            raise RuntimeError("broken")
        return steps.pop()

    steps = [[ended("a", 1, "length")]]
    thread = EngineThread({"m": Scripted(step)}, on_stats=lambda *_: None)  # type: ignore[dict-item]

    async def run() -> dict[int, str | None]:
        thread.start()
        ticket = await thread.submit("m", two_answers())
        found = await asyncio.wait_for(ends(thread, ticket), 10)
        thread.stop()
        return found

    assert asyncio.run(run()) == {0: "error", 1: "length"}


def test_who_asks_while_the_thread_ends_is_refused_and_does_not_wait() -> None:
    gate, entered = threading.Event(), threading.Event()

    def step() -> list[Event]:
        entered.set()
        gate.wait(10)
        return []

    thread = EngineThread({"m": Scripted(step)}, on_stats=lambda *_: None)  # type: ignore[dict-item]

    async def run() -> None:
        loop = asyncio.get_running_loop()
        thread.start()
        await thread.submit("m", two_answers())
        await loop.run_in_executor(None, entered.wait)
        late = asyncio.ensure_future(thread.submit("m", two_answers("b")))
        await asyncio.sleep(0.05)  # its command lies there, and the step does not end
        thread._is_stopping = True
        gate.set()
        with pytest.raises(Refusal, match="shutting down"):
            await asyncio.wait_for(late, 10)
        await loop.run_in_executor(None, thread.stop)
        with pytest.raises(Refusal, match="has stopped"):
            await thread.submit("m", two_answers("c"))

    asyncio.run(run())
