"""What an untrusted program cannot do: forty ways out are tried, each fails, and no process is left."""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qvl.outside import sandbox
from qvl.outside.sandbox import SandboxError, SandboxLimits, SandboxResult, run_program

ROOT = Path(__file__).resolve().parent.parent
# CI must try every way out: there a machine without bubblewrap is a failure, not a skip.
needs_bubblewrap = pytest.mark.skipif(
    shutil.which("bwrap") is None and not os.environ.get("CI"), reason="bubblewrap is not installed"
)
pytestmark = needs_bubblewrap


def run(program: str, stdin: str = "", **limits: float) -> SandboxResult:
    return run_program(program, stdin=stdin, limits=SandboxLimits(**({"seconds": 20.0} | limits)))  # pyright: ignore[reportArgumentType]


def processes_of_sandboxes() -> set[int]:
    """Every process of this machine whose command line names the program's file inside."""
    found = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if b"\0/program.py\0" in (folder / "cmdline").read_bytes():
                    found.add(int(folder.name))
            except OSError:
                pass
    return found


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = processes_of_sandboxes()
    children = Path(f"/proc/self/task/{threading.get_native_id()}/children")
    own = set(children.read_text().split())
    yield
    assert processes_of_sandboxes() <= before
    assert set(children.read_text().split()) <= own


# Each program prints ESCAPED when it got through; whatever it raises is the refusal we want. HOST is a folder of the host that all may
# read and write, with a file `secret` in it; PORT is a port of the host's loopback where somebody listens; PARENT is our process id.
ESCAPES = {
    "read the host's password hashes": "print(open('/etc/shadow').read() and 'ESCAPED')",
    "read the host's users": "print(open('/etc/passwd').read() and 'ESCAPED')",
    "read a file that all may read": "print(open('HOST/secret').read() and 'ESCAPED')",
    "list the host's temporary files": "import os; os.listdir('/tmp') and print('ESCAPED')",
    "list the host's homes": "import os; [print('ESCAPED') for h in ('/home', '/root') if os.path.exists(h) for f in os.listdir(h) "
    "if not f.startswith('.pyenv') and not f.startswith('.local')]",
    "read the project": "print(open('PROJECT/pyproject.toml').read() and 'ESCAPED')",
    "import the project": "import sys; sys.path.append('PROJECT'); import qvl; print('ESCAPED')",
    "import installed packages": "import torch; print('ESCAPED')",
    "read the environment": "import os; print('ESCAPED' if any('TOKEN' in k or 'canary' in v for k, v in os.environ.items()) else '')",
    "read the first process's environment": "print(b'canary' in open('/proc/1/environ', 'rb').read() and 'ESCAPED')",
    "read our process's environment": "print(b'canary' in open('/proc/PARENT/environ', 'rb').read() and 'ESCAPED')",
    "read every process's environment": "import glob\nfor f in glob.glob('/proc/*/environ'):\n"
    " if b'canary' in open(f, 'rb').read(): print('ESCAPED')",
    "write into the host's folder": "open('HOST/made', 'w').write('x'); print('ESCAPED')",
    "write beside the interpreter": "import os, sys; open(os.path.dirname(os.__file__) + '/made.py', 'w'); print('ESCAPED')",
    "write over the interpreter": "import sys; open(sys.executable, 'r+b'); print('ESCAPED')",
    "write into the root": "open('/made', 'w'); print('ESCAPED')",
    "change its own program": "open('/program.py', 'a').write('#'); print('ESCAPED')",
    "change its input": "import os; os.write(os.open('/proc/self/fd/0', os.O_RDWR), b'x') and print('ESCAPED')",
    "make a file in /dev": "open('/dev/made', 'w'); print('ESCAPED')",
    "make a device": "import os, stat; os.mknod('/tmp/disk', 0o600 | stat.S_IFBLK, os.makedev(8, 0)); print('ESCAPED')",
    "read a disk": "import glob; [open(d, 'rb') for d in glob.glob('/dev/[svn][dv]*')] and print('ESCAPED')",
    "set a kernel parameter": "f = '/proc/sys/kernel/core_pattern'; v = open(f).read(); open(f, 'w').write(v); print('ESCAPED')",
    "pull the emergency handle": "open('/proc/sysrq-trigger', 'w'); print('ESCAPED')",
    "change control groups": "import glob; [open(f, 'w') for f in glob.glob('/sys/fs/cgroup/**/cgroup.procs', recursive=True)] "
    "and print('ESCAPED')",
    "mount": "import ctypes; ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0 and print('ESCAPED')",
    "make a read-only mount writable": "import ctypes; ctypes.CDLL(None).mount(None, b'/usr/lib', None, 32 | 4096, None) == 0 "
    "and print('ESCAPED')",
    "unmount": "import ctypes; ctypes.CDLL(None).umount2(b'/proc', 2) == 0 and print('ESCAPED')",
    "make a user namespace": "import ctypes; ctypes.CDLL(None).unshare(0x10000000) == 0 and print('ESCAPED')",
    "join our namespaces": "import ctypes, os; ctypes.CDLL(None).setns(os.open('/proc/1/ns/net', 0), 0) or print('ESCAPED')",
    "become root": "import os; os.setuid(0); print('ESCAPED')",
    "change the root folder": "import os; os.chroot('/tmp'); print('ESCAPED')",
    "leave by a set-user-id file": "import os, subprocess; open('sh', 'w').write('#!/program.py'); os.chown('sh', 0, 0); print('ESCAPED')",
    "trace the first process": "import ctypes; ctypes.CDLL(None).ptrace(16, 1, None, None) == 0 and print('ESCAPED')",
    "trace our process": "import ctypes; ctypes.CDLL(None).ptrace(16, PARENT, None, None) == 0 and print('ESCAPED')",
    "trace its own child": "import ctypes, os, time\nc = os.fork()\nif c == 0: time.sleep(0.5); os._exit(0)\n"
    "ctypes.CDLL(None).ptrace(16, c, None, None) == 0 and print('ESCAPED')",
    "hold memory in files without names": "import os; os.memfd_create('x'); print('ESCAPED')",
    "hold memory in segments of no process": "import ctypes; ctypes.CDLL(None).shmget(0, 10**7, 0o1600) >= 0 and print('ESCAPED')",
    "use the kernel's keys": "import ctypes; ctypes.CDLL(None).syscall(250, 0, -4, 1) >= 0 and print('ESCAPED')",
    "make calls by their other numbers": "import ctypes; ctypes.CDLL(None).syscall(2**30 + 39) > 0 and print('ESCAPED')",
    "kill our process": "import os; os.kill(PARENT, 0); print('ESCAPED')",
    "kill everything else": "import os, signal; os.kill(-1, 0); print('ESCAPED')",
    "raise its limits": "import resource as r; r.setrlimit(r.RLIMIT_DATA, (r.RLIM_INFINITY, r.RLIM_INFINITY)); print('ESCAPED')",
    "connect to the host's loopback": "import socket; socket.create_connection(('127.0.0.1', PORT), 2); print('ESCAPED')",
    "connect to a socket file": "import socket; socket.socket(socket.AF_UNIX).connect('HOST/wire'); print('ESCAPED')",
    "connect to an abstract socket": "import socket; socket.socket(socket.AF_UNIX).connect('\\0qvl-test-PARENT'); print('ESCAPED')",
    "connect outside": "import socket; socket.create_connection(('8.8.8.8', 53), 2); print('ESCAPED')",
    "ask the name service": "import socket; socket.getaddrinfo('example.com', 80); print('ESCAPED')",
    "send a packet of its own making": "import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW); print('ESCAPED')",
    "follow a link outside": "import os; os.symlink('HOST/secret', 'link'); print(open('link').read() and 'ESCAPED')",
    "climb above its folder": "print(open('../../../../../../HOST/secret').read() and 'ESCAPED')",
    "enter by another process's root": "print(open('/proc/1/root/HOST/secret').read() and 'ESCAPED')",
    "use descriptors that were left open": "import os\nfor n in range(3, 500):\n try: print('ESCAPED', os.readlink(f'/proc/self/fd/{n}'), "
    "os.fstat(n))\n except OSError: pass",
    "write to our terminal": "open('/dev/tty', 'w').write('x'); print('ESCAPED')",
}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    folder = tmp_path_factory.mktemp("host")
    (folder / "secret").write_text("the host's")
    folder.chmod(0o777)
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.socket(socket.AF_UNIX) as wire,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        os.chdir(folder)  # a socket's path is short
        wire.bind("wire")
        os.chdir(ROOT)
        wire.listen()
        abstract.bind(f"\0qvl-test-{os.getpid()}")
        abstract.listen()
        yield {
            "HOST": str(folder),
            "PROJECT": str(ROOT),
            "PORT": str(listener.getsockname()[1]),
            "PARENT": str(os.getpid()),
        }
    assert {f.name for f in folder.iterdir()} == {"secret", "wire"}
    assert (folder / "secret").read_text() == "the host's"


def placed(program: str, host: dict[str, str]) -> str:
    for word, value in host.items():
        program = program.replace(word, value)
    return program


@pytest.mark.parametrize("way", ESCAPES)
def test_a_way_out_is_closed(way: str, host: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary")
    kept = os.open(host["HOST"] + "/secret", os.O_RDONLY)
    os.set_inheritable(kept, True)
    try:
        result = run("print('tried', flush=True)\n" + placed(ESCAPES[way], host))
    finally:
        os.close(kept)
    assert result.stdout.startswith("tried") and "ESCAPED" not in result.stdout, result
    assert result.killed_by is None


def test_forty_ways_out_are_tried() -> None:
    assert len(ESCAPES) >= 40


def test_the_same_programs_escape_where_nothing_holds_them(host: dict[str, str]) -> None:
    """So that a refusal above is the sandbox's, not a mistake in the program."""
    ways = [
        "read a file that all may read",
        "import the project",
        "connect to the host's loopback",
        "connect to a socket file",
    ]
    ways += [
        "connect to an abstract socket",
        "follow a link outside",
        "list the host's temporary files",
        "read the project",
    ]
    for way in ways:
        ran = subprocess.run(
            [sys.executable, "-c", placed(ESCAPES[way], host)],
            capture_output=True,
            text=True,
            cwd=host["HOST"],
            check=False,
        )
        (Path(host["HOST"]) / "link").unlink(missing_ok=True)
        assert "ESCAPED" in ran.stdout, (way, ran.stderr)


# ---- using too much ----------------------------------------------------------------------------------------------

BOMBS = {
    "sleep": ("import time; time.sleep(60)", "time"),
    "work": ("while True: pass", "time"),
    "ignore every signal": ("import signal, time\nfor s in range(1, 65):\n try: signal.signal(s, signal.SIG_IGN)\n except (OSError, "
                            "ValueError): pass\ntime.sleep(60)", "time"),
    "sleep in a child": ("import os, time\nos.fork()\nos.fork()\ntime.sleep(60)", "time"),
    "one large block": ("x = bytearray(10**10)", "memory"),
    "many small blocks": ("x = []\nwhile True: x.append(bytearray(10**6))", "memory"),
    "a large array": ("import numpy; numpy.ones(10**10)", "memory"),
    "blocks in many processes": ("import os, time\nfor _ in range(4):\n if os.fork() == 0: break\nx = bytearray(b'1') * (60 * 2**20)\n"
                                 "time.sleep(30)", "memory"),
    "shared memory": ("import mmap, time\nm = mmap.mmap(-1, 300 * 2**20)\nm.write(b'x' * len(m)) if 0 else None\n"
                      "for i in range(0, len(m), 4096): m[i] = 1\ntime.sleep(30)", "memory"),
    "processes": ("import os\nwhile True:\n try: os.fork()\n except OSError: pass", "processes"),
    "threads": ("import threading, time\nwhile True:\n try: threading.Thread(target=time.sleep, args=(60,)).start()\n"
                " except RuntimeError: time.sleep(60)", "processes"),
    "output": ("while True: print('x' * 10000)", "output"),
    "errors": ("import sys\nwhile True: print('x' * 10000, file=sys.stderr)", "output"),
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_costs_itself_alone(bomb: str) -> None:
    program, killed_by = BOMBS[bomb]
    start = time.monotonic()
    seconds = 1.0 if killed_by == "time" else 20.0
    memory = 1024 if bomb == "threads" else 128
    result = run(program, seconds=seconds, mebibytes=memory, processes=16, output_bytes=100_000)
    assert (result.killed_by, result.exit) == (killed_by, None)
    assert time.monotonic() - start < 15
    assert len(result.stdout) < 110_000 and len(result.stderr) < 110_000
    if killed_by == "output":
        assert (result.stdout + result.stderr).endswith("[output cut after 100,000 bytes]\n")


@pytest.mark.parametrize("folder", ["/tmp", ".", "/dev/shm"])
def test_no_folder_takes_more_than_its_share(folder: str) -> None:
    program = f"""
wrote = 0
try:
    for number in range(100):
        with open(f"{folder}/{{number}}", "wb") as file:
            for _ in range(10):
                wrote += file.write(bytes(2**20))
except OSError as error:
    print(wrote, error.errno)
"""
    result = run(program, file_mebibytes=16)
    wrote, errno = map(int, result.stdout.split())
    assert wrote <= 16 * 2**20 and errno == 28


def test_a_daemon_does_not_outlive_its_program() -> None:
    program = "import os, time\nif os.fork() == 0:\n os.setsid()\n if os.fork() == 0: time.sleep(60)\n os._exit(0)\nos.wait()\n"
    program += "print('done')"
    start = time.monotonic()
    assert run(program).stdout == "done\n"
    assert time.monotonic() - start < 10  # and `nothing_is_left` looks


def test_a_killed_caller_takes_its_program_along() -> None:
    code = (
        "from qvl.outside.sandbox import *\n"
        "run_program('import time; time.sleep(60)', limits=SandboxLimits(seconds=50))"
    )
    before = processes_of_sandboxes()
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    end = time.monotonic() + 60
    while len(processes_of_sandboxes() - before) < 3 and time.monotonic() < end:  # bubblewrap twice, and Python
        time.sleep(0.1)
    assert processes_of_sandboxes() - before
    caller.kill()
    caller.wait()
    while processes_of_sandboxes() - before and time.monotonic() < end:
        time.sleep(0.1)
    assert processes_of_sandboxes() <= before


# ---- ordinary programs -------------------------------------------------------------------------------------------


def test_a_program_reads_its_input_and_its_exit_code_comes_back() -> None:
    result = run("import sys\nprint(sum(map(int, sys.stdin.read().split())))\nsys.exit(7)", stdin="1 2\n3\n")
    assert result == SandboxResult(exit=7, stdout="6\n", stderr="", killed_by=None)


def test_the_standard_library_and_numpy_are_there() -> None:
    modules = "math re json random itertools collections heapq bisect functools decimal fractions datetime hashlib ssl ctypes zlib"
    result = run(
        f"import {', '.join(modules.split())}\nimport numpy as np\nprint((np.linalg.inv(np.eye(3) * 2)).sum())"
    )
    assert (result.stdout, result.stderr, result.exit) == ("1.5\n", "", 0)


def test_files_threads_and_processes_work() -> None:
    program = """
import os, tempfile
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pool
def square(x): return x * x
if __name__ == "__main__":
    assert os.listdir(".") == []
    open("a", "w").write("b")
    with tempfile.TemporaryFile() as file: file.write(b"x")
    with ThreadPoolExecutor(4) as threads, Pool(2) as processes:
        print(open("a").read(), sum(threads.map(square, range(5))), sum(processes.map(square, range(5))))
"""
    assert run(program).stdout == "b 30 30\n"


def test_runs_do_not_see_each_other() -> None:
    assert run("open('a', 'w'); open('/tmp/a', 'w')").exit == 0
    assert run("import os; print(os.listdir('.'), os.listdir('/tmp'))").stdout == "[] []\n"


def test_a_program_that_catches_its_memory_error_goes_on() -> None:
    result = run("try: bytearray(10**10)\nexcept MemoryError: print('caught')")
    assert (result.stdout, result.exit, result.killed_by) == ("caught\n", 0, None)


def test_what_is_no_text_comes_back_as_replacements() -> None:
    result = run(
        "import sys; sys.stdout.buffer.write(b'\\xff\\x00ok'); sys.stderr.write('\\ud800' if 0 else 'e')",
        stdin="\ud800",
    )
    assert (result.stdout, result.stderr) == ("\ufffd\x00ok", "e")


def test_a_program_that_is_no_python_or_dies_is_a_result() -> None:
    assert run("this is no program").exit == 1
    assert run("a\0b").exit == 1
    assert run("import os; os.kill(os.getpid(), 11)").exit == 139


def test_many_run_at_once() -> None:
    results: list[str] = []
    threads = [threading.Thread(target=lambda n=n: results.append(run(f"print({n})").stdout)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [f"{n}\n" for n in range(6)]


# ---- machines that cannot ----------------------------------------------------------------------------------------


def test_without_bubblewrap_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(
        SandboxError, match=r"bubblewrap is not installed, and no program runs without it; run: apt-get"
    ):
        run("print(1)")


@pytest.mark.parametrize("does", ["echo 'bwrap: No permissions to create new namespace' >&2; exit 1", "exit 0"])
def test_a_bubblewrap_that_makes_no_namespaces_is_a_refusal(
    does: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "bwrap"
    fake.write_text(f"#!/bin/sh\n{does}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(fake))
    with pytest.raises(SandboxError, match="this machine cannot isolate a program, so it was not run"):
        run("print(1)")


def test_a_bubblewrap_that_hangs_is_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\nexec sleep 60\n")
    fake.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(fake))
    monkeypatch.setattr(sandbox, "SECONDS_TO_START", 0.3)
    with pytest.raises(SandboxError, match="it did not start in time"):
        run("print(1)")


def test_namespaces_that_fail_half_way_are_a_refusal_and_no_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sandbox._namespaces
    monkeypatch.setattr(sandbox, "_namespaces", lambda limits: (*whole(limits), "--chdir", "/nowhere"))
    with pytest.raises(
        SandboxError, match=r"this machine cannot isolate a program, so it was not run \(bwrap: Can't chdir"
    ):
        run("print(1)")


def test_limits_are_above_zero() -> None:
    with pytest.raises(ValueError, match="seconds is 0; a limit must be above zero"):
        SandboxLimits(seconds=0)
