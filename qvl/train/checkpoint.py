"""A run on disk: what is trained at each checkpoint, what is frozen once; the newest whole one is found after any kill."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qvl.core.files import remove_leftovers, writing
from qvl.core.log import say_once
from qvl.model.weights import Source, save_tensors
from qvl.parallel.data_parallel import World, from_part, own_part, own_rows, whole
from qvl.train.optimizer import Optimizer

PREFIX = "step-"
FROZEN = "frozen.safetensors"
STREAM = "stream"
"""The folder in a checkpoint for the stream's own files."""
ALONE = World(0, 1, torch.device("cpu"))


class Stored(Mapping[str, Tensor]):
    """The tensors of a checkpoint's files by name. Each is read when it is asked for: whole, or the rows that this rank holds."""

    def __init__(self, folder: Path, files: Sequence[Path]) -> None:
        self.source = Source(folder, files)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.source.home:
            raise KeyError(name)
        return self.source.get(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.source.home)

    def __len__(self) -> int:
        return len(self.source.home)

    def part(self, name: str, target: Tensor) -> Tensor:
        """What this rank holds of a tensor that is sharded as `target` is."""
        return self.source.get(name, own_rows(target))

    def kind(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """(dtype, shape), without reading it."""
        return self.source.kind(name)


@dataclass(frozen=True)
class Saved:
    """A whole checkpoint. Its tensors are read from the files when they are asked for."""

    step: int
    weights: Stored
    """Without the frozen ones where the reader said that it holds them."""
    optimizer: Stored
    state: dict[str, Any]
    """JSON: stream, counters, spike statistics."""
    frozen: str | None = None
    """The digest of the frozen weights' file; None where the checkpoint holds all weights itself."""
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
        remove_leftovers(folder, f"{PREFIX}*")  # of killed saves
        with writing(final, sync=True) as new:
            new.mkdir()
            save_tensors(weights, new / "weights.safetensors")
            save_tensors(moments, new / "optimizer.safetensors")
            (new / "state.json").write_text(json.dumps(state), encoding="utf-8")
            if files is not None:
                shutil.move(files, new / STREAM)
            digests = {str(path.relative_to(new)): _digest(path) for path in sorted(new.rglob("*")) if path.is_file()}
            manifest = {"step": step, "sha256": digests} | ({} if frozen is None else {"frozen": frozen})
            (new / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        # Later ones can only be broken, and must not push this one out.
        for old in sorted(p for p in folder.glob(f"{PREFIX}*") if p.name <= final.name)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    world.barrier()
    return frozen


def _stage_files(folder: Path, save_files: Callable[[Path], None], world: World) -> Path:
    """The folder, beside the checkpoints, in which the stream's files of all ranks wait for the checkpoint that they belong to."""
    aside = folder / f".{STREAM}.staged"
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
        remove_leftovers(folder, f"{FROZEN}*")
        with writing(folder / FROZEN, sync=True) as new:
            save_tensors(tensors, new)
            digest = _digest(new)
    return world.from_first(digest)


def _on_rank_0(tensors: Iterable[tuple[str, Tensor]], world: World) -> dict[str, Tensor]:
    """Unsharded on the CPU; the other ranks take part in the gathering and keep nothing, so that a host holds one copy."""
    kept = {}
    for name, tensor in tensors:
        full = whole(tensor)
        if world.rank == 0:
            kept[name] = full.cpu().contiguous()
    return kept


def newest(folder: Path, world: World = ALONE, *, frozen: str | None = None) -> Saved | None:
    """The newest checkpoint whose files match its manifest; None when there is none. Broken ones are passed over and named.

    Every rank must call this: rank 0 hashes the files, once each, and the others take its word. `frozen` is the digest of the frozen
    weights where this run holds them already: their file is then neither hashed nor read.
    """
    found = _newest_whole(folder, frozen) if world.rank == 0 else None
    name = world.from_first(None if found is None else found.name)
    _check_alike(folder, name, world)
    return None if name is None else _opened(folder / name, frozen)


def _newest_whole(folder: Path, frozen: str | None) -> Path | None:
    for path in sorted(folder.glob(f"{PREFIX}*"), reverse=True):
        try:
            _check(path, frozen)
        except ValueError as error:
            say_once(f"passed over a broken checkpoint: {error}")
        else:
            return path
    return None


def _check_alike(folder: Path, name: str | None, world: World) -> None:
    """Ranks on hosts that do not share `folder` would go on from different steps, and wait for each other for ever."""
    steps = sorted(folder.glob(f"{PREFIX}*"))
    manifest = folder / (name or "") / "manifest.json"
    mine = str(bool(steps)) if name is None else manifest.read_text(encoding="utf-8") if manifest.is_file() else ""
    if world.sum(float(world.from_first(mine) != mine)) > 0:
        here = name if name and mine else steps[-1].name if steps else "0"
        raise ValueError(
            f"rank {world.rank} finds step {int(here.removeprefix(PREFIX))} in {folder}, other ranks another; give a folder that all "
            "hosts share."
        )


def read_run(path: Path) -> Saved:
    """Raises ValueError in one sentence when a file is missing or altered."""
    _check(path, None)
    return _opened(path, None)


def _check(path: Path, frozen: str | None) -> None:
    """That the files are those of the manifest, and can be read."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        for name, digest in manifest["sha256"].items():
            if _digest(path / name) != digest:
                raise ValueError(f"{path / name} differs from its manifest; the checkpoint is not whole.")
        digest = manifest.get("frozen")
        if frozen is not None and digest != frozen:
            raise ValueError(f"{path} was saved beside other frozen weights than this run's.")
        if digest is not None and frozen is None and _digest(path.parent / FROZEN) != digest:
            raise ValueError(f"{path.parent / FROZEN} differs from the manifest of {path.name}; it is not whole.")
        _opened(path, frozen)
    except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a whole checkpoint ({error}).") from None


def _opened(path: Path, frozen: str | None) -> Saved:
    """A checkpoint that was checked."""
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    digest = manifest.get("frozen")
    rest = [path.parent / FROZEN] if digest is not None and frozen is None else []
    return Saved(
        step=manifest["step"],
        weights=Stored(path, [*rest, path / "weights.safetensors"]),
        optimizer=Stored(path, [path / "optimizer.safetensors"]),
        state=json.loads((path / "state.json").read_text(encoding="utf-8")),
        frozen=digest,
        files=path / STREAM if (path / STREAM).is_dir() else None,
    )


@torch.no_grad()
def restore_weights(
    model: nn.Module, weights: Stored, *, helpers: Sequence[str] = (), only_trained: bool = False
) -> None:
    """Into a model with the same parameters, sharded or not, of which each rank reads its own part. Its `helpers` stay as they are, and
    what is frozen where the weights are `only_trained`."""
    own = {name: p for name, p in _own(model, helpers).items() if p.requires_grad or not only_trained}
    if set(own) != set(weights):
        odd = sorted(set(own) ^ set(weights))
        raise ValueError(
            f"the checkpoint and the model differ in {len(odd)} parameters, the first {odd[0]}; resume the same recipe."
        )
    for name, parameter in own.items():
        (dtype, shape), asked = weights.kind(name), (parameter.dtype, tuple(parameter.shape))
        if (dtype, shape) != asked:
            raise ValueError(
                f"the checkpoint holds {name} as {dtype} {shape}, the model as {asked[0]} {asked[1]}; "
                "resume with the same settings (dtype, LoRA rank), or start in another folder."
            )
        own_part(parameter).copy_(weights.part(name, parameter))


def restore_optimizer(optimizer: Optimizer, saved: Stored) -> None:
    """Moments sharded as their masters are, of which each rank reads its own part; counters as they are."""
    optimizer.restore(_Sharded(saved, optimizer.masters))


class _Sharded(Mapping[str, Tensor]):
    """An optimizer's stored state by `kind/parameter`, each tensor sharded as that parameter's master."""

    def __init__(self, stored: Stored, masters: Mapping[str, Tensor]) -> None:
        self.stored, self.masters = stored, masters

    def __getitem__(self, key: str) -> Tensor:
        master = self.masters[key.split("/", 1)[1]]
        if not self.stored.source.shape(key):  # a counter
            return self.stored[key]
        return from_part(self.stored.part(key, master), master)

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
