"""Checkpoints in and out: sharded safetensors streamed into place, both expert layouts, never pickle."""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qvl.core.files import writing_into
from qvl.model.config import ModelConfig, config_to_hf, read_config
from qvl.model.qwen3vl import Qwen3VL, empty_model

Layout = Literal["hub", "v5"]
"""How expert weights lie in a file: "hub" (E, D, 2F) and (E, F, D), used as x @ W; "v5" (transformers 5) their transposes."""

MAPPED_BYTES = 2**28
"""A file is mapped anew after so many bytes of tensors: pages that were read count as this process's memory until their mapping ends, and a
model whose weights stand there twice does not fit where one fits."""

COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)
"""Files beside the weights that make a folder complete; they travel with a conversion untouched."""


def load(
    folder: Path | str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    expert_layout: Layout | None = None,
) -> Qwen3VL:
    """The model of a checkpoint folder. Raises ValueError in one sentence when files and config disagree.

    Tensors go from the mapped file straight into their place, converted on the way, so anonymous memory stays at the weights' size.
    `expert_layout` settles square expert matrices, whose layout their shape does not tell.
    """
    folder = Path(folder)
    config = read_config(folder)
    source = Source(folder)
    model = empty_model(config, dtype=dtype, device=device)
    _check_names(_wanted(model), source, config)
    fill(model, source, expert_layout=expert_layout)
    model.requires_grad_(True)
    return model.eval()


def load_empty(folder: Path | str, *, dtype: torch.dtype = torch.float32) -> Qwen3VL:
    """The model of a checkpoint folder on the meta device, after every check that `load` makes; `fill` reads its weights later."""
    folder = Path(folder)
    config = read_config(folder)
    source = Source(folder)
    model = empty_model(config, dtype=dtype, device="meta")
    wanted = _wanted(model)
    _check_names(wanted, source, config)
    with torch.no_grad():
        for name, parameter in wanted.items():
            for stored, piece in _pieces(name, parameter, source):
                dtype, shape = source.kind(stored)
                tensor = torch.empty(shape, dtype=dtype, device="meta")
                _copy(name, piece, tensor, source.where(name), None)
    model.requires_grad_(True)
    return model.eval()


Own = Callable[[Tensor], tuple[Tensor, slice | None]]
"""What a process holds of a parameter: (that part, its rows of the first axis); None where it holds all rows."""


@torch.no_grad()
def fill(
    model: Qwen3VL,
    source: "Source",
    *,
    expert_layout: Layout | None = None,
    own: Own = lambda parameter: (parameter, None),
) -> None:
    """Read a folder's weights, whose names were checked, into a model; of a sharded one each process only its own rows. An adapter stays
    as it is."""
    for name, parameter in _wanted(model).items():
        held, rows = own(parameter)
        for stored, piece in _pieces(name, held, source, first=rows.start if rows else 0):
            _copy(name, piece, source.get(stored, rows if stored == name else None), source.where(name), expert_layout)


def _wanted(model: Qwen3VL) -> dict[str, Tensor]:
    """The model's own parameters by their names in a file."""
    parameters = model.named_parameters()
    return {to_checkpoint_name(n, model.config): p for n, p in parameters if not n.endswith((".lora_down", ".lora_up"))}


def stored_dtype(folder: Path | str) -> torch.dtype:
    """What a checkpoint folder's weights are stored in; the widest where files mix them, so that nothing is rounded."""
    source = Source(Path(folder))
    names = {source.files[path].get_slice(name).get_dtype() for name, path in source.home.items()}
    found = [
        dtype
        for name, dtype in (("F32", torch.float32), ("BF16", torch.bfloat16), ("F16", torch.float16))
        if name in names
    ]
    if not found or "F64" in names or len(found) > 1:
        return torch.float32  # no 16-bit type holds both others
    return found[0]


class Source:
    """All safetensors files of a folder, or the given ones, opened by mapping; names are checked before any tensor is read."""

    def __init__(self, folder: Path, files: Sequence[Path] | None = None) -> None:
        self.folder = folder
        self.files = {path: _open(path) for path in (_shards(folder) if files is None else files)}
        self._mapped = 0
        self.home: dict[str, Path] = {}
        for path, file in self.files.items():
            for name in file.keys():  # noqa: SIM118 (safe_open is not a dict)
                if name in self.home:
                    raise ValueError(
                        f"tensor {name} stands in both {self.home[name].name} and {path.name}; remove one."
                    )
                self.home[name] = path

    def get(self, name: str, rows: slice | None = None) -> Tensor:
        """The tensor, or only the given rows of its first axis: no other bytes are read."""
        path = self.home[name]
        try:
            file = self.files[path]
            tensor = file.get_tensor(name) if rows is None else file.get_slice(name)[rows]
        except (SafetensorError, RuntimeError, OSError) as error:
            raise ValueError(f"{path} could not give tensor {name}: {error}.") from None
        self._mapped += tensor.nbytes
        if self._mapped > MAPPED_BYTES:
            self.files[path], self._mapped = _open(path), 0
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.files[self.home[name]].get_slice(name).get_shape())

    def kind(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """(dtype, shape), without reading it."""
        shape = self.shape(name)
        return self.get(name, slice(0, 0) if shape else None).dtype, shape

    def where(self, name: str) -> str:
        return str(self.home.get(name, self.folder))


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if not index.is_file():
        if single.is_file():
            return [single]
        pickles = [p.name for p in folder.glob("*.bin")] + [p.name for p in folder.glob("*.pt*")]
        hint = f"; {pickles[0]} is a pickle, which can run code and is never read" if pickles else ""
        raise ValueError(f"{folder} has no model.safetensors or model.safetensors.index.json{hint}.")
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index} is not an index with a weight_map.") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{index} names the shard {name!r}; a shard must be a .safetensors file in the same folder."
            )
        if not (folder / name).is_file():
            raise ValueError(f"{index} names the shard {name}, which is missing; download it again.")
    return [folder / name for name in sorted(names)]


def _open(path: Path) -> "safe_open":
    if path.exists() and not os.access(path, os.R_OK):
        raise ValueError(f"{path} may not be read by this user; change its permissions (chmod a+r).")
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, RuntimeError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); download it again.") from None


def to_checkpoint_name(name: str, config: ModelConfig) -> str:
    """Our parameter name -> the file's."""
    if name.startswith("lm_head."):
        return name
    if config.vision is None:
        return name.replace("language_model.", "model.", 1)
    return f"model.{name}"


def checkpoint_shapes(model: Qwen3VL, layout: Layout = "hub") -> dict[str, tuple[int, ...]]:
    """Every tensor a saved folder holds and its shape; works on the meta device."""
    return {
        stored: tuple(tensor.shape)
        for name, parameter in model.named_parameters()
        for stored, tensor in _as_stored(name, parameter, model.config, layout)
    }


def _as_stored(name: str, parameter: Tensor, config: ModelConfig, layout: Layout) -> list[tuple[str, Tensor]]:
    """The file's names and views of a parameter: patch embedding as a Conv3d kernel; in the hub's layout experts transposed, those of a
    text-only model one by one."""
    stored = to_checkpoint_name(name, config)
    if _is_expert(name) and layout == "hub" and config.vision is None:
        return _separate_experts(stored, parameter)
    return [(stored, _reshaped(name, parameter, config, layout))]


def _reshaped(name: str, parameter: Tensor, config: ModelConfig, layout: Layout) -> Tensor:
    if name == "visual.patch_embed.proj.weight":
        assert config.vision is not None
        side = config.vision.patch_size
        return parameter.view(-1, config.vision.in_channels, config.vision.temporal_patch_size, side, side)
    if _is_expert(name) and layout == "hub":
        return parameter.transpose(1, 2)
    return parameter


def _is_expert(name: str) -> bool:
    return name.endswith((".experts.gate_up_proj", ".experts.down_proj"))


def _check_names(wanted: Mapping[str, Tensor], source: Source, config: ModelConfig) -> None:
    accounted = set()
    missing = []
    for name, parameter in wanted.items():
        found = [name] if name in source.home else [n for n, _ in _separate_experts(name, parameter)]
        if found and all(n in source.home for n in found):
            accounted.update(found)
        else:
            missing.append(name)
    if missing:
        raise ValueError(
            f"{source.folder} lacks {len(missing)} tensors its config.json needs, the first {missing[0]}; "
            "weights and config.json do not belong together, or a shard is missing."
        )
    extra = sorted(set(source.home) - accounted)
    if config.tie_word_embeddings and "lm_head.weight" in extra:
        head, table = (
            source.get("lm_head.weight"),
            source.get(to_checkpoint_name("language_model.embed_tokens.weight", config)),
        )
        if not torch.equal(head, table):
            raise ValueError(
                f"{source.where('lm_head.weight')} holds a head of its own, but config.json ties it to the embeddings; "
                "set tie_word_embeddings to false."
            )
        extra.remove("lm_head.weight")
    if extra:
        raise ValueError(
            f"{source.folder} holds {len(extra)} tensors its config.json does not know, the first {extra[0]}; "
            "weights and config.json do not belong together."
        )


def _separate_experts(name: str, parameter: Tensor, first: int = 0) -> list[tuple[str, Tensor]]:
    """Text-only Qwen3-MoE files hold one tensor an expert: their names, and where each goes inside our fused parameter, which begins with
    expert `first`."""
    match = re.fullmatch(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)", name)
    if match is None:
        return []
    stem, which = match.groups()
    if which == "down_proj":
        return [(f"{stem}.{first + e}.down_proj.weight", parameter[e]) for e in range(parameter.shape[0])]
    half = parameter.shape[1] // 2
    return [
        (f"{stem}.{first + e}.{part}.weight", parameter[e, rows])
        for e in range(parameter.shape[0])
        for part, rows in (("gate_proj", slice(0, half)), ("up_proj", slice(half, None)))
    ]


def _pieces(name: str, parameter: Tensor, source: Source, first: int = 0) -> list[tuple[str, Tensor]]:
    """(name of the file's tensor, part of the parameter that it fills)."""
    return [(name, parameter)] if name in source.home else _separate_experts(name, parameter, first)


def _copy(name: str, parameter: Tensor, tensor: Tensor, where: str, expert_layout: Layout | None) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{where} stores {name} as {tensor.dtype}; expected a floating-point type.")
    if _is_expert(name) and tensor.ndim == 3:
        tensor = _as_v5(name, tensor, tuple(parameter.shape), where, expert_layout)
    if name.endswith("visual.patch_embed.proj.weight") and tensor.ndim == 5:
        tensor = tensor.flatten(1)
    if tensor.shape != parameter.shape:
        raise ValueError(
            f"{where} stores {name} with shape {tuple(tensor.shape)}, config.json asks for {tuple(parameter.shape)}."
        )
    parameter.copy_(tensor)


def _as_v5(name: str, tensor: Tensor, shape: tuple[int, ...], where: str, expert_layout: Layout | None) -> Tensor:
    """An expert tensor in our orientation, told by its shape or, when square, by the caller."""
    if shape[1] == shape[2] and expert_layout is None:
        raise ValueError(
            f"{where} stores {name} as a square {tuple(tensor.shape)}, so its shape does not tell the hub's expert layout from "
            'transformers 5\'s; pass expert_layout "hub" or "v5".'
        )
    is_hub = expert_layout == "hub" if shape[1] == shape[2] else tuple(tensor.shape) == (shape[0], shape[2], shape[1])
    return tensor.transpose(1, 2) if is_hub else tensor


def save(
    model: Qwen3VL,
    folder: Path | str,
    *,
    layout: Layout = "hub",
    max_shard_bytes: int = 5 * 10**9,
    companions: Path | str | None = None,
) -> None:
    """Write a folder that transformers loads. Files are moved into place whole, config.json last.

    `companions` is a folder whose tokenizer, template and processor files are copied through unchanged.
    """
    if any(n.endswith((".lora_down", ".lora_up")) for n, _ in model.named_parameters()):
        raise ValueError(
            "the model has an adapter attached; merge or unload it first, or save_adapter to save the adapter alone."
        )
    if any(p.is_meta for p in model.parameters()):
        raise ValueError(
            "the model's plain weights were freed for serving (engine.prepare); load its folder again to save it."
        )
    folder = Path(folder)
    dtype = str(model.dtype).removeprefix("torch.")
    with writing_into(folder, last="config.json") as aside:
        _write_shards(model, aside, layout, max_shard_bytes)
        for name in COMPANIONS if companions else ():
            if (Path(companions or "") / name).is_file():
                shutil.copyfile(Path(companions or "") / name, aside / name)
        text = json.dumps(config_to_hf(model.config, layout=layout, dtype=dtype), indent=2)
        (aside / "config.json").write_text(text + "\n", encoding="utf-8")
        new = {path.name for path in aside.iterdir()}
        for stale in (*folder.glob("model*.safetensors"), folder / "model.safetensors.index.json"):
            if stale.name not in new:
                stale.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Shard:
    names: list[str]
    num_bytes: int


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """safetensors gives a new file to its owner alone whatever the umask says; a server under another account could not read it."""
    save_file(tensors, path, metadata=metadata)
    mask = os.umask(0o077)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def _write_shards(model: Qwen3VL, folder: Path, layout: Layout, max_shard_bytes: int) -> None:
    parameters = dict(model.named_parameters())
    shards = [_Shard([], 0)]
    for name, parameter in parameters.items():
        size = parameter.numel() * parameter.element_size()
        last = shards[-1]
        if last.names and last.num_bytes + size > max_shard_bytes:
            shards.append(_Shard([name], size))
        else:
            shards[-1] = _Shard([*last.names, name], last.num_bytes + size)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name in shard.names:
            for stored, tensor in _as_stored(name, parameters[name].detach(), model.config, layout):
                tensors[stored] = tensor.contiguous().cpu()
        save_tensors(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(s.num_bytes for s in shards)}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
