"""SigLIP's pooling head: one learned query looks at all patches of a frame and gives the frame's vector."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qvl.model.attention import equal_runs
from qvl.model.siglip import Tower
from qvl.model.siglip_text import SiglipMLP, draw


class AttentionPool(nn.Module):
    """Probe, multi-head attention, and an MLP with a LayerNorm before it. Module names are the checkpoint's."""

    def __init__(self, width: int, inner: int, num_heads: int) -> None:
        super().__init__()
        # One axis (the file has three), so that it counts as a vector: no weight decay, no Muon.
        self.probe = nn.Parameter(torch.empty(width))
        self.attention = ProbeAttention(width, num_heads)
        self.layernorm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = SiglipMLP(width, inner)

    def forward(self, x_PC: Tensor, frame_lengths: tuple[int, ...]) -> Tensor:
        """Normed patches of all frames, end to end, to one vector a frame (I, C); a frame of a video is an image here."""
        x_IC = self.attention(self.probe, x_PC, frame_lengths)
        return x_IC + self.mlp(self.layernorm(x_IC))


class ProbeAttention(nn.Module):
    """torch's MultiheadAttention for one query that all frames share."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, probe_C: Tensor, x_PC: Tensor, frame_lengths: tuple[int, ...]) -> Tensor:
        width = probe_C.shape[0]
        q_C = F.linear(probe_C, self.in_proj_weight[:width], self.in_proj_bias[:width])
        kv = F.linear(x_PC, self.in_proj_weight[width:], self.in_proj_bias[width:])
        k_PNH, v_PNH = kv.unflatten(-1, (2, self.num_heads, -1)).unbind(1)
        query = q_C.view(1, self.num_heads, 1, -1)
        outs = []
        # One call for each run of frames of equal size: no padding, and no scatter, whose sums would vary from run to run on a GPU.
        for start, count, length in equal_runs(frame_lengths):
            k, v = (
                x.narrow(0, start, count * length).unflatten(0, (count, length)).transpose(1, 2) for x in (k_PNH, v_PNH)
            )
            out = F.scaled_dot_product_attention(query.expand(count, -1, -1, -1), k, v)
            outs.append(out.flatten(1))
        return self.out_proj(torch.cat(outs))


def new_pool(width: int, inner: int, num_heads: int, *, seed: int = 0) -> AttentionPool:
    """Freshly drawn, fp32, on the CPU."""
    pool = _empty(width, inner, num_heads, torch.float32)
    draw(pool, seed=seed)
    return pool


def load_pool(folder: Path | str, *, dtype: torch.dtype = torch.float32) -> AttentionPool:
    """The head of a SigLIP or SigLIP-2 checkpoint. Raises ValueError where the folder has none."""
    tower = Tower.open(folder)
    pool = _empty(tower.width, tower.inner, tower.num_heads, dtype)
    with torch.no_grad():
        for name, parameter in pool.named_parameters():
            value = tower.get(f"head.{name}")
            if value.numel() != parameter.numel():
                raise ValueError(
                    f"{folder} has head.{name} of shape {tuple(value.shape)} where {tuple(parameter.shape)} was expected."
                )
            parameter.copy_(value.view_as(parameter))
    return pool.eval()


def _empty(width: int, inner: int, num_heads: int, dtype: torch.dtype) -> AttentionPool:
    with torch.device("meta"):
        pool = AttentionPool(width, inner, num_heads).to(dtype)
    return pool.to_empty(device="cpu")
