"""Device facts: what is claimed about the machine is so, and names of devices and dtypes are understood or refused."""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qvl.core import device, log


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.LogCaptureFixture]:
    monkeypatch.setattr(log, "_said", set())
    with caplog.at_level(logging.WARNING, logger="qvl"):
        yield caplog


def test_facts_name_this_machine() -> None:
    facts = device.facts()
    assert facts.torch_version == torch.__version__
    assert 1 <= facts.num_cores <= (os.cpu_count() or 1)
    assert 2**28 < facts.memory_bytes <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert len(facts.gpus) == torch.cuda.device_count()
    assert facts.cpu_name


def test_only_cores_this_process_may_use_are_counted() -> None:
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system has no affinity")
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert device.num_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize(
    ("files", "cores", "memory"),
    [
        ({"cpu.max": "150000 100000", "memory.max": "1000000"}, 2, 1_000_000),
        ({"cpu.max": "max 100000", "memory.max": "max"}, 64, None),
        (
            {"cpu.cfs_quota_us": "100000", "cpu.cfs_period_us": "100000", "memory.limit_in_bytes": "2000000"},
            1,
            2_000_000,
        ),
        (
            {"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000", "memory.limit_in_bytes": "9223372036854771712"},
            64,
            None,
        ),
    ],
    ids=["v2", "v2 without limits", "v1", "v1 without limits"],
)
def test_limits_of_a_container_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cores: int, memory: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(device, "_cgroup_folders", lambda controller: [tmp_path])
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert device.num_cores() == cores
    assert device.memory_bytes() == (memory or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


@pytest.mark.parametrize(
    "names",
    [
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
    ids=["v2", "v1"],
)
def test_what_a_container_has_left_is_free_and_files_it_only_read_are_no_use_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, str, str]
) -> None:
    limit, used, idle = names
    monkeypatch.setattr(device, "_cgroup_folders", lambda controller: [])
    of_the_machine = device.free_memory_bytes()
    assert 0 < of_the_machine <= device.memory_bytes()
    monkeypatch.setattr(device, "_cgroup_folders", lambda controller: [tmp_path])
    (tmp_path / limit).write_text("1000000\n")
    (tmp_path / used).write_text("700000\n")
    (tmp_path / "memory.stat").write_text(f"anon 500000\n{idle} 200000\n")
    assert device.free_memory_bytes() == 500_000
    (tmp_path / used).write_text("1300000\n")
    assert device.free_memory_bytes() == 0


def test_grouped_matmul_is_claimed_only_where_it_gives_the_right_answer() -> None:
    if device.grouped_mm_runs(torch.float32):
        a, b = torch.randn(8, 16), torch.randn(2, 16, 16)
        got = torch.nn.functional.grouped_mm(a, b, offs=torch.tensor([3, 8], dtype=torch.int32))
        assert torch.allclose(got, torch.cat((a[:3] @ b[0], a[3:] @ b[1])), atol=1e-5)
    assert device.grouped_mm_runs(torch.int64) is False


def test_auto_is_the_gpu_where_there_is_one() -> None:
    assert device.pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert device.pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "tpu", ""])
def test_an_unknown_device_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"device is '{name}'; expected auto, cpu, cuda, cuda:N or mps"):
        device.pick_device(name)


def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"device is 'cuda:99', but torch .* sees \d+ CUDA devices here; use auto or cpu"
    ):
        device.pick_device("cuda:99")


def test_dtypes_have_short_and_long_names() -> None:
    names = ("fp32", "float32", "bf16", "bfloat16")
    assert [device.pick_dtype("cpu", n) for n in names] == [
        torch.float32,
        torch.float32,
        torch.bfloat16,
        torch.bfloat16,
    ]
    with pytest.raises(ValueError, match="dtype is 'int8'; expected auto, float32, bfloat16, float16"):
        device.pick_dtype("cpu", "int8")


@pytest.mark.parametrize(
    ("flags", "dtype"), [(("avx2",), torch.float32), (("amx_bf16",), torch.bfloat16), (("bf16",), torch.bfloat16)]
)
def test_auto_dtype_is_bfloat16_where_the_cpu_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(device, "_cpu", lambda: ("made up", flags))
    assert device.pick_dtype("cpu", "auto") is dtype


def test_float16_on_a_cpu_is_bfloat16_and_says_so_once(said: pytest.LogCaptureFixture) -> None:
    assert [device.pick_dtype("cpu", "fp16") for _ in range(3)] == [torch.bfloat16] * 3
    assert [r.message for r in said.records] == [
        "float16 on a CPU runs as bfloat16: torch has no fast CPU kernels for float16"
    ]


def test_torchrun_says_where_a_process_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert device.place() == device.Place(rank=0, world_size=1, local_rank=0)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert device.place() == device.Place(rank=5, world_size=8, local_rank=1)


def test_a_child_sees_only_the_variables_named_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QVL_TEST_SECRET", "s")
    monkeypatch.setenv("QVL_TEST_SHOWN", "1")
    assert device.child_environment("QVL_TEST_SHOWN", "QVL_TEST_UNSET") == {"QVL_TEST_SHOWN": "1"}


def test_rows_are_written_whole_with_null_for_numbers_json_lacks(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.jsonl"
    with log.JsonlWriter(path) as rows:
        rows.write(
            {"loss": float("nan"), "step": 1, "norm": torch.tensor(0.5), "of": [float("inf"), None], "file": Path("a")}
        )
        assert path.read_text() == '{"loss": null, "step": 1, "norm": 0.5, "of": [null, null], "file": "a"}\n'
    with log.JsonlWriter(path) as rows:
        rows.write({"step": 2})
    assert [row["step"] for row in log.read_jsonl(path)] == [1, 2]
    with log.JsonlWriter(path) as rows:
        rows.write({"step": 3, "said": "a line\u2028of a page\u0085"})  # ends a line for Python, not in JSON
    assert log.read_jsonl(path)[-1]["said"] == "a line\u2028of a page\u0085"
    assert log.read_jsonl(tmp_path / "absent.jsonl") == []


@pytest.mark.parametrize(
    ("left_behind", "steps"), [('{"step": 1}\n{"ste', [1, 9]), ('{"step": 1}', [1, 9]), ('{"st', [9]), ("", [9])]
)
def test_half_a_row_of_a_killed_run_is_cut_off(tmp_path: Path, left_behind: str, steps: list[int]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(left_behind)
    with log.JsonlWriter(path) as rows:
        rows.write({"step": 9})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == steps


def test_a_row_that_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    with (
        log.JsonlWriter(tmp_path / "rows.jsonl") as rows,
        pytest.raises(ValueError, match="holds set; expected text, numbers"),
    ):
        rows.write({"x": {1}})
    assert (tmp_path / "rows.jsonl").read_text() == ""


def test_log_lines_to_a_pipe_are_dated(capsys: pytest.CaptureFixture[str]) -> None:
    log.set_up("info")
    log.log.info("loaded 3 files")
    log.log.debug("not shown")
    line = capsys.readouterr().err
    assert line.endswith(" INFO loaded 3 files\n")
    assert line[:2] == "20"
    with pytest.raises(ValueError, match="log level is 'loud'"):
        log.set_up("loud")
