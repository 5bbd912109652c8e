"""Kill -9 anywhere, also in the middle of a save: the next start goes on to the bit as if nothing had happened."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qvl.core.log import read_jsonl
from qvl.train.checkpoint import newest

HERE = Path(__file__).parent
STEPS, EVERY = 24, 2


def start(out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(HERE / "ranks.py"), str(out), str(STEPS), str(EVERY)]
    return subprocess.Popen(command, cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def killed_when(out: Path, is_time: Callable[[], bool]) -> bool:
    """Start, and kill -9 as soon as `is_time`; False when the run ended before."""
    process = start(out)
    while process.poll() is None:
        if is_time():
            process.kill()
            process.wait()
            return True
        time.sleep(0.001)
    assert process.returncode == 0
    return False


def lines(out: Path) -> int:
    log = out / "log.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("straight")
    assert start(out).wait(timeout=240) == 0
    return out


def same_end(one: Path, two: Path) -> None:
    a, b = newest(one), newest(two)
    assert a is not None and b is not None
    assert a.step == b.step == STEPS
    assert all(torch.equal(b.weights[name], weight) for name, weight in a.weights.items())
    assert all(torch.equal(b.optimizer[name], moment) for name, moment in a.optimizer.items())
    assert a.state == b.state


def test_killed_between_steps_and_resumed_the_run_ends_to_the_bit_the_same(straight: Path, tmp_path: Path) -> None:
    for more in (3, 6):
        reached = lines(tmp_path) + more
        assert killed_when(tmp_path, lambda reached=reached: lines(tmp_path) >= reached)
    assert start(tmp_path).wait(timeout=240) == 0
    same_end(straight, tmp_path)
    assert [row["step"] for row in read_jsonl(tmp_path / "log.jsonl")] == list(range(1, STEPS + 1))


def test_killed_while_a_checkpoint_is_written_the_run_ends_to_the_bit_the_same(straight: Path, tmp_path: Path) -> None:
    def is_saving() -> bool:
        return any(tmp_path.glob(".step-*.partial/*/optimizer.safetensors")) and (lines(tmp_path) > 5)

    hits = sum(killed_when(tmp_path, is_saving) for _ in range(2))
    assert hits >= 1
    assert start(tmp_path).wait(timeout=240) == 0
    same_end(straight, tmp_path)
    assert not list(tmp_path.glob(".step-*.partial")) or newest(tmp_path) is not None
