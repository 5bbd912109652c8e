"""python -m bench [SUITE ...] [--threads N] [--rounds N] [--beside FILE] [--keep]: measure, print, with --keep append to results.jsonl."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench import answer, engine, network, train
from bench.rows import Row, append

SUITES = {"network": network.rows, "answer": answer.rows, "engine": engine.rows, "train": train.rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "suites", nargs="*", default=list(SUITES), help=f"of {', '.join(SUITES)}; all when none is named"
    )
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves torch's own choice")
    parser.add_argument("--rounds", type=int, default=7, help="paired rounds for each row")
    parser.add_argument("--keep", action="store_true", help="append the rows to bench/results.jsonl")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--beside", type=Path, help="lines of the programs in bench/peers, run in the same hour: one more row for each"
    )
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    rows: list[Row] = []
    for name in args.suites:
        for row in SUITES[name](rounds=args.rounds, device=args.device):
            for each in (row, *others(row, args.beside)):
                rows.append(each)
                if args.keep:  # at once: what was measured outlives a run that is broken off
                    append(each, args.device)
    show(rows)


def others(row: Row, file: Path | None) -> Iterator[Row]:
    """The row once more for each peer that was timed apart with as many threads."""
    for line in file.read_text(encoding="utf-8").splitlines() if file else ():
        found = json.loads(line)
        if (found["metric"], found["threads"]) == (row.metric, row.threads):
            seconds = found["seconds"]
            yield replace(row, peer=f"{found['peer']}; timed apart", peer_value=seconds, ratio=seconds / row.value)


def show(rows: list[Row]) -> None:
    table = Table(title=f"{rows[0].threads} threads, {rows[0].rounds} paired rounds, medians")
    for name in ("row", "ours", "peer", "peer / ours", "floor", "of the floor", "peer is"):
        table.add_column(name, justify="left" if name in ("row", "peer is") else "right")
    for r in rows:
        table.add_row(
            r.metric,
            f"{r.value:.4g} {r.unit}",
            f"{r.peer_value:.4g} {r.unit}",
            f"{r.ratio:.2f}",
            f"{r.limit:.4g} {r.unit}",
            f"{r.limit / r.value:.0%}",
            r.peer,
        )
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
