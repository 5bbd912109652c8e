"""qvl logits: run a checkpoint on tensors in the Hugging Face convention and write the logits."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from qvl.core.device import pick_device, pick_dtype
from qvl.core.files import writing
from qvl.model.padded import batch_from_padded, to_padded
from qvl.model.weights import load, save_tensors
from qvl.outside.hub import resolve


@dataclass(frozen=True, kw_only=True)
class Logits:
    """Reads input_ids, attention_mask, pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw (left or right padded)
    and writes padded `logits` (rows, tokens, vocabulary) in fp32 and `position_ids` (3, rows, tokens); zeros at the padding."""

    model: str
    """Checkpoint folder, or a name on the hub."""
    inputs: Path
    """A safetensors file."""
    out: Path
    """The safetensors file to write."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the weights and activations are held in."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""


def run(args: Logits) -> None:
    try:
        tensors = load_file(args.inputs)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{args.inputs} is not a readable safetensors file: {error}.") from None
    device = pick_device(args.device)
    model = load(resolve(args.model), dtype=pick_dtype(device, args.dtype), device=device)
    batch = batch_from_padded(tensors, model.config)
    with torch.inference_mode():
        logits_TV = model.logits(model(batch.to(device))).float().cpu()
    mask = tensors.get("attention_mask", torch.ones_like(tensors["input_ids"]))
    position_ids = to_padded(batch.position_3T.T, mask).permute(2, 0, 1).contiguous()
    with writing(args.out) as new:
        save_tensors({"logits": to_padded(logits_TV, mask), "position_ids": position_ids}, new)
