"""What fits is said before anybody can ask, and what does not fit is refused in a sentence that says what would."""

import io
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import torch
from openai import OpenAI

from media_files import numbered_frame, write_video
from qvl.commands import serve
from qvl.commands.serve import GIB, Serve, cache_gib
from qvl.prompt import video as prompt_video
from qvl.serve.run import Server
from serve_doubles import address, data_uri, noise, running

BYTES_PER_TOKEN = 4 * 2 * 2 * 16 * 4
"""Layers, keys and values, kv heads, head width, fp32."""


# ---- before the start


@pytest.mark.parametrize(
    ("kind", "free", "flags", "gib"),
    [
        ("cpu", 20.0, {}, 4.0),
        ("cpu", 8.0, {}, 2.0),
        ("cpu", 20.0, {"memory": 0.9}, 18.0),
        ("cpu", 20.0, {"memory_gib": 19.5}, 19.5),
        ("cuda", 60.0, {}, 54.0),
        ("cuda", 60.0, {"memory": 0.5}, 30.0),
    ],
)
def test_memory_is_a_share_of_what_is_free_or_gib(
    monkeypatch: pytest.MonkeyPatch, kind: str, free: float, flags: dict[str, Any], gib: float
) -> None:
    monkeypatch.setattr(serve, "free_memory_bytes", lambda: int((free if kind == "cpu" else 1) * GIB))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free * GIB), int(80 * GIB)))
    model: Any = SimpleNamespace(device=torch.device(kind))
    assert cache_gib(Serve(**flags), model) == pytest.approx(gib)


def test_memory_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "free_memory_bytes", lambda: 20 * GIB)
    model: Any = SimpleNamespace(device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"--memory-gib is 21 and beside the weights 20.00 GiB are free; give less"):
        cache_gib(Serve(memory_gib=21), model)
    for share in (0.0, 1.1, -1.0):
        with pytest.raises(ValueError, match="it is a share above 0 and at most 1"):
            cache_gib(Serve(memory=share), model)
    with pytest.raises(ValueError, match="both given"):
        cache_gib(Serve(memory=0.5, memory_gib=1), model)


@pytest.mark.parametrize("flags", [{"memory_gib": 0.02}, {"memory_gib": None, "memory": 0.2}], ids=["GiB", "share"])
def test_it_says_before_it_listens_what_fits(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, flags: dict[str, Any]
) -> None:
    monkeypatch.setattr(serve, "free_memory_bytes", lambda: int(0.1 * GIB))
    with caplog.at_level(logging.INFO, logger="qvl"), running(tiny_folder, **flags) as server:
        pass
    # Once each: the command line, if a test before this one used it, hears them too.
    heard = dict.fromkeys(record.getMessage() for record in caplog.records)
    said, listening = [text for text in heard if "GiB" in text or "listening" in text]
    assert listening.startswith("listening at")
    # 0.02 GiB in blocks of 64 tokens; the last token is drawn and never read.
    tokens = int(0.02 * GIB) // (64 * BYTES_PER_TOKEN) * 64
    assert said == (
        "tiny (float32 on cpu): the weights take 0.02 GiB, the cache takes 0.02 GiB: "
        f"one request of up to {tokens + 1:,} tokens, or {tokens // 64 // 64} of 4,096 at once."
    )
    engine = next(iter(server.thread.engines.values()))
    assert engine.describe().longest_context == tokens + 1


# ---- what does not fit


@pytest.fixture(scope="module")
def small(tiny_folder: Path) -> Iterator[Server]:
    """Its cache holds 960 tokens."""
    with running(tiny_folder, memory_gib=(960 + 1) * BYTES_PER_TOKEN / GIB) as server:
        yield server


def refused(server: Server, content: Any, **asked: Any) -> tuple[str, str | None]:
    client = OpenAI(base_url=f"{address(server)}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": content}], **asked)
    error = caught.value.body
    assert isinstance(error, dict)
    return error["message"], error["code"]


def test_a_request_that_cannot_fit_is_refused_with_what_it_needs_and_what_there_is(small: Server) -> None:
    message, code = refused(small, "What?", max_tokens=1000)
    assert code == "does_not_fit"
    assert message == (
        "the request needs a cache of 1010 tokens (10 of prompt, up to 1000 of answer), and all of the cache holds 960; "
        "shorten the prompt, ask for fewer tokens, or give the cache more memory."
    )
    message, code = refused(small, "word " * 2000)
    assert code == "context_length_exceeded"
    assert message.startswith("The conversation has 2,009 tokens; the model reads 961 with its answer.")


def test_media_that_cannot_fit_are_refused_while_they_come(small: Server) -> None:
    # 64 tokens each: the sixteenth is one too many, and the others are not opened.
    pictures = [{"type": "image_url", "image_url": {"url": noise(i, 256)}} for i in range(20)]
    message, code = refused(small, pictures)
    assert code == "media"
    assert message == (
        "messages[0].content[15]: with this one the media have more than the 961 tokens that fit; send fewer or smaller ones."
    )


def test_a_film_that_cannot_fit_is_refused_after_its_first_frame(
    small: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer, placed = io.BytesIO(), []
    write_video(buffer, [numbered_frame(i, 256, 256) for i in range(64)], fps="10", format="mp4")
    film = data_uri(buffer.getvalue(), "video/mp4")
    monkeypatch.setattr(prompt_video, "_place", lambda *_: placed.append(1))
    message, code = refused(small, [{"type": "video_url", "video_url": {"url": film}, "fps": 10, "max_tokens": 4096}])
    assert code == "media" and not placed
    assert message == (
        "messages[0].content[0]: the video would be 2,048 tokens and 961 fit; ask for fewer max_tokens, a lower fps or a part of it."
    )


def test_the_server_goes_on_after_refusals(small: Server) -> None:
    client = OpenAI(base_url=f"{address(small)}/v1", api_key="none", max_retries=0)
    reply = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "What?"}], max_tokens=20)
    assert reply.usage is not None and reply.usage.prompt_tokens == 10
