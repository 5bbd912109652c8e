"""A tiny vision pre-stage for test_contrastive; run by torchrun, it trains on this rank's share of fixed pictures."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qvl.model.qwen3vl import Qwen3VL, new_model
from qvl.model.siglip_text import TextTowerConfig, fixed_length
from qvl.parallel.data_parallel import join_world, leave_world
from qvl.train.contrastive import V0_RATES, CaptionPack, Contrastive, new_contrastive, picture_batch
from qvl.train.loop import LoopConfig, fit
from qvl.train.optimizer import OptimizerConfig
from test_train import small

LENGTH = 6


def text_config(width: int = 32) -> TextTowerConfig:
    return TextTowerConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_layers=1,
        num_heads=2,
        projection_size=width,
        max_length=LENGTH,
    )


def tiny(dtype: torch.dtype = torch.float32) -> Contrastive:
    return new_contrastive(model(dtype), text_config())


def model(dtype: torch.dtype = torch.float32) -> Qwen3VL:
    config = small()
    assert config.vision is not None
    vision = replace(config.vision, pos_embed_init="sincos", initializer_range=0.1)
    return new_model(replace(config, vision=vision), dtype=dtype)


Picture = tuple[Tensor, Tensor]


def drawn_pictures(count: int, seed: int) -> list[Picture]:
    """Noise of different sizes: 2x2, 2x4, 4x4 patches in turn."""
    g = torch.Generator().manual_seed(seed)
    grids = [((2, 2), (2, 4), (4, 4))[i % 3] for i in range(count)]
    return [(torch.randn(h * w, 1536, generator=g) * 0.5, torch.tensor([[1, h, w]])) for h, w in grids]


def captioned(pictures: Sequence[Picture], words: Sequence[int]) -> CaptionPack:
    """Picture i with a caption of two tokens that follow from `words[i]`."""
    return CaptionPack(
        batch=picture_batch(pictures),
        ids=tuple(f"p{i}" for i in range(len(pictures))),
        categories=tuple("ab"[i % 2] for i in range(len(pictures))),
        caption_ST=captions(words),
        caption_id_S=torch.tensor(words),
    )


def captions(words: Sequence[int]) -> Tensor:
    return fixed_length([[2 + word, 20 + word] for word in words], length=LENGTH, eos_id=1, pad_id=0)


class Share:
    """Six pictures a step; a lone rank sees all of them; of two ranks the first sees four and the second two."""

    def __init__(self, rank: int, size: int) -> None:
        self.rows = slice(0, 6) if size == 1 else (slice(0, 4), slice(4, 6))[rank]
        self.step = 0

    def next_step(self) -> Sequence[CaptionPack]:
        self.step += 1
        # Captions 1 and 5 are equal and lie on different ranks.
        return [captioned(drawn_pictures(6, seed=self.step)[self.rows], [0, 1, 2, 3, 4, 1][self.rows])]

    def state(self) -> dict[str, Any]:
        return {"step": self.step}

    def restore(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def main(out: Path) -> None:
    torch.set_num_threads(1)
    world = join_world(torch.device("cpu"))
    config = LoopConfig(steps=3, optimizer=OptimizerConfig(lr=1e-3, rates=V0_RATES))
    fit(tiny(), Share(world.rank, world.size), config, out, world)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave_world()
