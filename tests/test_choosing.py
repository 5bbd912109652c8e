"""docs/choosing.md: its table of sizes is what the presets say."""

from pathlib import Path

import pytest
import torch

from qvl.engine.kv_cache import bytes_per_block
from qvl.model.config import preset
from qvl.model.qwen3vl import empty_model

PAGE = (Path(__file__).parent.parent / "docs" / "choosing.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["2B", "4B", "8B", "32B", "30B-A3B", "235B-A22B"])
def test_sizes_are_those_of_the_presets(name: str) -> None:
    config = preset(name)
    count = sum(p.numel() for p in empty_model(config, dtype=torch.bfloat16, device="meta").parameters())
    token = bytes_per_block(config.text, 1, torch.bfloat16)
    [row] = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith(f"| {name} |")]
    gib = [f"{length * 1024 * token / 2**30:.2g} GiB" for length in (32, 256)]
    assert row == [name, f"{count / 1e9:.1f} B, {2 * count / 1e9:.1f} GB", row[2], f"{token // 1024} KiB", *gib]
