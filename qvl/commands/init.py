"""Joins a Qwen3 text checkpoint and a SigLIP-2 vision checkpoint into a folder that pretraining starts from."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from qvl.model.config import ModelConfig, preset
from qvl.model.start import start, start_config
from qvl.model.weights import Layout, save
from qvl.outside.hub import resolve
from qvl.prompt.budget import ImageBudget
from qvl.prompt.folder import IMAGE_CONFIG, IMAGE_FILE, VIDEO_CONFIG, VIDEO_FILE, image_config, video_config
from qvl.prompt.sampling import VideoSampling
from qvl.prompt.template import jinja_template


@dataclass(frozen=True, kw_only=True)
class Init:
    """Writes a Hugging Face folder: text and vision weights as they came, the mergers between them freshly drawn."""

    text: str
    """A text-only Qwen3, dense or MoE: a folder or a hub name."""
    vision: str
    """A SigLIP-2 (or SigLIP) vision checkpoint with 16x16 patches: a folder or a hub name."""
    out: Path
    """The folder to write. It must not exist, or be empty."""
    like: str | None = None
    """A published size (2B, 4B, 8B, 32B, 30B-A3B, 235B-A22B) whose rotary base and length to take; the text checkpoint's own otherwise."""
    grid_side: int = 48
    """Side of the position table."""
    deepstack: tuple[int, ...] | None = None
    """Vision blocks, counted from 0, whose output the first decoder layers see; spread as published otherwise."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What the weights are written as."""
    seed: int = 0
    """Of the mergers' draw."""
    layout: Layout = "hub"
    """How expert weights lie in the file: as in the published repositories, or as transformers 5 writes them."""


def run(args: Init) -> int:
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ValueError(f"{args.out} exists already; name a new folder.")
    text, vision = resolve(args.text), resolve(args.vision)
    config = start_config(text, vision, grid_side=args.grid_side, deepstack=args.deepstack)
    if args.like:
        config = as_published(config, preset(args.like))
    model = start(text, vision, config=config, dtype=getattr(torch, args.dtype), seed=args.seed)
    save(model, args.out, layout=args.layout, companions=text)
    write_processors(args.out)
    count = sum(p.numel() for p in model.parameters())
    fresh = sum(p.numel() for name, p in model.named_parameters() if "merger" in name)
    levels = ", ".join(map(str, config.vision.deepstack_visual_indexes)) if config.vision else ""
    print(
        f"{args.out}: {count:,} parameters, {fresh:,} of them in mergers to be trained; DeepStack after blocks {levels}"
    )
    return 0


def as_published(config: ModelConfig, published: ModelConfig) -> ModelConfig:
    """The config with the rotary base, axes and length of a published size; `start` checks that it is of that size otherwise."""
    rope, length = published.text.rope, published.text.max_position_embeddings
    return replace(config, text=replace(config.text, rope=rope, max_position_embeddings=length))


def write_processors(folder: Path) -> None:
    """What a text checkpoint has not: how pictures and videos become patches, and a chat template that knows them."""
    for name, content in (
        (IMAGE_FILE, IMAGE_CONFIG | image_config(ImageBudget())),
        (VIDEO_FILE, VIDEO_CONFIG | video_config(VideoSampling())),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(jinja_template("instruct"), encoding="utf-8")
    # The text model's own template would win over the file in some readers, and drops pictures.
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.is_file():
        raw = json.loads(tokenizer.read_text(encoding="utf-8"))
        raw.pop("chat_template", None)
        tokenizer.write_text(json.dumps(raw, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
