"""Shards in an object store: read by range, kept on disk within a limit."""

from pathlib import Path

import fsspec
import pytest

from data_files import chats, mixture, model_config, processor, write_shards
from qvl.data.loader import make_loader
from qvl.data.store import Store, shards_of
from qvl.outside.workers import InProcess


@pytest.fixture
def memory():
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs
    fs.store.clear()


class Counting:
    """How often whole files are fetched from the memory file system."""

    def __init__(self, fs, monkeypatch) -> None:
        self.opened: list[str] = []
        real = type(fs)._open

        def counted(fs_self, path, *args, **kwargs):
            if (args[0] if args else kwargs.get("mode", "rb")) == "rb":
                self.opened.append(path)
            return real(fs_self, path, *args, **kwargs)

        monkeypatch.setattr(type(fs), "_open", counted)


def test_ranges_of_local_and_remote_files_are_the_same(memory, tmp_path) -> None:
    data = bytes(range(256)) * 4
    (tmp_path / "a.tar").write_bytes(data)
    memory.pipe("/bucket/a.tar", data)
    for store in (Store(), Store(tmp_path / "cache")):
        for url in (str(tmp_path / "a.tar"), "memory://bucket/a.tar"):
            assert store.read(url, 300, 20) == data[300:320]
            assert store.read(url) == data


def test_a_file_that_ends_too_early_is_an_error(tmp_path) -> None:
    (tmp_path / "a.tar").write_bytes(b"12345")
    with pytest.raises(ValueError, match=r"a\.tar ends after 5 bytes; 8 were expected"):
        Store().read(str(tmp_path / "a.tar"), 2, 6)


def test_a_shard_is_fetched_once_and_kept(memory, tmp_path, monkeypatch) -> None:
    memory.pipe("/bucket/a.tar", b"x" * 1000)
    count = Counting(memory, monkeypatch)
    for store in (Store(tmp_path), Store(tmp_path)):
        assert store.read("memory://bucket/a.tar", 10, 5) == b"xxxxx"
        assert store.read("memory://bucket/a.tar", 20, 5) == b"xxxxx"
    assert count.opened == ["/bucket/a.tar"]


def test_what_was_untouched_longest_makes_room(memory, tmp_path) -> None:
    for name in "abc":
        memory.pipe(f"/bucket/{name}.tar", name.encode() * 400)
    for name in "abac":
        store = Store(tmp_path, cache_bytes=1000)
        assert store.read(f"memory://bucket/{name}.tar", 0, 3) == name.encode() * 3
    kept = {file.read_bytes()[:1] for file in tmp_path.glob("*.shard")}
    assert kept == {b"a", b"c"}


def test_a_shard_that_was_dropped_while_open_is_read_on(memory, tmp_path) -> None:
    for name in "ab":
        memory.pipe(f"/bucket/{name}.tar", name.encode() * 400)
    store = Store(tmp_path, cache_bytes=500)
    assert store.read("memory://bucket/a.tar", 0, 2) == b"aa"
    assert store.read("memory://bucket/b.tar", 0, 2) == b"bb"
    assert store.read("memory://bucket/a.tar", 5, 2) == b"aa"
    assert len(list(tmp_path.glob("*.shard"))) == 1


def test_a_folder_a_file_and_a_pattern_name_shards_in_order(memory, tmp_path) -> None:
    for name in ("s-1.tar", "s-0.tar", "note.txt"):
        (tmp_path / name).write_bytes(b"")
        memory.pipe(f"/bucket/{name}", b"")
    assert shards_of(tmp_path) == [str(tmp_path / "s-0.tar"), str(tmp_path / "s-1.tar")]
    assert shards_of(str(tmp_path / "s-1*")) == [str(tmp_path / "s-1.tar")]
    assert [Path(url).name for url in shards_of("memory://bucket")] == ["s-0.tar", "s-1.tar"]
    assert all(url.startswith("memory://") for url in shards_of("memory://bucket"))
    with pytest.raises(ValueError, match="none does not exist"):
        shards_of("memory://none")


@pytest.mark.parametrize("cached", [False, True])
def test_training_data_may_lie_in_an_object_store(memory, tmp_path, cached: bool) -> None:
    small = processor(tmp_path / "model")
    write_shards(tmp_path / "data", chats(12), small, max_records=5)
    for file in (tmp_path / "data").iterdir():
        memory.pipe(f"/bucket/data/{file.name}", file.read_bytes())
    found = []
    for where in (tmp_path / "data", "memory://bucket/data"):
        options = {"pack_tokens": 256, "pack_patches": 1024, "packs_per_step": 2, "seed": 1, "decoder": InProcess()}
        if cached:
            options["cache"] = tmp_path / "cache"
        with make_loader(mixture(where), small, model_config(small), **options) as made:  # type: ignore[arg-type]
            found.append([(m.ids, m.batch.token_T.tolist()) for _ in range(3) for m in made.next_step()])
    assert found[0] == found[1]
