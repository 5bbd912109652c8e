"""Bombs, damage and odd shapes sent through the whole server: a clean refusal or an answer, in bounded memory, and the next is served."""

import io
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from media_files import damaged, encoded, forged_mp4, gif, gradient, numbered_frame, pdf, png_header, write_video
from memory_watch import MemoryWatch
from qvl.outside.media import MediaLimits
from qvl.outside.workers import WorkerPool
from qvl.serve.limits import Limits
from qvl.serve.run import Server
from serve_doubles import (
    CHAT,
    CLIENT,
    address,
    body,
    data_uri,
    engine_of,
    eventually,
    heartbeat,
    holds_nothing,
    image,
    picture,
    post,
    refused,
    running,
    video,
)

pytestmark = pytest.mark.no_shape_hook
MIB = 2**20


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[Server]:
    with running(tiny_folder, mode="exact", max_tokens=4) as server:
        assert post(server, body(image(picture()))).status_code == 200  # the worker runs
        yield server


def paper(data: bytes, **wishes: Any) -> dict[str, Any]:
    return {"type": "file", "file": {"file_data": data_uri(data, "application/pdf")}, **wishes}


def png(data: bytes) -> dict[str, Any]:
    return image(data_uri(data, "image/png"))


def film(data: bytes) -> dict[str, Any]:
    return video(data_uri(data, "video/mp4"))


def clip(num_frames: int = 12) -> bytes:
    buffer = io.BytesIO()
    write_video(buffer, [numbered_frame(i) for i in range(num_frames)], fps="10", format="mp4")
    return buffer.getvalue()


def workers() -> list[int]:
    """The decoding processes of this one."""
    children = [pid for task in Path("/proc/self/task").glob("*/children") for pid in task.read_text().split()]
    return [int(pid) for pid in children if "worker_main" in Path(f"/proc/{pid}/cmdline").read_text()]


# ---- bombs


def many_pages() -> bytes:
    """2,000 pages, and page ranges that name them a thousand times."""
    return pdf([(10, 10)] * 2000)


BOMBS: dict[str, Callable[[], dict[str, Any]]] = {
    "a picture of 50,000 x 50,000 in 100 bytes": lambda: png(png_header(50_000, 50_000)),
    "a picture of one line, 65,535 long": lambda: png(encoded(np.zeros((1, 65_535, 3), np.uint8), "PNG")),
    "a film of 86,400,000 frames in 2 kB": lambda: film(forged_mp4(86_400_000)),
    "a film of 15,000,000 frames in 2 kB": lambda: film(forged_mp4(15_000_000)),
    "an animation whose second frame is 60,000 x 60,000": lambda: film(gif(1, sizes=[(60_000, 60_000)])),
    "an animation of 5,000 frames on 6,000 x 6,000": lambda: film(gif(5_000, (6_000, 6_000))),
    "a document asked for two million pages": lambda: paper(many_pages(), pages=",".join(["1-2000"] * 500)),
    "a picture as wide as its file claims and no more": lambda: png(png_header(8_000, 8_000, b"\0" * 100)),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if "15,000,000" in name else []) for name in BOMBS]
)
def test_a_bomb_is_refused_in_bounded_memory(server: Server, name: str) -> None:
    data = {"messages": body(BOMBS[name]())["messages"]}
    watch, start = MemoryWatch(), time.monotonic()
    with watch:
        reply = post(server, data, "/tokenize")
    print(f"\n{name}: {time.monotonic() - start:.2f} s, +{watch.rise / MIB:.0f} MiB: {reply.text[:120]}")
    refused(reply, 400)
    # FFmpeg takes memory for the frames a film promises: there the worker's own bound is what holds.
    assert watch.rise < (Limits().max_worker_bytes if name.startswith("a film") else 256 * MIB)
    assert post(server, body(image(picture()))).status_code == 200


def test_an_animation_without_end_is_one_picture_where_a_picture_was_asked_for(server: Server) -> None:
    assert post(server, body(png(gif(100_000)))).status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize("num_frames", [100_000])
def test_a_hundred_thousand_frames_are_cut_off_or_shown(server: Server, num_frames: int) -> None:
    """Of one pixel each: within every limit, and answered from a sample of them, or refused when a minute has passed."""
    watch, start = MemoryWatch(), time.monotonic()
    with watch:
        reply = post(server, {"messages": body(film(gif(num_frames)))["messages"]}, "/tokenize")
    print(
        f"\n{num_frames:,} frames: {time.monotonic() - start:.1f} s, +{watch.rise / MIB:.0f} MiB, {reply.status_code}"
    )
    assert reply.status_code in (200, 400) and watch.rise < 256 * MIB


def many(parts: int) -> bytes:
    return json.dumps(body(*["x"] * parts)).encode()


LARGE: dict[str, tuple[Callable[[], bytes], set[int]]] = {
    "10,000 parts": (lambda: many(10_000), {400}),
    "10,000 messages": (lambda: json.dumps({"messages": body()["messages"] * 10_000}).encode(), {400}),
    "ten million zeros": (lambda: b'{"messages": [' + b"0," * 10_000_000 + b"0]}", {413}),
    "a hundred thousand unknown fields": (
        lambda: b"{" + b",".join(b'"x%d":1' % i for i in range(100_000)) + b"}",
        {413},
    ),
    "50,000 unknown fields": (lambda: b"{" + b",".join(b'"x%d":1' % i for i in range(50_000)) + b"}", {400}),
    "a field with a name of a megabyte": (lambda: b'{"' + b"m" * MIB + b'": 1}', {400}),
    "50,000 wrong biases": (
        lambda: (
            b'{"messages":[{"role":"user"}],"logit_bias":{' + b",".join(b'"x%d":1' % i for i in range(50_000)) + b"}}"
        ),
        {400},
    ),
    "a part with a field of a megabyte": (lambda: json.dumps(body({"x" * MIB: 1})).encode(), {400}),
    "brackets a hundred thousand deep": (lambda: b'{"messages": ' + b"[" * 100_000, {400}),
    "a number of four thousand digits": (lambda: b'{"messages":[{"role":"user"}],"seed":' + b"9" * 4000 + b"}", {400}),
    "a number of a megabyte": (lambda: b'{"messages":[{"role":"user"}],"seed":' + b"9" * MIB + b"}", {400}),
}


@pytest.mark.parametrize("name", LARGE)
def test_what_is_cheap_to_send_is_cheap_to_refuse(server: Server, name: str) -> None:
    make, statuses = LARGE[name]
    content = make()
    watch, start = MemoryWatch(), time.monotonic()
    with watch, heartbeat(server) as beats:
        reply = CLIENT.post(address(server) + CHAT, content=content, headers={"content-type": "application/json"})
    print(
        f"\n{name}: {len(content):,} bytes, {time.monotonic() - start:.2f} s, stall {beats.worst * 1000:.0f} ms, "
        f"+{watch.rise / MIB:.0f} MiB"
    )
    assert reply.status_code in statuses, reply.text
    refused(reply, reply.status_code)
    assert watch.rise < 256 * MIB and eventually(lambda: holds_nothing(server))


def test_a_body_of_five_gigabytes_is_refused_by_its_head(server: Server) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {5 * 10**9}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), 30) as wire:
        wire.sendall(head.encode() + b"{")
        assert wire.recv(65536).startswith(b"HTTP/1.1 413")


@pytest.mark.slow
def test_a_body_without_an_end_is_cut_off_in_bounded_memory(server: Server) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"100000\r\n" + b"a" * MIB + b"\r\n"
    watch, sent = MemoryWatch(), 0
    with watch, socket.create_connection(("127.0.0.1", server.port), 60) as wire:
        wire.sendall(head.encode() + b'2\r\n{"\r\n')
        try:
            while sent < 5000:
                wire.sendall(chunk)
                sent += 1
        except OSError:
            pass
    print(f"\n{sent} MiB were sent, +{watch.rise / MIB:.0f} MiB")
    assert sent < 200 and watch.rise < 256 * MIB
    assert eventually(lambda: holds_nothing(server)) and post(server, body()).status_code == 200


# ---- damage

SEEDS: dict[str, bytes] = {}


def seed_files() -> dict[str, bytes]:
    if not SEEDS:
        pixels = gradient(40, 60)
        for format in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
            SEEDS[format] = encoded(pixels, format)
        frames = [Image.fromarray(numbered_frame(i, 32, 48)) for i in range(4)]
        SEEDS["ANIMATION"] = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
        SEEDS["MP4"] = clip(6)
        SEEDS["PDF"] = pdf([(60, 40), (40, 60)])
    return SEEDS


def part_of(kind: str, data: bytes) -> dict[str, Any]:
    if kind == "PDF":
        return paper(data)
    return film(data) if kind in ("MP4", "ANIMATION") else image(data_uri(data, f"image/{kind.lower()}"))


@pytest.mark.parametrize("count", [12, pytest.param(400, marks=pytest.mark.slow)])
def test_damaged_media_get_an_answer_or_a_sentence(server: Server, count: int) -> None:
    """`count` damaged files of each of eight kinds."""
    statuses: dict[tuple[str, int], int] = {}
    for kind, data in seed_files().items():
        assert post(server, {"messages": body(part_of(kind, data))["messages"]}, "/tokenize").status_code == 200
        for number in range(count):
            reply = post(server, {"messages": body(part_of(kind, damaged(data, number)))["messages"]}, "/tokenize")
            assert reply.status_code in (200, 400), (kind, number, reply.text)
            if reply.status_code == 400:
                assert refused(reply, 400).startswith("messages[0].content[0]: "), (kind, number)
            statuses[kind, reply.status_code] = statuses.get((kind, reply.status_code), 0) + 1
    print("\n", statuses)
    assert post(server, body(image(picture()), film(clip()))).status_code == 200
    assert eventually(lambda: holds_nothing(server))


@pytest.mark.slow
@pytest.mark.parametrize("kind, count", [("image", 100_000), ("film", 2_000)])
def test_a_decoder_lives_through_damaged_files(kind: str, count: int) -> None:
    """Straight to the worker, so that many fit: how often it had to be killed is told, that it never takes us along is tested."""
    files = [
        data
        for name, data in seed_files().items()
        if (name in ("MP4", "ANIMATION")) == (kind == "film") and name != "PDF"
    ]
    job = "image" if kind == "image" else "video_facts"
    refusals, crashes = 0, 0
    with WorkerPool(MediaLimits(max_seconds=20, memory_bytes=2**30)) as pool:
        for number in range(count):
            try:
                list(pool.run(job, io.BytesIO(damaged(files[number % len(files)], number))))
            except ValueError as error:
                refusals += 1
                crashes += "process was ended" in str(error)
                assert not re.search(r"\b0x[0-9a-f]{4}|/usr|/tmp|Traceback", str(error)), number
    print(f"\n{count:,} damaged files ({kind}): {refusals:,} refused, {crashes} of these by ending the process")


def test_a_decoder_killed_in_the_middle_fails_its_request_alone(server: Server) -> None:
    data, stop = clip(60), threading.Event()

    def kill() -> None:
        while not stop.wait(0.05):
            for pid in workers():
                os.kill(pid, 9)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        replies = [post(server, body(film(data))) for _ in range(4)]
    finally:
        stop.set()
        thread.join()
    assert {reply.status_code for reply in replies} <= {200, 400}
    assert any("the process was ended" in refused(reply, 400) for reply in replies if reply.status_code == 400)
    assert post(server, body(film(data))).status_code == 200


# ---- odd shapes


def odd_pictures() -> dict[str, tuple[bytes, int]]:
    """Files, and the status each gets."""
    colour = Image.fromarray(gradient(64, 96))
    grey16 = Image.fromarray((np.arange(64 * 96).reshape(64, 96) * 10).astype(np.uint16))
    found = {
        "1x1": (encoded(gradient(1, 1), "PNG"), 200),
        "1x200": (encoded(gradient(1, 200), "PNG"), 200),
        "200x1": (encoded(gradient(200, 1), "PNG"), 200),
        "1x201": (encoded(gradient(1, 201), "PNG"), 400),
        "3x3": (encoded(gradient(3, 3), "PNG"), 200),
        "empty": (b"", 400),
        "one byte": (b"\x89", 400),
        "text": (b"hello", 400),
        "16 bits": (encoded(grey16, "PNG"), 200),
        "CMYK": (encoded(colour.convert("CMYK"), "JPEG"), 200),
        "palette": (encoded(colour.convert("P"), "PNG"), 200),
        "transparent palette": (encoded(colour.convert("P"), "PNG", transparency=3), 200),
        "one bit": (encoded(colour.convert("1"), "PNG"), 200),
        "grey": (encoded(colour.convert("L"), "JPEG"), 200),
        "grey and alpha": (encoded(colour.convert("LA"), "PNG"), 200),
        "animated": (gif(3, (8, 8)), 200),
        "TIFF": (encoded(colour, "TIFF"), 400),
        "a film": (clip(2), 400),
    }
    for orientation in range(1, 10):
        exif = Image.Exif()
        exif[0x0112] = orientation
        found[f"EXIF {orientation}"] = (encoded(colour, "JPEG", exif=exif), 200)
    return found


def test_odd_pictures_are_answered_or_cleanly_refused(server: Server) -> None:
    for name, (data, status) in odd_pictures().items():
        reply = post(server, body(image(data_uri(data, "image/png")), max_tokens=1))
        assert reply.status_code == status, (name, reply.text)
        if status == 400:
            refused(reply, 400)


# ---- no answer of one from the cache of another


def lookalikes() -> list[dict[str, Any]]:
    """Pictures that some cache somewhere took for each other: the same bytes in another shape or mode, the same file at another size."""
    pixels = np.random.default_rng(3).integers(0, 256, 64 * 192 * 3, dtype=np.uint8)
    files = [
        encoded(pixels.reshape(shape), "PNG") for shape in ((64, 192, 3), (192, 64, 3), (96, 128, 3), (128, 96, 3))
    ]
    grey = Image.fromarray(pixels[: 64 * 96].reshape(64, 96))
    files += [encoded(grey, "PNG"), encoded(Image.frombytes("P", grey.size, grey.tobytes()), "PNG")]
    files += [encoded(gradient(64, 96), "PNG"), encoded(gradient(64, 96), "BMP")]
    parts = [png(data) for data in files] + [image(data_uri(files[0], "image/png"), max_tokens=n) for n in (4, 8, 16)]
    return [body(part, "What?", max_tokens=6, temperature=0, logprobs=True) for part in parts]


def said(reply: Any) -> Any:
    assert reply.status_code == 200, reply.text
    choice = reply.json()["choices"][0]
    return choice["message"]["content"], [entry["logprob"] for entry in choice["logprobs"]["content"]]


@pytest.mark.parametrize("count", [22, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_picture_is_answered_from_anothers_cache(server: Server, tiny_folder: Path, count: int) -> None:
    """The same requests at once, over and over, and with a tenant's salt: to the bit what a server without any cache says."""
    asked = lookalikes()
    with running(tiny_folder, mode="exact", prefix_cache=False) as bare:
        engine_of(bare).encoder.max_bytes = 0
        expected = [said(post(bare, data)) for data in asked]
        assert engine_of(bare).stats().encoder_found == engine_of(bare).stats().prefix_tokens_found == 0
    assert (
        len({json.dumps(answer) for answer in expected}) >= len(asked) - 2
    )  # BMP is PNG, and so is the first at its own size

    def ask(number: int) -> bool:
        salt = {"cache_salt": f"tenant {number % 2}"} if number % 3 else {}
        return said(post(server, asked[number % len(asked)] | salt)) == expected[number % len(asked)]

    with ThreadPoolExecutor(16) as threads:
        assert list(threads.map(ask, range(count))) == [True] * count
    assert engine_of(server).stats().encoder_found > 0
