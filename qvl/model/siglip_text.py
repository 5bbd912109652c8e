"""SigLIP-2's text tower: one vector a caption, which the vision pre-stage pulls pictures towards."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qvl.core.config import read_object
from qvl.model.attention import Packed
from qvl.model.weights import Source


@dataclass(frozen=True, kw_only=True)
class TextTowerConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    projection_size: int
    """Of the vector that comes out: the vision tower's width."""
    max_length: int = 64
    """Tokens of every caption, padding included."""

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"text width {self.hidden_size} does not divide into {self.num_heads} heads.")


class TextTower(nn.Module):
    """Token and position tables, pre-norm blocks with full attention, LayerNorm, the last token through one Linear.

    Captions all have `max_length` tokens, padding included. SigLIP was trained so: without a mask, its tokens attend to the padding, and
    the vector is read at the last place, which mostly is padding. Leaving the padding out would change every number. Inside, captions lie
    end to end as everywhere. Module names are the checkpoint's.
    """

    def __init__(self, config: TextTowerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.embeddings = nn.ModuleDict(
            {
                "token_embedding": nn.Embedding(config.vocab_size, width),
                "position_embedding": nn.Embedding(config.max_length, width),
            }
        )
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(Block(config) for _ in range(config.num_layers))})
        self.final_layer_norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, config.projection_size)

    def forward(self, token_ST: Tensor) -> Tensor:
        """int64 (captions, max_length), made by `fixed_length`, to (captions, projection_size)."""
        count, length = token_ST.shape
        if length != self.config.max_length:
            raise ValueError(
                f"captions of {length} tokens came; this tower reads exactly {self.config.max_length}: cut or pad (fixed_length)."
            )
        tokens, places = self.embeddings["token_embedding"], self.embeddings["position_embedding"]
        end_to_end = (tokens(token_ST) + places.weight).flatten(0, 1)
        states = self._states(end_to_end, Packed((length,) * count, is_causal=False))
        return self.head(self.final_layer_norm(states[length - 1 :: length]))

    def _states(self, x_TD: Tensor, layout: Packed) -> Tensor:
        for block in self.encoder["layers"]:  # type: ignore[union-attr]
            x_TD = block(x_TD, layout)
        return x_TD


class Block(nn.Module):
    def __init__(self, config: TextTowerConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.mlp = SiglipMLP(config.hidden_size, config.intermediate_size)

    def forward(self, x_TD: Tensor, layout: Packed) -> Tensor:
        x_TD = x_TD + self.self_attn(self.layer_norm1(x_TD), layout)
        return x_TD + self.mlp(self.layer_norm2(x_TD))


class Attention(nn.Module):
    def __init__(self, config: TextTowerConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x_TD: Tensor, layout: Packed) -> Tensor:
        q_TNH, k_TNH, v_TNH = (
            project(x_TD).unflatten(-1, (self.num_heads, -1)) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(layout.attend(q_TNH, k_TNH, v_TNH, layer=0).flatten(-2))


class SiglipMLP(nn.Module):
    """fc2(gelu(fc1(x))) with the tanh form of GELU; the pooling head has one too."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """Any axes in front; the last is `width`."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def fixed_length(captions: Sequence[Sequence[int]], *, length: int, eos_id: int, pad_id: int) -> Tensor:
    """Token ids of captions as rows of equal length (S, T): cut, ended by `eos_id`, padded on the right.

    SigLIP-2 lower-cases a caption before its (Gemma's) tokenizer, whose eos_id is 1 and pad_id 0. The ids in the published config.json
    are defaults of another tokenizer, so they are not read.
    """
    if length < 1:
        raise ValueError(f"length is {length}; expected 1 or more.")
    token_ST = torch.full((len(captions), length), pad_id, dtype=torch.int64)
    for row, caption in zip(token_ST, captions, strict=True):
        ids = [*caption[: length - 1], eos_id]
        row[: len(ids)] = torch.tensor(ids)
    return token_ST


def new_text_tower(config: TextTowerConfig, *, seed: int = 0) -> TextTower:
    """Freshly drawn, fp32, on the CPU."""
    with torch.device("meta"):
        tower = TextTower(config)
    tower.to_empty(device="cpu")
    draw(tower, seed=seed)
    return tower


@torch.no_grad()
def draw(module: nn.Module, *, seed: int) -> None:
    """As SigLIP draws its helpers: Glorot for matrices, width^-0.5 for tables and the probe, ones for norms, zeros for biases."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(module.named_parameters()):
        if name.endswith("bias"):
            parameter.zero_()
        elif name == "probe" or "embedding" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
        elif parameter.ndim == 1:
            parameter.fill_(1.0)
        else:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * math.sqrt(2 / sum(parameter.shape)))


def load_text_tower(folder: Path | str, *, dtype: torch.dtype = torch.float32) -> TextTower:
    """Of a SigLIP or SigLIP-2 checkpoint, whole or its text half alone, in either of Hugging Face's two forms."""
    folder = Path(folder)
    num_heads = _num_heads(folder)
    source = Source(folder)
    prefix = "text_model." if "text_model.final_layer_norm.weight" in source.home else ""

    def get(name: str) -> Tensor:
        if prefix + name not in source.home:
            raise ValueError(
                f"{folder} lacks {prefix + name}; expected a SigLIP or SigLIP-2 checkpoint with its text half."
            )
        return source.get(prefix + name)

    stem = f"{prefix}encoder.layers."
    layers = {name.removeprefix(stem).split(".")[0] for name in source.home if name.startswith(stem)}
    config = TextTowerConfig(
        vocab_size=get("embeddings.token_embedding.weight").shape[0],
        hidden_size=get("final_layer_norm.weight").shape[0],
        intermediate_size=get("encoder.layers.0.mlp.fc1.weight").shape[0],
        num_layers=len(layers),
        num_heads=num_heads,
        projection_size=get("head.weight").shape[0],
        max_length=get("embeddings.position_embedding.weight").shape[0],
    )
    with torch.device("meta"):
        tower = TextTower(config).to(dtype)
    tower.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            value = get(name)
            if value.shape != parameter.shape:
                raise ValueError(
                    f"{folder} has {prefix + name} of shape {tuple(value.shape)} where {tuple(parameter.shape)} was expected."
                )
            parameter.copy_(value)
    return tower.eval()


def _num_heads(folder: Path) -> int:
    """The one size that no tensor tells; the text part of config.json is refused where this tower would compute something else."""
    path = folder / "config.json"
    raw = read_object(path, "a SigLIP folder's config.json")
    kind = raw.get("model_type")
    if kind not in ("siglip", "siglip2", "siglip_text_model", "siglip2_text_model"):
        raise ValueError(
            f"{path} says model_type {kind!r}; the text tower comes from siglip, siglip2 or their text models."
        )
    text = raw if kind.endswith("_text_model") else raw.get("text_config", {})
    if not isinstance(text, dict):
        raise ValueError(f"{path} has text_config {text!r}; expected an object.")
    for field, value in (("hidden_act", "gelu_pytorch_tanh"), ("layer_norm_eps", 1e-6)):
        if text.get(field, value) != value:
            raise ValueError(f"{path} has {field} = {text[field]!r}; SigLIP's text tower has {value!r}.")
    # Published files leave out what equals the class default, which is 12 heads in both forms.
    return text.get("num_attention_heads", 12)
