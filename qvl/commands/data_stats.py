"""qvl data stats: tokens for each category and source, lengths, licences and repeats of indexed shards."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from qvl.data.index import read_index
from qvl.data.report import Stats, Tally, stats_of
from qvl.data.store import Store, all_shards


@dataclass(frozen=True, kw_only=True)
class DataStats:
    """Reads the indexes alone; tokens are those of the model the indexes were built with."""

    data: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Shards, folders of shards, patterns or addresses."""
    json: bool = False
    """Print JSON for a program instead of tables."""


def run(args: DataStats) -> None:
    store = Store()
    stats = stats_of([read_index(shard, None, store) for shard in all_shards(args.data)])
    if args.json:
        print(json.dumps({**asdict(stats), "total": asdict(stats.total)}, ensure_ascii=False))
        return
    console = Console()
    console.print(_tallies("category", stats.by_category, stats.total))
    console.print(_tallies("source", stats.by_source, stats.total))
    console.print(_lengths(stats))
    for title, counts in (("licence", stats.by_license), ("kind", stats.by_kind)):
        table = Table(title, "records")
        for name, count in sorted(counts.items(), key=lambda entry: -entry[1]):
            table.add_row(name, f"{count:,}")
        console.print(table)
    console.print(
        f"{stats.bad:,} unreadable, {stats.twice:,} repeated, longest {stats.longest:,} tokens", highlight=False
    )


def _tallies(title: str, tallies: Mapping[str, Tally], total: Tally) -> Table:
    table = Table(title, "records", "text tokens", "visual tokens", "learned", "share")
    every = max(1, total.text + total.visual)
    for name, t in sorted(tallies.items(), key=lambda entry: -(entry[1].text + entry[1].visual)):
        share = (t.text + t.visual) / every
        table.add_row(name or "-", f"{t.records:,}", f"{t.text:,}", f"{t.visual:,}", f"{t.targets:,}", f"{share:.1%}")
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _lengths(stats: Stats) -> Table:
    table = Table("tokens from", "records", "")
    most = max(stats.lengths.values(), default=1)
    for edge, count in sorted(stats.lengths.items()):
        table.add_row(f"{edge:,}", f"{count:,}", "#" * max(1, round(40 * count / most)))
    return table
