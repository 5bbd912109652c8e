"""Where pretraining starts: Qwen3's text weights, SigLIP-2's vision weights, fresh mergers between them (report 2)."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from qvl.model.config import ModelConfig, TextConfig, VisionConfig, read_config, spread_levels
from qvl.model.merger import Merger
from qvl.model.qwen3vl import Qwen3VL, empty_model
from qvl.model.siglip import Tower, fill_tower
from qvl.model.weights import load

VISUAL_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
"""Config field -> its token. Qwen3's own tokenizer already has all four (ids 151652 to 151656), so no row is added to the embeddings."""


def start(
    text_folder: Path | str,
    vision_folder: Path | str,
    *,
    config: ModelConfig | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Qwen3VL:
    """A model that writes as the text checkpoint and sees as the vision checkpoint, its mergers not yet trained.

    `config` is `start_config` of the two folders, or that with another rotary base or length, position table, DeepStack levels or token
    ids; a published size's `preset` fits too where the folders have its sizes.
    """
    config = config or start_config(text_folder, vision_folder)
    text, tower = load(text_folder, dtype=dtype), Tower.open(vision_folder)
    _check(config, text.config, tower)
    model = empty_model(config, dtype=dtype, device="meta")
    model.language_model.load_state_dict(text.language_model.state_dict(), assign=True)
    if not config.tie_word_embeddings:
        model.lm_head.load_state_dict(text.lm_head.state_dict(), assign=True)
    model.visual.to_empty(device="cpu")
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for merger in (*model.visual.deepstack_merger_list, model.visual.merger):
            assert isinstance(merger, Merger)
            _draw(merger, config.text.initializer_range, generator)
        fill_tower(model.visual, tower)
    model.requires_grad_(True)
    return model.eval()


def start_config(
    text_folder: Path | str,
    vision_folder: Path | str,
    *,
    grid_side: int = 48,
    deepstack: tuple[int, ...] | None = None,
    token_ids: dict[str, int] | None = None,
) -> ModelConfig:
    """The config of the joined model.

    Text sizes, rotary base and length stay the text checkpoint's; its rotary axes become interleaved, split as published (24, 20, 20 of
    64). The tower's sizes are read off its tensors. `deepstack` names the vision blocks whose output the first decoder layers see (see
    `spread_levels`). `token_ids` (fields of VISUAL_TOKENS) are needed only where the text folder's tokenizer lacks the four tokens.
    """
    text = read_config(text_folder)
    if text.vision is not None:
        raise ValueError(f"{text_folder} already holds a Qwen3-VL; a start takes a text-only Qwen3.")
    if text.text.moe and not text.text.moe.norm_topk_prob:
        raise ValueError(
            f"{text_folder} does not renormalise its chosen experts (norm_topk_prob false); Qwen3-VL always does."
        )
    tower = Tower.open(vision_folder)
    across = text.text.head_dim // 2 * 20 // 64
    section = (text.text.head_dim // 2 - 2 * across, across, across)
    return ModelConfig(
        text=replace(text.text, rope=replace(text.text.rope, scheme="interleaved", section=section)),
        vision=VisionConfig(
            depth=tower.depth,
            hidden_size=tower.width,
            num_heads=tower.num_heads,
            intermediate_size=tower.inner,
            out_hidden_size=text.text.hidden_size,
            num_position_embeddings=grid_side**2,
            deepstack_visual_indexes=spread_levels(tower.depth) if deepstack is None else deepstack,
            initializer_range=text.text.initializer_range,
        ),
        tie_word_embeddings=text.tie_word_embeddings,
        **(token_ids or visual_token_ids(text_folder)),
    )


def visual_token_ids(text_folder: Path | str) -> dict[str, int]:
    """The ids of the four visual tokens in a folder's tokenizer.json."""
    path = Path(text_folder) / "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist, so the ids of {', '.join(VISUAL_TOKENS.values())} are unknown; give them."
        )
    try:
        added = {
            token["content"]: int(token["id"]) for token in json.loads(path.read_text(encoding="utf-8"))["added_tokens"]
        }
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not a tokenizer.json with a list of added_tokens.") from None
    missing = [token for token in VISUAL_TOKENS.values() if token not in added]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}; add them to the tokenizer or give the ids of tokens to use instead."
        )
    return {field: added[token] for field, token in VISUAL_TOKENS.items()}


def _check(config: ModelConfig, text: ModelConfig, tower: Tower) -> None:
    """A config may choose what weights do not fix: rotary base and length, table, levels, ids."""

    def fixed(part: TextConfig) -> TextConfig:
        part = replace(part, rope=text.text.rope, max_position_embeddings=0, initializer_range=0.0)
        return replace(part, bos_token_id=None, eos_token_id=None)

    if fixed(config.text) != fixed(text.text) or config.tie_word_embeddings != text.tie_word_embeddings:
        raise ValueError("the config given does not describe the text checkpoint; derive one with start_config.")
    asked = config.vision
    sizes = tower.depth, tower.width, tower.inner, tower.num_heads
    if asked is None or sizes != (asked.depth, asked.hidden_size, asked.intermediate_size, asked.num_heads):
        raise ValueError(
            "the config given does not describe the vision checkpoint, which has "
            f"{sizes[0]} blocks of width {sizes[1]}, MLP width {sizes[2]} and {sizes[3]} heads; derive one with start_config."
        )


def _draw(merger: Merger, std: float, generator: torch.Generator) -> None:
    """As a new model's: normal with the config's initializer_range, biases zero, norms one (the report does not say)."""
    merger.norm.reset_parameters()
    for linear in (merger.linear_fc1, merger.linear_fc2):
        linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator) * std)
        nn.init.zeros_(linear.bias)
