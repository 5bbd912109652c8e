"""Which frames of a video are taken and how large they are: three published rules behind one dataclass."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch

from qvl.prompt.budget import PIXELS_PER_TOKEN, check_ratio, read_areas
from qvl.prompt.visual import FACTOR, FRAMES

PIXELS_PER_VIDEO_TOKEN = PIXELS_PER_TOKEN * FRAMES
LONGEST = 1e9
"""Seconds, thirty years: sums of larger times are no numbers any more."""


@dataclass(frozen=True, kw_only=True)
class VideoMeta:
    """What must be known of a video before frames can be chosen. Nothing here has a default that could be wrong."""

    num_frames: int
    fps: float
    seconds: tuple[float, ...] | None = None
    """When each source frame is shown, from 0. None: frame i is shown at i / fps."""

    def __post_init__(self) -> None:
        if self.num_frames < 1:
            raise ValueError(f"the video has {self.num_frames} frames; it needs at least one.")
        if not 0 < self.fps < math.inf:
            raise ValueError(f"the video has {self.fps} frames a second; give the true rate, above zero.")
        if self.seconds is not None:
            if len(self.seconds) != self.num_frames:
                raise ValueError(
                    f"the video has {self.num_frames} frames and {len(self.seconds)} times; give one time for each frame."
                )
            if any(not 0 <= s <= LONGEST for s in self.seconds) or list(self.seconds) != sorted(self.seconds):
                raise ValueError("the frame times are not ascending seconds from 0; sort the frames by time.")

    def time(self, index: int) -> float:
        return self.seconds[index] if self.seconds is not None else index / self.fps


@dataclass(frozen=True, kw_only=True)
class VideoSampling:
    """How a video is thinned and sized. A video token covers 32 x 32 pixels of two frames.

    - rule "transformers": the Hugging Face processor of 5.23. One budget for the whole video, so a short clip gets large frames.
    - rule "per-frame": qwen-vl-utils, and the report's evaluation. Every frame stays within `min_frame_tokens` .. `max_frame_tokens`, less
      when the whole would exceed `max_tokens`.
    """

    rule: Literal["transformers", "per-frame"] = "transformers"
    fps: float | None = 2.0
    """Frames taken a second; exclusive with num_frames."""
    num_frames: int | None = None
    min_frames: int = 4
    max_frames: int = 768
    min_tokens: float = 2
    """Of the whole video (rule "transformers")."""
    max_tokens: float = 12288
    """Of the whole video."""
    min_frame_tokens: float = 128
    max_frame_tokens: float = 768
    cap_pixels_per_frame: bool = False
    """Rule "transformers": hold frames to max_frame_tokens too, as its processor can be told to."""
    times: Literal["index", "real"] = "index"
    """Timestamps from index / fps, as the model was trained, or from the file's own presentation times. They differ when the frame rate
    varies; the Visual's notes then say by how much."""

    def __post_init__(self) -> None:
        if (self.fps is None) == (self.num_frames is None):
            raise ValueError(f"fps is {self.fps} and num_frames is {self.num_frames}; set one and make the other None.")
        if self.fps is not None and not 0 < self.fps <= 240:
            raise ValueError(f"fps is {self.fps}; expected above 0 and at most 240 frames a second.")
        if self.num_frames is not None and self.num_frames < 1:
            raise ValueError(f"num_frames is {self.num_frames}; expected at least 1.")
        for low, high in (
            ("min_frames", "max_frames"),
            ("min_tokens", "max_tokens"),
            ("min_frame_tokens", "max_frame_tokens"),
        ):
            if not 0 < getattr(self, low) <= getattr(self, high) < math.inf:
                raise ValueError(
                    f"{low} is {getattr(self, low)} and {high} is {getattr(self, high)}; expected 0 < {low} <= {high}."
                )

    @classmethod
    def transformers(cls, **changes: Any) -> Self:
        return cls(**changes)

    @classmethod
    def qwen_vl_utils(cls, **changes: Any) -> Self:
        """The release's own preparation: 128,000 tokens of context, 0.9 of them for the video."""
        return cls(**{"rule": "per-frame", "max_tokens": 115_200, **changes})

    @classmethod
    def report(cls, **changes: Any) -> Self:
        """Report 5: up to 2,048 frames and 224K tokens, 640 tokens a frame (768 for VideoMMMU and MMVU).

        K is taken as 1,024: 256K less 32K for the answer. How the caps are met is not given; qwen-vl-utils' way is used.
        """
        return cls(
            **{"rule": "per-frame", "max_frames": 2048, "max_tokens": 224 * 1024, "max_frame_tokens": 640, **changes}
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """From a video_preprocessor_config.json. Its `size` is pixels times frames."""
        low, high = read_areas(config)
        num_frames = config.get("num_frames")
        return cls(
            fps=None if num_frames else config.get("fps", 2.0),
            num_frames=num_frames,
            min_frames=config.get("min_frames", 4),
            max_frames=config.get("max_frames", 768),
            min_tokens=low / PIXELS_PER_VIDEO_TOKEN,
            max_tokens=high / PIXELS_PER_VIDEO_TOKEN,
            min_frame_tokens=min(128, config.get("max_video_tokens", 768)),
            max_frame_tokens=config.get("max_video_tokens", 768),
            cap_pixels_per_frame=bool(config.get("cap_pixels_per_frame")),
        )


def sample_indices(meta: VideoMeta, sampling: VideoSampling) -> tuple[int, ...]:
    """The source frames to take, ascending."""
    total = meta.num_frames
    if sampling.rule == "transformers":
        count = sampling.num_frames
        if count is None:
            assert sampling.fps is not None
            count = min(max(int(total / meta.fps * sampling.fps), sampling.min_frames), sampling.max_frames, total)
        return tuple(np.linspace(0, total - 1, count).round().astype(int).tolist())
    if total == 1:  # qwen-vl-utils refuses this; a single frame is shown twice here
        return (0,)
    count = _even_count(meta, sampling)
    # float32, as there: on long videos its roundings are not numpy's.
    return tuple(torch.linspace(0, total - 1, count, dtype=torch.float32).round().long().tolist())


def _even_count(meta: VideoMeta, sampling: VideoSampling) -> int:
    """qwen-vl-utils' smart_nframes."""
    total = meta.num_frames
    if sampling.num_frames is not None:
        count = round(sampling.num_frames / FRAMES) * FRAMES
        if not FRAMES <= count <= total:
            raise ValueError(
                f"num_frames is {sampling.num_frames} and the video has {total} frames; expected 2 to {total}."
            )
        return count
    assert sampling.fps is not None
    fewest = math.ceil(sampling.min_frames / FRAMES) * FRAMES
    most = max(FRAMES, sampling.max_frames // FRAMES * FRAMES)
    count = min(max(total / meta.fps * sampling.fps, fewest), most, total)
    return math.floor(count / FRAMES) * FRAMES


def video_size(num_frames: int, height: int, width: int, sampling: VideoSampling) -> tuple[int, int]:
    """The height and width every taken frame is resized to."""
    num_frames = max(num_frames, FRAMES)  # a single frame is shown twice
    if sampling.rule == "per-frame":
        return _per_frame_size(num_frames, height, width, sampling)
    least, most = int(sampling.min_tokens * PIXELS_PER_VIDEO_TOKEN), int(sampling.max_tokens * PIXELS_PER_VIDEO_TOKEN)
    if sampling.cap_pixels_per_frame:
        cap = int(sampling.max_frame_tokens * PIXELS_PER_TOKEN)
        most = max(min(cap, most // num_frames), int(least * 1.05)) * num_frames
    return _whole_video_size(num_frames, height, width, least, most)


def _whole_video_size(num_frames: int, height: int, width: int, least: int, most: int) -> tuple[int, int]:
    """transformers' video smart_resize. The count is rounded half to even (5 frames weigh 4), the shrinking uses the true one."""
    if min(height, width) < FACTOR:
        scale = max(FACTOR / height, FACTOR / width)
        height, width = int(height * scale), int(width * scale)
    check_ratio(height, width)
    tall, wide = round(height / FACTOR) * FACTOR, round(width / FACTOR) * FACTOR
    weight = round(num_frames / FRAMES) * FRAMES
    if weight * tall * wide > most:
        shrink = math.sqrt(num_frames * height * width / most)
        tall, wide = (max(FACTOR, math.floor(side / shrink / FACTOR) * FACTOR) for side in (height, width))
    elif weight * tall * wide < least:
        grow = math.sqrt(least / (num_frames * height * width))
        tall, wide = (math.ceil(side * grow / FACTOR) * FACTOR for side in (height, width))
    return tall, wide


def _per_frame_size(num_frames: int, height: int, width: int, sampling: VideoSampling) -> tuple[int, int]:
    """qwen-vl-utils' fetch_video and its smart_resize, in which no side rounds to nothing."""
    check_ratio(height, width)
    least = sampling.min_frame_tokens * PIXELS_PER_TOKEN
    share = sampling.max_tokens * PIXELS_PER_TOKEN / num_frames * FRAMES
    most = max(min(sampling.max_frame_tokens * PIXELS_PER_TOKEN, share), int(least * 1.05))
    tall, wide = (max(FACTOR, round(side / FACTOR) * FACTOR) for side in (height, width))
    if tall * wide > most:
        shrink = math.sqrt(height * width / most)
        tall, wide = (max(FACTOR, math.floor(side / shrink / FACTOR) * FACTOR) for side in (height, width))
    elif tall * wide < least:
        grow = math.sqrt(least / (height * width))
        tall, wide = (math.ceil(side * grow / FACTOR) * FACTOR for side in (height, width))
    return tall, wide
