"""One measured row: our time, the peer's in the same run, and the floor that physics sets."""

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from qvl.core.device import facts

RESULTS = Path(__file__).parent / "results.jsonl"


@dataclass(frozen=True, kw_only=True)
class Row:
    suite: str
    metric: str
    value: float
    """Our median, in `unit`."""
    unit: str
    peer: str
    """Name, version and setting of what ran beside us."""
    peer_value: float
    ratio: float
    """Median over rounds of peer time / our time: above 1 we are faster."""
    limit: float
    """The floor in `unit`: the row's FLOPs at the matmul rate, or its bytes at the copy rate, both measured in this run."""
    limit_is: str
    shape: str
    threads: int
    rounds: int
    command: str


def matmul_rate(dtype: torch.dtype, device: str = "cpu") -> float:
    """FLOP/s of a plain square matmul, best of six."""
    size = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    best = min(seconds(lambda: torch.mm(a, b), device) for _ in range(6))
    return 2 * size**3 / best


def copy_rate() -> float:
    """Bytes a second of copying memory that no cache holds (read and write counted once each), best of six."""
    source = torch.zeros(2**26, dtype=torch.float32)
    target = torch.empty_like(source)
    return 2 * 4 * source.numel() / min(seconds(lambda: target.copy_(source)) for _ in range(6))


def seconds(work: Callable[[], object], device: str = "cpu") -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(
    ours: Callable[[], object], theirs: Callable[[], object], rounds: int, device: str = "cpu", *, warm: bool = True
) -> tuple[float, float, float]:
    """(our median, their median, median of their/our), the two run in turn so that a drifting machine hits both."""
    if warm:
        ours()
        theirs()
    pairs = [(seconds(ours, device), seconds(theirs, device)) for _ in range(rounds)]
    return (
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(b / a for a, b in pairs),
    )


def measured(
    ours: Callable[[], object],
    theirs: Callable[[], object],
    *,
    suite: str,
    metric: str,
    peer: str,
    limit: tuple[float, str],
    shape: str,
    rounds: int,
    device: str = "cpu",
    warm: bool = True,
) -> Row:
    """The row of two workloads run in turn; `limit` is the floor in seconds and what it is made of. `warm` calls each once before."""
    a, b, ratio = in_turn(ours, theirs, rounds, device, warm=warm)
    return Row(
        suite=suite,
        metric=metric,
        value=a,
        unit="s",
        peer=peer,
        peer_value=b,
        ratio=ratio,
        limit=limit[0],
        limit_is=limit[1],
        shape=shape,
        threads=torch.get_num_threads(),
        rounds=rounds,
        command=f"python -m bench {suite}",
    )


def append(row: Row, device: str = "cpu") -> None:
    """Add a row with date, commit (marked when the tree differs from it), machine and versions."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True, check=False
    ).stdout.strip()
    stamp = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit,
        "machine": torch.cuda.get_device_name() if device == "cuda" else facts().cpu_name,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(stamp | asdict(row)) + "\n")
