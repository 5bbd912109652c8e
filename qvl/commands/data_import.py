"""qvl data import: turn JSONL, JSON, parquet or a Hugging Face folder into tar shards, bad rows listed with their reasons."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn

from qvl.data.ingest import import_data
from qvl.outside.media import MediaLimits
from qvl.outside.workers import WorkerPool

MOST_NAMES = 8


@dataclass(frozen=True, kw_only=True)
class DataImport:
    """Reads OpenAI messages, ms-swift, LLaVA or ShareGPT conversations, our own records, or rows with plain text.

    Media are copied into the shards and measured, so that lengths are known later without decoding.
    """

    source: Annotated[Path, tyro.conf.Positional]
    """A .jsonl, .json, .parquet or .arrow file, or a folder of them."""
    out: Path
    """Folder for the shards."""
    format: Literal["auto", "openai", "swift", "llava", "text", "record"] = "auto"
    """What the rows are; auto tells by each row's keys."""
    kind: Literal["sft", "rl", "pref"] = "sft"
    """What conversations are for. Plain text is always for pretraining. rl rows need a reward (scorer, truth), pref rows a rejected answer
    (rejected_response, rejected_messages, or chosen and rejected)."""
    media_root: Path | None = None
    """Folder that the rows' media paths start from; the source's own without it. Nothing outside it is read."""
    name: str = ""
    """Name of the source in counts; the file's name without it."""
    category: str = ""
    """Category of rows that do not say."""
    license: str = ""
    """Licence of rows that do not say, as an SPDX name."""
    lang: str = ""
    max_records: int = 10_000
    """Records of one shard."""
    max_shard_mb: int = 1024
    """Size at which a shard is closed."""


def run(args: DataImport) -> int:
    columns = (SpinnerColumn(), TextColumn("{task.completed:,} rows"))
    with WorkerPool(MediaLimits()) as decoder, Progress(*columns, transient=True, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)
        report = import_data(
            args.source,
            args.out,
            format=None if args.format == "auto" else args.format,
            kind=args.kind,
            media_root=args.media_root,
            name=args.name,
            category=args.category,
            license=args.license,
            lang=args.lang,
            max_records=args.max_records,
            max_bytes=args.max_shard_mb * 1024**2,
            decoder=decoder,
            progress=lambda done: bar.update(task, completed=done),
        )
    if not report.written and not report.rejected:
        raise ValueError(f"{args.source} holds no rows; nothing was imported.")
    if len(report.files) > 1:
        names = [str(file.relative_to(args.source)) for file in report.files]
        more = f" and {len(names) - MOST_NAMES:,} more" if len(names) > MOST_NAMES else ""
        print(f"read {len(names):,} files, each as training data: {', '.join(names[:MOST_NAMES])}{more}")
    print(f"wrote {report.written:,} records in {len(report.shards)} shards to {args.out}")
    if report.repeated:
        print(f"{report.repeated:,} rows had the id of an earlier one; a mark of their content was put behind it")
    for key, count in report.unread.items():
        print(f"the key {key!r} of {count:,} rows has no place in a record and was not read")
    if report.rejected:
        print(f"left out {report.rejected:,} rows; their reasons are in {report.rejects}, for instance:")
        for line in report.first:
            print(f"  {line}")
    return 0 if report.written else 1
