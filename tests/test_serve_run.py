"""qvl serve as a process: it says what fits, refuses open doors, and ends in order."""

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from qvl.commands import cli
from qvl.commands.serve import (
    Serve,
    base_sampling,
    build,
    check_adapters,
    check_address,
    name_of,
    read_adapters,
    read_keys,
)
from qvl.model.weights import load
from qvl.prompt.processor import Processor
from qvl.session import Session
from serve_doubles import KEY

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def process(tiny_saved: Path) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """The process, its address, and what it said until it listened."""
    flags = [
        "--model",
        str(tiny_saved),
        "--port",
        "0",
        "--memory-gib",
        "0.02",
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--drain-seconds",
        "120",
    ]
    run = subprocess.Popen(
        [sys.executable, "-m", "qvl", "serve", *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.stdout is not None
    said: list[str] = []
    for line in run.stdout:
        said.append(line)
        if found := re.search(r"listening at (http://127\.0\.0\.1:\d+)", line):
            break
    else:
        raise AssertionError("".join(said))
    yield run, found[1], said
    run.kill()
    run.wait()
    run.stdout.close()


def ask(url: str, tokens: int, lines: list[str]) -> None:
    asked = {
        "messages": [{"role": "user", "content": "Tell."}],
        "max_tokens": tokens,
        "stream": True,
        "logit_bias": {"151645": -100, "151643": -100},
    }
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=asked, timeout=60) as reply:
        lines += [line for line in reply.iter_lines() if line]


@pytest.mark.slow  # a second process
def test_sigterm_finishes_what_runs_and_takes_nothing_new(
    process: tuple[subprocess.Popen[str], str, list[str]],
) -> None:
    run, url, said = process
    assert any("GiB" in line and "tokens" in line for line in said)
    lines: list[str] = []
    client = threading.Thread(target=ask, args=(url, 60, lines))
    client.start()
    while 'running{model="tiny"} 1.0' not in httpx.get(f"{url}/metrics").text:
        time.sleep(0.01)
    run.send_signal(signal.SIGTERM)
    statuses = set()
    while run.poll() is None:
        try:
            statuses.add(httpx.get(f"{url}/readyz").status_code)
        except httpx.TransportError:
            break
        time.sleep(0.01)
    client.join(timeout=60)
    assert lines[-1] == "data: [DONE]" and '"finish_reason":"length"' in lines[-2]
    assert statuses <= {200, 503} and 503 in statuses
    assert run.wait(timeout=30) == 0


@pytest.mark.slow  # a second process
def test_a_second_sigterm_breaks_off_what_runs(process: tuple[subprocess.Popen[str], str, list[str]]) -> None:
    run, url, _ = process
    lines: list[str] = []
    client = threading.Thread(target=ask, args=(url, 9000, lines))
    client.start()
    while 'running{model="tiny"} 1.0' not in httpx.get(f"{url}/metrics").text:
        time.sleep(0.01)
    run.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert run.poll() is None
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=30) == 0
    client.join(timeout=60)
    assert '"finish_reason":"cancelled"' in "".join(lines[-2:])


def test_beyond_this_machine_it_wants_a_key(capsys: pytest.CaptureFixture[str], tiny_saved: Path) -> None:
    assert cli.main(["serve", "--model", str(tiny_saved), "--host", "0.0.0.0"]) == 2
    assert "--api-key-file" in capsys.readouterr().err
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        check_address(host, ())
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org"):
        with pytest.raises(ValueError, match="other machines"):
            check_address(host, ())
        check_address(host, (KEY,))


def test_keys_stand_one_a_line_and_are_long(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# mine\n{KEY}\n\nanother-key-0123456789\n")
    assert read_keys(file) == (KEY, "another-key-0123456789")
    file.write_text("# none\n")
    with pytest.raises(ValueError, match="holds no key"):
        read_keys(file)
    file.write_text("short\n")
    with pytest.raises(ValueError, match="shorter than 16"):
        read_keys(file)


def test_adapters_are_names_and_folders() -> None:
    assert read_adapters(("a=x/y", "b=z")) == {"a": Path("x/y"), "b": Path("z")}
    for entries in (("a",), ("=x",), ("a=",), ("a=x", "a=y")):
        with pytest.raises(ValueError, match="adapter"):
            read_adapters(entries)


def test_a_model_is_called_as_it_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--Qwen--Qwen3-VL-2B-Instruct" / "snapshots" / "89644892"
    snapshot.mkdir(parents=True)
    monkeypatch.chdir(snapshot.parent)
    assert name_of(Serve(model="Qwen/Qwen3-VL-2B-Instruct"), snapshot) == "Qwen/Qwen3-VL-2B-Instruct"
    assert name_of(Serve(model="."), Path(".")) == "snapshots"
    assert name_of(Serve(model=str(snapshot)), snapshot) == "89644892"
    assert name_of(Serve(model=str(snapshot), name="mine"), snapshot) == "mine"
    assert name_of(Serve(), snapshot) == "quickstart"


def test_an_adapter_does_not_take_the_models_name(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="the model and an adapter are both called 'tuned'; name one of them otherwise"
    ):
        build(Serve(model=str(tiny_folder), name="tuned", device="cpu"), tiny_folder, {"tuned": tmp_path}, ())
    with pytest.raises(ValueError, match=r"the adapter 'mine' should lie in .*, and .*adapter_config\.json is missing"):
        check_adapters("tuned", {"mine": tmp_path})


def test_an_answer_may_fill_the_context_and_draws_anew_each_time(tiny_folder: Path) -> None:
    model, processor = load(tiny_folder), Processor.from_folder(tiny_folder)
    for kind in ("model", "official"):
        sampling = base_sampling(Serve(sampling=kind), Session.over(model, processor, sampling=kind))
        assert (sampling.max_tokens, sampling.seed) == (32768, None)
    assert base_sampling(Serve(max_tokens=7), Session.over(model, processor)).max_tokens == 7
