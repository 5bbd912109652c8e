"""The media loader: what messages show is opened, decoded and cut into patches, for commands, server, sessions and training alike."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from qvl.outside.media import MediaError
from qvl.outside.workers import Decoder
from qvl.prompt.budget import ImageBudget
from qvl.prompt.document import load_document
from qvl.prompt.image import image_patches, load_image
from qvl.prompt.message import MEDIA, ContentPart, Document, Image, Message, Video
from qvl.prompt.sampling import VideoSampling
from qvl.prompt.video import frames_video, load_video
from qvl.prompt.visual import Visual

Opener = Callable[[Any], Any]
"""From a part's source to what a decoder reads: a path, bytes, a data URI, a raster or an open file, which is closed after use."""


def as_it_is(source: Any) -> Any:
    return source


@dataclass(frozen=True, kw_only=True)
class MediaItem:
    """One image, video or page of a PDF, as the network gets it."""

    kind: Literal["image", "video", "page"]
    name: str
    """The path, address or beginning of the data URI that it came from; empty for what has no name."""
    visual: Visual
    budget: ImageBudget | VideoSampling
    """What held for it: the loader's own, or the part's wishes."""
    page: int | None = None
    """Which of a document's pages that were asked for, from 1."""
    raster: Tensor | None = field(default=None, repr=False)
    """An image at its own size, uint8 (3, height, width), where the loader keeps it."""

    @property
    def part(self) -> Image | Video:
        """What stands in the message in the source's place."""
        return Video(self.visual) if self.kind == "video" else Image(self.visual)

    @property
    def grid_thw(self) -> list[int]:
        """In patches, of the whole item, as Hugging Face counts."""
        return [len(self.visual.grid_I3), *self.visual.grid_I3[0, 1:].tolist()]

    def without_patches(self) -> "MediaItem":
        """What it is, for a reply; the patches go on in a sample, and are held once."""
        patch_PX = self.visual.patch_PX
        return replace(
            self, raster=None, visual=replace(self.visual, patch_PX=patch_PX.new_empty(0, patch_PX.shape[1]))
        )


class MediaFault(ValueError):
    """A media file that cannot be shown; its sentence begins with the file's name. `__cause__` is the bare error."""

    def __init__(self, error: ValueError, name: str, message: int = 0, part: int = 0) -> None:
        super().__init__(f"{name}: {error}" if name and name not in str(error) else str(error))
        self.error, self.name = error, name
        self.message, self.part = message, part
        """Numbers of the message and of the part in it."""


@dataclass(frozen=True, kw_only=True)
class MediaLoader:
    """Media files to patches. What differs from place to place is how a source is opened and where it is decoded."""

    images: ImageBudget | None = field(default_factory=ImageBudget)
    """None: this model folder does not say how large images may be, so none can be loaded."""
    videos: VideoSampling | None = field(default_factory=VideoSampling)
    decoder: Decoder | None = None
    """None: in this process, for files you trust; a WorkerPool for any other."""
    open: Opener = as_it_is
    frames_seconds: float | None = None
    """How long reading the frames of one list may take."""
    keeps_raster: bool = False
    folder: str = "the model folder"
    """Named where it lacks the budgets."""

    def load_all(
        self, messages: Sequence[Message], *, max_tokens: int | None = None, check: Callable[[], None] = lambda: None
    ) -> tuple[list[Message], list[MediaItem]]:
        """The messages with every media file loaded (a document is an image for each page), and the items in order. What is a Visual
        already stays.

        `max_tokens`: of all together. `check` is called after each item and may raise. Raises MediaFault.
        """
        shown: list[Message] = []
        items: list[MediaItem] = []
        left = max_tokens
        for i, message in enumerate(messages):
            content: list[ContentPart] = []
            first = len(items)
            for j, part in enumerate(message.content):
                if not isinstance(part, MEDIA) or isinstance(part.source, Visual):
                    content.append(part)
                    continue
                try:
                    for item in self.load(part, max_tokens=left):
                        if left is not None:
                            left -= item.visual.num_tokens
                            _check_room(left, max_tokens)
                        check()
                        items.append(item)
                        content.append(item.part)
                except ValueError as error:
                    bare = error.error if isinstance(error, MediaFault) else error
                    raise MediaFault(bare, name_of(part.source), i, j) from bare
            shown.append(message.with_content(content) if len(items) > first else message)
        return shown, items

    def load(self, part: Image | Video | Document, *, max_tokens: int | None = None) -> Iterator[MediaItem]:
        """One item; of a document one for each page, as it is rendered. A video of more than `max_tokens` is refused undecoded."""
        name = name_of(part.source)
        try:
            yield from self._loaded(part, name, max_tokens)
        except ValueError as error:
            raise MediaFault(error, name) from error

    def _loaded(self, part: Image | Video | Document, name: str, max_tokens: int | None) -> Iterator[MediaItem]:
        if self.images is None or self.videos is None:
            raise ValueError(
                f"{self.folder} has no preprocessor_config.json, so the size of images is unknown; copy that file from the base model's "
                "folder, or give image_budget."
            )
        with ExitStack() as files:
            if isinstance(part, Image):
                images = image_budget_for(self.images, part.min_tokens, part.max_tokens)
                raster = load_image(self._opened(part.source, files), self.decoder)
                visual, kept = image_patches(raster, images), raster if self.keeps_raster else None
                yield MediaItem(kind="image", name=name, visual=visual, budget=images, raster=kept)
            elif isinstance(part, Document):
                images = image_budget_for(self.images, None, part.max_tokens)
                stream = self._opened(part.source, files)
                for number, visual in enumerate(load_document(stream, part.pages, images, self.decoder), 1):
                    yield MediaItem(kind="page", name=name, visual=visual, budget=images, page=number)
            else:
                videos = video_sampling_for(self.videos, part)
                if isinstance(part.source, tuple):
                    frames = _Frames(part.source, self._opened, self.frames_seconds)
                    files.callback(frames.latest.close)
                    times = {"fps": part.frame_fps, "seconds": part.frame_seconds}
                    visual = frames_video(frames, videos, self.decoder, **times)
                else:
                    stream = self._opened(part.source, files)
                    visual = load_video(stream, videos, self.decoder, most_tokens=max_tokens)
                yield MediaItem(kind="video", name=name, visual=visual, budget=videos)

    def _opened(self, source: Any, files: ExitStack) -> Any:
        opened = self.open(source)
        if opened is not source and hasattr(opened, "close") and hasattr(opened, "read"):
            files.callback(opened.close)
        return opened


class _Frames(Sequence[Any]):
    """The frames of a list, each opened when it is read and closed before the next; one deadline holds for all."""

    def __init__(self, sources: Sequence[Any], open: Callable[[Any, ExitStack], Any], seconds: float | None) -> None:
        self.sources, self.open, self.seconds = sources, open, seconds
        self.deadline = None if seconds is None else time.monotonic() + seconds
        self.latest = ExitStack()

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, number: Any) -> Any:
        self.latest.close()
        source = self.sources[int(number)]  # IndexError ends the loop
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise MediaError(
                f"reading the frames took longer than {self.seconds:g} seconds; send a video, or fewer frames."
            )
        return self.open(source, self.latest)


def image_budget_for(budget: ImageBudget, min_tokens: int | None, max_tokens: int | None) -> ImageBudget:
    """The budget with one image's own limits; a ceiling below the floor lowers the floor."""
    high = budget.max_tokens if max_tokens is None else max_tokens
    low = min(budget.min_tokens, high) if min_tokens is None else min_tokens
    return ImageBudget(min_tokens=low, max_tokens=max(high, low) if max_tokens is None else high)


def video_sampling_for(sampling: VideoSampling, part: Video) -> VideoSampling:
    """The sampling with one video's own wishes."""
    if part.sample_fps is not None:
        sampling = replace(sampling, fps=part.sample_fps, num_frames=None)
    if part.num_frames is not None:
        sampling = replace(sampling, fps=None, num_frames=part.num_frames)
    if part.max_tokens is not None:
        low = min(sampling.min_tokens, part.max_tokens)
        sampling = replace(sampling, max_tokens=part.max_tokens, min_tokens=low)
    return sampling


def name_of(source: Any) -> str:
    """How people know a source: its path or address; empty for bytes and rasters."""
    if not isinstance(source, str | Path):
        return ""
    name = str(source)
    return name if len(name) <= 200 else name[:60] + "..."  # a data URI


def _check_room(left: int, most: int | None) -> None:
    if left < 0:
        raise ValueError(
            f"with this one the media have more than the {most:,} tokens that fit; send fewer or smaller ones."
        )
