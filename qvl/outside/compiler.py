"""A C++ file to a shared library, by the machine's own compiler, once for each text of it and each kind of CPU."""

import atexit
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from qvl.core.device import child_environment, compiler, facts
from qvl.core.files import writing

FOLDER = Path("~/.cache/qvl")
SECONDS = 120


class NoLibraryError(Exception):
    """There is no compiler here, or it did not get through; says which in half a sentence."""


def shared_library(source: Path, flags: tuple[str, ...] = ()) -> Path:
    """The library of a C++ file, compiled for this CPU. Raises NoLibraryError."""
    cxx = compiler()
    if cxx is None:
        raise NoLibraryError("there is no C++ compiler")
    machine = facts()
    # A home folder may be shared by machines: what one CPU runs, another may not.
    key = repr((source.read_bytes(), cxx, flags, machine.machine, machine.cpu_name, machine.cpu_flags))
    name = f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:20]}.so"
    folder = _own_folder()
    if not (folder / name).exists():
        with writing(folder / name) as made:
            _compile([cxx, *flags, "-shared", "-fPIC", str(source), "-o", str(made)])
    return folder / name


def _own_folder() -> Path:
    """Where libraries are kept: in a folder that nobody else may write to, since what lies there is run."""
    try:
        folder = FOLDER.expanduser()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.stat()
        if about.st_uid == os.getuid() and not about.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):
        pass  # no home, or one that cannot be written to: compiled for this process alone
    folder = Path(tempfile.mkdtemp(prefix="qvl-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _compile(command: list[str]) -> None:
    environment = child_environment("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH")
    try:
        subprocess.run(
            command, check=True, capture_output=True, env=environment, stdin=subprocess.DEVNULL, timeout=SECONDS
        )
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").splitlines() or ["it said nothing"]
        raise NoLibraryError(f"{Path(command[0]).name} failed: {lines[0][:200]}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoLibraryError(f"{Path(command[0]).name} failed: {type(error).__name__}") from None
