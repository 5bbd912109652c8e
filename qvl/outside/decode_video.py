"""Video files to RGB frames with PyAV: packets are counted, only wanted frames become pictures, one frame is held at a time."""

import struct
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, BinaryIO

import av
import numpy as np
from av.error import FFmpegError
from av.sidedata.sidedata import Type as SideDataType
from av.stream import Disposition
from PIL import Image

from qvl.outside.decode_image import FORMATS, open_picture, rgb
from qvl.outside.media import MediaError, MediaLimits, Message, check_pixels, refusing

# Demuxers that read one file and nothing else. A playlist (HLS, DASH, concat) would open other files and addresses.
CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg,h264,hevc,ivf,mpegvideo"
UNREADABLE = "the file is not a readable video (MP4, MOV, MKV, WebM, AVI, MPEG, FLV, WMV, Ogg, GIF or animated WebP)."
ANIMATION_PICTURES = 16
"""Frames of an animation, in pictures of the largest size allowed: a thousand of 1024 x 1024."""
NEAR = 0.02
"""How far the rate a container tells may be from what its times say, for rounding."""
BROKEN = "the video's pictures cannot be decoded; the file is damaged or its codec is not supported. Re-encode it."


def video_facts(stream: BinaryIO, limits: MediaLimits) -> Iterator[Message]:
    """One message: {num_frames, fps, width, height, unit, container_frames, notes} and, as int64, the presentation time of every
    frame in units of `unit` seconds, sorted, followed by that of every frame one can start decoding at. With `numbered` true
    the file gives no times, the buffer is empty and frames are asked for by number.

    All of it comes from the packets, none from decoding: 216,000 frames (two hours) cost seconds, not minutes.
    """
    if _is_animation(stream):
        yield from _animation_facts(stream, limits)
        return
    with refusing(UNREADABLE), _open(stream, limits) as container:
        track = _track(container, limits)
        times, keys, notes = _read_packets(container, track, limits)
        num_frames = len(times)
        if num_frames == 0:
            raise MediaError("the video has no frames; nothing can be shown of it.")
        known = [t for t in times if t is not None]
        numbered = len(set(known)) < num_frames or track.time_base is None
        unit = track.time_base or Fraction(1)
        fps = float(track.average_rate or 0)
        if not fps or (not numbered and len(known) > 1):
            # Matroska says the rate it would like to have; where the times say another, they are right.
            true = _rate(sorted(known), unit)
            fps = fps if abs(fps / true - 1) < NEAR else true
        header = {
            "num_frames": num_frames,
            "fps": fps,
            "width": track.codec_context.width,
            "height": track.codec_context.height,
            "unit": float(unit),
            "num_keys": 0 if numbered else len(keys),
            "numbered": numbered,
            "container_frames": track.frames,
            "notes": notes,
        }
    yield header, np.array([] if numbered else sorted(known) + sorted(keys), dtype=np.int64)


def video_frames(
    stream: BinaryIO, limits: MediaLimits, *, wanted: list[int], keys: list[int] | None
) -> Iterator[Message]:
    """A message {height, width, time, exact} with its RGB bytes for each entry of `wanted` (ascending), then {decoded, converted}.

    With `keys`, `wanted` holds presentation times and keys[i] is where decoding may start to reach wanted[i]; the stream jumps there when
    that skips frames. Without, `wanted` holds frame numbers and everything up to the last is decoded.
    """
    if _is_animation(stream):
        yield from _animation_frames(stream, limits, wanted)
        return
    with refusing(BROKEN), _open(stream, limits) as container:
        track = _track(container, limits)
        track.thread_type = "AUTO"
        track.codec_context.thread_count = 2  # frame threads each hold pictures: 2 keep a 1080p worker under 100 MB
        reader, upright = _Reader(container, track), _Upright()
        converted, last, message = 0, None, None
        for number, want in enumerate(wanted):
            if message is None or want != last:
                frame = reader.at(want, keys[number] if keys is not None else None)
                pixels = upright(frame.to_ndarray(format="rgb24"), frame)
                height, width = pixels.shape[:2]
                check_pixels("a frame of the video", width, height, limits)
                time = reader.decoded - 1 if keys is None else frame.pts
                header = {"height": height, "width": width, "time": time, "exact": time == want}
                message, last = (header, pixels), want
                converted += 1
            yield message
    yield {"decoded": reader.decoded, "converted": converted}, b""


class _Reader:
    """Walks forward through a container, jumping ahead where a later key frame allows it."""

    def __init__(self, container: Any, track: Any) -> None:
        self.container, self.track = container, track
        self.frames = container.decode(track)
        self.current: Any = None
        self.decoded = 0
        self.may_jump = True

    def at(self, want: int, key: int | None) -> Any:
        """The first frame at or after `want`: a time, or without `key` a number. After the last, the last."""
        # A frame before the first key frame has a key beyond it, and is walked to.
        if key is not None and key <= want and self.may_jump and (self.current is None or key > self.current.pts):
            self._jump(want, key)
        while self.current is None or self._place(key) < want:
            frame = next(self.frames, None)
            if frame is None and self.current is None:
                raise MediaError(BROKEN)
            if frame is None:
                break
            self.decoded += 1
            if key is None or frame.pts is not None:
                self.current = frame
        return self.current

    def _place(self, key: int | None) -> int:
        return self.decoded - 1 if key is None else self.current.pts

    def _jump(self, want: int, key: int) -> None:
        self._seek(key)
        self.current = next((f for f in self.frames if f.pts is not None), None)
        self.decoded += 1
        if self.current is None or self.current.pts > want:
            # The index lies. Start over and walk: slower, never wrong.
            self.may_jump, self.current = False, None
            self._seek(min(0, self.track.start_time or 0))

    def _seek(self, time: int) -> None:
        self.container.seek(time, stream=self.track, backward=True)
        self.frames = self.container.decode(self.track)


def _open(stream: BinaryIO, limits: MediaLimits) -> Any:
    stream.seek(0)
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "none", "max_pixels": str(limits.max_pixels)}
    return av.open(stream, options=options, metadata_errors="ignore")


def _track(container: Any, limits: MediaLimits) -> Any:
    tracks = [t for t in container.streams.video if not t.disposition & Disposition.attached_pic]  # cover art
    if not tracks:
        raise MediaError("the file has no video track; send sound files elsewhere and pictures as images.")
    track = tracks[0]
    if track.codec_context is None:
        raise MediaError("the video's codec is not supported; re-encode it as H.264.")
    check_pixels("the video", track.codec_context.width, track.codec_context.height, limits)
    # A stream may change its size on the way: the decoder itself refuses before it takes memory for such a frame.
    track.codec_context.options = {"max_pixels": str(limits.max_pixels)}
    return track


def _read_packets(container: Any, track: Any, limits: MediaLimits) -> tuple[list[int | None], list[int], list[str]]:
    """Times of all frames and of the key frames, in file order, and notes on what is missing."""
    times: list[int | None] = []
    keys: list[int] = []
    hidden = 0
    try:
        for packet in container.demux(track):
            if packet.size == 0:  # the flush packet at the end
                continue
            if packet.is_discard:  # cut away by an edit list
                hidden += 1
                continue
            times.append(packet.pts)
            if packet.is_keyframe and packet.pts is not None:
                keys.append(packet.pts)
            if len(times) > limits.max_frames:
                raise MediaError(f"the video has more than {limits.max_frames:,} frames; cut it first.")
    except FFmpegError:
        if not times:
            raise
        return times, keys, [f"the file breaks off after {len(times)} frames"]
    if track.frames > len(times) + hidden:
        return times, keys, [f"the file promises {track.frames} frames and holds {len(times)}"]
    return times, keys, []


def _rate(times: list[int], unit: Fraction) -> float:
    """Frames a second when the container names none: measured on the frames' own times, never assumed."""
    if len(times) > 1 and times[-1] > times[0]:
        return (len(times) - 1) / float((times[-1] - times[0]) * unit)
    if len(times) == 1:
        return 1.0  # one frame: its time is 0 at any rate
    raise MediaError(
        "the video gives neither a frame rate nor frame times; re-encode it, or send frames with their times."
    )


class _Upright:
    """Frames as a player shows them. Phones film sideways and front cameras mirrored; both note it in the stream's display matrix.

    The matrix is read of the first frame, and of the first after each turn: PyAV ties a frame to its side data in a circle, so that every
    frame whose side data are looked at stays in memory until Python collects (691 MiB for 300 frames of 1080p, where 53 are enough).
    """

    def __init__(self) -> None:
        self._of_turn: dict[int, tuple[bool, bool, bool]] = {}

    def __call__(self, pixels: np.ndarray, frame: Any) -> np.ndarray:
        if frame.rotation not in self._of_turn:
            self._of_turn[frame.rotation] = _orientation(frame)
        is_transposed, flips_y, flips_x = self._of_turn[frame.rotation]
        if is_transposed:
            pixels = pixels.transpose(1, 0, 2)
        return np.ascontiguousarray(pixels[:: -1 if flips_y else 1, :: -1 if flips_x else 1])


def _orientation(frame: Any) -> tuple[bool, bool, bool]:
    """(rows and columns change places, then top and bottom, then left and right).

    The matrix sends a pixel (x right, y down) to (a x + c y, b x + d y); of its four numbers only signs and which two are large count,
    since videos turn by right angles (ISO/IEC 14496-12, 8.3.2).
    """
    note = next((data for data in frame.side_data if data.type == SideDataType.DISPLAYMATRIX), None)
    if note is None:
        return False, False, False
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(note))
    if abs(b) + abs(c) > abs(a) + abs(d):
        return True, b < 0, c < 0
    return False, d < 0, a < 0


def _is_animation(stream: BinaryIO) -> bool:
    stream.seek(0)
    start = stream.read(12)
    stream.seek(0)
    return (
        start[:4] == b"GIF8" or (start[:4] == b"RIFF" and start[8:12] == b"WEBP") or start[:8] == b"\x89PNG\r\n\x1a\n"
    )


def _animation_facts(stream: BinaryIO, limits: MediaLimits) -> Iterator[Message]:
    """GIF, WebP and PNG go through Pillow, which lays partial frames over each other as browsers do. Times are in milliseconds."""
    with refusing(UNREADABLE), open_picture(stream, limits) as picture:
        assert picture.format in FORMATS
        times, now, unknown, pixels = [], 0.0, 0, 0
        promised = getattr(picture, "n_frames", 1)
        _check_length(promised, promised * picture.width * picture.height, limits)
        while _seek_frame(picture, len(times), limits):
            pixels += picture.width * picture.height
            _check_length(len(times), pixels, limits)
            if picture.format == "WEBP":  # its durations are known only after decoding
                picture.load()
            times.append(round(now))
            duration = float(picture.info.get("duration") or 0)
            unknown += duration <= 0
            now += duration if duration > 0 else 100.0  # what browsers show an unset duration as
        num_frames = len(times)
        notes = [f"{unknown} of {num_frames} frames have no duration and count 0.1 seconds"] if unknown else []
        header = {
            "num_frames": num_frames,
            "fps": num_frames / (now / 1000),
            "width": picture.width,
            "height": picture.height,
            "unit": 0.001,
            "num_keys": 0,
            "numbered": False,
            "container_frames": num_frames,
            "notes": notes,
        }
    yield header, np.array(times, dtype=np.int64)


def _check_length(num_frames: int, pixels: int, limits: MediaLimits) -> None:
    """Each frame is laid over the whole picture, so a small file can cost hours: before it is begun, and as frames grow it on the way."""
    if num_frames > limits.max_frames or pixels > ANIMATION_PICTURES * limits.max_pixels:
        raise MediaError(f"the animation is too long, it has {num_frames:,} frames or more; cut it or scale it down.")


def _seek_frame(picture: Image.Image, number: int, limits: MediaLimits) -> bool:
    """Whether there is such a frame; a GIF's may be larger than the picture it began as."""
    try:
        picture.seek(number)
    except EOFError:
        return False
    check_pixels("a frame of the animation", picture.width, picture.height, limits)
    return True


def _animation_frames(stream: BinaryIO, limits: MediaLimits, wanted: list[int]) -> Iterator[Message]:
    """`wanted` holds frame numbers."""
    converted = 0
    with refusing(BROKEN), open_picture(stream, limits) as picture:
        for number in wanted:
            if not _seek_frame(picture, number, limits):
                raise MediaError(BROKEN)
            picture.load()  # a damaged GIF may turn from RGB to RGBA only now
            pixels = np.array(rgb(picture))
            converted += 1
            yield {"height": pixels.shape[0], "width": pixels.shape[1], "time": number, "exact": True}, pixels
    yield {"decoded": converted, "converted": converted}, b""
