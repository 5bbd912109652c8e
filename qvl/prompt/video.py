"""A video, from a file or from frames, to patches with times. Frames are resized as they come; only their patches are kept."""

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import chain, pairwise
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qvl.outside.workers import Decoder, InProcess
from qvl.prompt.image import Source, load_image, opened, raster_from
from qvl.prompt.sampling import VideoMeta, VideoSampling, sample_indices, video_size
from qvl.prompt.visual import FRAMES, MERGE, PATCH, Visual, check_raster, fold_bytes, resize_raster


def load_video(
    source: Source,
    sampling: VideoSampling | None = None,
    decoder: Decoder | None = None,
    *,
    most_tokens: int | None = None,
) -> Visual:
    """A video file, GIF or animated WebP. Only the sampled frames become pictures; memory does not grow with the video's length.

    Frame count and times come from the file's packets, never from an assumed rate. One frame alone is shown twice. The decoder is as
    in load_image. ValueError, after its first frame, for one of more than `most_tokens` visual tokens.
    """
    sampling, decoder = sampling or VideoSampling(), decoder or InProcess()
    with opened(source, decoder) as stream:
        ((facts, buffer),) = decoder.run("video_facts", stream)
        times = np.frombuffer(buffer, dtype=np.int64)
        starts = times[facts["num_frames"] :]
        times = times[: facts["num_frames"]]
        seconds = _seconds(times, facts)
        meta = VideoMeta(
            num_frames=facts["num_frames"], fps=facts["fps"], seconds=seconds if sampling.times == "real" else None
        )
        indices = sample_indices(meta, sampling)
        wanted, keys = list(indices), None
        if len(starts) and not facts["numbered"]:
            wanted = times[list(indices)].tolist()
            # Frames before the first key frame cannot be reached by a jump: they ask for the first key frame and wait.
            keys = starts[np.maximum(np.searchsorted(starts, wanted, side="right") - 1, 0)].tolist()
        inexact: list[int] = []
        # Closed at once where it is broken off, whoever still holds the error: until then its worker serves nobody else.
        with closing(decoder.run("video_frames", stream, wanted=wanted, keys=keys)) as messages:
            frames = _decoded(messages, inexact)
            visual = video_patches(frames, meta, sampling, indices=indices, most_tokens=most_tokens)
    notes = list(facts["notes"])
    if inexact:
        notes.append(f"{len(inexact)} of {len(indices)} frames cannot be decoded; the nearest ones stand in")
    drift = max((abs(s - i / meta.fps) for i, s in enumerate(seconds or ())), default=0.0)
    if drift > 1 / meta.fps:
        used = "index / fps" if sampling.times == "index" else "the file's own times"
        notes.append(
            f"the frame rate varies: index / fps is off by up to {drift:.2f} seconds; timestamps follow {used}"
        )
    return replace(visual, notes=(*visual.notes, *notes))


def video_patches(
    frames: Tensor | Iterable[Tensor],
    meta: VideoMeta,
    sampling: VideoSampling | None = None,
    *,
    indices: Sequence[int] | None = None,
    most_tokens: int | None = None,
) -> Visual:
    """Frames as uint8 rasters to patches, equal to the bit to transformers' video processor on the same frames.

    `frames` are all source frames, from which `sampling` takes some; with `indices` they are those source frames already, in order,
    and may come from an iterator. They are resized to one size, that of the first.
    """
    sampling = sampling or VideoSampling()
    if indices is None:
        indices = sample_indices(meta, sampling)
        if not isinstance(frames, Tensor | Sequence):
            raise ValueError(
                "all source frames are needed to choose from; give a tensor or list, or the indices the frames stand for."
            )
        if len(frames) != meta.num_frames:
            raise ValueError(
                f"{len(frames)} frames were given and the video has {meta.num_frames}; give all, or their indices."
            )
        frames = [frames[i] for i in indices]
    stream = iter(frames)
    first = next(stream, None)
    if first is None or not indices:
        raise ValueError("the video has no frames; nothing can be shown of it.")
    source_height, source_width = check_raster(first).shape[1:]
    height, width = video_size(len(indices), source_height, source_width, sampling)
    rows, columns = height // PATCH, width // PATCH
    slices = -(-len(indices) // FRAMES)
    if most_tokens is not None and (tokens := slices * rows * columns // MERGE**2) > most_tokens:
        raise ValueError(
            f"the video would be {tokens:,} tokens and {most_tokens:,} fit; ask for fewer max_tokens, a lower fps or a part of it."
        )
    patch_PX = torch.empty(slices * rows * columns, 3 * FRAMES * PATCH * PATCH, dtype=torch.uint8)
    pairs = patch_PX.view(slices, rows * columns * 3, FRAMES, PATCH * PATCH)
    count = 0
    for frame in chain([first], stream):
        if count == len(indices):
            raise ValueError(f"more than the {len(indices)} frames named by the indices were given.")
        _place(resize_raster(check_raster(frame), height, width), pairs, count)
        count += 1
    if count != len(indices):
        raise ValueError(f"{count} frames were given for {len(indices)} indices; give one frame for each.")
    if count % FRAMES:  # the last frame fills its slice
        pairs[-1, :, 1] = pairs[-1, :, 0]
    return Visual(
        kind="video",
        patch_PX=patch_PX,
        grid_I3=torch.tensor([[1, rows, columns]]).repeat(slices, 1),
        height=height,
        width=width,
        source_height=source_height,
        source_width=source_width,
        seconds=slice_seconds([meta.time(i) for i in indices]),
        frame_indices=tuple(indices),
        fps=meta.fps,
        notes=("the video has one frame, shown twice",) if meta.num_frames == 1 else (),
    )


def frames_video(
    frames: Sequence[Source | Image.Image | Tensor],
    sampling: VideoSampling | None = None,
    decoder: Decoder | None = None,
    *,
    fps: float | None = None,
    seconds: Sequence[float] | None = None,
) -> Visual:
    """A list of pictures as a video. All are shown. Their `fps` or the `seconds` of each must be known: without, the network would be
    told wrong times."""
    if (fps is None) == (seconds is None):
        raise ValueError(
            f"a list of {len(frames)} frames came with fps {fps} and times {seconds}; give the frames' fps or one time for each."
        )
    if seconds is not None:
        steps = [b - a for a, b in pairwise(seconds) if b > a]
        fps = len(steps) / sum(steps) if steps else 1.0
    assert fps is not None
    meta = VideoMeta(num_frames=len(frames), fps=fps, seconds=tuple(seconds) if seconds is not None else None)
    rasters = (load_image(frame, decoder) for frame in frames)
    return video_patches(rasters, meta, sampling, indices=range(len(frames)))


def slice_seconds(times: Sequence[float]) -> tuple[float, ...]:
    """The time of each slice of two frames: the mean of both. An odd count repeats the last."""
    filled = [*times, *times[-1:]] if len(times) % FRAMES else times
    return tuple((a + b) / 2 for a, b in zip(filled[::FRAMES], filled[1::FRAMES], strict=True))


def slice_label(seconds: float, style: Literal["seconds", "hms"] = "seconds") -> str:
    """The text before a slice: `<3.0 seconds>` or `<0:00:03.0>`.

    The report trains both styles (report 2, "Video Timestamp") and prints the first only; the spelling of the second is ours.
    """
    text = f"{seconds:.1f}"
    if style == "seconds":
        return f"<{text} seconds>"
    whole, tenths = text.split(".")
    minutes, second = divmod(int(whole), 60)
    hour, minute = divmod(minutes, 60)
    return f"<{hour}:{minute:02d}:{second:02d}.{tenths}>"


def _place(raster: Tensor, pairs: Tensor, number: int) -> None:
    """Writes frame `number` into its half of its slice."""
    pairs[number // FRAMES, :, number % FRAMES] = fold_bytes(raster)


def _decoded(messages: Iterable[tuple[dict[str, Any], Any]], inexact: list[int]) -> Iterable[Tensor]:
    for header, buffer in messages:
        if "height" in header:
            if not header["exact"]:
                inexact.append(header["time"])
            yield raster_from(buffer, header["height"], header["width"])


def _seconds(times: np.ndarray, facts: dict[str, Any]) -> tuple[float, ...] | None:
    """When each frame is shown, from 0; None if the file does not say."""
    if len(times) == 0:
        return None
    return tuple(((times - times[0]) * facts["unit"]).tolist())
