"""Runs a Python program that nobody trusts: in namespaces of its own, without network or host files, with every resource bounded."""

import fcntl
import importlib.util
import json
import os
import platform
import resource
import secrets
import select
import selectors
import shutil
import signal
import struct
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Literal

from qvl.core.device import control_group, process_tree

KilledBy = Literal["time", "memory", "output", "processes"]

SECONDS_TO_START = 20.0
"""For bubblewrap to make the namespaces, before the program's own clock starts; 50 ms on a machine at rest."""
MEBIBYTE = 2**20
NOBODY = 65534
PYTHON_OPTIONS = ("-s", "-P", "-B", "/program.py")
BECOME_NOBODY = (
    f"import os, sys; os.closerange(3, 1024); os.setgroups([]); os.setresgid(*[{NOBODY}] * 3); os.setresuid(*[{NOBODY}] * 3); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)
"""What root's sandbox starts first: with the user goes the last capability."""
MAKE_NAMESPACE = """
import ctypes, sys
if ctypes.CDLL(None).unshare(0x10000000):
    sys.exit(1)
print("made", flush=True)
sys.stdin.readline()
open("/proc/sys/user/max_user_namespaces", "w").write("0")
print("closed", flush=True)
sys.stdin.readline()
"""
CUT = "\n[output cut after {limit:,} bytes]\n"


class SandboxError(RuntimeError):
    """This machine cannot isolate a program, so none was run. The text is one sentence."""


@dataclass(frozen=True, kw_only=True)
class SandboxLimits:
    """What one program may use. Beyond a limit the program is killed, with all processes it started."""

    seconds: float = 10.0
    """Wall time, the interpreter's start included; the processor time of each process is bounded by the same number."""
    mebibytes: int = 512
    """Memory of all its processes together. Beside it, each of its three writable folders may hold `file_mebibytes`."""
    processes: int = 32
    """Processes and threads alive at once."""
    file_mebibytes: int = 64
    """One file, and all files of a folder together."""
    output_bytes: int = 2**20
    """Of stdout and of stderr each."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name} is {value}; a limit must be above zero.")


@dataclass(frozen=True, kw_only=True)
class SandboxResult:
    """How a program ended."""

    exit: int | None
    """Its exit code, 128 + n after signal n as shells count; None where a limit ended it."""
    stdout: str
    stderr: str
    killed_by: KilledBy | None
    """The limit that ended it. "memory" also where it ended itself by a MemoryError that it did not catch."""


def run_program(program: str, *, stdin: str = "", limits: SandboxLimits | None = None) -> SandboxResult:
    """Runs Python source under bubblewrap with the standard library and numpy, in an empty folder. Waits until all its processes are gone.

    The program sees no network, no host file beside what Python needs (read-only), no process but its own, no environment of ours. It has
    no capabilities and no further user namespaces. Raises SandboxError where that cannot be had: a program never runs unprotected.
    """
    limits = limits or SandboxLimits()
    bwrap = _bubblewrap()
    others = _namespace_of_others() if os.geteuid() == 0 else None
    with ExitStack() as stack:
        source = stack.enter_context(_sealed("program", program))
        rules = stack.enter_context(_sealed("calls", _forbidden_calls(platform.machine())))
        given = stack.enter_context(_sealed("stdin", stdin))
        info, info_end = os.pipe()
        block_end, block = os.pipe()
        told = stack.enter_context(os.fdopen(info, "rb"))
        go = stack.enter_context(os.fdopen(block, "wb", buffering=0))
        try:
            outer = subprocess.Popen(
                [
                    bwrap,
                    *(("--userns", str(others)) if others is not None else ("--unshare-user", "--disable-userns")),
                    *_namespaces(limits),
                    *(("--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID") if others is not None else ()),
                    *("--json-status-fd", str(info_end), "--block-fd", str(block_end)),
                    *("--seccomp", str(rules.fileno())),
                    *("--perms", "0444", "--ro-bind-data", str(source.fileno()), "/program.py", "--remount-ro", "/"),
                    *(
                        "--",
                        _python(),
                        *(("-I", "-S", "-c", BECOME_NOBODY) if others is not None else ()),
                        *PYTHON_OPTIONS,
                    ),
                ],
                pass_fds=(info_end, block_end, source.fileno(), rules.fileno(), *(() if others is None else (others,))),
                env={},
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        finally:
            os.close(info_end)
            os.close(block_end)
        stack.enter_context(outer)
        stack.callback(outer.kill)
        try:
            first = _first_process(outer, told)
            pidfd = os.pidfd_open(first)
            stack.callback(os.close, pidfd)
            stack.callback(_end, pidfd)
            _limit(first, limits)
        except (OSError, ValueError, KeyError) as error:
            raise _refusal(outer) from error
        with _control_groups(first, limits):
            with suppress(BrokenPipeError):  # it failed meanwhile, which its status will say
                go.write(b"g")
            run = _Run(outer, first, limits)
            killed_by = run.watch()
            _end(pidfd)
            result = run.result(killed_by)
        # An exit code of bubblewrap's own, for namespaces it could not finish, is not the program's.
        if result.killed_by is None and b'"exit-code"' not in told.read():
            raise _cannot((result.stderr.strip().splitlines() or ["bubblewrap said nothing"])[-1][:200])
        return result


# ---- what the program sees ---------------------------------------------------------------------------------------


def _bubblewrap() -> str:
    if sys.platform != "linux":
        raise SandboxError("programs are run in Linux namespaces alone, and this is no Linux; score code on one.")
    if bwrap := shutil.which("bwrap"):
        return bwrap
    raise SandboxError("bubblewrap is not installed, and no program runs without it; run: apt-get install bubblewrap")


def _namespaces(limits: SandboxLimits) -> Iterator[str]:
    own = ("--perms", "0777", "--size", str(limits.file_mebibytes * MEBIBYTE), "--tmpfs")
    yield from ("--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try")
    yield from ("--die-with-parent", "--new-session", "--cap-drop", "ALL", "--hostname", "sandbox", "--clearenv")
    environment = {
        "HOME": "/box",
        "LANG": "C.UTF-8",
        "PATH": "/usr/bin:/bin",
        "PYTHONHASHSEED": "0",  # a set of strings has the same order in every run
        "PYTHONPATH": "/packages",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    for name, value in environment.items():
        yield from ("--setenv", name, value)
    yield from _python_files()
    # bubblewrap leaves the kernel's parameters in sight, which a process of the host's root may change whatever its namespace.
    yield from ("--proc", "/proc", "--tmpfs", "/proc/sys", "--remount-ro", "/proc/sys")
    yield from (
        "--dev",
        "/dev",
        *own,
        "/dev/shm",
        "--remount-ro",
        "/dev",
        *own,
        "/tmp",
        *own,
        "/box",
        "--chdir",
        "/box",
    )


def _python() -> str:
    return os.path.realpath(sys.executable)


def _python_files() -> Iterator[str]:
    """Interpreter, standard library, C libraries and numpy; other installed packages (this one too) are covered by empty folders."""
    for folder in ("/lib", "/lib64", "/usr/lib", "/usr/lib64"):
        if Path(folder).is_symlink():
            yield from ("--symlink", os.readlink(folder), folder)
        else:
            yield from _shown(folder)
    yield from _shown("/etc/ld.so.cache")
    yield from _shown(_python())
    prefix = Path(sys.base_prefix)
    for name in ("lib", "lib64"):
        if (prefix / name) not in (Path("/usr/lib"), Path("/usr/lib64")) and not (prefix / name).is_symlink():
            yield from _shown(str(prefix / name))
    library = Path(sysconfig.get_path("stdlib"))
    for folder in (
        *(library / "site-packages", library / "dist-packages", library.parent / "python3" / "dist-packages"),
        *(Path("/usr/lib/python3/dist-packages"), Path("/usr/lib/python3/site-packages")),
    ):
        if folder.is_dir():
            yield from ("--tmpfs", str(folder), "--remount-ro", str(folder))
    numpy = importlib.util.find_spec("numpy")
    for place in (numpy.submodule_search_locations or ()) if numpy else ():
        yield from _shown(place, "/packages/numpy")
        yield from _shown(f"{place}.libs", "/packages/numpy.libs")


def _shown(place: str, inside: str | None = None) -> Iterator[str]:
    """A file or folder, read-only. bubblewrap alone would make the folders above it for their owner, who is not who runs the program."""
    if not Path(place).exists():
        return
    inside = inside or place
    for folder in reversed(Path(inside).parents[:-1]):
        yield from ("--perms", "0755", "--dir", str(folder))
    yield from ("--ro-bind", place, inside)


@contextmanager
def _sealed(name: str, content: str | bytes) -> Iterator[IO[bytes]]:
    """A text (or bytes) as an open file that nobody can change any more."""
    with os.fdopen(os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "w+b") as file:
        file.write(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
        file.seek(0)
        fcntl.fcntl(
            file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        )
        yield file


FORBIDDEN = {
    # Another process's memory and descriptors.
    **{
        "ptrace": (101, 117),
        "process_vm_readv": (310, 270),
        "process_vm_writev": (311, 271),
        "pidfd_getfd": (438, 438),
    },
    # Memory that no limit of ours counts: it belongs to no process, or to a file without a name.
    **{"memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194)},
    # Keys are not kept apart by namespaces of processes or users as strictly as the rest.
    **{"add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219)},
    # Large parts of the kernel that no program we score needs.
    **{"bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425)},
    **{"mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97)},
    **{"setns": (308, 268), "open_by_handle_at": (304, 265), "open_tree": (428, 428), "move_mount": (429, 429)},
    **{"fsopen": (430, 430), "init_module": (175, 105), "finit_module": (313, 273), "kexec_load": (246, 104)},
}
"""System calls that answer "not permitted", with their numbers on x86_64 and aarch64."""


def _forbidden_calls(machine: str) -> bytes:
    """The filter as the kernel's packet-filter program. Elsewhere than on these two machines it allows all; the namespaces stay."""
    allow, deny, kill = 0x7FFF0000, 0x00050000 | 1, 0x80000000
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06  # of the packet filter: load a word, jump, return
    machines = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
    if machine not in machines:
        return struct.pack("=HBBI", give, 0, 0, allow)
    column, architecture = machines[machine]
    numbers = [numbers[column] for numbers in FORBIDDEN.values()]
    steps = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    # From 2**30 on x86_64 counts its calls for 32-bit pointers, under other numbers.
    steps += [(at_least, len(numbers) + 1, 0, 2**30)]
    steps += [(equal, len(numbers) - place, 0, number) for place, number in enumerate(numbers)]
    steps += [(give, 0, 0, allow), (give, 0, 0, deny)]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


@cache
def _namespace_of_others() -> int:
    """For root: a user namespace, as an open file, in which programs are nobody, and from which no further one can be made.

    In a namespace of bubblewrap's own making the program would still be the host's root without capabilities: root owns the kernel's
    parameters in /proc/sys, and could write them.
    """
    helper = subprocess.Popen(
        [_python(), "-I", "-S", "-c", MAKE_NAMESPACE],
        env={},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert helper.stdin is not None and helper.stdout is not None
        if helper.stdout.readline() != b"made\n":
            raise OSError("no user namespace")
        for file in ("uid_map", "gid_map"):
            Path(f"/proc/{helper.pid}/{file}").write_text(f"0 0 1\n{NOBODY} {NOBODY} 1\n")
        helper.stdin.write(b"\n")
        helper.stdin.flush()
        if helper.stdout.readline() != b"closed\n":
            raise OSError("a user namespace that cannot be closed")
        return os.open(f"/proc/{helper.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise _cannot(str(error)) from error
    finally:
        helper.kill()
        helper.communicate()


# ---- starting it --------------------------------------------------------------------------------------------------


def _first_process(outer: "subprocess.Popen[bytes]", told: IO[bytes]) -> int:
    """The process that is number 1 inside, as we see it. It waits until its limits are set."""
    text, end = b"", time.monotonic() + SECONDS_TO_START
    while True:
        ready, _, _ = select.select([told], [], [], max(0.0, end - time.monotonic()))
        piece = os.read(told.fileno(), 4096) if ready else b""
        text += piece
        if text.endswith(b"\n"):
            return int(json.loads(text.splitlines()[0])["child-pid"])
        if not piece:
            raise ValueError("bubblewrap did not say which process it started")


def _refusal(outer: "subprocess.Popen[bytes]") -> SandboxError:
    outer.kill()
    _, said = outer.communicate()
    lines = said.decode(errors="replace").strip().splitlines() or ["it did not start in time"]
    return _cannot(lines[-1][:200])


def _cannot(why: str) -> SandboxError:
    return SandboxError(
        f"this machine cannot isolate a program, so it was not run ({why}); allow user namespaces, or score code elsewhere."
    )


def _limit(process: int, limits: SandboxLimits) -> None:
    """Inherited by everything that process 1 starts."""
    memory, seconds = limits.mebibytes * MEBIBYTE, int(limits.seconds) + 2
    wanted = {
        # DATA counts memory that can be written; AS also counts mapped libraries and shared memory.
        resource.RLIMIT_DATA: memory,
        resource.RLIMIT_AS: memory + 512 * MEBIBYTE,
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: limits.file_mebibytes * MEBIBYTE,
        resource.RLIMIT_NOFILE: 128,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    if os.geteuid() != 0:  # counted within the namespace, of which root's runs share one; `watch` counts for all
        wanted[resource.RLIMIT_NPROC] = 2 * limits.processes + 16
    for kind, value in wanted.items():
        hard = resource.prlimit(process, kind)[1]
        bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.prlimit(process, kind, (bound, bound))


@contextmanager
def _control_groups(process: int, limits: SandboxLimits) -> Iterator[None]:
    """Where we may make control groups (version 1; root in a container often may), the kernel bounds memory and processes as a whole."""
    made: list[Path] = []
    wanted = {
        "memory": ("memory.limit_in_bytes", (limits.mebibytes + 3 * limits.file_mebibytes) * MEBIBYTE),
        "pids": ("pids.max", 2 * limits.processes + 16),
    }
    try:
        for controller, (file, value) in wanted.items():
            above = control_group(controller)
            if above is None:
                continue
            for left in above.glob("qvl-*-*"):  # by a caller that was killed
                if not Path("/proc", left.name.split("-")[1]).exists():
                    with suppress(OSError):
                        left.rmdir()
            group = above / f"qvl-{os.getpid()}-{secrets.token_hex(8)}"
            with suppress(OSError):
                group.mkdir()
                made.append(group)
                (group / file).write_text(str(value))
                (group / "cgroup.procs").write_text(str(process))
        yield
    finally:
        for group in made:
            _remove(group)


def _remove(group: Path) -> None:
    """An ended process leaves its group a moment later."""
    for _ in range(100):
        try:
            return group.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.01)


# ---- watching it --------------------------------------------------------------------------------------------------


class _Run:
    """Reads what the program says, and looks at its time, memory and processes."""

    def __init__(self, outer: "subprocess.Popen[bytes]", first: int, limits: SandboxLimits) -> None:
        assert outer.stdout is not None and outer.stderr is not None
        self.outer, self.first, self.limits = outer, first, limits
        self.said = {outer.stdout: bytearray(), outer.stderr: bytearray()}

    def watch(self) -> KilledBy | None:
        """Until it ends (None) or passes a limit."""
        end, wait = time.monotonic() + self.limits.seconds, 0.002
        ended = os.pidfd_open(self.outer.pid)
        try:
            with selectors.DefaultSelector() as waiting:
                for file in (ended, *self.said):
                    waiting.register(file, selectors.EVENT_READ)
                while True:
                    ready = [key.fileobj for key, _ in waiting.select(wait)]
                    for file in self.said:
                        if file in ready and not self._read(file):
                            waiting.unregister(file)
                    if any(len(text) > self.limits.output_bytes for text in self.said.values()):
                        return "output"
                    if ended in ready:
                        return None
                    if time.monotonic() > end:
                        return "time"
                    # Often at first, since most programs are short and a bomb is quick.
                    wait = min(0.02, wait * 1.5)
                    tasks, memory = process_tree(self.first)
                    if tasks > self.limits.processes + 1:  # and process 1, which is bubblewrap's
                        return "processes"
                    if memory > self.limits.mebibytes * MEBIBYTE:
                        return "memory"
        finally:
            os.close(ended)

    def result(self, killed_by: KilledBy | None) -> SandboxResult:
        """After all its processes are gone, so that both pipes end."""
        for file in self.said:
            while len(self.said[file]) <= self.limits.output_bytes and self._read(file):
                pass
        code = self.outer.wait()
        if killed_by is None and any(len(text) > self.limits.output_bytes for text in self.said.values()):
            killed_by = "output"
        stdout, stderr = (self._text(text) for text in self.said.values())
        if killed_by is None:
            killed_by = _own_end(code, stderr)
        return SandboxResult(exit=None if killed_by else code, stdout=stdout, stderr=stderr, killed_by=killed_by)

    def _read(self, file: IO[bytes]) -> bool:
        piece = os.read(file.fileno(), 65536)
        self.said[file] += piece
        return bool(piece)

    def _text(self, said: bytearray) -> str:
        limit = self.limits.output_bytes
        text = said[:limit].decode(errors="replace")
        return text + CUT.format(limit=limit) if len(said) > limit else text


def _own_end(code: int, stderr: str) -> KilledBy | None:
    """The limits that a process meets by itself: an allocation that failed, a signal about its processor time."""
    last = stderr.rstrip().rpartition("\n")[2]
    if code == 1 and last.partition(":")[0].rpartition(".")[2] in ("MemoryError", "_ArrayMemoryError"):
        return "memory"
    return "time" if code == 128 + signal.SIGXCPU else None


def _end(pidfd: int) -> None:
    """Kills process 1 of the namespace, and with it every other, and waits until they are gone."""
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    select.select([pidfd], [], [])
