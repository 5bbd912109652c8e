"""Small shards for tests: questions on pictures, clips and text documents, with a tokenizer of bytes."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from media_files import encoded, gradient, numbered_frame, write_video
from qvl.data.index import build_index
from qvl.data.mixture import Mixture, mixture_from_dict
from qvl.data.record import Medium, Record, record_from_dict
from qvl.data.shard import ShardWriter
from qvl.model.config import ModelConfig, preset
from qvl.prompt.budget import ImageBudget
from qvl.prompt.processor import Processor
from qvl.prompt.sampling import VideoSampling
from real_tokenizer import write_small_tokenizer

IMAGES = ImageBudget(min_tokens=4, max_tokens=64)
VIDEOS = VideoSampling(fps=1.0, min_tokens=4, max_tokens=64)


def processor(folder: Path, **changes: Any) -> Processor:
    """Ids 0-255 are bytes, 256-281 the control tokens."""
    options = {"template": "instruct", "image_budget": IMAGES, "video_sampling": VIDEOS} | changes
    return Processor.from_folder(write_small_tokenizer(folder), **options)


def model_config(with_processor: Processor) -> ModelConfig:
    nano, tokenizer = preset("nano"), with_processor.tokenizer
    ids = {
        f"{name}_token_id": tokenizer.control_id(f"<|{control}|>")
        for name, control in {
            "image": "image_pad",
            "video": "video_pad",
            "vision_start": "vision_start",
            "vision_end": "vision_end",
        }.items()
    }
    return replace(nano, **ids)


def document(id: str, text: str, **more: Any) -> Record:
    data = {"id": id, "kind": "pretrain", "messages": [{"role": "document", "content": text}], **more}
    return record_from_dict(data)


def picture(number: int, height: int = 64, width: int = 96) -> bytes:
    pixels = gradient(height, width)
    pixels[:, :, 2] = number * 37 % 256
    return encoded(pixels, "PNG")


def chat(id: str, question: str, answer: str, *, height: int = 64, width: int = 96) -> Record:
    """A question on one picture, 0.png."""
    return record_from_dict(
        {
            "id": id,
            "kind": "sft",
            "category": "vqa",
            "license": "CC0-1.0",
            "media": {"0.png": {"w": width, "h": height}},
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "0.png"}, {"type": "text", "text": question}]},
                {"role": "assistant", "content": answer},
            ],
        }
    )


def clip(frames: int = 8, fps: int = 4) -> bytes:
    file = io.BytesIO()
    write_video(file, (numbered_frame(i) for i in range(frames)), fps=str(fps), format="mp4")
    return file.getvalue()


def film(id: str, frames: int = 8, fps: float = 4.0, **block: Any) -> Record:
    medium = Medium(w=96, h=64, num_frames=frames, fps=fps, duration=frames / fps)
    return record_from_dict(
        {
            "id": id,
            "kind": "sft",
            "category": "video",
            "media": {"0.mp4": {k: v for k, v in vars(medium).items() if v is not None}},
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "video", "video": "0.mp4", **block}, {"type": "text", "text": "?"}],
                },
                {"role": "assistant", "content": "bars"},
            ],
        }
    )


def write_shards(
    folder: Path, entries: list[tuple[Record, dict[str, bytes]]], with_processor: Processor, **options: Any
) -> list[Path]:
    """Shards with their indexes."""
    with ShardWriter(folder, **options) as writer:
        for record, media in entries:
            writer.write(record, media)
    for path in writer.paths:
        build_index(str(path), with_processor)
    return writer.paths


def chats(count: int, *, name: str = "chat") -> list[tuple[Record, dict[str, bytes]]]:
    rng = np.random.default_rng(len(name))
    entries = []
    for i in range(count):
        height, width = (int(side) * 32 for side in rng.integers(1, 5, 2))
        record = chat(
            f"{name}-{i}",
            "what? " * int(rng.integers(1, 9)),
            "it " * int(rng.integers(1, 12)),
            height=height,
            width=width,
        )
        entries.append((record, {"0.png": picture(i, height, width)}))
    return entries


def texts(count: int, *, name: str = "text", longest: int = 200) -> list[tuple[Record, dict[str, bytes]]]:
    rng = np.random.default_rng(count)
    return [(document(f"{name}-{i}", f"{i} " + "word " * int(rng.integers(1, longest // 5))), {}) for i in range(count)]


def mixture(*paths: Path, **more: Any) -> Mixture:
    return mixture_from_dict({"sources": [{"path": str(path)} for path in paths], **more})
