"""The loader: the same global batches for any ranks, workers and interruptions; bad records are replaced, never fatal, never hidden."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_files import chat, chats, clip, document, film, mixture, model_config, picture, processor, texts, write_shards
from qvl.data.index import build_index, index_url, read_index
from qvl.data.loader import Loader, MicroBatch, make_loader
from qvl.data.mixture import Mixture, mixture_from_dict
from qvl.model.qwen3vl import new_model
from qvl.outside.media import MediaLimits
from qvl.outside.workers import InProcess, WorkerPool
from qvl.prompt.budget import ImageBudget
from qvl.prompt.processor import Processor


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Processor:
    return processor(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory, small) -> Path:
    """30 questions on pictures, 3 films and 40 texts, two of them longer than a pack."""
    folder = tmp_path_factory.mktemp("data")
    films = [(film(f"film-{i}", frames=8 + 8 * i), {"0.mp4": clip(8 + 8 * i)}) for i in range(3)]
    write_shards(folder / "seen", chats(30) + films, small, max_records=15)
    long = [(document(f"long-{i}", "x" * (300 + 256 * i)), {}) for i in range(2)]
    write_shards(folder / "read", texts(38) + long, small)
    return folder


def loader(where: Mixture | Path, small: Processor, **more: Any) -> Loader:
    made = mixture(where) if isinstance(where, Path) else where
    options: dict[str, Any] = {"pack_tokens": 256, "pack_patches": 1024, "packs_per_step": 4, "seed": 5, "buffer": 16}
    options |= {"decoder": InProcess()} | more
    return make_loader(made, small, model_config(small), **options)


def both(data: Path, **more: Any) -> Mixture:
    return mixture(data / "seen", data / "read", **more)


def digest(micro: MicroBatch) -> str:
    """Everything a pack holds."""
    batch = micro.batch
    parts = [batch.token_T, batch.position_3T, batch.is_target_T, batch.patch_PX, batch.grid_I3]
    joined = b"".join(b"-" if part is None else part.numpy().tobytes() for part in parts)
    return hashlib.sha256(joined + repr((micro.ids, micro.categories, batch.lengths)).encode()).hexdigest()[:16]


def steps(made: Loader, count: int) -> list[set[str]]:
    return [{digest(micro) for micro in made.next_step()} for _ in range(count)]


# ---- what a step is


def test_a_step_gives_packs_within_both_budgets(data, small) -> None:
    with loader(both(data), small) as made:
        packs = [micro for _ in range(4) for micro in made.next_step()]
    assert len(packs) == 16
    for micro in packs:
        batch = micro.batch
        assert sum(batch.lengths) == batch.token_T.numel() <= 256
        assert batch.patch_PX is None or batch.patch_PX.shape[0] <= 1024
        assert len(micro.ids) == len(micro.categories) == len(batch.lengths)
        assert batch.is_target_T is not None and batch.is_target_T.any()
    assert {category for micro in packs for category in micro.categories} == {"vqa", "video", ""}


def test_an_epoch_brings_every_record_once_and_long_texts_whole(data, small) -> None:
    sources = [{"path": str(data / name), "max_epochs": 1} for name in ("seen", "read")]
    seen: list[str] = []
    tokens = 0
    with loader(mixture_from_dict({"sources": sources}), small, packs_per_step=1) as made:
        while packs := made.next_step():
            for micro in packs:
                seen += micro.ids
                tokens += sum(n for id, n in zip(micro.ids, micro.batch.lengths, strict=True) if id == "long-1")
    counts = {id: seen.count(id) for id in set(seen)}
    assert len(counts) == 73
    assert counts.pop("long-0") == 2 and counts.pop("long-1") == 3 and set(counts.values()) == {1}
    assert tokens == 556 + 1  # its letters and the end of the document


def test_stats_count_what_was_planned_and_what_was_read(data, small) -> None:
    with loader(both(data), small) as made:
        steps(made, 5)
        stats = made.stats
    read = stats["read"]
    assert read["packs"] == 20 and 0.9 < read["fill"] <= 1
    assert read["quarantined"] == read["replaced"] == read["cut"] == 0 and read["pieces"] > 0
    shares = list(stats["planned"]["tokens"].values())
    assert shares[0] / sum(shares) == pytest.approx(0.5, abs=0.05)


# ---- ranks, workers, resuming


@pytest.mark.parametrize(("world_size", "workers"), [(1, 2), (2, 0), (4, 1)])
def test_ranks_and_workers_do_not_change_the_global_batches(data, small, world_size: int, workers: int) -> None:
    with loader(both(data), small) as alone:
        expected = steps(alone, 5)
        state = alone.state()
    shared: list[set[str]] = [set() for _ in range(5)]
    for rank in range(world_size):
        with loader(both(data), small, rank=rank, world_size=world_size, workers=workers) as made:
            for number, packs in enumerate(steps(made, 5)):
                assert len(packs) == 4 // world_size
                shared[number] |= packs
            assert made.state() == state
    assert shared == expected


@given(stop=st.integers(0, 5), ranks=st.sampled_from([1, 2]), workers=st.sampled_from([0, 2]), seed=st.integers(0, 9))
@settings(max_examples=8)
@pytest.mark.no_shape_hook
def test_resuming_at_any_step_is_as_if_it_had_never_stopped(data, small, stop, ranks, workers, seed) -> None:
    with loader(both(data), small, seed=seed) as whole:
        expected = steps(whole, 6)
    with loader(both(data), small, seed=seed, workers=workers) as first:
        assert steps(first, stop) == expected[:stop]
        state = json.loads(json.dumps(first.state()))
    rest: list[set[str]] = [set() for _ in range(6 - stop)]
    for rank in range(ranks):
        with loader(both(data), small, seed=seed, rank=rank, world_size=ranks) as second:
            second.restore(state)
            assert second.step == stop
            for number, packs in enumerate(steps(second, 6 - stop)):
                rest[number] |= packs
    assert rest == expected[stop:]


def test_a_loader_can_go_back_to_an_earlier_state(data, small) -> None:
    with loader(both(data), small, workers=2) as made:
        steps(made, 2)
        state = made.state()
        expected = steps(made, 2)
        made.restore(state)
        assert steps(made, 2) == expected


def test_a_state_is_refused_when_the_data_changed(data, small) -> None:
    with loader(both(data), small) as made:
        state = made.state()
    with (
        loader(data / "seen", small) as other,
        pytest.raises(ValueError, match="saved with another records, weights, so the order cannot be continued"),
    ):
        other.restore(state)


def test_packs_that_ranks_cannot_share_are_refused(data, small) -> None:
    with pytest.raises(ValueError, match="rank 0 of 3 with 4 packs a step"):
        loader(both(data), small, world_size=3)


# ---- bad records


def spoil(shard: Path, rows: list[int]) -> None:
    """Flips bytes in the pictures of some records; the tar file stays whole."""
    index = read_index(str(shard), None)
    content = bytearray(shard.read_bytes())
    for row in rows:
        end = int(index.offset_S[row] + index.size_S[row])
        place = content.rindex(b"IDAT", 0, end)
        content[place + 4 : place + 12] = b"\0\xff" * 4
    shard.write_bytes(content)


@pytest.fixture
def spoilt(tmp_path, small) -> Path:
    [shard] = write_shards(tmp_path / "spoilt", chats(40), small)
    spoil(shard, list(range(0, 40, 5)))
    return tmp_path / "spoilt"


def test_a_fifth_of_bad_records_leaves_the_order_of_the_good_ones(tmp_path, small, spoilt) -> None:
    write_shards(tmp_path / "good", chats(40), small)
    with loader(tmp_path / "good", small) as made:
        good = [list(micro.ids) for _ in range(6) for micro in made.next_step()]
    with loader(spoilt, small, max_bad_rate=0.5, out=tmp_path / "out") as made:
        met = [list(micro.ids) for _ in range(6) for micro in made.next_step()]
        stats = made.stats["read"]
    bad = {f"chat-{i}" for i in range(0, 40, 5)}
    assert not bad & {id for ids in met for id in ids}
    for before, after in zip(good, met, strict=True):
        kept = [id for id in before if id not in bad]
        rest = iter(after)
        assert all(id in rest for id in kept)  # in the same order, with stand-ins among them
        assert len(after) <= len(before)
    rows = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    planned = bad & {id for ids in good for id in ids}
    assert planned <= {row["id"] for row in rows} <= bad and len(planned) > 4
    assert all("changed since the index" in row["reason"] for row in rows)
    assert stats["quarantined"] >= len(rows) and stats["replaced"] >= len(planned)


def test_replacements_do_not_depend_on_ranks_and_workers(small, spoilt) -> None:
    with loader(spoilt, small, max_bad_rate=1.0) as alone:
        expected = steps(alone, 6)
    shared: list[set[str]] = [set() for _ in range(6)]
    for rank in range(2):
        with loader(spoilt, small, max_bad_rate=1.0, rank=rank, world_size=2, workers=2) as made:
            for number, packs in enumerate(steps(made, 6)):
                shared[number] |= packs
    assert shared == expected


def test_too_many_bad_records_stop_the_run(small, spoilt) -> None:
    with loader(spoilt, small, max_bad_rate=0.05) as made:
        made.quarantine.patience = 20
        with pytest.raises(ValueError, match=r"samples could not be read, more than the 5\.0% allowed"):
            steps(made, 20)


def test_a_pack_of_which_nothing_can_be_read_stops_the_run_and_is_written_down(tmp_path, small) -> None:
    [shard] = write_shards(tmp_path / "data", chats(5), small)
    spoil(shard, list(range(5)))
    with (
        loader(tmp_path / "data", small, max_bad_rate=1.0, out=tmp_path) as made,
        pytest.raises(ValueError, match="no record of a pack could be read, nor any of 64 others"),
    ):
        made.next_step()
    assert (tmp_path / "quarantine.jsonl").read_text().count("\n") == 5


def test_a_record_in_quarantine_is_not_tried_again(tmp_path, small, spoilt) -> None:
    with loader(spoilt, small, max_bad_rate=1.0, out=tmp_path / "out") as made:
        expected = steps(made, 8)
    with loader(spoilt, small, max_bad_rate=1.0, out=tmp_path / "out") as again:
        assert steps(again, 8) == expected
        assert again.stats["read"]["quarantined"] == 0


def test_half_a_line_that_a_kill_left_in_a_quarantine_file_is_passed_over(tmp_path, small, spoilt) -> None:
    with loader(spoilt, small, max_bad_rate=1.0, out=tmp_path / "out") as made:
        expected = steps(made, 4)
    file = tmp_path / "out" / "quarantine.jsonl"
    text = file.read_text()
    for cut in (file, file.with_name("quarantine-1.jsonl")):
        cut.write_text(text[: text.index("\n") + 20])
    with loader(spoilt, small, max_bad_rate=1.0, out=tmp_path / "out") as again:
        assert len(again.quarantine) == 1 and steps(again, 4) == expected


def test_a_broken_picture_and_one_of_another_size_than_its_facts_are_set_aside(tmp_path, small) -> None:
    entries = chats(12)
    entries[3] = (chat("liar", "q", "a", height=64, width=64), {"0.png": picture(0, 64, 128)})
    entries[7] = (chat("broken", "q", "a"), {"0.png": picture(0)[:120]})
    write_shards(tmp_path / "data", entries, small)
    with loader(tmp_path / "data", small, max_bad_rate=1.0, out=tmp_path) as made:
        steps(made, 3)
    rows = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    reasons = {row["id"]: row["reason"] for row in rows}
    assert reasons["liar"].startswith("0.png gives 1 x [1, 4, 8] patches and its facts promise 1 x [1, 4, 4]")
    assert reasons["broken"].startswith("the file is not a whole JPEG, PNG") and len(rows) == 2


def test_a_hanging_record_costs_its_limit_and_is_replaced(tmp_path, small) -> None:
    entries = chats(10)
    entries[4] = (chat("hangs", "what?", "it"), {"0.png": picture(4) + b"hang"})
    write_shards(tmp_path / "data", entries, small)
    pool = WorkerPool(MediaLimits(max_seconds=5.0), jobs="tests.data_hang_job")
    options = {"decoder": pool, "max_bad_rate": 1.0, "out": tmp_path, "packs_per_step": 2}
    with loader(tmp_path / "data", small, **options) as made:
        ids = [id for _ in range(3) for micro in made.next_step() for id in micro.ids]
    [row] = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert row["id"] == "hangs" and "took longer than 5 seconds" in row["reason"]
    assert "hangs" not in ids and set(ids) == {f"chat-{i}" for i in range(10) if i != 4}


# ---- too long


def test_a_long_film_gets_fewer_tokens_and_a_long_chat_is_cut(tmp_path, small) -> None:
    entries = [
        (film("film", frames=40), {"0.mp4": clip(40)}),
        (chat("chat", "q", "a" * 500), {"0.png": picture(0)}),
    ]
    write_shards(tmp_path / "data", entries, small)
    source = mixture_from_dict({"sources": [{"path": str(tmp_path / "data"), "max_epochs": 1}]})
    with loader(source, small, pack_tokens=128, pack_patches=512, packs_per_step=2) as made:
        packs = {micro.ids: micro.batch for micro in made.next_step()}
        stats = made.stats["read"]
    assert stats["rebudgeted"] == 1 and stats["cut"] == 1 and stats["quarantined"] == 0
    assert packs[("chat",)].num_tokens == 128 and packs[("film",)].num_tokens <= 128
    answer = bytes(packs[("film",)].token_T[-6:-2].tolist()).decode()
    assert answer == "bars"


# ---- the index guards the lengths


def test_another_budget_needs_another_index(tmp_path, small, data) -> None:
    other = processor(tmp_path / "model", image_budget=ImageBudget(min_tokens=4, max_tokens=32))
    with pytest.raises(ValueError, match="built with another tokenizer, template or visual budget"):
        loader(data / "seen", other)


def test_a_shard_without_an_index_says_how_to_make_one(tmp_path, small) -> None:
    [shard] = write_shards(tmp_path / "data", chats(3), small)
    Path(index_url(str(shard))).unlink()
    with pytest.raises(ValueError, match="has no index; build it with qvl data index"):
        loader(tmp_path / "data", small)


def test_an_index_of_an_older_version_says_so(tmp_path, small) -> None:
    [shard] = write_shards(tmp_path / "data", texts(3), small)
    file = Path(index_url(str(shard)))
    with np.load(file) as old:
        columns = {name: old[name] for name in old.files if name != "content"}
    head = json.loads(bytes(columns["head"])) | {"version": 1}
    columns["head"] = np.frombuffer(json.dumps(head).encode(), np.uint8)
    with file.open("wb") as out:
        np.savez(out, **columns)
    with pytest.raises(ValueError, match="has version 1, this code reads 2; build it again with qvl data index"):
        read_index(str(shard), None)


def test_a_record_that_cannot_be_indexed_is_flagged_and_never_planned(tmp_path, small) -> None:
    thinking = chats(4)
    [shard] = write_shards(tmp_path / "data", thinking, small)
    content = shard.read_bytes().replace(b'"role":"user"', b'"role":"usXr"', 1)
    shard.write_bytes(content)
    said: list[str] = []
    index = build_index(str(shard), small, complain=said.append)
    assert index.flag_S.tolist()[0] & 1 and len(said) == 1 and "has the role 'usXr'" in said[0]
    with loader(tmp_path / "data", small, packs_per_step=1) as made:
        assert made.stats["planned"]["left out"] == 1
        assert "chat-0" not in {id for _ in range(3) for micro in made.next_step() for id in micro.ids}


def test_the_model_takes_what_the_loader_gives(data, small) -> None:
    config = model_config(small)
    model = new_model(config, seed=0)
    with loader(both(data), small) as made:
        [micro, *_] = made.next_step()
    with torch.no_grad():
        assert torch.isfinite(model.logits(model(micro.batch))).all()
