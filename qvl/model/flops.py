"""The floor under every speed figure: floating-point operations of a forward pass, by part."""

from dataclasses import dataclass

from qvl.model.config import ModelConfig
from qvl.model.siglip_text import TextTowerConfig


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Multiply and add count as two. A backward pass costs twice the forward."""

    vision: int
    decoder: int
    head: int

    @property
    def forward(self) -> int:
        return self.vision + self.decoder + self.head

    @property
    def training(self) -> int:
        return 3 * self.forward


def forward_flops(
    config: ModelConfig, lengths: tuple[int, ...], frame_lengths: tuple[int, ...] = (), *, num_logits: int | None = None
) -> Flops:
    """Matmuls and attention products of one pass; norms, rotations and softmax are left out. Causal attention counts the half it needs.

    `lengths` are tokens of each sequence, `frame_lengths` patches of each frame; `num_logits` rows go through the head (None: all).
    """
    text = config.text
    heads, kv = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    tokens = sum(lengths)
    attention_weights = text.hidden_size * (2 * heads + 2 * kv)
    decoder = 0
    for layer in range(text.num_hidden_layers):
        if text.moe is not None and text.moe.is_moe_layer(layer):
            mlp = 3 * text.hidden_size * text.moe.intermediate_size * text.moe.num_experts_per_tok
            mlp += text.hidden_size * text.moe.num_experts
        else:
            mlp = 3 * text.hidden_size * text.intermediate_size
        decoder += 2 * tokens * (attention_weights + mlp)
        decoder += sum(2 * n * (n + 1) * heads for n in lengths)
    rows = tokens if num_logits is None else num_logits
    return Flops(
        vision=vision_flops(config, frame_lengths), decoder=decoder, head=2 * rows * text.hidden_size * text.vocab_size
    )


def vision_flops(config: ModelConfig, frame_lengths: tuple[int, ...], *, with_mergers: bool = True) -> int:
    """A forward pass of the tower; the vision pre-stage runs no mergers."""
    vision = config.vision
    if vision is None or not frame_lengths:
        return 0
    patches = sum(frame_lengths)
    width, joined = vision.hidden_size, vision.hidden_size * vision.merge_area
    block = 4 * width * width + 2 * width * vision.intermediate_size
    total = 2 * patches * (vision.patch_numbers * width + vision.depth * block)
    total += vision.depth * sum(4 * n * n * width for n in frame_lengths)
    mergers = (1 + len(vision.deepstack_visual_indexes)) if with_mergers else 0
    return total + mergers * 2 * (patches // vision.merge_area) * joined * (joined + vision.out_hidden_size)


def text_tower_flops(config: TextTowerConfig, captions: int) -> int:
    """A forward pass of the vision pre-stage's text tower."""
    width, tokens = config.hidden_size, captions * config.max_length
    block = 2 * tokens * (4 * width * width + 2 * width * config.intermediate_size)
    block += captions * 4 * config.max_length**2 * width
    return config.num_layers * block + captions * 2 * width * config.projection_size


def pool_flops(width: int, inner: int, frame_lengths: tuple[int, ...]) -> int:
    """A forward pass of the pooling head: keys and values of every patch, one query and an MLP for each frame."""
    patches = sum(frame_lengths)
    return patches * (4 * width * width + 4 * width) + len(frame_lengths) * (2 * width * width + 4 * width * inner)
