"""Videos: the frames, sizes, times and patches of transformers, real frame counts and rates, and memory that stays flat."""

import gc
import io
import math
import random
import re
import struct
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

import oracle_processor as oracle
from media_files import encoded, gradient, numbered_frame, read_number, write_video
from memory_watch import MemoryWatch
from qvl.outside.media import MediaLimits
from qvl.outside.workers import InProcess, WorkerPool
from qvl.prompt.image import load_image, raster_from
from qvl.prompt.sampling import VideoMeta, VideoSampling, sample_indices, video_size
from qvl.prompt.video import frames_video, load_video, slice_label, slice_seconds, video_patches

# Equal to transformers.


@pytest.mark.oracle
def test_sizes_are_those_of_transformers_in_5000_random_cases() -> None:
    for case, expected in zip(oracle.video_size_cases(), oracle.answers()["video_size"], strict=True):
        if case["low"] > case["high"]:
            continue
        sampling = VideoSampling(
            min_tokens=case["low"] / 2048, max_tokens=case["high"] / 2048, cap_pixels_per_frame=case["cap"]
        )
        if expected is None:
            with pytest.raises(ValueError, match="at most 200 times"):
                video_size(case["n"], case["h"], case["w"], sampling)
        else:
            assert list(video_size(case["n"], case["h"], case["w"], sampling)) == expected, case


@pytest.mark.oracle
def test_frames_and_times_are_those_of_transformers_in_5000_random_cases() -> None:
    for case, (indices, times) in zip(oracle.sampling_cases(), oracle.answers()["sampling"], strict=True):
        number = case["num_frames"]
        sampling = VideoSampling(
            fps=None if number else case["fps"], num_frames=number, min_frames=case["min"], max_frames=case["max"]
        )
        meta = VideoMeta(num_frames=case["total"], fps=case["source_fps"])
        got = sample_indices(meta, sampling)
        assert list(got) == indices, case
        assert list(slice_seconds([meta.time(i) for i in got])) == times, case


@pytest.mark.oracle
@pytest.mark.parametrize("number", range(len(oracle.VIDEOS)))
def test_patches_are_those_of_transformers_to_the_bit(number: int) -> None:
    case = oracle.VIDEOS[number]
    call, config = case["call"], {"size": oracle.VIDEO_SIZE} | case["call"]
    meta = VideoMeta(num_frames=case["frames"], fps=case["fps"])
    indices = None if call.get("do_sample_frames", True) else range(case["frames"])
    visual = video_patches(
        torch.from_numpy(oracle.clip(case)), meta, VideoSampling.from_config(config), indices=indices
    )
    digest, grid, expected_indices, times = oracle.answers()["video"][number]
    assert oracle.digest(visual.values_PX.numpy()) == digest
    ((slices, rows, columns),) = grid
    assert (
        visual.grid_I3.tolist() == [[1, rows, columns]] * slices
    )  # a row for each slice, since each has its own timestamp
    assert list(visual.frame_indices or ()) == expected_indices
    assert list(visual.seconds or ()) == times


# Sampling.


def test_two_frames_a_second_between_4_and_768() -> None:
    assert sample_indices(VideoMeta(num_frames=100, fps=25), VideoSampling()) == (0, 14, 28, 42, 57, 71, 85, 99)
    assert len(sample_indices(VideoMeta(num_frames=10, fps=30), VideoSampling())) == 4
    assert len(sample_indices(VideoMeta(num_frames=216_000, fps=30), VideoSampling())) == 768


def test_the_qwen_vl_utils_preset_takes_even_counts_and_limits_each_frame() -> None:
    sampling = VideoSampling.qwen_vl_utils()
    assert len(sample_indices(VideoMeta(num_frames=100, fps=29.97), sampling)) == 6  # 6.67 frames, floored to even
    assert video_size(8, 1080, 1920, sampling) == (640, 1152)  # 720 of at most 768 tokens
    assert video_size(768, 1080, 1920, sampling) == (384, 736)  # 115,200 tokens / 384 slices = 300 each
    assert video_size(8, 100, 100, sampling) == (384, 384)  # 144 tokens, at least 128
    with pytest.raises(ValueError, match="num_frames is 20 and the video has 10 frames; expected 2 to 10"):
        sample_indices(VideoMeta(num_frames=10, fps=5), VideoSampling.qwen_vl_utils(num_frames=20, fps=None))


def test_the_report_preset_holds_its_three_caps() -> None:
    sampling = VideoSampling.report()
    two_hours = VideoMeta(num_frames=216_000, fps=30)
    frames = len(sample_indices(two_hours, sampling))
    height, width = video_size(frames, 1080, 1920, sampling)
    assert frames == 2048
    assert frames // 2 * height * width // 1024 <= 224 * 1024
    assert math.prod(video_size(8, 1080, 1920, sampling)) // 1024 <= 640
    assert math.prod(video_size(8, 1080, 1920, VideoSampling.report(max_frame_tokens=768))) // 1024 > 640


def test_short_clips_need_not_eat_the_whole_budget() -> None:
    assert math.prod(video_size(4, 1080, 1920, VideoSampling())) // 1024 == 34 * 60
    assert math.prod(video_size(4, 1080, 1920, VideoSampling(cap_pixels_per_frame=True))) // 1024 <= 768


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"num_frames": 8}, "fps is 2.0 and num_frames is 8; set one"),
        ({"fps": None}, "set one"),
        ({"fps": 0.0}, "expected above 0 and at most 240"),
        ({"fps": 1e308}, "expected above 0 and at most 240"),
        ({"fps": float("nan")}, "expected above 0 and at most 240"),
        ({"fps": None, "num_frames": 0}, "expected at least 1"),
        ({"max_frames": 3}, "min_frames is 4 and max_frames is 3"),
        ({"max_tokens": float("inf")}, "max_tokens is inf"),
    ],
)
def test_sampling_that_makes_no_sense_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        VideoSampling(**changes)


# Times.


def test_labels_are_in_seconds_or_hours_minutes_seconds() -> None:
    assert slice_label(3.0) == "<3.0 seconds>"
    assert slice_label(3.0, "hms") == "<0:00:03.0>"
    assert slice_label(4225.26, "hms") == "<1:10:25.3>"
    assert slice_label(59.96) == "<60.0 seconds>"
    assert slice_label(59.96, "hms") == "<0:01:00.0>"


def test_an_odd_count_repeats_the_last_frame() -> None:
    frames = torch.from_numpy(oracle.clip({"frames": 5, "height": 64, "width": 64}))
    visual = video_patches(frames, VideoMeta(num_frames=5, fps=2), indices=range(5))
    assert visual.seconds == (0.25, 1.25, 2.0)
    last = visual.values_PX.view(3, -1, 3, 2, 256)[-1]
    assert torch.equal(last[:, :, 0], last[:, :, 1])


def test_a_single_frame_is_shown_twice() -> None:
    frames = torch.from_numpy(oracle.clip({"frames": 1, "height": 64, "width": 64}))
    visual = video_patches(frames, VideoMeta(num_frames=1, fps=30))
    assert (visual.seconds, visual.frame_indices, len(visual.grid_I3)) == ((0.0,), (0,), 1)
    assert visual.notes == ("the video has one frame, shown twice",)


def test_a_list_of_frames_needs_its_rate_or_times() -> None:
    frames = [Image.fromarray(gradient(64, 64)) for _ in range(4)]
    assert frames_video(frames, fps=2).seconds == (0.25, 1.25)
    assert frames_video(frames, seconds=[0, 1, 5, 9]).seconds == (0.5, 7.0)
    with pytest.raises(ValueError, match="give the frames' fps or one time for each"):
        frames_video(frames)
    with pytest.raises(ValueError, match="4 frames and 2 times; give one time for each frame"):
        frames_video(frames, seconds=[0, 1])
    with pytest.raises(ValueError, match="not ascending seconds"):
        frames_video(frames, seconds=[0, 2, 1, 3])
    with pytest.raises(ValueError, match="give the true rate"):
        frames_video(frames, fps=0)
    with pytest.raises(ValueError, match="0 frames"):
        frames_video([], fps=2)


# Files. Every frame says its own number.


def numbers(path: Path, sampling: VideoSampling) -> tuple[list[int], Any]:
    """The numbers read off the frames that were decoded, and the Visual."""
    visual = load_video(path, sampling)
    frames = visual.values_PX.view(len(visual.grid_I3), visual.height // 32, visual.width // 32, 2, 2, 3, 2, 16, 16)
    seen = []
    for k in range(len(visual.frame_indices or ())):
        raster = frames[k // 2].select(5, k % 2).permute(4, 0, 2, 5, 1, 3, 6).reshape(3, visual.height, visual.width)
        seen.append(read_number((raster + 1) * 127.5))
    return seen, visual


FILES: dict[str, dict[str, Any]] = {
    "clip.mp4": {},
    "all_key_frames.mp4": {"group": 1, "b_frames": 0},
    "one_key_frame.mp4": {"group": 1000},
    "clip.mkv": {},
    "clip.webm": {"codec": "libvpx-vp9", "b_frames": 0, "deadline": "realtime", "cpu-used": "8"},
    "clip.avi": {"codec": "mpeg4"},
    "clip.ts": {},
    "clip.mov": {"codec": "mpeg4"},
    "clip.flv": {"b_frames": 0},
    "clip.h264": {},
}


@pytest.mark.parametrize("name", FILES)
def test_every_sampled_frame_is_the_right_one(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    write_video(path, (numbered_frame(i) for i in range(150)), **FILES[name])
    for count in (150, 12, 5):
        seen, visual = numbers(path, VideoSampling(fps=None, num_frames=count))
        assert seen == list(visual.frame_indices) == np.linspace(0, 149, count).round().astype(int).tolist()
        assert visual.fps == pytest.approx(25, rel=1e-3)
        assert visual.seconds[-1] == pytest.approx(
            149 / 25 if count % 2 else (149 + visual.frame_indices[-2]) / 50, rel=1e-3
        )


def test_frames_agree_with_plain_decoding(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, (oracle.noise(64, 96, seed=i) for i in range(60)))
    with av.open(path) as container:
        plain = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    facts, buffer = next(iter(InProcess().run("video_facts", path.open("rb"))))
    times, keys = np.split(np.asarray(buffer), [facts["num_frames"]])
    for wanted in ([0, 1, 2, 30, 31, 59], [59], [47, 48, 49], [12, 12, 12]):
        starts = [int(keys[keys <= times[i]].max()) for i in wanted]
        *frames, end = InProcess().run(
            "video_frames", path.open("rb"), wanted=[int(times[i]) for i in wanted], keys=starts
        )
        for index, (header, pixels) in zip(wanted, frames, strict=True):
            assert header["exact"]
            assert np.array_equal(pixels, plain[index])
        assert end[0]["converted"] == len(set(wanted))


def test_sparse_frames_are_reached_by_jumping(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, (numbered_frame(i) for i in range(600)), group=10)
    facts, buffer = next(iter(InProcess().run("video_facts", path.open("rb"))))
    times, keys = np.split(np.asarray(buffer), [facts["num_frames"]])
    wanted = [0, 200, 400, 599]
    starts = [int(keys[keys <= times[i]].max()) for i in wanted]
    *_, (end, _) = InProcess().run("video_frames", path.open("rb"), wanted=[int(times[i]) for i in wanted], keys=starts)
    assert end["converted"] == 4
    assert end["decoded"] <= 4 * 11  # of 600


def test_a_file_that_names_no_count_or_rate_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "clip.ts"
    write_video(path, (numbered_frame(i) for i in range(60)), fps="30000/1001")
    ((facts, _),) = InProcess().run("video_facts", path.open("rb"))
    assert facts["container_frames"] == 0
    assert facts["num_frames"] == 60
    assert facts["fps"] == pytest.approx(29.97, rel=1e-3)


def test_a_varying_frame_rate_is_told_and_its_real_times_can_be_used(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    times = [0, 100, 200, 300, 3000, 6000, 9000, 9900]
    write_video(path, (numbered_frame(i) for i in range(8)), times=times, b_frames=0)
    real = load_video(path, VideoSampling(fps=None, num_frames=8, times="real"))
    index = load_video(path, VideoSampling(fps=None, num_frames=8))
    assert real.seconds == pytest.approx((0.05, 0.25, 4.5, 9.45), abs=1e-3)
    assert index.seconds == pytest.approx([(0.5 + 2 * k) / index.fps for k in range(4)])
    assert "the frame rate varies" in real.notes[0] and "the file's own times" in real.notes[0]
    assert "the frame rate varies" in index.notes[0] and "follow index / fps" in index.notes[0]


def test_videos_filmed_sideways_are_turned_upright(tmp_path: Path) -> None:
    path = tmp_path / "phone.mp4"
    with av.open(path, "w") as container:
        stream: Any = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        stream.set_display_rotation(90)
        pixels = np.zeros((64, 96, 3), np.uint8)
        pixels[:, :48] = 255  # the left half is white
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    (header, got), *_ = InProcess().run("video_frames", path.open("rb"), wanted=[0], keys=None)
    raster = raster_from(got, header["height"], header["width"])
    assert raster.shape == (3, 96, 64)
    # Turned by 90 degrees counterclockwise, the left half lies at the bottom.
    assert raster[0, 80, 32] > 200 and raster[0, 16, 32] < 50
    assert load_video(path).source_height == 96


MIRRORS = {  # the display matrix's a, b, c, d -> what a player does with the stored frame
    "left and right": ((-1, 0, 0, 1), lambda frame: frame[:, ::-1]),
    "top and bottom": ((1, 0, 0, -1), lambda frame: frame[::-1]),
    "half a turn": ((-1, 0, 0, -1), lambda frame: frame[::-1, ::-1]),
    "a quarter clockwise": ((0, 1, -1, 0), lambda frame: np.rot90(frame, -1)),
    "a quarter counterclockwise": ((0, -1, 1, 0), lambda frame: np.rot90(frame)),
    "along the diagonal": ((0, 1, 1, 0), lambda frame: frame.transpose(1, 0, 2)),
    "along the other diagonal": ((0, -1, -1, 0), lambda frame: frame[::-1, ::-1].transpose(1, 0, 2)),
}


@pytest.mark.parametrize("name", MIRRORS)
def test_videos_are_mirrored_and_turned_as_their_display_matrix_says(tmp_path: Path, name: str) -> None:
    (a, b, c, d), shown = MIRRORS[name]
    frame = np.zeros((64, 96, 3), np.uint8)
    frame[:32, :48], frame[:32, 48:], frame[32:, :48] = 255, 160, 80
    path = tmp_path / "phone.mp4"
    write_video(path, [frame] * 3, fps="25", b_frames=0)
    one = 1 << 16
    plain = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    turned = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    data = path.read_bytes()
    track = data.index(b"tkhd")
    assert data.count(plain, track) == 1
    path.write_bytes(data[:track] + data[track:].replace(plain, turned))
    (header, got), *_ = InProcess().run("video_frames", path.open("rb"), wanted=[0], keys=None)
    pixels = np.asarray(got).reshape(header["height"], header["width"], 3)
    assert pixels.shape == shown(frame).shape and np.abs(pixels.astype(int) - shown(frame)).mean() < 8


@pytest.mark.parametrize("format", ["GIF", "WEBP"])
def test_animations_are_videos_when_given_as_videos(format: str) -> None:
    frames = [Image.fromarray(numbered_frame(i)) for i in range(6)]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(
        frames[0], format, save_all=True, append_images=frames[1:], duration=[100, 100, 100, 100, 500, 100], **options
    )
    visual = load_video(data, VideoSampling(fps=None, num_frames=6, times="real"))
    assert visual.fps == pytest.approx(6.0)
    assert visual.seconds == pytest.approx((0.05, 0.25, 0.65))


def test_a_worker_gives_the_same_patches(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, (gradient(64, 96) for _ in range(30)))
    with WorkerPool() as pool:
        assert torch.equal(load_video(path, decoder=pool).patch_PX, load_video(path).patch_PX)


# Files that are refused, or answered with a note.


def whole_mp4(frames: int = 50, **options: Any) -> bytes:
    buffer = io.BytesIO()
    write_video(buffer, (oracle.noise(64, 96, seed=i) for i in range(frames)), format="mp4", **options)
    return buffer.getvalue()


def test_bad_videos_are_refused_in_one_sentence(tmp_path: Path) -> None:
    sound = tmp_path / "sound.mp4"
    with av.open(sound, "w") as container:
        stream: Any = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile://{sound}\n#EXT-X-ENDLIST\n".encode()
    refused = {
        "empty": (b"", "not a readable video"),
        "text": (b"hello " * 100, "not a readable video"),
        "truncated": (whole_mp4()[:-2000], "not a readable video"),
        "sound only": (sound.read_bytes(), "no video track"),
        "a playlist of other files": (playlist, "not a readable video"),
        "a list of files to join": (f"ffconcat version 1.0\nfile {sound}\n".encode(), "not a readable video"),
        "a still picture": (encoded(gradient(20, 20), "JPEG"), "not a readable video"),
    }
    for name, (data, sentence) in refused.items():
        with pytest.raises(ValueError, match=sentence) as caught:
            load_video(data)
        assert "\n" not in str(caught.value), name


def test_a_video_without_frames_is_refused() -> None:
    # A fragmented file that ends after its header.
    data = whole_mp4(muxer={"movflags": "empty_moov+frag_keyframe"})
    with pytest.raises(ValueError, match=r"no frames|not a readable video"):
        load_video(data[: data.index(b"moof") - 4])


def test_a_video_that_breaks_off_is_shown_up_to_there_with_a_note() -> None:
    buffer = io.BytesIO()
    write_video(buffer, (oracle.noise(64, 96, seed=i) for i in range(50)), format="matroska")
    data = buffer.getvalue()
    visual = load_video(data[: len(data) // 2])
    assert 20 < max(visual.frame_indices or ()) < 40
    assert visual.num_tokens > 0


def test_a_broadcast_cut_in_the_middle_is_shown_from_its_first_whole_picture_with_a_note(tmp_path: Path) -> None:
    path = tmp_path / "whole.ts"
    write_video(path, (numbered_frame(i) for i in range(90)), group=30, b_frames=0)
    packets = path.read_bytes()
    cut = packets[: 188 * 3] + packets[len(packets) // 188 // 2 * 188 :]  # its tables, then the second half
    path.write_bytes(cut)
    seen, visual = numbers(path, VideoSampling(fps=None, num_frames=4))
    assert seen[0] == 60 and seen[-1] == 89  # 60 is the first key frame of the second half
    assert re.fullmatch(r"[12] of 4 frames cannot be decoded; the nearest ones stand in", visual.notes[0])


def test_limits_on_frames_and_pixels_hold() -> None:
    data = whole_mp4()
    with pytest.raises(ValueError, match="more than 49 frames; cut it first"):
        load_video(data, decoder=InProcess(MediaLimits(max_frames=49)))
    with pytest.raises(ValueError, match="96x64, 6,144 pixels; at most 6,000"):
        load_video(data, decoder=InProcess(MediaLimits(max_pixels=6000)))


def test_any_damage_gives_a_video_or_a_sentence() -> None:
    rng = random.Random(0)
    whole = whole_mp4(12)
    with WorkerPool(MediaLimits(max_seconds=10)) as pool:
        for _ in range(60):
            data = bytearray(whole)
            for _ in range(rng.randint(1, 20)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            try:
                assert load_video(bytes(data), decoder=pool).num_tokens > 0
            except ValueError as error:
                assert "\n" not in str(error)


# Memory.


def test_decoded_frames_are_let_go_without_waiting_for_the_collector() -> None:
    """A frame whose side data were looked at lives in a circle: a long video filled the worker's memory so."""
    film = io.BytesIO()
    write_video(film, [numbered_frame(i) for i in range(100)], fps="25", codec="ffv1", format="matroska")
    gc.collect()
    gc.disable()
    try:
        pictures = sum(
            "height" in header
            for header, _ in InProcess().run("video_frames", film, wanted=list(range(100)), keys=None)
        )
        alive = sum(type(one) is av.VideoFrame for one in gc.get_objects())
    finally:
        gc.enable()
    assert pictures == 100 and alive <= 5


@pytest.mark.slow
def test_ten_minutes_of_1080p_stay_within_300_mb(tmp_path: Path) -> None:
    """The rise of this process and the worker together, with the 768 frames that are kept."""
    path = tmp_path / "long.mp4"
    ready = [av.VideoFrame.from_ndarray(numbered_frame(i, 1080, 1920)).reformat(format="yuv420p") for i in range(8)]
    with av.open(path, "w") as container:
        stream: Any = container.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = 1080, 1920, "yuv420p"
        for i in range(600 * 25):
            ready[i % 8].pts = i
            container.mux(stream.encode(ready[i % 8]))
        container.mux(stream.encode(None))
    memory, start = MemoryWatch(), time.monotonic()
    with WorkerPool() as pool, memory:
        visual = load_video(path, decoder=pool)
    spent = time.monotonic() - start
    print(f"\nrise {memory.rise / 2**20:.0f} MiB, of it patches {visual.patch_PX.numel() / 2**20:.0f} MiB, "
          f"{len(visual.frame_indices or ())} frames of {600 * 25}, {spent:.0f} s")  # fmt: skip
    assert visual.frame_indices is not None and len(visual.frame_indices) == 768
    assert memory.rise < 300e6


@pytest.mark.parametrize("format", ["matroska", "mp4"])
def test_the_rate_is_that_of_the_frames_whatever_the_container_would_like(format: str) -> None:
    times = [round(i * 1000 / 30) for i in range(60)] + [2000 + 1000 * i for i in range(1, 21)]
    film = io.BytesIO()
    write_video(film, [numbered_frame(i) for i in range(80)], fps="30", format=format, times=times)
    found = load_video(film, VideoSampling(fps=2.0))
    assert found.fps == pytest.approx(79 / 22, rel=0.02)
    assert found.seconds is not None and found.seconds[-1] == pytest.approx(22, abs=1.5)


def test_a_phones_own_format_is_named() -> None:
    for brand in (b"heic", b"avif"):
        with pytest.raises(ValueError, match="HEIC or AVIF picture, which is not read: save it as JPEG or PNG"):
            load_image(io.BytesIO(b"\0\0\0\x18ftyp" + brand + b"\0" * 40))
