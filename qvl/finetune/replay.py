"""Replay: what a tuning run practises beside its data, so that other skills stay: files of the user's, or what the model writes itself."""

import json
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from qvl.core.files import write_text
from qvl.core.log import log
from qvl.data.formats import FORMATS
from qvl.data.index import build_index, fingerprint, read_index
from qvl.data.ingest import ENDINGS, import_data
from qvl.data.mixture import Mixture, Replay
from qvl.data.order import key_of
from qvl.data.record import Record
from qvl.data.shard import ShardWriter
from qvl.data.store import is_remote
from qvl.finetune.rehearsal import LENGTH, rehearse
from qvl.model.qwen3vl import Qwen3VL
from qvl.parallel.data_parallel import World
from qvl.prompt.processor import Processor

PASSES = 4
"""How often a run may meet a text that the model wrote itself: after about four passes little is learned from a text but the text."""
TEXT_ENDINGS = (".txt", ".md")


@dataclass(frozen=True, kw_only=True)
class ReplayChoice:
    """What the user asked for, and what is needed to make it."""

    what: str
    model: str
    """Where the weights came from that write the texts."""
    share: float
    samples: int
    folder: Path
    run_tokens: int
    pack_tokens: int
    seed: int


def with_replay(mixture: Mixture, choice: ReplayChoice, model: Qwen3VL, processor: Processor, world: World) -> Mixture:
    """The mixture with everything that is replayed as mixture files.

    What is made or imported lies in `choice.folder`, under a name that follows from what it was made of: a run that goes on finds it, and
    one with other wishes does not.
    """
    what = _resolved(mixture, choice)
    if choice.what == "auto" and mixture.stages:
        log.warning("the mixture has stages, so nothing is replayed but what their weights say")
    if what == "none":
        return replace(mixture, replay=())
    ready = [
        replace(entry, path=_mixture_file(_placed(entry.path, mixture.folder), choice.folder, processor, world))
        for entry in mixture.replay
    ]
    if what == "self":
        ready.append(_own(choice, model, processor, world))
    elif what != "mixture":
        ready.append(Replay(path=_mixture_file(what, choice.folder, processor, world), share=choice.share))
    return replace(mixture, replay=tuple(ready))


def needs_model(mixture: Mixture, choice: ReplayChoice) -> bool:
    """Whether `with_replay` will have the model write texts, for which it needs its weights."""
    return _resolved(mixture, choice) == "self" and not (_own_folder(choice) / "replay.json").exists()


def _resolved(mixture: Mixture, choice: ReplayChoice) -> str:
    if choice.what != "auto":
        return choice.what
    return "mixture" if mixture.replay or mixture.stages else "self"


def _own_folder(choice: ReplayChoice) -> Path:
    made_of = key_of(choice.model, choice.seed, choice.share, choice.samples, choice.pack_tokens)
    return choice.folder / f"self-{made_of:016x}"


def _own(choice: ReplayChoice, model: Qwen3VL, processor: Processor, world: World) -> Replay:
    """What the model writes itself. Each rank writes a part."""
    folder = _own_folder(choice)
    done = folder / "replay.json"
    if not done.exists():
        wanted = choice.share * choice.run_tokens / PASSES
        half = max(4, min(choice.samples, math.ceil(wanted / LENGTH)) // 2)
        if world.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped while it wrote
            folder.mkdir(parents=True)
        world.barrier()
        mine = range(half)[world.rank :: world.size]
        records = rehearse(model, processor, mine, mine, pack_tokens=choice.pack_tokens, seed=choice.seed)
        _write(records, folder, processor, prefix=f"rank-{world.rank}")
        world.barrier()
        if world.rank == 0:
            _tell(folder, choice)
        world.barrier()
    told = json.loads(done.read_text())
    passes = told["share"] * choice.run_tokens / max(told["tokens"], 1)
    if passes > 1.05 * PASSES and world.rank == 0:
        log.warning(
            "the run is longer than the one these texts were written for: they come round %.0f times. A new --out writes more.",
            passes,
        )
    return Replay(path=str((folder / "mixture.yaml").resolve()), share=told["share"])


def _tell(folder: Path, choice: ReplayChoice) -> None:
    """The mixture file of what was written, and the share it is good for."""
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise ValueError(
            "the model wrote nothing that could be replayed; give --replay a file of texts or chats, or --replay none."
        )
    kept = [read_index(str(shard), None) for shard in shards]
    tokens = sum(int(index.text_S.sum()) for index in kept)
    share = min(choice.share, PASSES * tokens / choice.run_tokens)
    log.info(
        "the model wrote %d texts and chats of its own to replay, %s tokens: %.1f%% of the run in at most %d passes",
        sum(index.num_records for index in kept),
        f"{tokens:,}",
        100 * share,
        PASSES,
    )
    if share < choice.share / 2:
        log.warning(
            "that is less than the share of %g that was asked for; real text and chats (--replay FILE) keep more",
            choice.share,
        )
    _write_mixture(folder, str(folder.resolve()))
    write_text(folder / "replay.json", json.dumps({"share": share, "tokens": tokens}))


def _mixture_file(path: str, folder: Path, processor: Processor, world: World) -> str:
    """A mixture file for what may be one already, shards with their indexes, rows to import, or plain text."""
    if Path(path).suffix in (".yaml", ".yml"):
        return str(Path(path).resolve())
    folder = folder / f"file-{key_of(str(Path(path).resolve()), *_stamps(Path(path))):016x}"
    made = folder / "mixture.yaml"
    if world.rank == 0 and not made.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if _is_shards(path):
            _write_mixture(folder, path if is_remote(path) else str(Path(path).resolve()))
        else:
            _import(Path(path), folder, processor)
            _write_mixture(folder, str(folder.resolve()))
    world.barrier()
    return str(made.resolve())


def _stamps(path: Path) -> list[int]:
    """Size and time of what a path names, so that a file that was changed is imported anew."""
    files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path] if path.exists() else []
    return [number for f in files for number in (f.stat().st_size, f.stat().st_mtime_ns)]


def _is_shards(path: str) -> bool:
    return is_remote(path) or path.endswith(".tar") or (Path(path).is_dir() and any(Path(path).glob("*.tar")))


def _import(path: Path, folder: Path, processor: Processor) -> None:
    if path.suffix in TEXT_ENDINGS:
        text = _text(path)
        records = [
            Record(
                id=path.stem,
                kind="pretrain",
                source=path.stem,
                category="replay/text",
                messages=({"role": "document", "content": text},),
            )
        ]
        _write(records, folder, processor, prefix="shard")
        return
    if not path.exists():
        raise ValueError(
            f"--replay is {path}, which does not exist; give auto, self, none, a mixture file, shards, a file ending in "
            f"{', '.join((*ENDINGS, *TEXT_ENDINGS))}, or a folder of such rows."
        )
    report = import_data(path, folder, category="replay")
    if report.rejected:
        log.warning("%d rows of %s cannot be replayed, see %s", report.rejected, path, report.rejects)
    if not report.written:
        raise ValueError(f"{path} holds no row that can be replayed; expected one of the formats {', '.join(FORMATS)}.")
    mark = fingerprint(processor)
    for shard in report.shards:
        build_index(str(shard), processor, mark=mark, complain=log.warning)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as UTF-8 text ({error}).") from None


def _write(records: list[Record], folder: Path, processor: Processor, *, prefix: str) -> None:
    with ShardWriter(folder, prefix=prefix) as writer:
        for record in records:
            writer.write(record, {})
    for path in writer.paths:
        build_index(str(path), processor, complain=log.warning)


def _write_mixture(folder: Path, source: str) -> None:
    # JSON is YAML too, and quotes what must be quoted.
    write_text(folder / "mixture.yaml", json.dumps({"sources": [{"path": source}]}))


def _placed(path: str, folder: str) -> str:
    return path if is_remote(path) or Path(path).is_absolute() else str(Path(folder) / path)
