"""Sixty-four clients at once, ten times too many, and clients that leave: every answer is what it is alone, and nothing stays held."""

import asyncio
import json
import random
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from media_files import encoded, numbered_frame
from memory_watch import MemoryWatch
from qvl.engine.sequence import Sequence
from qvl.serve.app import App, has_media
from qvl.serve.gate import Gate
from qvl.serve.run import Server
from serve_doubles import (
    CHAT,
    address,
    body,
    data_uri,
    engine_of,
    eventually,
    holds_nothing,
    image,
    noise,
    picture,
    post,
    running,
    service,
)

pytestmark = pytest.mark.no_shape_hook
MIB = 2**20


def gate_of(server: Server) -> Gate:
    app: Any = server.config.app
    assert isinstance(app, App)
    layer: Any = app.middleware_stack
    while not isinstance(layer, Gate):
        layer = layer.app
    return layer


def nothing_is_left(server: Server) -> bool:
    return holds_nothing(server) and gate_of(server).in_flight == gate_of(server).held_bytes == 0


def percentiles(seconds: list[float]) -> str:
    if not seconds:
        return "none"
    p50, p99 = np.percentile(seconds, [50, 99]) * 1000
    return f"p50 {p50:.0f} ms, p99 {p99:.0f} ms of {len(seconds):,}"


# ---- mixed clients


def catalogue() -> list[dict[str, Any]]:
    """Words and pictures, short and long, one answer and several, greedy and drawn with a seed."""
    frames = [data_uri(encoded(numbered_frame(i, 32, 32), "PNG"), "image/png") for i in range(6)]
    film = {"type": "video_frames", "video_frames": frames, "fps": 2}
    long = "the same long beginning " * 20
    asked = [
        body("Hi"),
        body("Tell me of the sea.", temperature=1, seed=3),
        body(long + "first", max_tokens=10),
        body(long + "second", temperature=0.7, seed=5, n=2),
        body("What now?", n=3, seed=1, temperature=1, max_tokens=5),
        body(image(noise(1)), "What?"),
        body(image(noise(2)), "What?", temperature=1, seed=9),
        body(image(noise(1)), image(picture()), "Which?", n=2, temperature=1, seed=2),
        body("First this", image(picture(96, 64)), "and then?", max_tokens=9),
        body(film, "What happens?"),
        body("Count: " + " ".join(map(str, range(200))), max_tokens=6),
        body(image(noise(3, 128)), "Describe.", presence_penalty=1.0, max_tokens=12),
    ]
    return [{"temperature": 0, **data} | {"max_tokens": max(4, data["max_tokens"])} for data in asked]


@dataclass
class Tally:
    """What the clients saw."""

    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    left: int = 0
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)


def answers(choices: list[dict[str, Any]]) -> list[Any]:
    return [(choice["message"]["content"], choice["finish_reason"]) for choice in choices]


async def streamed(
    client: httpx.AsyncClient, url: str, data: dict[str, Any], tally: Tally, leave_after: int | None
) -> Any:
    """The answers, joined from their chunks; None where the client left."""
    start = last = time.monotonic()
    words, finish, count = [""] * (data.get("n") or 1), [""] * (data.get("n") or 1), 0
    async with client.stream("POST", url, json=data | {"stream": True}) as reply:
        tally.statuses[reply.status_code] += 1
        async for line in reply.aiter_lines():
            if not line or line == "data: [DONE]":
                continue
            if leave_after is not None and count >= leave_after:
                tally.left += 1
                return None
            [choice] = json.loads(line.removeprefix("data: "))["choices"]
            if choice["delta"].get("content"):
                now = time.monotonic()
                (tally.between if count else tally.first).append(now - (last if count else start))
                last, count = now, count + 1
                words[choice["index"]] += choice["delta"]["content"]
            finish[choice["index"]] = choice["finish_reason"] or finish[choice["index"]]
    return list(zip(words, finish, strict=True))


async def mixed(
    server: Server, expected: list[Any], tally: Tally, *, clients: int, requests: int | None, seconds: float | None
) -> None:
    """`requests` of each client, or as many as it makes in `seconds`."""
    asked, url = catalogue(), address(server) + CHAT
    end = None if seconds is None else time.monotonic() + seconds

    async def one(number: int, client: httpx.AsyncClient) -> None:
        draw, made = random.Random(number), 0
        while made < requests if requests is not None else time.monotonic() < (end or 0):
            made += 1
            which, how = draw.randrange(len(asked)), draw.choice(("whole", "stream", "stream", "leave"))
            if how == "whole":
                reply = await client.post(url, json=asked[which])
                tally.statuses[reply.status_code] += 1
                got = answers(reply.json()["choices"]) if reply.status_code == 200 else reply.text
            else:
                got = await streamed(client, url, asked[which], tally, draw.randrange(4) if how == "leave" else None)
            if got is not None and got != expected[which]:
                tally.wrong.append(f"{how} {which}: {got!r} and alone {expected[which]!r}")

    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(timeout=300, verify=False, limits=limits) as client:
        await asyncio.gather(*(one(number, client) for number in range(clients)))


@pytest.mark.parametrize(
    "requests, seconds", [(1, None), pytest.param(None, 300.0, marks=pytest.mark.slow)], ids=["short", "five minutes"]
)
def test_every_answer_among_64_clients_is_what_it_is_alone(
    tiny_folder: Path, requests: int | None, seconds: float | None
) -> None:
    with running(tiny_folder, mode="exact") as server:
        expected = [answers(post(server, data).json()["choices"]) for data in catalogue()]
        warm = Tally()
        if seconds is not None:  # until caches, arenas and threads have grown to what they will be
            asyncio.run(mixed(server, expected, warm, clients=64, requests=None, seconds=120))
        tally, before, threads = Tally(), MemoryWatch.now(), threading.active_count()
        asyncio.run(mixed(server, expected, tally, clients=64, requests=requests, seconds=seconds))
        risen = MemoryWatch.now() - before
        print(
            f"\n{sum(tally.statuses.values()):,} requests {dict(tally.statuses)}, {tally.left:,} left, {len(tally.wrong)} wrong; "
            f"first token {percentiles(tally.first)}; between tokens {percentiles(tally.between)}; memory {risen / MIB:+.0f} MiB"
        )
        assert tally.wrong == warm.wrong == []
        assert tally.statuses.keys() == {200} and tally.left > 0
        assert eventually(lambda: nothing_is_left(server))
        assert eventually(lambda: threading.active_count() <= threads + 4)  # the pools', which start when first needed
        assert seconds is None or risen < 64 * MIB
        assert engine_of(server).stats().prefix_tokens_found > 0


# ---- ten times too many


@pytest.mark.slow
def test_ten_times_too_many_are_told_when_to_come_again_and_the_rest_are_answered(tiny_folder: Path) -> None:
    """Eight fit (four run, four wait), eighty come, and come again for a minute."""
    with running(tiny_folder, mode="exact", max_running=4, max_queue=4) as server:
        asked = catalogue()[:4]
        expected = [answers(post(server, data).json()["choices"]) for data in asked]
        base, busy, accepted, wrong, before = [], [], [], [], MemoryWatch.now()
        for _ in range(20):
            start = time.monotonic()
            post(server, asked[0])
            base.append(time.monotonic() - start)

        async def storm() -> None:
            end = time.monotonic() + 60

            async def one(number: int, client: httpx.AsyncClient) -> None:
                draw = random.Random(number)
                while time.monotonic() < end:
                    which, start = draw.randrange(4), time.monotonic()
                    reply = await client.post(address(server) + CHAT, json=asked[which])
                    if reply.status_code == 200:
                        accepted.append(time.monotonic() - start)
                        if answers(reply.json()["choices"]) != expected[which]:
                            wrong.append(reply.text)
                    else:
                        assert reply.status_code == 429 and int(reply.headers["retry-after"]) >= 1, reply.text
                        busy.append(time.monotonic() - start)
                        await asyncio.sleep(0.2)

            limits = httpx.Limits(max_connections=80)
            async with httpx.AsyncClient(timeout=120, verify=False, limits=limits) as client:
                await asyncio.gather(*(one(number, client) for number in range(80)))

        asyncio.run(storm())
        risen, after = MemoryWatch.now() - before, []
        for _ in range(20):
            start = time.monotonic()
            assert answers(post(server, asked[0]).json()["choices"]) == expected[0]
            after.append(time.monotonic() - start)
        print(
            f"\n429: {percentiles(busy)}; answered: {percentiles(accepted)}, {len(wrong)} wrong; memory {risen / MIB:+.0f} MiB; "
            f"one alone before: {percentiles(base)}, after: {percentiles(after)}"
        )
        assert wrong == [] and len(busy) > len(accepted) > 0
        assert eventually(lambda: nothing_is_left(server)) and risen < 64 * MIB


# ---- clients that leave


STAGES = ("queued", "media", "prefill", "decode")
ENDLESS = {"logit_bias": {"151645": -100, "151643": -100}, "max_tokens": 400}


def leaving(stage: str, draw: random.Random) -> tuple[dict[str, Any], float]:
    """What is asked, and how long the client stays at most once it has asked, in short answers."""
    if stage == "media":
        frames = [noise(draw.randrange(10**6), 64) for _ in range(12)]
        return body({"type": "video_frames", "video_frames": frames, "fps": 2}, "What?"), 2
    if stage == "prefill":
        return body(f"{draw.random()} " + "word " * 3000) | ENDLESS, 8
    return body(f"{draw.random()} tell me.") | ENDLESS, 1 if stage == "queued" else 10


class Departures:
    """Where the server was with a request when it let it go, and how long after its client had left."""

    def __init__(self, server: Server, patch: pytest.MonkeyPatch) -> None:
        self.stages: Counter[str] = Counter()
        self.closed: dict[str, float] = {}
        self.late: list[float] = []
        engine, shared = engine_of(server), service(server)
        cancel, off_loop = engine.cancel, shared.off_loop

        def cancelled(id: str) -> None:
            task: Any = engine._tasks.get(id)
            if task is not None:
                sequence: Sequence = next(iter(task.answers.values())).sequence
                is_read = len(sequence.tokens) > sequence.num_prompt
                self.stages["decode" if is_read else "prefill" if sequence.was_running else "queued"] += 1
            cancel(id)
            if id in self.closed:
                self.late.append(time.monotonic() - self.closed[id])

        async def prepared(messages: Any, work: Any) -> Any:
            try:
                return await off_loop(messages, work)
            except asyncio.CancelledError:
                self.stages["media"] += has_media(messages)
                raise

        patch.setattr(engine, "cancel", cancelled)
        patch.setattr(shared, "off_loop", prepared)


async def leave(server: Server, number: int, departures: Departures, unit: float) -> None:
    """A client that leaves after a random part of its stay, or of its stream. `unit`: seconds of a short answer on this machine."""
    draw = random.Random(number)
    stage, stream = STAGES[number % 4], draw.random() < 0.5
    data, stay = leaving(stage, draw)
    content = json.dumps(data | {"stream": stream}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + (content if draw.random() < 0.9 else content[: draw.randrange(len(content))]))
    id, chunks = b"", draw.randrange(2, 9) if stage == "decode" else 1000
    with suppress(TimeoutError):
        await writer.drain()
        async with asyncio.timeout(draw.random() * stay * unit if chunks == 1000 or not stream else 120):
            while chunks and (line := await reader.readline()):
                if b'"id":"chatcmpl-' in line:
                    id, chunks = b"chatcmpl-" + line.partition(b"chatcmpl-")[2][:32], chunks - 1
    departures.closed[id.decode()] = time.monotonic()
    if draw.random() < 0.5:
        writer.transport.abort()  # a reset instead of a goodbye
    else:
        writer.close()


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_clients_that_leave_at_any_moment_leave_nothing_behind(
    tiny_folder: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queued, while their media are decoded, while their prompt is read, while they are answered; streamed and not."""
    with running(tiny_folder, max_running=8) as server:
        expected = answers(post(server, catalogue()[0]).json()["choices"])
        start = time.monotonic()
        assert answers(post(server, catalogue()[0]).json()["choices"]) == expected
        unit, threads, departures = time.monotonic() - start, threading.active_count(), Departures(server, monkeypatch)

        async def crowd() -> None:
            places = asyncio.Semaphore(32)

            async def one(number: int) -> None:
                async with places:
                    await leave(server, number, departures, unit)

            await asyncio.gather(*(one(number) for number in range(count)))

        asyncio.run(crowd())
        assert eventually(lambda: nothing_is_left(server), 60)
        print(f"\n{count:,} left: {dict(departures.stages)}; let go after {percentiles(departures.late)}")
        assert departures.stages.total() >= count / 4
        assert count < 1000 or all(departures.stages[stage] > 0 for stage in STAGES)
        assert answers(post(server, catalogue()[0]).json()["choices"]) == expected
        assert eventually(lambda: threading.active_count() <= threads + 4)
        assert service(server).thread.is_alive
