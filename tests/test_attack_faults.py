"""Faults from inside and from above: a broken kernel, numbers that are none, memory gone, SIGTERM, a poisoned model folder."""

import json
import pickle
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from qvl.commands.serve import Serve, build
from qvl.model.weights import load
from qvl.serve.run import Server
from serve_doubles import (
    CHAT,
    CLIENT,
    address,
    body,
    engine_of,
    eventually,
    holds_nothing,
    image,
    picture,
    post,
    refused,
    running,
    service,
)

pytestmark = pytest.mark.no_shape_hook
VICTIM = body("zebra", image(picture(64, 64)), max_tokens=6, temperature=0, seed=1)
OTHER = body("Tell me of the sea.", image(picture(64, 96)), max_tokens=10, temperature=0)


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[Server]:
    with running(tiny_folder, mode="exact") as server:
        yield server


# ---- a fault at every stage of one request


def is_victim(server: Server, sequence: Any) -> bool:
    ids = service(server).cook.served.processor.tokenizer.encode_text("zebra")
    return any(sequence.tokens[i : i + len(ids)] == ids for i in range(sequence.num_prompt))


def fails(*_: Any, **__: Any) -> Any:
    raise RuntimeError("CUDA error at 0x7f00deadbeef in /usr/lib/kernel.so")


def in_preparing(server: Server, patch: pytest.MonkeyPatch, error: Exception) -> None:
    kitchen = service(server).cook.kitchen
    load = kitchen.load

    def loaded(messages: Any, **options: Any) -> Any:
        if "zebra" in str(messages):
            raise error
        return load(messages, **options)

    patch.setattr(kitchen, "load", loaded)


def in_encoding(server: Server, patch: pytest.MonkeyPatch, error: Exception) -> None:
    encoder = engine_of(server).encoder
    encode = encoder._encode

    def encoded(sample: Any, group: Any) -> Any:
        if sample.grid_I3.tolist() == [[1, 4, 4]]:
            raise error
        return encode(sample, group)

    patch.setattr(encoder, "_encode", encoded)
    encoder.kept.clear()
    encoder.num_bytes = 0


def in_the_model(server: Server, patch: pytest.MonkeyPatch, error: Exception) -> None:
    runner = engine_of(server).runner
    forward = runner._forward

    def forwarded(pieces: Any, outcome: Any) -> None:
        if any(is_victim(server, piece.chunk.sequence) for piece in pieces):
            raise error
        forward(pieces, outcome)

    patch.setattr(runner, "_forward", forwarded)


def in_the_logits(server: Server, patch: pytest.MonkeyPatch, error: Exception) -> None:
    del error
    runner = engine_of(server).runner
    run = runner.run

    def ran(chunks: Any, prompt_of: Any) -> Any:
        outcome = run(chunks, prompt_of)
        for sequence, logits_V in outcome.logits.items():
            if is_victim(server, sequence):
                outcome.logits[sequence] = torch.full_like(logits_V, torch.nan)
        return outcome

    patch.setattr(runner, "run", ran)


def of_the_request(**changes: Any) -> Callable[[Server, pytest.MonkeyPatch, Exception], None]:
    def install(server: Server, patch: pytest.MonkeyPatch, error: Exception) -> None:
        del error
        cook = service(server).cook
        prepare = cook.prepare

        def prepared(asked: Any, **options: Any) -> Any:
            made = prepare(asked, **options)
            return replace(made, request=replace(made.request, **changes)) if "zebra" in str(asked.messages) else made

        patch.setattr(cook, "prepare", prepared)

    return install


class Grammar:
    allowed = staticmethod(fails)


STAGES: dict[str, Callable[[Server, pytest.MonkeyPatch, Exception], None]] = {
    "preparing": in_preparing,
    "encoding": in_encoding,
    "model": in_the_model,
    "logits": in_the_logits,
    "text": of_the_request(text_stream=fails),
    "grammar": of_the_request(grammar=Grammar()),
}
ERRORS = {
    "memory": torch.OutOfMemoryError("tried to allocate 80 GiB at 0x7f00deadbeef"),
    "kernel": RuntimeError("CUDA error in /usr/lib/kernel.so"),
}


CASES = [(stage, "kernel") for stage in STAGES] + [(stage, "memory") for stage in ("preparing", "encoding", "model")]


@pytest.mark.parametrize("stage, error", CASES)
def test_a_fault_ends_its_own_request_and_no_other(
    server: Server, stage: str, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = post(server, OTHER).json()["choices"]
    with monkeypatch.context() as patch:
        STAGES[stage](server, patch, ERRORS[error])
        others: list[Any] = []
        thread = threading.Thread(target=lambda: others.append(post(server, OTHER).json()["choices"]))
        thread.start()
        assert refused(post(server, VICTIM), 500)
        lines = post(server, VICTIM | {"stream": True}).text
        thread.join()
    assert others == [expected]
    assert "0x7f" not in lines and "/usr" not in lines and "CUDA" not in lines
    if '"chat.completion.chunk"' in lines:  # it got as far as a stream
        assert '"finish_reason":"error"' in lines and lines.endswith("data: [DONE]\n\n")
    start = time.monotonic()
    assert post(server, VICTIM).status_code == 200
    print(f"\n{stage}, {error}: the same request is answered {time.monotonic() - start:.2f} s later")
    assert eventually(lambda: holds_nothing(server)) and service(server).thread.is_alive


# ---- SIGTERM


def stream(server: Server, tokens: int, lines: list[str]) -> threading.Thread:
    """A client in a thread; returns once its first words came."""
    asked = body("Hi", stream=True, logit_bias={"151645": -100, "151643": -100}) | {"max_tokens": tokens}

    def read() -> None:
        with CLIENT.stream("POST", address(server) + CHAT, json=asked) as reply:
            lines.extend(line for line in reply.iter_lines() if line)

    thread = threading.Thread(target=read)
    thread.start()
    assert eventually(lambda: engine_of(server).stats().running == 1)
    return thread


def test_sigterm_lets_what_runs_finish_and_takes_nothing_new(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    with running(tiny_folder) as server:
        engine = engine_of(server)
        step, gate = engine.step, threading.Event()
        # The engine stands still until all has been asked, however slow this machine is.
        monkeypatch.setattr(
            engine, "step", lambda: step() if gate.is_set() or not engine.stats().running else time.sleep(0.01) or []
        )
        client = stream(server, 12, lines)
        # Who hangs half-way in a head, or is connected and silent, holds nothing up.
        with (
            socket.create_connection(("127.0.0.1", server.port)) as half,
            socket.create_connection(("127.0.0.1", server.port)),
        ):
            half.sendall(b"POST /v1/chat")
            server.handle_exit(signal.SIGTERM, None)
            assert eventually(lambda: CLIENT.get(address(server) + "/readyz").status_code == 503)
            assert "shutting down" in refused(post(server, body()), 503)
            assert not server.should_exit
            gate.set()
            client.join(60)
            assert eventually(lambda: server.should_exit)
    assert lines[-1] == "data: [DONE]" and '"finish_reason":"length"' in lines[-2]


def test_a_deadline_ends_what_will_not_finish(tiny_folder: Path) -> None:
    lines: list[str] = []
    with running(tiny_folder) as server:
        server.drain_seconds = 0.2
        client = stream(server, 15_000, lines)
        server.handle_exit(signal.SIGTERM, None)
        client.join(60)
        assert eventually(lambda: server.should_exit)
    assert '"finish_reason":"cancelled"' in "".join(lines[-2:])


# ---- who never finishes a head


def test_a_head_that_drips_is_cut_off(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvl.serve.run.HEAD_SECONDS", 0.3)

    def is_cut_off(wire: socket.socket) -> bool:
        for _ in range(200):
            try:
                wire.sendall(b"x")
                wire.settimeout(0.05)
                if wire.recv(1000) == b"":
                    return True
            except TimeoutError:
                continue
            except OSError:
                return True
        return False

    with running(tiny_folder) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as wire:
            wire.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nx: ")
            assert is_cut_off(wire)
        with socket.create_connection(("127.0.0.1", server.port)) as wire:  # and the same after a first request
            wire.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b"200 OK" in wire.recv(10_000)
            wire.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nx: ")
            assert is_cut_off(wire)
        engine, lines = engine_of(server), []
        step = engine.step
        monkeypatch.setattr(engine, "step", lambda: time.sleep(0.1) or step())
        stream(server, 12, lines).join(60)  # an answer takes longer than a head may, and is not cut off
        assert lines[-1] == "data: [DONE]"


# ---- a poisoned folder


class Canary:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def poisoned(clean: Path, folder: Path, canary: Path) -> Path:
    """A good model with every trap that once worked somewhere: pickles, code, a template that reaches out of its sandbox."""
    shutil.copytree(clean, folder)
    evil = pickle.dumps({"model.embed_tokens.weight": Canary(canary)})
    for name in (
        "pytorch_model.bin",
        "model.pt",
        "training_args.bin",
        "optimizer.pt",
        "consolidated.00.pth",
        "model.ckpt",
    ):
        (folder / name).write_bytes(evil)
    for name in (
        "modeling_evil.py",
        "processing_evil.py",
        "tokenization_evil.py",
        "__init__.py",
        "setup.py",
        "conftest.py",
    ):
        (folder / name).write_text(f"open({str(canary)!r}, 'w')\n")
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        if (folder / name).exists():
            data = json.loads((folder / name).read_text())
            data["auto_map"] = {
                k: f"modeling_evil.{k}" for k in ("AutoConfig", "AutoModel", "AutoProcessor", "AutoTokenizer")
            }
            data["trust_remote_code"] = True
            (folder / name).write_text(json.dumps(data))
    escape = "{{ cycler.__init__.__globals__.os.system('touch " + str(canary) + "') }}{{ messages[0].content }}"
    (folder / "chat_template.jinja").write_text(escape)
    return folder


@pytest.mark.parametrize("has_weights", [True, False])
def test_nothing_in_a_poisoned_folder_runs(tiny_folder: Path, tmp_path: Path, has_weights: bool) -> None:
    canary = tmp_path / "canary"
    folder = poisoned(tiny_folder, tmp_path / "evil", canary)
    pickle.loads(pickle.dumps(Canary(tmp_path / "alive")))
    assert (tmp_path / "alive").exists()  # the trap works
    flags = Serve(model=str(folder), port=0, name="evil", memory_gib=0.01, dtype="float32", device="cpu")
    if has_weights:
        with pytest.raises(ValueError, match="template"):
            build(flags, folder, {}, ())
        with running(folder, template="instruct") as server:
            assert post(server, body()).status_code == 200
    else:
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        with pytest.raises(ValueError, match="safetensors"):
            load(folder)
    assert not canary.exists()


def test_a_client_cannot_bring_a_template_or_a_file_of_weights(server: Server) -> None:
    for field in ("chat_template", "template", "lora_path", "model_path", "adapter"):
        refused(post(server, body(**{field: "{{ 7 * 7 }}"})), 400)
    assert "no such model" in refused(post(server, body(model="../../evil")), 404)
    reply = httpx.get(f"{address(server)}/v1/models/..%2f..%2fevil")
    assert reply.status_code == 404
