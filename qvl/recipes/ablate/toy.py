"""The toy of the ablations: a network of half a million parameters, whose draw does not depend on which parts an arm has."""

import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from qvl.model.config import ModelConfig, RopeConfig, preset
from qvl.model.qwen3vl import Qwen3VL, empty_model
from qvl.model.vision import sincos_table
from qvl.prompt.budget import ImageBudget
from qvl.prompt.folder import Folder
from qvl.prompt.message import Text
from qvl.prompt.processor import Processor
from qvl.prompt.sampling import VideoSampling
from qvl.prompt.tokenizer import Tokenizer
from qvl.recipes.quickstart.vocabulary import for_tokenizer, train_tokenizer
from qvl.worlds.world import World


def toy_processor(worlds: Sequence[World], texts: Sequence[str] = (), *, size: int = 384) -> Processor:
    """A tokenizer of what these worlds and texts say, with Qwen3-VL's template; pictures and clips are never resized."""
    said = [
        part.text
        for world in worlds
        for index in range(120)
        for message in world(0, index).messages
        for part in message.parts
        if isinstance(part, Text)
    ]
    turns = ["user\n", "assistant\n"] * 60
    return Processor(
        tokenizer=train_tokenizer([*texts, *said, *turns], size=size),
        style="instruct",
        folder=Folder(path=Path("toy"), template=None, image_config=None, video_config=None),
        image_budget=ImageBudget(min_tokens=1, max_tokens=1024),
        video_sampling=VideoSampling(fps=1.0, min_tokens=1, max_tokens=8192),
    )


def toy_config(tokenizer: Tokenizer) -> ModelConfig:
    """Qwen3-VL's shape: two DeepStack levels into three decoder layers, sections of the rotary axes as in the quickstart."""
    nano = preset("nano")
    assert nano.vision is not None
    shape = replace(
        nano,
        text=replace(
            nano.text,
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=32,
            rope=RopeConfig(theta=10_000.0, scheme="interleaved", section=(6, 5, 5)),
            max_position_embeddings=32768,
        ),
        vision=replace(
            nano.vision,
            depth=3,
            hidden_size=64,
            num_heads=4,
            intermediate_size=256,
            out_hidden_size=96,
            deepstack_visual_indexes=(0, 1),
            num_position_embeddings=64,
            pos_embed_init="sincos",
        ),
        tie_word_embeddings=False,
    )
    return for_tokenizer(shape, tokenizer)


@torch.no_grad()
def toy_model(config: ModelConfig, *, seed: int) -> Qwen3VL:
    """Each parameter is drawn by its own name and the seed, so that two arms begin equal in all they share.

    The scale of each draw is the quickstart's: fan-in for matrices, token rows of deviation .5, blocks that begin as nothing, QK-norm
    gains of 1.6, a sine-cosine table of positions.
    """
    model = empty_model(config, dtype=torch.float32, device="cpu")
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        if name.endswith((".bias", "o_proj.weight", "down_proj.weight")):
            parameter.zero_()
        elif parameter.ndim == 1:
            parameter.fill_(1.6 if name.endswith(("q_norm.weight", "k_norm.weight")) else 1.0)
        elif name.endswith("pos_embed.weight"):
            assert config.vision is not None
            parameter.copy_(sincos_table(config.vision.grid_side, config.vision.hidden_size) * 0.7)
        else:
            std = 0.5 if "embed_tokens" in name else 0.02 if "lm_head" in name else parameter.shape[1] ** -0.5
            parameter.normal_(0, std, generator=generator)
    return model
