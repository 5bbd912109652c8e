"""Media of a request: fetched only where allowed, decoded in a process that can be killed, within the server's ceilings."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

from qvl.outside.fetch import Fetcher, HostRefused
from qvl.outside.media import MediaError, MediaLimits
from qvl.outside.workers import WorkerPool
from qvl.prompt.media import MediaFault, MediaItem
from qvl.prompt.message import MEDIA, Document, Image, Message, Text, Video
from qvl.prompt.processor import Processor
from qvl.serve.errors import Refusal, gone, safe_sentence
from qvl.serve.limits import Limits

FRAMES_PATIENCE = 5
"""How many times as long as one file a list of frames may take."""


class Kitchen:
    """Makes what a client sent into what the network takes. Threads may share one."""

    def __init__(
        self,
        processor: Processor,
        limits: Limits,
        *,
        max_tokens: int,
        allow_domains: tuple[str, ...] = (),
        allow_folders: tuple[Path | str, ...] = (),
        workers: int = 1,
        media_seconds: float = 60.0,
    ) -> None:
        """`max_tokens`: of a whole prompt; media beyond it are refused while they come."""
        self.processor, self.limits, self.max_tokens = processor, limits, max_tokens
        self.allows_addresses = bool(allow_domains)
        self.allows_files = bool(allow_folders)
        self.media_seconds = media_seconds
        self.pool = WorkerPool(
            MediaLimits(
                max_bytes=limits.max_medium_bytes,
                max_pages=limits.max_pages,
                max_seconds=media_seconds,
                memory_bytes=limits.max_worker_bytes,
            ),
            size=workers,
        )
        self.fetcher = Fetcher(
            allow_domains=allow_domains, allow_folders=allow_folders, max_bytes=limits.max_medium_bytes
        )

    def close(self) -> None:
        """Does not wait for what is being decoded."""
        self.pool.stop()

    def check(self, messages: Sequence[Message]) -> None:
        """Counts and ceilings, before anything is opened (CVE-2026-100650: items fetched, then counted)."""
        limits = self.limits
        parts = [part for message in messages for part in message.content]
        media = [part for part in parts if isinstance(part, MEDIA)]
        words = sum(len(part.text) for part in parts if isinstance(part, Text))
        words += sum(
            len(m.thinking or "") + sum(len(c.name) + len(str(c.arguments)) for c in m.tool_calls) for m in messages
        )
        for count, most, what in (
            (len(parts), limits.max_parts, "parts"),
            (len(media), limits.max_media, "pictures, videos and documents"),
            (words, limits.max_text, "characters"),
        ):
            if count > most:
                raise Refusal(400, f"The conversation has {count:,} {what}; at most {most:,} are allowed.")
        if media and self.processor.image_budget is None:
            raise Refusal(400, "This model takes text only.", param="messages")
        for where, part in _media_of(messages):
            self._check_part(where, part)

    def _check_part(self, where: str, part: Image | Video | Document) -> None:
        limits = self.limits
        sources = part.source if isinstance(part.source, tuple) else (part.source,)
        if not all(isinstance(source, str) for source in sources):
            raise Refusal(400, f"{where}: the source must be text: a data URI or an address.", param=where)
        if len(sources) > limits.max_frames:
            raise Refusal(400, f"{where} has {len(sources):,} frames; at most {limits.max_frames:,} are allowed.")
        most = limits.max_video_tokens if isinstance(part, Video) else limits.max_image_tokens
        wishes = [("max_tokens", part.max_tokens, most)]
        if isinstance(part, Image):
            wishes.append(("min_tokens", part.min_tokens, most))
        if isinstance(part, Video):
            wishes.append(("num_frames", part.num_frames, limits.max_frames))
        if isinstance(part, Document):
            wishes.append(("pages", len(part.pages or ""), 4096))
        for name, value, ceiling in wishes:
            if value is not None and value > ceiling:
                raise Refusal(400, f"{where}: {name} is {value:,}; at most {ceiling:,} is allowed.", param=where)

    def load(
        self, messages: Sequence[Message], *, is_cancelled: Callable[[], bool] = lambda: False
    ) -> tuple[list[Message], list[MediaItem], float]:
        """The conversation with its media loaded, the media in order, and the seconds it took. Nothing is opened for who has gone."""
        start = time.monotonic()

        def check() -> None:
            if is_cancelled():
                raise gone()

        def opened(source: str) -> BinaryIO:
            check()
            return self._open(source)

        loader = replace(
            self.processor.media_loader(self.pool, opened), frames_seconds=FRAMES_PATIENCE * self.media_seconds
        )
        try:
            shown, items = loader.load_all(messages, max_tokens=self.max_tokens, check=check)
        except MediaFault as fault:
            where = place_of(fault.message, fault.part)
            text = safe_sentence(fault.error, "the file could not be read.")
            raise Refusal(400, f"{where}: {text}", param=where, code="media") from fault
        return shown, items, time.monotonic() - start

    def _open(self, source: str) -> BinaryIO:
        """Off until allowed: an address by its domain, a file by its folder. What is allowed is nobody's business."""
        kind = source[:32].lower()
        if not kind.startswith("data:"):
            if kind.startswith(("http://", "https://")):
                if not self.allows_addresses:
                    raise MediaError("this server fetches nothing; send the file itself as a data URI.")
            elif not self.allows_files:
                raise MediaError("this server reads no files of its own; send the file itself as a data URI.")
        try:
            return self.fetcher.open(source)
        except HostRefused as error:
            # One sentence for all: which names exist inside is nobody's business either.
            raise MediaError("this server may not fetch from that host; send the file itself as a data URI.") from error


def _media_of(messages: Sequence[Message]) -> Iterator[tuple[str, Image | Video | Document]]:
    for i, message in enumerate(messages):
        for j, part in enumerate(message.content):
            if isinstance(part, MEDIA):
                yield place_of(i, j), part


def place_of(message: int, part: int) -> str:
    return f"messages[{message}].content[{part}]"


def facts_of(item: MediaItem) -> dict[str, Any]:
    """What was made of it: sizes, frames and times, for clients who ask."""
    visual = item.visual
    facts: dict[str, Any] = {
        "kind": item.kind,
        "tokens": visual.num_tokens,
        "grid_thw": item.grid_thw,
        "size": [visual.width, visual.height],
        "source_size": [visual.source_width, visual.source_height],
        "budget": asdict(item.budget),
    }
    if item.kind == "video":
        facts["timestamps"] = None if visual.seconds is None else [round(s, 3) for s in visual.seconds]
        facts["frame_indices"] = None if visual.frame_indices is None else list(visual.frame_indices)
        facts["fps"] = visual.fps
    return facts | ({"notes": list(visual.notes)} if visual.notes else {})
