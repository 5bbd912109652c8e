"""The table of decoding jobs, the same for a worker process and for a trusted caller's own process."""

from collections.abc import Callable, Generator, Iterator
from typing import Any, BinaryIO

from qvl.outside.decode_image import image
from qvl.outside.decode_pdf import pdf_facts, pdf_pages
from qvl.outside.decode_video import video_facts, video_frames
from qvl.outside.media import MediaLimits, Message

Job = Callable[..., Iterator[Message]]

JOBS: dict[str, Job] = {
    "image": image,
    "video_facts": video_facts,
    "video_frames": video_frames,
    "pdf_facts": pdf_facts,
    "pdf_pages": pdf_pages,
}


def run_job(
    jobs: dict[str, Job], name: str, stream: BinaryIO, limits: MediaLimits, options: dict[str, Any]
) -> Generator[Message]:
    """The messages of a job on a file, from its start."""
    if name not in jobs:
        raise ValueError(f"there is no decoding job {name!r}; there are {', '.join(sorted(jobs))}.")
    stream.seek(0)
    yield from jobs[name](stream, limits, **options)
