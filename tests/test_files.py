"""Files written whole or not at all: what an error, a kill and a second writer leave behind, and who may read the new file."""

import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest
import torch
from safetensors.torch import load_file, save_file

from qvl.core.files import LEFTOVER_SECONDS, remove_leftovers, write_bytes, write_text, writing, writing_into

ROOT = Path(__file__).resolve().parent.parent


class BreakError(Exception):
    pass


def inside(folder: Path) -> dict[str, str]:
    """Every name in a folder, with a file's text."""
    return {path.name: path.read_text() if path.is_file() else "" for path in folder.iterdir()}


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def started(program: str, *arguments: Path) -> "subprocess.Popen[str]":
    """A process that has said its first line."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline()
    return process


# One file


def test_a_file_has_the_old_text_until_the_block_ends_and_then_the_new_one(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    write_text(file, "old")
    with writing(file) as new:
        new.write_text("new")
        assert file.read_text() == "old"
    assert inside(tmp_path) == {"a.txt": "new"}


def test_text_is_written_in_utf8_and_bytes_as_they_are(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "gr\u00fcn\r\n")
    write_bytes(tmp_path / "b.bin", b"\xff\x00")
    assert (tmp_path / "a.txt").read_bytes() == b"gr\xc3\xbcn\r\n" and (tmp_path / "b.bin").read_bytes() == b"\xff\x00"


def test_after_an_error_the_old_file_stays_and_nothing_beside_it(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(BreakError), writing(tmp_path / "a.txt") as new:
        new.write_text("ne")
        new.with_name(".tmp-of-a-library").write_text("n")
        raise BreakError
    with pytest.raises(BreakError), writing(tmp_path / "b.txt") as new:
        new.write_text("ne")
        raise BreakError
    assert inside(tmp_path) == {"a.txt": "old"}


def test_two_writers_of_one_file_do_not_mix_and_the_later_end_wins(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    with writing(file) as first:
        first.write_text("first")
        with writing(file) as second:
            second.write_text("second")
            assert first.read_text() == "first"
        assert file.read_text() == "second"
    assert inside(tmp_path) == {"a.txt": "first"}


def test_who_reads_while_two_threads_write_sees_one_text_whole(tmp_path: Path) -> None:
    file, texts = tmp_path / "a.txt", {letter * 100_000 for letter in "ab"}
    write_text(file, "a" * 100_000)
    threads = [Thread(target=lambda t=text: [write_text(file, t) for _ in range(30)]) for text in texts]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert file.read_text() in texts
    assert inside(tmp_path).keys() == {"a.txt"} and file.read_text() in texts


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_the_mode_of_a_new_file_follows_the_umask(tmp_path: Path, mask: int, expected: int) -> None:
    with umask(mask):
        write_text(tmp_path / "a.txt", "text")
        with writing(tmp_path / "b") as new:
            new.mkdir()
            (new / "c.txt").write_text("text")
        with writing_into(tmp_path / "d", last="e.txt") as new:
            (new / "e.txt").write_text("text")
    assert mode(tmp_path / "a.txt") == mode(tmp_path / "b/c.txt") == mode(tmp_path / "d/e.txt") == expected
    assert mode(tmp_path / "b") == mode(tmp_path / "d") == 0o777 & ~mask


def test_a_file_in_a_folder_that_is_not_there_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(f"'{tmp_path / 'none' / 'a.txt'}'") + "$"):
        write_text(tmp_path / "none" / "a.txt", "text")
    with pytest.raises(IsADirectoryError, match=re.escape(f"'{tmp_path}'") + "$"):
        write_text(tmp_path, "text")


def test_what_must_outlast_a_loss_of_power_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []

    def sync(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        done.append(str(path.relative_to(tmp_path)).partition(".partial/")[2] or path.name)

    def replace(source: Path, target: Path) -> None:
        done.append(f"{source.name} is {target.name}")
        os.rename(source, target)

    monkeypatch.setattr("qvl.core.files.os.fsync", sync)
    monkeypatch.setattr("qvl.core.files.os.replace", replace)
    write_text(tmp_path / "a.txt", "text", sync=True)
    assert done == ["new", "new is a.txt", tmp_path.name]
    done.clear()
    with writing(tmp_path / "b", sync=True) as new:
        new.mkdir()
        (new / "c.txt").write_text("text")
    assert done == ["new/c.txt", "new", "new is b", tmp_path.name]
    done.clear()
    write_text(tmp_path / "a.txt", "text")
    assert done == ["new is a.txt"]


# Kills


HANGS = """
import sys, time
from pathlib import Path
from qvl.core.files import writing
with writing(Path(sys.argv[1])) as new, new.open("w") as file:
    new.with_name(".tmp-of-a-library").write_text("n")
    file.write("ne")
    file.flush()
    print("half is written", flush=True)
    time.sleep(60)
"""


def test_a_killed_writer_leaves_the_old_file_whole_and_its_own_folder_which_goes_after_a_day(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    write_text(file, "old")
    process = started(HANGS, file)
    process.kill()
    process.communicate()
    [left] = tmp_path.glob(".a.txt.????????.partial")
    assert inside(tmp_path) == {"a.txt": "old", left.name: ""}
    assert inside(left) == {"new": "ne", ".tmp-of-a-library": "n"}
    write_text(file, "new")
    assert inside(tmp_path) == {"a.txt": "new", left.name: ""}, "a day has not gone by: its writer may be alive"
    before = time.time() - LEFTOVER_SECONDS - 1
    os.utime(left, (before, before))
    write_text(tmp_path / "b.txt", "another name")
    assert left.exists()
    write_text(file, "newer")
    assert inside(tmp_path) == {"a.txt": "newer", "b.txt": "another name"}


def test_a_writer_that_is_interrupted_cleans_up(tmp_path: Path) -> None:
    process = started(HANGS, tmp_path / "a.txt")
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert inside(tmp_path) == {}


WRITES = """
import sys
from pathlib import Path
from qvl.core.files import write_text
print("begun", flush=True)
while True:
    for letter in "ab":
        write_text(Path(sys.argv[1]), letter * 300_000)
"""


def test_a_kill_at_any_moment_leaves_one_text_whole(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    write_text(file, "a" * 300_000)
    for number in range(4):
        process = started(WRITES, file)
        time.sleep(0.05 + 0.0137 * number)
        process.kill()
        process.communicate()
        assert file.read_text() in {letter * 300_000 for letter in "ab"}
    remove_leftovers(tmp_path, "a.txt.*")
    assert inside(tmp_path).keys() == {"a.txt"}


def test_leftovers_go_at_once_for_a_caller_who_is_alone_and_only_of_the_names_given(tmp_path: Path) -> None:
    for name in (".step-1.01234567.partial", ".step-2.partial", ".stop.01234567.partial", "step-3", ".step-4"):
        (tmp_path / name).mkdir()
    remove_leftovers(tmp_path, "step-*")
    assert inside(tmp_path).keys() == {".stop.01234567.partial", "step-3", ".step-4"}


def test_half_a_file_of_safetensors_is_in_the_folder_that_goes(tmp_path: Path) -> None:
    # It writes to a name of its own and renames, so a kill would leave that name beside the file that was asked for.
    with writing(tmp_path / "a.safetensors") as new:
        seen = tmp_path.stat().st_mtime_ns
        save_file({"a": torch.ones(3)}, new)
        assert tmp_path.stat().st_mtime_ns == seen, "something was made beside the partial folder"
    assert load_file(tmp_path / "a.safetensors")["a"].tolist() == [1, 1, 1]


# Folders


def folder_with(path: Path, **texts: str) -> None:
    path.mkdir()
    for name, text in texts.items():
        (path / name).write_text(text)


def test_a_folder_takes_its_name_whole_and_the_old_one_is_gone(tmp_path: Path) -> None:
    folder_with(tmp_path / "step", a="old", b="old")
    with writing(tmp_path / "step") as new:
        folder_with(new, a="new")
        assert inside(tmp_path / "step") == {"a": "old", "b": "old"}
    assert inside(tmp_path / "step") == {"a": "new"} and inside(tmp_path).keys() == {"step"}
    with pytest.raises(BreakError), writing(tmp_path / "step") as new:
        folder_with(new, a="newer")
        raise BreakError
    assert inside(tmp_path / "step") == {"a": "new"} and inside(tmp_path).keys() == {"step"}


def test_files_move_into_a_folder_beside_what_it_holds_the_one_that_counts_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_with(tmp_path / "model", config="old", notes="mine")
    moved: list[str] = []

    def replace(source: Path, target: Path) -> None:
        moved.append(target.name)
        os.rename(source, target)

    monkeypatch.setattr("qvl.core.files.os.replace", replace)
    with writing_into(tmp_path / "model", last="config") as new:
        for name in ("weights-1", "config", "a", "weights-2"):
            (new / name).write_text("new")
        assert inside(tmp_path / "model") == {"config": "old", "notes": "mine", new.name: ""}
    assert moved == ["a", "weights-1", "weights-2", "config"]
    assert inside(tmp_path / "model") == {**dict.fromkeys(moved, "new"), "notes": "mine"}
    assert inside(tmp_path).keys() == {"model"}


def test_after_an_error_no_file_has_moved_and_no_folder_is_made(tmp_path: Path) -> None:
    folder_with(tmp_path / "model", config="old")
    for name in ("model", "deep/model"):
        with pytest.raises(BreakError), writing_into(tmp_path / name, last="config") as new:
            (new / "config").write_text("new")
            raise BreakError
    assert inside(tmp_path / "model") == {"config": "old"} and inside(tmp_path / "deep") == {}


def test_files_move_into_a_folder_that_is_a_link_to_another_disk(tmp_path: Path) -> None:
    if not os.access("/dev/shm", os.W_OK) or Path("/dev/shm").stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system here")
    far = Path(f"/dev/shm/qvl-test-{os.getpid()}")
    far.mkdir()
    try:
        (tmp_path / "model").symlink_to(far)
        with writing_into(tmp_path / "model", last="config") as new:
            (new / "config").write_text("new")
        assert inside(far) == {"config": "new"} and (tmp_path / "model").is_symlink()
    finally:
        for file in far.iterdir():
            file.unlink()
        far.rmdir()


# One home


def test_nothing_else_in_the_package_writes_to_a_name_of_its_own_and_renames() -> None:
    by_hand = re.compile(r"os\.replace\(|os\.rename\(|\.partial\b|\.part\b[-\"]|mkstemp|NamedTemporaryFile")
    files = {str(path.relative_to(ROOT)): path for path in (ROOT / "qvl").rglob("*.py")}
    assert [name for name, path in files.items() if by_hand.search(path.read_text())] == ["qvl/core/files.py"]
