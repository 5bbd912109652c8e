"""SigLIP and SigLIP-2 vision checkpoints, read into our tower: the eyes that pretraining starts from (report 2)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qvl.core.config import read_object
from qvl.model.config import VisionConfig
from qvl.model.vision import Vision
from qvl.model.weights import Source


@dataclass(frozen=True, kw_only=True)
class Tower:
    """A SigLIP or SigLIP-2 vision checkpoint, alone or with its text half, in either of Hugging Face's two forms."""

    source: Source
    prefix: str
    """What stands before "embeddings." in its tensor names."""
    depth: int
    width: int
    inner: int
    num_heads: int

    @classmethod
    def open(cls, folder: Path | str) -> "Tower":
        folder = Path(folder)
        raw = _vision_object(folder)
        source = Source(folder)
        prefix = "vision_model." if "vision_model.embeddings.patch_embedding.weight" in source.home else ""
        if f"{prefix}embeddings.patch_embedding.weight" not in source.home:
            raise ValueError(
                f"{folder} lacks embeddings.patch_embedding.weight; expected a SigLIP or SigLIP-2 vision checkpoint."
            )
        stem = f"{prefix}encoder.layers."
        layers = {name.removeprefix(stem).split(".")[0] for name in source.home if name.startswith(stem)}
        if layers != {str(i) for i in range(len(layers))}:
            raise ValueError(
                f"{folder} holds vision layers {sorted(layers)}; expected them counted from 0 without a gap."
            )
        inner, width = source.get(f"{stem}0.mlp.fc1.weight").shape
        # Published files leave out what equals the class default, which is 12 heads in both forms.
        return cls(
            source=source,
            prefix=prefix,
            depth=len(layers),
            width=width,
            inner=inner,
            num_heads=raw.get("num_attention_heads", 12),
        )

    def get(self, name: str) -> Tensor:
        if self.prefix + name not in self.source.home:
            raise ValueError(
                f"{self.source.folder} lacks {self.prefix + name}; expected a SigLIP or SigLIP-2 vision checkpoint."
            )
        return self.source.get(self.prefix + name)


def _vision_object(folder: Path) -> dict[str, Any]:
    """The vision part of config.json, refused where Qwen3-VL's tower would compute something else."""
    path = folder / "config.json"
    raw = read_object(path, "a SigLIP folder's config.json")
    kind = raw.get("model_type")
    if kind not in ("siglip", "siglip2", "siglip_vision_model", "siglip2_vision_model"):
        raise ValueError(
            f"{path} says model_type {kind!r}; the tower starts from siglip, siglip2 or their vision models."
        )
    vision = raw if kind.endswith("_vision_model") else raw.get("vision_config")
    if not isinstance(vision, dict):
        raise ValueError(f"{path} lacks the object 'vision_config'.")
    for field, value in (("hidden_act", "gelu_pytorch_tanh"), ("layer_norm_eps", 1e-6), ("num_channels", 3)):
        if vision.get(field, value) != value:
            raise ValueError(f"{path} has {field} = {vision[field]!r}; Qwen3-VL's tower has {value!r}.")
    return vision


def fill_tower(visual: Vision, tower: Tower) -> None:
    """Embeddings and blocks, in place. The attention-pooling head is left behind: mergers read every patch, not one pooled vector.

    SigLIP ends in a LayerNorm, Qwen3-VL's tower does not, but its merger begins with one of the same width: that one takes its values.
    """
    _copy(visual.patch_embed.proj.weight, lift_patches(tower.get("embeddings.patch_embedding.weight"), visual.config))
    _copy(visual.patch_embed.proj.bias, tower.get("embeddings.patch_embedding.bias"))
    table = tower.get("embeddings.position_embedding.weight")
    _copy(visual.pos_embed.weight, resize_table(table, visual.config.grid_side))
    for index, block in enumerate(visual.blocks):
        stem = f"encoder.layers.{index}"
        for kind in ("weight", "bias"):
            parts = [tower.get(f"{stem}.self_attn.{part}_proj.{kind}") for part in "qkv"]
            _copy(block.get_parameter(f"attn.qkv.{kind}"), torch.cat(parts))
            for ours, theirs in (
                ("attn.proj", "self_attn.out_proj"),
                ("norm1", "layer_norm1"),
                ("norm2", "layer_norm2"),
                ("mlp.linear_fc1", "mlp.fc1"),
                ("mlp.linear_fc2", "mlp.fc2"),
            ):
                _copy(block.get_parameter(f"{ours}.{kind}"), tower.get(f"{stem}.{theirs}.{kind}"))
    for kind in ("weight", "bias"):
        _copy(visual.merger.norm.get_parameter(kind), tower.get(f"post_layernorm.{kind}"))


def _copy(parameter: Tensor, value: Tensor) -> None:
    if parameter.shape != value.shape:
        raise ValueError(
            f"a vision tensor of shape {tuple(value.shape)} came where {tuple(parameter.shape)} was expected."
        )
    parameter.copy_(value)


def lift_patches(kernel: Tensor, config: VisionConfig) -> Tensor:
    """A one-frame patch embedding as (C, X) for patches of two frames, half of it on each.

    A still image is shown twice, so the halves add up to what the one frame gave; a video gets the mean of its two frames. `kernel` is
    SigLIP's Conv2d (width, channel, row, column) or SigLIP-2's Linear over (row, column, channel).
    """
    side, channels, frames = config.patch_size, config.in_channels, config.temporal_patch_size
    if kernel.numel() != kernel.shape[0] * channels * side**2:
        raise ValueError(
            f"the patch embedding has shape {tuple(kernel.shape)}; Qwen3-VL's patches are {side}x{side} with {channels} channels, so take "
            f"a patch{side} checkpoint."
        )
    if kernel.ndim == 2:
        kernel = kernel.unflatten(1, (side, side, channels)).permute(0, 3, 1, 2)
    lifted = kernel.unsqueeze(2).expand(-1, -1, frames, -1, -1) / frames
    return lifted.flatten(1)


def resize_table(table: Tensor, side: int) -> Tensor:
    """A square position table (n * n, width) as (side * side, width), such that a picture of n x n patches still reads the old numbers.

    The network reads its table bilinearly with aligned corners (`vision.interpolate_table`), so the table is stretched with aligned corners
    too; SigLIP-2's own half-pixel convention would move every reading by up to a third of a patch. Bicubic, without antialiasing (nothing
    is thrown away when a table grows), misses the old numbers by 0.6% on a smooth 16 x 16 table and by 8% on white noise. The rest is
    removed exactly, by the least change of the table that does so.
    """
    old = round(table.shape[0] ** 0.5)
    if old**2 != table.shape[0]:
        raise ValueError(f"the position table has {table.shape[0]} rows, which is not a square.")
    if old == side:
        return table
    square = table.double().unflatten(0, (old, old)).movedim(-1, 0)
    stretched = F.interpolate(square[None], size=(side, side), mode="bicubic", align_corners=True)[0]
    if 1 < old < side:
        reading = _reading(old, side)
        back = torch.linalg.pinv(reading)
        stretched = stretched + back @ (square - reading @ stretched @ reading.T) @ back.T
    return stretched.movedim(0, -1).flatten(0, 1).to(table.dtype)


def _reading(count: int, side: int) -> Tensor:
    """(count, side): how `count` patches in a row read a row of the table."""
    at = torch.arange(count, dtype=torch.float64) * (side - 1) / (count - 1)
    return (1 - (at[:, None] - torch.arange(side)).abs()).clamp(min=0)
