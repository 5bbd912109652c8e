"""A run on disk: what is trained at each checkpoint, what is frozen once; the newest whole one is found after any kill."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from qvl.core.log import say_once
from qvl.model.weights import save_tensors
from qvl.parallel.data_parallel import World, whole
from qvl.train.optimizer import Optimizer

PREFIX = "step-"
FROZEN = "frozen.safetensors"
STREAM = "stream"
"""The folder in a checkpoint for the stream's own files."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint read back, on the CPU."""

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    """JSON: stream, counters, spike statistics."""
    frozen: str | None = None
    """The digest of the frozen weights' file, which was compared; None where the checkpoint holds all weights itself."""
    files: Path | None = None
    """The folder of the stream's own files, which were compared; None where the stream keeps none."""


def save_run(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    state: dict[str, Any],
    world: World,
    *,
    keep: int,
    helpers: Sequence[str] = (),
    frozen: str | None = None,
    save_files: Callable[[Path], None] | None = None,
) -> str | None:
    """Write `folder/step-N`, what is trained and its moments, and drop all but the newest `keep`. Every rank must call this; rank 0 writes.

    What is frozen never changes, so it is written once, to `folder/frozen.safetensors`: a run of LoRA on 8B would write 17 GB of it each
    time. Modules in `helpers` are not saved. Returns that file's digest, which the run's next call gives as `frozen`; a resumed run has it
    from what it read. `save_files` writes the stream's own files into the folder it is given, on every rank; they land in `step-N/stream`.
    """
    own = _own(model, helpers)
    weights = _on_rank_0(((n, p.detach()) for n, p in own.items() if p.requires_grad), world)
    moments = _on_rank_0(optimizer.state().items(), world)
    if frozen is None:
        frozen = _save_frozen(folder, {n: p.detach() for n, p in own.items() if not p.requires_grad}, world)
    files = None if save_files is None else _stage_files(folder, save_files, world)
    if world.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        final = folder / f"{PREFIX}{step:08d}"
        aside = folder / f".{final.name}.partial"
        for left in folder.glob(f".{PREFIX}*.partial"):  # of killed saves
            shutil.rmtree(left, ignore_errors=True)
        aside.mkdir()
        save_tensors(weights, aside / "weights.safetensors")
        save_tensors(moments, aside / "optimizer.safetensors")
        (aside / "state.json").write_text(json.dumps(state), encoding="utf-8")
        if files is not None:
            os.rename(files, aside / STREAM)
        digests = {str(path.relative_to(aside)): _digest(path) for path in sorted(aside.rglob("*")) if path.is_file()}
        manifest = {"step": step, "sha256": digests} | ({} if frozen is None else {"frozen": frozen})
        (aside / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        for path in aside.rglob("*"):
            _sync(path)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(aside, final)
        _sync(folder)
        # Later ones can only be broken, and must not push this one out.
        for old in sorted(p for p in folder.glob(f"{PREFIX}*") if p.name <= final.name)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    world.barrier()
    return frozen


def _stage_files(folder: Path, save_files: Callable[[Path], None], world: World) -> Path:
    """The folder, beside the checkpoints, in which the stream's files of all ranks wait for the checkpoint that they belong to."""
    aside = folder / f".{STREAM}.partial"
    if world.rank == 0:
        shutil.rmtree(aside, ignore_errors=True)  # of a killed save
        aside.mkdir(parents=True)
    world.barrier()
    save_files(aside)
    world.barrier()
    return aside


def _own(model: nn.Module, helpers: Sequence[str]) -> dict[str, nn.Parameter]:
    """The parameters that are the run's own."""
    inside = tuple(f"{name}." for name in helpers)
    return {name: p for name, p in model.named_parameters() if not (inside and name.startswith(inside))}


def _save_frozen(folder: Path, frozen: dict[str, Tensor], world: World) -> str | None:
    """The digest of the file that now holds them; None where nothing is frozen."""
    if not frozen:
        return None
    tensors, digest = _on_rank_0(frozen.items(), world), None
    if world.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / f".{FROZEN}.partial"
        save_tensors(tensors, aside)
        _sync(aside)
        digest = _digest(aside)
        os.rename(aside, folder / FROZEN)
        _sync(folder)
    return world.from_first(digest)


def _on_rank_0(tensors: Iterable[tuple[str, Tensor]], world: World) -> dict[str, Tensor]:
    """Unsharded on the CPU; the other ranks take part in the gathering and keep nothing, so that a host holds one copy."""
    kept = {}
    for name, tensor in tensors:
        full = whole(tensor)
        if world.rank == 0:
            kept[name] = full.cpu().contiguous()
    return kept


def newest(folder: Path) -> Saved | None:
    """The newest checkpoint whose files match its manifest; None when there is none. Broken ones are passed over and named."""
    for path in sorted(folder.glob(f"{PREFIX}*"), reverse=True):
        try:
            return read_run(path)
        except ValueError as error:
            say_once(f"passed over a broken checkpoint: {error}")
    return None


def read_run(path: Path) -> Saved:
    """Raises ValueError in one sentence when a file is missing or altered."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        for name, digest in manifest["sha256"].items():
            if _digest(path / name) != digest:
                raise ValueError(f"{path / name} differs from its manifest; the checkpoint is not whole.")
        frozen, digest = dict[str, Tensor](), manifest.get("frozen")
        if digest is not None:
            if _digest(path.parent / FROZEN) != digest:
                raise ValueError(f"{path.parent / FROZEN} differs from the manifest of {path.name}; it is not whole.")
            frozen = load_file(path.parent / FROZEN)
        return Saved(
            step=manifest["step"],
            weights=frozen | load_file(path / "weights.safetensors"),
            optimizer=load_file(path / "optimizer.safetensors"),
            state=json.loads((path / "state.json").read_text(encoding="utf-8")),
            frozen=digest,
            files=path / STREAM if (path / STREAM).is_dir() else None,
        )
    except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"{path} is not a whole checkpoint ({error}).") from None


@torch.no_grad()
def restore_weights(model: nn.Module, weights: dict[str, Tensor], *, helpers: Sequence[str] = ()) -> None:
    """Into a model with the same parameters, sharded or not; its `helpers` stay as they are."""
    own = _own(model, helpers)
    if set(own) != set(weights):
        odd = sorted(set(own) ^ set(weights))
        raise ValueError(
            f"the checkpoint and the model differ in {len(odd)} parameters, the first {odd[0]}; resume the same recipe."
        )
    for name, parameter in own.items():
        saved, asked = weights[name], (parameter.dtype, parameter.shape)
        if (saved.dtype, saved.shape) != asked:
            raise ValueError(
                f"the checkpoint holds {name} as {saved.dtype} {tuple(saved.shape)}, the model as {asked[0]} {tuple(asked[1])}; "
                "resume with the same settings (dtype, LoRA rank), or start in another folder."
            )
        parameter.copy_(_like(saved, parameter))


def _like(tensor: Tensor, target: Tensor) -> Tensor:
    """Sharded as `target` is."""
    if isinstance(target, DTensor):
        return distribute_tensor(tensor.to(target.device), target.device_mesh, target.placements)
    return tensor.to(target.device)


def restore_optimizer(optimizer: Optimizer, saved: dict[str, Tensor]) -> None:
    """Moments sharded as their masters are; counters as they are."""
    placed = {}
    for key, tensor in saved.items():
        master = optimizer.masters.get(key.split("/", 1)[1])
        is_scalar = tensor.ndim == 0 or master is None
        placed[key] = tensor if is_scalar else _like(tensor, master)  # type: ignore[arg-type]
    optimizer.restore(placed)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Make the kernel write it down before the rename counts."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
