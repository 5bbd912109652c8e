"""LoRA (arXiv 2106.09685): a small trainable detour beside chosen Linears, in PEFT's file format."""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from qvl.core.files import writing_into
from qvl.core.log import log
from qvl.model.layers import Linear
from qvl.model.qwen3vl import Qwen3VL
from qvl.model.weights import save_tensors, to_checkpoint_name

DECODER = r".*\blayers\.\d+\..*_proj"
"""Every Linear of the decoder's layers (attention alone where the MLP is fused experts), nothing of the vision tower."""

CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
READ = (
    "peft_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "bias",
    "alpha_pattern",
    "rank_pattern",
    "init_lora_weights",
)
# Which modules are adapted stands in the tensors' names; the rest says who made the adapter, or how training began.
HARMLESS = (
    *(
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
    ),
    *("fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config"),
    *("megatron_core", "peft_version", "qalora_group_size", "revision", "target_modules", "task_type"),
)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """A new adapter. The detour's output is scaled by alpha / r, or by alpha / sqrt(r) with `use_rslora` (arXiv 2312.03732)."""

    r: int = 16
    alpha: float = 32.0
    target_modules: str | tuple[str, ...] = DECODER
    """Checkpoint names, as PEFT reads them: a tuple of name ends ("q_proj"), a regular expression of whole names, or "all-linear"."""
    dropout: float = 0.0
    use_rslora: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _check_numbers(self.r, self.alpha, self.dropout, "the adapter")


class LoraLinear(nn.Linear):
    """y = W x + b + scale * up(down(dropout(x))). `weight` and `bias` are the base's own parameters."""

    def __init__(
        self, base: nn.Linear, down: Tensor, up: Tensor, *, alpha: float, dropout: float, use_rslora: bool
    ) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        # At least fp32, as PEFT keeps them: an update of 1e-4 would vanish in a bf16 number.
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        # A base without storage is filled later; the adapter's values exist now.
        device = down.device if base.weight.is_meta else base.weight.device
        self.lora_down = nn.Parameter(down.to(device, dtype))
        self.lora_up = nn.Parameter(up.to(device, dtype))
        self.rank, self.alpha, self.dropout, self.use_rslora = down.shape[0], alpha, dropout, use_rslora
        self.merged: _Merged | None = None
        self.train(base.training)

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def forward(self, input: Tensor) -> Tensor:
        """Any axes in front; the last is the width."""
        out = F.linear(input, self.weight, self.bias)
        if self.merged is not None:
            return out
        inner = F.dropout(input.to(self.lora_down.dtype), self.dropout, self.training)
        return (out + F.linear(F.linear(inner, self.lora_down), self.lora_up) * self.scale).to(out.dtype)


@dataclass(frozen=True)
class _Merged:
    """What a merged module keeps aside, out of sight of `parameters()`, so that a saved folder holds plain weights."""

    weight: Tensor
    down: nn.Parameter
    up: nn.Parameter


def add_adapter(model: Qwen3VL, config: LoraConfig) -> None:
    """A new adapter that changes nothing yet (down uniform as nn.Linear's own, up zero). The base is frozen, the adapter trains."""
    _refuse_second(model)
    generator = torch.Generator().manual_seed(config.seed)
    layers = {}
    for path, base in _targets(model, config.target_modules).items():
        bound = base.in_features**-0.5
        down = (torch.rand(config.r, base.in_features, generator=generator) * 2 - 1) * bound
        up = torch.zeros(base.out_features, config.r)
        layers[path] = LoraLinear(
            base, down, up, alpha=config.alpha, dropout=config.dropout, use_rslora=config.use_rslora
        )
    _attach(model, layers)


def num_adapter_parameters(model: Qwen3VL, config: LoraConfig) -> int:
    """What `add_adapter` would add; the model may have no storage."""
    targets = _targets(model, config.target_modules).values()
    return sum(config.r * (base.in_features + base.out_features) for base in targets)


def load_adapter(model: Qwen3VL, folder: Path | str) -> None:
    """Attach an adapter that PEFT or `save_adapter` wrote. The base is frozen, the adapter trains.

    Raises ValueError, with the model untouched, when the adapter does not fit or asks for what is not implemented.
    """
    _refuse_second(model)
    folder = Path(folder)
    settings = _read_settings(folder)
    pairs = _read_pairs(folder)
    known = _candidates(model)
    layers = {}
    for path, pair in pairs.items():
        if path not in known:
            raise ValueError(
                f"{folder} adapts {path}, which is no Linear of this model that can carry an adapter (head, embeddings, router and fused "
                "experts cannot). Load the model it was trained on, or train it without that module."
            )
        base, rank = known[path], int(_pattern(settings.rank_pattern, path, settings.r))
        down, up = pair["lora_A"].flatten(1), pair["lora_B"].flatten(1)
        if (*down.shape, *up.shape) != (rank, base.in_features, base.out_features, rank):
            raise ValueError(
                f"{folder} adapts {path} with shapes {tuple(down.shape)} and {tuple(up.shape)}; this model and rank {rank} need "
                f"{(rank, base.in_features)} and {(base.out_features, rank)}. It was trained on another model."
            )
        if not bool(torch.isfinite(down).all() and torch.isfinite(up).all()):
            raise ValueError(f"{folder} holds numbers for {path} that are not finite; its training went wrong.")
        alpha = float(_pattern(settings.alpha_pattern, path, settings.alpha))
        layers[path] = LoraLinear(base, down, up, alpha=alpha, dropout=settings.dropout, use_rslora=settings.use_rslora)
    if not any(bool(layer.lora_up.any()) for layer in layers.values()):
        log.warning("the adapter in %s changes nothing: every lora_B is zero; it was saved before it learned", folder)
    _attach(model, layers)


@torch.no_grad()
def merge(model: Qwen3VL, *, keep_base: bool = True) -> None:
    """Add the adapter into the weights, in place, computed in fp32 and rounded once to the weights' dtype.

    The base weights are kept aside (memory for every adapted weight once more), so that `unmerge` and `unload` restore them to the bit.
    With `keep_base` false they are given up and the adapted modules become plain Linears for good. Merged weights are ordinary weights:
    `weights.save` writes them. An adapter whose change is lost in rounding is reported by a warning.
    """
    layers = {path: layer for path, layer in _attached(model).items() if layer.merged is None}
    num_changed = 0
    for layer in layers.values():
        base = layer.weight.clone()
        delta = (layer.lora_up @ layer.lora_down) * layer.scale
        layer.weight.copy_(layer.weight.to(delta.dtype) + delta)
        num_changed += not torch.equal(base, layer.weight)
        layer.merged = _Merged(base if keep_base else layer.weight, layer.lora_down, layer.lora_up)
        del layer.lora_down, layer.lora_up
    if layers and num_changed < len(layers):
        log.warning(
            "merging changed %d of %d weights; the others' adapter is zero or below the precision of %s",
            num_changed,
            len(layers),
            next(iter(layers.values())).weight.dtype,
        )
    if not keep_base:
        _detach(model)


@torch.no_grad()
def unmerge(model: Qwen3VL) -> None:
    """Base weights to the bit, adapter beside them again."""
    for layer in _attached(model).values():
        if layer.merged is not None:
            aside, layer.merged = layer.merged, None
            layer.weight.copy_(aside.weight)
            # The model may have moved meanwhile; the parameters stay the objects an optimizer knows.
            layer.lora_down, layer.lora_up = aside.down, aside.up
            layer.lora_down.data = aside.down.to(layer.weight.device)
            layer.lora_up.data = aside.up.to(layer.weight.device)


def unload(model: Qwen3VL) -> None:
    """Take the adapter off: the model as it was before, to the bit, all of it trainable as `weights.load` gives it."""
    unmerge(model)
    _detach(model)


def save_adapter(model: Qwen3VL, folder: Path | str, *, base: str | None = None) -> None:
    """Write adapter_config.json and adapter_model.safetensors, which PEFT loads. `base` names the base model for the reader."""
    layers = _attached(model)
    tensors = {}
    for path, layer in layers.items():
        down, up = (layer.lora_down, layer.lora_up) if layer.merged is None else (layer.merged.down, layer.merged.up)
        down, up = down.detach().cpu(), up.detach().cpu()
        if path.endswith("visual.patch_embed.proj"):  # a Conv3d there, a Linear here
            vision = model.config.vision
            assert vision is not None
            down = down.unflatten(
                1, (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
            )
            up = up[:, :, None, None, None]
        tensors |= {_key(path, "lora_A"): down.contiguous(), _key(path, "lora_B"): up.contiguous()}
    with writing_into(folder, last=CONFIG_FILE) as aside:
        save_tensors(tensors, aside / WEIGHTS_FILE, {"format": "pt"})
        text = json.dumps(_config_of(model, layers, base), indent=2)
        (aside / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def _config_of(model: Qwen3VL, layers: dict[str, LoraLinear], base: str | None) -> dict[str, Any]:
    ends = {path.rpartition(".")[2] for path in layers}
    is_short_enough = {p for p in _candidates(model) if p.rpartition(".")[2] in ends} == set(layers)
    first = next(iter(layers.values()))
    rank = Counter(layer.rank for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "task_type": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": first.dropout,
        "use_rslora": first.use_rslora,
        "bias": "none",
        "target_modules": sorted(ends) if is_short_enough else sorted(layers),
        "rank_pattern": {path: layer.rank for path, layer in layers.items() if layer.rank != rank},
        "alpha_pattern": {path: layer.alpha for path, layer in layers.items() if layer.alpha != alpha},
    }


@dataclass(frozen=True, kw_only=True)
class _Settings:
    r: int
    alpha: float
    dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: Mapping[str, float] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)


def _read_settings(folder: Path) -> _Settings:
    path = folder / CONFIG_FILE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; expected a folder that PEFT or save_adapter wrote.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        found = raw.get("peft_type") if isinstance(raw, dict) else raw
        raise ValueError(f"{path} describes {found!r}; only peft_type LORA is implemented.")
    # Whatever else is set may change the arithmetic: PEFT adds variants (DoRA, QALoRA, aLoRA, ...) as new keys.
    strange = [key for key, value in raw.items() if value and key not in (*READ, *HARMLESS)]
    strange += ["bias"] if raw.get("bias", "none") != "none" else []
    start = raw.get("init_lora_weights", True)
    strange += (
        ["init_lora_weights"]
        if isinstance(start, str) and start.lower() not in ("gaussian", "eva", "orthogonal")
        else []
    )
    if strange:
        said = ", ".join(f"{key} = {json.dumps(raw[key])}" for key in strange)
        raise ValueError(
            f"{path} has {said}, which is not implemented; only plain LoRA on Linears is, with base weights unchanged."
        )
    r, alpha, dropout = (raw.get(key) for key in ("r", "lora_alpha", "lora_dropout"))
    dropout = 0.0 if dropout is None else dropout
    _check_numbers(r, alpha, dropout, str(path))
    assert isinstance(r, int) and isinstance(alpha, int | float)
    patterns = {key: raw.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    for key, pattern in patterns.items():
        # PEFT reads the names as regular expressions; a stranger's file gets no say over those.
        if not isinstance(pattern, dict) or not all(re.fullmatch(r"[\w.]+", name) for name in pattern):
            raise ValueError(f"{path} has a {key} that is not made of plain module names: {json.dumps(pattern)}.")
        for value in pattern.values():
            _check_numbers(value if key == "rank_pattern" else r, value, dropout, f"{key} in {path}")
    return _Settings(r=r, alpha=alpha, dropout=dropout, use_rslora=bool(raw.get("use_rslora")), **patterns)


def _check_numbers(r: Any, alpha: Any, dropout: Any, where: str) -> None:
    checks = (
        ("rank r", r, "a whole number from 1", type(r) is int and r >= 1),
        ("alpha", alpha, "a number above 0", _is_number(alpha) and 0 < alpha < math.inf),
        ("dropout", dropout, "at least 0 and below 1", _is_number(dropout) and 0 <= dropout < 1),
    )
    for name, value, expected, is_good in checks:
        if not is_good:
            raise ValueError(f"{where} has {name} = {value!r}; it must be {expected}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read_pairs(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Checkpoint name of the module -> its lora_A and lora_B."""
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        hint = (
            f"; {PICKLE_FILE} is a pickle, which can run code and is never read"
            if (folder / PICKLE_FILE).exists()
            else ""
        )
        raise ValueError(f"{folder} has no {WEIGHTS_FILE}{hint}.")
    try:
        tensors = load_file(path)
    except (SafetensorError, RuntimeError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); download it again.") from None
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.(lora_A|lora_B)\.weight", key)
        if match is None or tensor.ndim < 2:
            raise ValueError(
                f"{path} holds {key} of shape {tuple(tensor.shape)}; only lora_A and lora_B matrices are implemented."
            )
        pairs.setdefault(match[1], {})[match[2]] = tensor
    lone = [name for name, pair in pairs.items() if len(pair) != 2]
    if lone or not pairs:
        raise ValueError(
            f"{path} holds {f'half an adapter for {lone[0]}' if lone else 'no adapter'}; it needs lora_A and lora_B."
        )
    return pairs


def _pattern(pattern: Mapping[str, float], path: str, default: float) -> float:
    """The first entry that is the module's name or its end."""
    return next((value for name, value in pattern.items() if path == name or path.endswith(f".{name}")), default)


def _key(path: str, half: str) -> str:
    return f"base_model.model.{path}.{half}.weight"


def _targets(model: Qwen3VL, wanted: str | tuple[str, ...]) -> dict[str, nn.Linear]:
    known = _candidates(model)
    if wanted == "all-linear":  # as PEFT: the patch embedding is a Conv3d there
        return {path: module for path, module in known.items() if not path.endswith("patch_embed.proj")}
    if isinstance(wanted, str):
        found = {path: module for path, module in known.items() if re.fullmatch(wanted, path)}
        missed = [] if found else [wanted]
    else:
        found = {path: m for path, m in known.items() if any(path == w or path.endswith(f".{w}") for w in wanted)}
        missed = [w for w in wanted if not any(path == w or path.endswith(f".{w}") for path in known)]
    if missed or not found:
        ends = sorted({path.rpartition(".")[2] for path in known})
        raise ValueError(
            f"target_modules {', '.join(map(repr, missed)) or 'are empty, which'} match no Linear of this model that can carry an adapter "
            f"(head, embeddings, router and fused experts cannot); there are {', '.join(ends)}."
        )
    return found


def _candidates(model: Qwen3VL) -> dict[str, nn.Linear]:
    """Linears by checkpoint name. Not the head (logits are taken from its weight) nor the router (no Linear in transformers 5)."""
    return {
        to_checkpoint_name(path, model.config): module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and not path.endswith((".mlp.gate", "lm_head"))
    }


def _attached(model: Qwen3VL) -> dict[str, LoraLinear]:
    layers = {path: module for path, module in _candidates(model).items() if isinstance(module, LoraLinear)}
    if not layers:
        raise ValueError("the model has no adapter; call load_adapter or add_adapter first.")
    return layers


def _refuse_second(model: Qwen3VL) -> None:
    if any(isinstance(module, LoraLinear) for module in model.modules()):
        raise ValueError("the model has an adapter already; call unload, or merge with keep_base=False, first.")
    is_meta = [p.is_meta for p in model.parameters()]
    if any(is_meta) and not all(is_meta):  # where all are, none was read yet (weights.load_empty)
        raise ValueError("the model's plain weights were freed for serving; load its folder again.")


def _attach(model: Qwen3VL, layers: dict[str, LoraLinear]) -> None:
    model.requires_grad_(False)
    _replace(model, layers)


def _detach(model: Qwen3VL) -> None:
    plain = {}
    for path, layer in _attached(model).items():
        plain[path] = Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        plain[path].weight, plain[path].bias = layer.weight, layer.bias
        plain[path].train(layer.training)
    _replace(model, plain)
    model.requires_grad_(True)


def _replace(model: Qwen3VL, new: Mapping[str, nn.Linear]) -> None:
    for name in [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]:
        path = to_checkpoint_name(name, model.config)
        if path in new:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new[path])
