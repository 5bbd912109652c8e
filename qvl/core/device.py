"""What this machine is: cores, memory, number formats, kernels. The only reader of the environment and of /proc."""

import ctypes
import importlib.util
import mmap
import os
import platform
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from qvl.core.log import say_once


@dataclass(frozen=True, kw_only=True)
class Gpu:
    name: str
    capability: tuple[int, int]
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the machine has, as far as this process may use it."""

    system: str
    machine: str
    """Instruction set: x86_64, aarch64, ..."""
    cpu_name: str
    cpu_flags: tuple[str, ...]
    """Those that decide how fast low-precision arithmetic is, not all."""
    num_cores: int
    """Cores this process may run on (affinity and container quota)."""
    num_threads: int
    """Threads torch computes with."""
    memory_bytes: int
    """The machine's, or the container's limit where that is lower."""
    gpus: tuple[Gpu, ...]
    python_version: str
    torch_version: str
    cpu_grouped_mm: tuple[str, ...]
    """Dtypes for which torch's grouped matmul (MoE experts) runs on the CPU."""
    varlen_attention: bool
    """Whether torch.nn.attention.varlen can run: it needs CUDA and capability 8.0."""
    compiler: str | None
    """A C++ compiler, without which torch.compile has nothing to run on a CPU."""

    @property
    def cpu_bf16(self) -> bool:
        """Whether the CPU multiplies bfloat16 itself instead of by way of fp32."""
        return any(flag in self.cpu_flags for flag in ("avx512_bf16", "amx_bf16", "bf16", "svebf16"))


@dataclass(frozen=True, kw_only=True)
class Place:
    """This process among those that torchrun started; alone without torchrun."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def facts() -> Facts:
    """Looks at the machine afresh: a few milliseconds, and the CUDA context where there is a GPU."""
    cpu_name, flags = _cpu()
    gpus = tuple(_gpu(i) for i in range(torch.cuda.device_count()))
    return Facts(
        system=platform.system(),
        machine=platform.machine(),
        cpu_name=cpu_name,
        cpu_flags=flags,
        num_cores=num_cores(),
        num_threads=torch.get_num_threads(),
        memory_bytes=memory_bytes(),
        gpus=gpus,
        python_version=platform.python_version(),
        torch_version=torch.__version__,
        cpu_grouped_mm=tuple(
            str(d).removeprefix("torch.") for d in (torch.float32, torch.bfloat16) if grouped_mm_runs(d)
        ),
        varlen_attention=varlen_runs(),
        compiler=compiler(),
    )


def pick_device(name: str = "auto") -> torch.device:
    """The device a person named; `auto` is the first GPU, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (index and not index.isdigit()):
        raise ValueError(f"device is {name!r}; expected auto, cpu, cuda, cuda:N or mps")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ValueError(
            f"device is {name!r}, but torch {torch.__version__} sees {found} CUDA devices here; use auto or cpu"
        )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device is 'mps', but torch cannot use Metal here; use auto or cpu")
    return torch.device(name)


def pick_dtype(device: torch.device | str, name: str = "auto") -> torch.dtype:
    """The number format for weights on `device`; `auto` is bfloat16 where the device multiplies it itself.

    float16 on a CPU becomes bfloat16 and says so: torch's CPU kernels for float16 are slow, and the published weights are bfloat16.
    """
    kind = torch.device(device).type
    if name == "auto":
        if kind == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
            return torch.bfloat16 if native else torch.float16
        return torch.bfloat16 if kind == "cpu" and facts().cpu_bf16 else torch.float32
    short = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    formats = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    dtype = formats.get(short.get(name, name))
    if dtype is None:
        raise ValueError(f"dtype is {name!r}; expected auto, {', '.join(formats)} (or {', '.join(short)})")
    if dtype is torch.float16 and kind == "cpu":
        say_once("float16 on a CPU runs as bfloat16: torch has no fast CPU kernels for float16")
        return torch.bfloat16
    return dtype


def place() -> Place:
    """Where torchrun put this process (RANK, WORLD_SIZE, LOCAL_RANK)."""
    if "RANK" not in os.environ:
        return Place()
    return Place(
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        local_rank=int(os.environ["LOCAL_RANK"]),
    )


def take_place(here: Place, port: int) -> None:
    """Sets what torchrun would have set for this process, for `place` and for torch.distributed; the parent keeps the store at `port`."""
    os.environ |= {"RANK": str(here.rank), "LOCAL_RANK": str(here.local_rank), "WORLD_SIZE": str(here.world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}


def child_environment(*names: str) -> dict[str, str]:
    """Those of the named variables that are set: what a process we start may see. PATH and the library paths are worth naming."""
    return {name: os.environ[name] for name in names if name in os.environ}


def num_cores() -> int:
    """Cores this process may run on: its affinity, and a container's CPU quota rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _cgroup_folders("cpu"):
        v2, v1 = folder / "cpu.max", folder / "cpu.cfs_quota_us"
        if v2.exists():
            quota, period = v2.read_text().split()
        elif v1.exists():
            quota, period = v1.read_text().strip(), (folder / "cpu.cfs_period_us").read_text()
        else:
            continue
        if quota not in ("max", "-1"):
            cores = min(cores, max(1, -(-int(quota) // int(period))))
    return cores


def memory_bytes() -> int:
    """Memory this process may use in all: the machine's, or its container's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for folder in _cgroup_folders("memory"):
        for file in (folder / "memory.max", folder / "memory.limit_in_bytes"):
            text = file.read_text().strip() if file.exists() else "max"
            if text != "max":
                total = min(total, int(text))
    return total


def free_memory_bytes() -> int:
    """Memory this process may still take without pushing anything out: the machine's, or what its container has left of its limit."""
    total = free = memory_bytes()
    info = Path("/proc/meminfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("MemAvailable:"):
            free = min(free, int(line.split()[1]) * 1024)
    for folder in _cgroup_folders("memory"):
        for limit, used, idle in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            text = (folder / limit).read_text().strip() if (folder / limit).exists() else "max"
            if text == "max" or int(text) > total:
                continue
            # Files that were read count as used until somebody wants the room.
            counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            free = min(free, max(0, int(text) - int((folder / used).read_text()) + int(counts[idle])))
    return free


@cache
def grouped_mm_runs(dtype: torch.dtype, device: torch.device | str = "cpu") -> bool:
    """Whether one matmul per expert in a single call works here, found out by making a tiny one."""
    grouped_mm = getattr(torch.nn.functional, "grouped_mm", None)
    if grouped_mm is None:
        return False
    a, b = torch.ones(8, 16, dtype=dtype, device=device), torch.ones(2, 16, 16, dtype=dtype, device=device)
    ends = torch.tensor([4, 8], dtype=torch.int32, device=device)
    try:
        return grouped_mm(a, b, offs=ends).shape == (8, 16)
    except (RuntimeError, NotImplementedError):  # the answer to the question, not a failure
        return False


@cache
def varlen_runs() -> bool:
    """Whether torch's attention over sequences laid end to end has a kernel here."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability() >= (8, 0)


def compiler() -> str | None:
    """Path of a C++ compiler: the one CXX names, else the first usual name found."""
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def _gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    return Gpu(name=properties.name, capability=capability, memory_bytes=properties.total_memory)


def _cpu() -> tuple[str, tuple[str, ...]]:
    """Name and telling flags. x86 lists `flags` and a `model name`, arm lists `Features` and often no name."""
    wanted = {
        "avx2",
        "avx512f",
        "avx512_bf16",
        "amx_bf16",
        "amx_int8",
        "avx512_vnni",
        "asimd",
        "sve",
        "sve2",
        "bf16",
        "svebf16",
        "i8mm",
    }
    info = Path("/proc/cpuinfo")
    name, flags = platform.processor() or platform.machine(), set[str]()
    for line in info.read_text().splitlines() if info.exists() else ():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "model name" and value:
            name = value
        elif key in ("flags", "Features"):
            flags |= wanted & set(value.split())
    return name, tuple(sorted(flags))


def _cgroup_folders(controller: str) -> list[Path]:
    """This process's control groups, innermost first, where limits on `controller` may stand (version 2 and 1 layouts)."""
    own, root = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
    folders: list[Path] = []
    for line in own.read_text().splitlines() if own.exists() else ():
        number, controllers, path = line.split(":", 2)
        if number != "0" and controller not in controllers.split(","):
            continue
        top = root if number == "0" else root / controller
        inner = top / path.lstrip("/")
        folders += [f for f in (inner, *inner.parents) if f.is_relative_to(top) and f.exists()]
    return folders


def control_group(controller: str) -> Path | None:
    """The folder of this process's innermost control group for `controller`; None where there is none."""
    return next(iter(_cgroup_folders(controller)), None)


def process_tree(root: int) -> tuple[int, int]:
    """(tasks, bytes) of process `root` and all below it: their processes and threads, and the memory they hold beside files on disk.

    Files that every user may read, so a process cannot hide by making itself undumpable. Pages that processes share since a fork count
    once where the kernel says so.
    """
    tasks, memory, waiting = 0, 0, [root]
    while waiting:
        folder = Path("/proc") / str(waiting.pop())
        try:
            for task in (folder / "task").iterdir():
                tasks += 1
                waiting += [int(child) for child in (task / "children").read_text().split()]
            memory += _private_bytes(folder)
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile; what it left behind belongs to the root next time
    return tasks, memory


def _private_bytes(folder: Path) -> int:
    kinds = {"RssAnon:", "RssShmem:"}
    lines = (line.split() for line in (folder / "status").read_text().splitlines())
    resident = sum(int(line[1]) * 1024 for line in lines if line and line[0] in kinds)
    if resident < 64 * 1024**2:
        return resident
    try:
        lines = (line.split() for line in (folder / "smaps_rollup").read_text().splitlines())
        return sum(int(line[1]) * 1024 for line in lines if line and line[0] in ("Pss_Anon:", "Pss_Shmem:"))
    except OSError:
        return resident


def ask_for_large_pages(tensors: Iterable[Tensor]) -> None:
    """Where Linux gives pages of 2 MiB to those who ask, asks for tensors that nobody has written yet: 1.9 GB of weights are 900 page
    faults then, not 460,000, and loading them takes six tenths of the time. Elsewhere nothing happens; it is advice."""
    advise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
    if advise is None:
        return
    page = mmap.PAGESIZE
    for tensor in tensors:
        low, high = -(-tensor.data_ptr() // page) * page, (tensor.data_ptr() + tensor.nbytes) // page * page
        if tensor.device.type == "cpu" and high > low:
            advise(ctypes.c_void_p(low), ctypes.c_size_t(high - low), ctypes.c_int(mmap.MADV_HUGEPAGE))
