"""Answering beside transformers: preprocessing of pictures and video, decoding alone and in company."""

from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from bench.network import same_in_transformers, text_inputs
from bench.rows import Row, copy_rate, measured
from qvl.core.batch import Sample
from qvl.engine.generate import generate
from qvl.engine.prepare import prepare
from qvl.engine.sampling import Sampling
from qvl.model.config import ModelConfig, preset
from qvl.model.qwen3vl import Qwen3VL, new_model
from qvl.prompt.image import image_patches
from qvl.prompt.sampling import VideoMeta, VideoSampling
from qvl.prompt.video import video_patches

NEW_TOKENS = 32
COMMON: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "patch_size": 16}


def rows(rounds: int = 7, device: str = "cpu", size: str = "0.2B") -> list[Row]:
    rate = copy_rate()
    sizes = ((1024, 1024), (480, 640), (1080, 1920))
    pictures = [image_row(size, rounds, rate, as_floats=floats) for size in sizes for floats in (False, True)]
    pictures.append(video_row(rounds, rate))
    ours = new_model(preset(size), dtype=torch.bfloat16, device=device)
    theirs = same_in_transformers(ours)
    prepare(ours)
    theirs.to(torch.device(device))  # type: ignore[arg-type]
    return pictures + [decode_row(ours, theirs, batch, rounds, rate, size) for batch in (1, 8)]


def image_row(shape: tuple[int, int], rounds: int, rate: float, *, as_floats: bool) -> Row:
    """Raster in, patches out, as each network takes them: transformers' floats, our bytes (our network makes the floats itself, which
    `as_floats` counts here)."""
    height, width = shape
    raster = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, height, width), dtype=np.uint8))
    processor = Qwen2VLImageProcessor(size={"shortest_edge": 65536, "longest_edge": 16_777_216}, **COMMON)
    theirs = partial(processor, images=raster, return_tensors="pt", device="cpu")
    visual = image_patches(raster)
    assert torch.equal(visual.values_PX, theirs()["pixel_values"]), "the two make different pixels"
    return _row(
        f"preprocess {width}x{height} image" + (", to floats" if as_floats else ""),
        (lambda: image_patches(raster).values_PX) if as_floats else (lambda: image_patches(raster)),
        theirs,
        peer="fast image processor",
        floor=(raster.numel() + visual.patch_PX.numel() * (4 if as_floats else 1), rate),
        shape=f"uint8 raster to {'fp32' if as_floats else 'uint8'} patches",
        rounds=rounds * 5,
    )


def video_row(rounds: int, rate: float) -> Row:
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (16, 3, 448, 448), dtype=np.uint8))
    meta = VideoMeta(num_frames=16, fps=2.0)
    processor = Qwen3VLVideoProcessor(size={"shortest_edge": 4096, "longest_edge": 25_165_824}, **COMMON)
    theirs = partial(processor, videos=[frames], do_sample_frames=False, return_tensors="pt", device="cpu")

    def ours() -> Tensor:
        return video_patches(frames, meta, VideoSampling(), indices=range(16)).values_PX

    patches = ours()
    assert torch.equal(patches, theirs()["pixel_values_videos"]), "the two make different pixels"
    return _row(
        "preprocess 16 frames of 448x448",
        ours,
        theirs,
        peer="video processor",
        floor=(frames.numel() + patches.numel() * 4, rate),
        shape="uint8 rasters to fp32 patches",
        rounds=rounds * 3,
    )


def decode_row(
    ours: Qwen3VL, theirs: transformers.PreTrainedModel, batch: int, rounds: int, rate: float, size: str
) -> Row:
    """Greedy, prompt of 128 tokens each, seconds for all 32 steps and the prefill before them."""
    inputs = text_inputs(128, ours.device)
    samples = [Sample(token_T=inputs["input_ids"][0].cpu())] * batch
    ids = inputs["input_ids"].repeat(batch, 1)
    greedy = Sampling(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "pad_token_id": 0}

    def run_theirs() -> None:
        with torch.inference_mode():
            theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)  # type: ignore[operator]

    return _row(
        f"decode {NEW_TOKENS} tokens, batch {batch}",
        lambda: generate(ours, samples, greedy),
        run_theirs,
        peer="generate, sdpa, bf16",
        floor=(NEW_TOKENS * step_bytes(ours.config, batch, 128 + NEW_TOKENS // 2), rate),
        shape=f"{size}, bf16, context 128-{128 + NEW_TOKENS}",
        rounds=rounds,
    )


def step_bytes(config: ModelConfig, batch: int, context: int) -> int:
    """What one decoding step must read: every decoder and head weight once, and the cache of every sequence (bf16)."""
    text = config.text
    heads, kv = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    layer = text.hidden_size * (2 * heads + 2 * kv) + 3 * text.hidden_size * text.intermediate_size
    weights = text.num_hidden_layers * layer + text.vocab_size * text.hidden_size
    return 2 * (weights + text.num_hidden_layers * 2 * kv * batch * context)


def _row(metric: str, ours, theirs, *, peer: str, floor: tuple[int, float], shape: str, rounds: int) -> Row:
    num_bytes, rate = floor
    return measured(
        ours,
        theirs,
        suite="answer",
        metric=metric,
        peer=f"transformers {transformers.__version__}, {peer}",
        limit=(num_bytes / rate, f"{num_bytes / 1e6:.0f} MB at {rate / 1e9:.0f} GB/s"),
        shape=shape,
        rounds=rounds,
    )
