"""What one request may ask for. Everything a client can enlarge has a ceiling here."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The defaults suit a server that strangers reach. What goes past one is refused before any work is done for it."""

    max_body_bytes: int = 64 * 1024**2
    """Of a request; pictures travel in it as base64."""
    body_seconds: float = 60.0
    """Until the whole request must be here (a slow sender holds a connection, never a place in the queue)."""
    max_held_bytes: int = 512 * 1024**2
    """Of all requests that arrive or are worked on; past it a new one is asked to come again."""
    max_values: int = 2**16
    """Items of the request's lists and objects, in all: what is cheap to send and dear to read."""
    max_messages: int = 512
    max_parts: int = 1024
    """Words and media of the whole conversation."""
    max_media: int = 128
    """Pictures, videos and PDFs of the whole conversation."""
    max_text: int = 4 * 1024**2
    """Characters of the whole conversation."""
    max_logprobs: int = 2**20
    """Entries one reply may hold: answers x tokens x (1 + top_logprobs)."""
    max_answers: int = 16
    """n (CVE-2026-34756: 16,384 of them in one request)."""
    max_stop: int = 16
    max_stop_length: int = 256
    max_logit_bias: int = 1024
    max_tools: int = 128
    max_schema_bytes: int = 64 * 1024
    """Of response_format's schema, and of all tools together."""
    max_schema_depth: int = 32
    max_medium_bytes: int = 256 * 1024**2
    """One medium that is fetched or read from an allowed folder."""
    max_worker_bytes: int = 768 * 1024**2
    """Memory of a process that decodes media."""
    max_frames: int = 2048
    """Frames of one video (CVE-2026-105758: a request's own num_frames without a ceiling)."""
    max_image_tokens: int = 16384
    max_video_tokens: int = 224 * 1024
    max_pages: int = 200
    """Of one PDF."""
    max_patch_bytes: int = 4 * 1024**3
    """Patches of all requests that wait or run; past it a new request is asked to come again."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name} is {value}; a limit must be above zero.")
