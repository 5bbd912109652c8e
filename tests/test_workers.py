"""The killable decoder: whatever a file does to it, its caller gets bytes or one sentence, in bounded time and memory."""

import io
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from media_files import encoded, gradient, png_header
from qvl.outside.media import MediaError, MediaLimits
from qvl.outside.workers import InProcess, WorkerPool
from qvl.prompt.image import load_image

NOTHING = b"anything"


def pool(size: int = 1, **limits: Any) -> WorkerPool:
    return WorkerPool(MediaLimits(**limits), size=size, jobs="tests.media_jobs")


def pid(workers: WorkerPool) -> int:
    ((header, _),) = workers.run("facts", io.BytesIO(NOTHING))
    return header["pid"]


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_bytes_go_there_and_come_back() -> None:
    data = bytes(range(256)) * 40_000  # larger than any socket buffer
    with pool() as workers:
        ((header, body),) = workers.run("echo", io.BytesIO(data))
        assert header == {"said": "bytes follow"} and bytes(body) == data


def test_a_worker_is_kept_from_job_to_job_and_after_a_refusal() -> None:
    with pool() as workers:
        first = pid(workers)
        with pytest.raises(MediaError, match=r"this file is refused; send another\."):
            list(workers.run("refuse", io.BytesIO(NOTHING)))
        assert pid(workers) == first


def test_a_worker_loads_no_torch_and_sees_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    with pool() as workers:
        ((header, _),) = workers.run("facts", io.BytesIO(NOTHING))
    assert header["loaded"] == []
    assert set(header["environment"]) <= {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "LC_CTYPE"}


def test_a_hang_costs_its_limit_and_its_process() -> None:
    with pool(max_seconds=2.0) as workers:
        # The clock also runs while a worker starts, so it is started with a job that is quick.
        first = wait_for_pid(workers)
        with pytest.raises(MediaError, match="took longer than 2 seconds; the process was ended"):
            list(workers.run("hang", io.BytesIO(NOTHING)))
        assert not alive(first)
        assert wait_for_pid(workers) != first


def wait_for_pid(workers: WorkerPool) -> int:
    for _ in range(20):
        try:
            return pid(workers)
        except MediaError:
            continue  # a slow start on a busy machine
    raise AssertionError("the worker never started in time")


def test_sending_a_little_at_a_time_does_not_reset_the_clock() -> None:
    with pool(max_seconds=1.0) as workers, pytest.raises(MediaError, match="took longer than 1 seconds"):
        list(workers.run("drip", io.BytesIO(NOTHING)))


def test_the_callers_own_time_is_not_charged() -> None:
    with pool(max_seconds=1.0) as workers:
        wait_for_pid(workers)
        messages = workers.run("drip", io.BytesIO(NOTHING))
        next(messages)
        time.sleep(1.2)
        next(messages)
        messages.close()


@pytest.mark.parametrize("native", [False, True])
def test_memory_beyond_the_limit_is_refused(native: bool) -> None:
    with pool(memory_bytes=300 * 2**20) as workers:
        with pytest.raises(MediaError, match=r"needs more memory|ran out of memory"):
            list(workers.run("grow", io.BytesIO(NOTHING), native=native))
        assert pid(workers) > 0


def test_a_crash_is_one_sentence_and_the_next_job_runs() -> None:
    with pool() as workers:
        with pytest.raises(MediaError, match="crashed its process"):
            list(workers.run("crash", io.BytesIO(NOTHING)))
        assert pid(workers) > 0


def test_a_worker_killed_half_way_is_one_sentence_and_the_next_job_runs() -> None:
    with pool() as workers:
        first = pid(workers)
        messages = workers.run("drip", io.BytesIO(NOTHING))
        next(messages)
        os.kill(first, 9)
        with pytest.raises(MediaError, match="crashed its process"):
            list(messages)
        assert pid(workers) != first


def test_a_worker_may_not_send_more_than_the_limits_allow() -> None:
    with (
        pool(max_pixels=1_000_000, max_frames=1000) as workers,
        pytest.raises(MediaError, match="sent more than the limits"),
    ):
        list(workers.run("flood", io.BytesIO(NOTHING)))


def test_what_a_decoder_says_stays_inside() -> None:
    with pool() as workers, pytest.raises(MediaError, match="the file could not be decoded") as caught:
        list(workers.run("blab", io.BytesIO(NOTHING)))
    assert str(caught.value) == "the file could not be decoded."
    assert caught.value.__notes__ == ["cause in the decoding process: RuntimeError"]


def test_a_worker_cannot_write_files(tmp_path: Path) -> None:
    with pool() as workers, pytest.raises(MediaError):
        list(workers.run("write", io.BytesIO(NOTHING), path=str(tmp_path / "trace")))
    assert not (tmp_path / "trace").exists() or (tmp_path / "trace").stat().st_size == 0


def test_a_caller_that_stops_reading_leaves_a_clean_pool() -> None:
    with pool() as workers:
        first = pid(workers)
        messages = workers.run("drip", io.BytesIO(NOTHING))
        next(messages)
        messages.close()
        assert not alive(first)
        assert pid(workers) != first


def test_closing_ends_the_processes() -> None:
    workers = pool(size=2)
    first = pid(workers)
    workers.close()
    assert not alive(first)


def test_workers_end_with_their_parent_even_if_it_is_killed() -> None:
    code = (
        "import io, time; from qvl.outside.workers import WorkerPool\n"
        "from qvl.outside.media import MediaLimits\n"
        "p = WorkerPool(jobs='tests.media_jobs')\n"
        "print(next(iter(p.run('facts', io.BytesIO(b''))))[0]['pid'], flush=True)\n"
        "next(p.run('hang', io.BytesIO(b'')))\n"
    )
    root = Path(__file__).parents[1]
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=root)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(200):
        if not alive(worker):
            return
        time.sleep(0.05)
    raise AssertionError("the worker outlived its parent")


def test_a_forked_process_gets_a_worker_of_its_own() -> None:
    with pool() as workers:
        first = pid(workers)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(write, str(pid(workers)).encode())
            os._exit(0)
        os.waitpid(child, 0)
        assert int(os.read(read, 100)) != first
        assert pid(workers) == first
        os.close(read)
        os.close(write)


def test_threads_share_a_pool() -> None:
    data = encoded(gradient(40, 60), "PNG")
    expected = load_image(data)
    results: list[bool] = []
    with WorkerPool(size=2) as workers:
        threads = [
            threading.Thread(target=lambda: results.append(torch.equal(load_image(data, workers), expected)))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == [True] * 8


def test_a_pool_that_is_stopped_waits_for_nobody() -> None:
    workers = pool(max_seconds=60, size=1)
    said: list[str] = []

    def decode() -> None:
        with pytest.raises(MediaError) as error:
            list(workers.run("hang", io.BytesIO(NOTHING)))
        said.append(str(error.value))

    process = pid(workers)
    threads = [threading.Thread(target=decode) for _ in range(2)]  # one decodes, one waits for its turn
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    workers.stop()
    for thread in threads:
        thread.join(timeout=20)
    assert not any(thread.is_alive() for thread in threads) and not alive(process)
    assert sorted(text.split(";")[0] for text in said) == [
        "decoding has been stopped",
        "decoding the file crashed its process or ran out of memory",
    ]


def test_pictures_decode_alike_inside_and_outside() -> None:
    with WorkerPool() as workers:
        for format in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
            data = encoded(gradient(41, 63), format)
            assert torch.equal(load_image(data, workers), load_image(data, InProcess()))


def test_a_file_on_disk_is_handed_over_open(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(gradient(41, 63), "PNG"))
    with WorkerPool() as workers, path.open("rb") as stream:
        path.unlink()  # the worker never needs its name
        assert load_image(stream, workers).shape == (3, 41, 63)


def test_a_worker_names_the_size_of_a_picture_too_large() -> None:
    with (
        WorkerPool() as workers,
        pytest.raises(ValueError, match=r"the picture is 10000x10000, 100,000,000 pixels; at most 67,108,864"),
    ):
        load_image(png_header(10_000, 10_000), workers)


def test_an_unknown_job_and_limits_without_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="there is no decoding job 'rm'; there are image"):
        list(InProcess().run("rm", io.BytesIO(b"")))
    with pytest.raises(ValueError, match="max_seconds is 0; a limit must be above zero"):
        MediaLimits(max_seconds=0)
    with pytest.raises(ValueError, match="needs at least one"):
        WorkerPool(size=0)


def test_packages_are_found_where_we_found_them_and_what_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "far_away.py").write_text("from tests.media_jobs import JOBS")
    for _ in range(2):
        with WorkerPool(jobs="far_away") as workers:
            if str(tmp_path) in sys.path:
                assert pid(workers) != os.getpid()
            else:
                with pytest.raises(
                    MediaError, match=r"the decoding process cannot import far_away; install it beside qvl"
                ):
                    pid(workers)
        monkeypatch.syspath_prepend(str(tmp_path))
