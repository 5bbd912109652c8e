"""A complete tiny model folder for tests of commands: random weights, the real tokenizer, small budgets for media."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qvl.model.config import ModelConfig, RopeConfig, preset
from qvl.model.qwen3vl import new_model
from qvl.model.weights import save
from qvl.prompt.budget import ImageBudget
from qvl.prompt.processor import Processor
from qvl.prompt.template import Style
from qvl.prompt.tokenizer import Tokenizer
from real_tokenizer import real_tokenizer, real_tokenizer_folder


def tiny_config() -> ModelConfig:
    nano = preset("nano")
    assert nano.vision is not None
    text = replace(
        nano.text,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        head_dim=16,
        rope=RopeConfig(theta=5_000_000.0, scheme="interleaved", section=(4, 2, 2)),
        # wide enough that the answers of random weights are no ties
        initializer_range=0.3,
    )
    vision = replace(
        nano.vision, hidden_size=48, intermediate_size=96, out_hidden_size=32, initializer_range=0.1, depth=4
    )
    return replace(nano, text=text, vision=vision)


def tiny_checkpoint(folder: Path, style: Style = "instruct") -> Path:
    """Weights in fp32, generation_config.json as published, pictures of 4 to 64 tokens."""
    save(new_model(tiny_config(), seed=3, dtype=torch.float32), folder)
    budget = ImageBudget(min_tokens=4, max_tokens=64)
    Processor.from_folder(real_tokenizer_folder(), template=style, image_budget=budget).save(folder)
    return folder


def read_tokenizer_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """All tiny folders have one tokenizer; reading it takes most of a command's second."""
    tokenizer = real_tokenizer()
    monkeypatch.setattr(Tokenizer, "from_folder", classmethod(lambda cls, folder: tokenizer))
