"""Fills the generated parts of the docs: the tree and commands from captions, the shape legend, tables of measured numbers.

A block stands between `<!-- NAME -->` and `<!-- end -->`. Names: tree, commands, legend; story, which shows the reports in bench/story;
bench:SUITE and bench:SUITE/START, which show the rows of bench/results.jsonl of that suite, or those whose metric begins so.
`python -m dev.blocks` (make docs) rewrites the files; a test fails when one differs from what this would write.
"""

import json
import re
import statistics
from pathlib import Path
from typing import Any

from qvl.commands import cli
from qvl.core.legend import LEGEND
from qvl.core.log import read_jsonl

ROOT = Path(__file__).resolve().parent.parent
FLOORS = (
    ("commands",),
    ("recipes",),
    ("finetune", "serve", "eval"),
    ("posttrain",),
    ("train", "agent"),
    ("session",),
    ("engine", "parallel", "curate"),
    ("data", "worlds", "scoring"),
    ("prompt", "show"),
    ("model", "outside"),
    ("core",),
)
_BLOCK = re.compile(r"(<!-- (tree|commands|legend|story|bench:[^>\n]+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    for file in documents():
        text = file.read_text(encoding="utf-8")
        if (new := filled(text)) != text:
            file.write_text(new, encoding="utf-8")
            print(f"filled {file.relative_to(ROOT)}")


def documents() -> list[Path]:
    """The pages that may hold blocks."""
    return sorted(
        [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("dev/**/*.md"), *ROOT.glob("bench/**/*.md")]
    )


def filled(text: str) -> str:
    """A page with every block made anew."""
    return _BLOCK.sub(lambda match: f"{match[1]}{block(match[2])}\n{match[3]}", text)


def block(name: str) -> str:
    """The text that belongs into the block of this name."""
    if name == "tree":
        return tree()
    if name == "commands":
        return _table(("command", "what it does"), [(f"`qvl {cli.spoken(n)}`", c) for n, c in cli.commands().items()])
    if name == "legend":
        return _table(("letter", "axis"), [(f"`{letter}`", meaning) for letter, meaning in LEGEND.items()])
    if name == "story":
        return story([json.loads(file.read_text()) for file in sorted((ROOT / "bench" / "story").glob("*.json"))])
    return bench(name.removeprefix("bench:"), read_jsonl(ROOT / "bench" / "results.jsonl"))


def tree() -> str:
    """The package as captions: floors from the top down, a room's files in alphabetical order."""
    lines = [_line("qvl/", ROOT / "qvl" / "__init__.py", 0)]
    for number, rooms in reversed(list(enumerate(reversed(FLOORS)))):
        for room in rooms:
            folder = ROOT / "qvl" / room
            if (folder / "__init__.py").exists():
                lines += ["", _line(f"{number} {room}/", folder / "__init__.py", 2), *_inside(folder, 4)]
    return "\n".join(["```", *lines, "```"])


def _inside(folder: Path, indent: int) -> list[str]:
    lines = [_line(file.name, file, indent) for file in sorted(folder.glob("*.py")) if file.name != "__init__.py"]
    for inner in sorted(path.parent for path in folder.glob("*/__init__.py")):
        lines += [_line(f"{inner.name}/", inner / "__init__.py", indent), *_inside(inner, indent + 2)]
    return lines


def _line(name: str, file: Path, indent: int) -> str:
    return f"{' ' * indent}{name:<{22 - indent}} {cli.caption(file)}"


def bench(name: str, rows: list[dict[str, Any]]) -> str:
    """The newest row of each measurement beside each peer on each machine as a table; without rows, a line that says so."""
    newest: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in rows:  # rows stand in the order in which they were measured
        if row["suite"] == name or f"{row['suite']}/{row['metric']}".startswith(name):
            peer = row["peer"].split()[0]  # its name, whatever the version
            newest[row["metric"], row["shape"], row["machine"], str(row["threads"]), peer] = row
    if not newest:
        return f"No rows of `{name}` yet; `make bench` measures them."
    head = ("what", "shape", "qvl", "peer", "peer / qvl", "peer is", "machine", "threads", "date", "commit")
    cells = [
        (
            row["metric"],
            row["shape"],
            f"{row['value']:.4g} {row['unit']}",
            f"{row['peer_value']:.4g} {row['unit']}",
            f"{row['ratio']:.2f}",
            *(str(row[key]) for key in ("peer", "machine", "threads", "date", "commit")),
        )
        for _, row in sorted(newest.items())
    ]
    return _table(head, cells)


def story(reports: list[dict[str, Any]]) -> str:
    """What runs of the story got, one row a promise: the mean and the worst of the quickstart's runs, then the long story beside its own
    promise."""
    quick, long = ([r for r in reports if r["size"] == size] for size in ("quickstart", "story"))
    if not quick:
        return "No report in `bench/story` yet; put a `report.json` of `make quickstart` or `make story` there."
    rows = []
    for number, skill in enumerate(quick[0]["chapters"]):
        got = [run["chapters"][number]["got"] for run in quick]
        worst = max(got) if skill.get("is_less_better") else min(got)
        cells = [skill["chapter"], re.split(r" \(|:| in [\d,]+ tokens", skill["skill"])[0]]
        cells += [f"{skill[key]:.3g}" for key in ("floor", "promise")]
        cells += [f"{statistics.mean(got):.3f}", f"{worst:.3f}"]
        cells += [f"{statistics.stdev(got):.3f}" if len(got) > 1 else "-"]
        for run in long:
            told = run["chapters"][number]
            cells += [f"{told['promise']:.3g}", f"{told['got']:.3f}"]
        rows.append(tuple(cells))
    head = ["chapter", "skill", "floor", "promise", f"mean of {len(quick)} runs", "worst", "deviation"]
    head += [name for run in long for name in ("`make story` promises", f"and got, seed {run['seed']}")]
    minutes = [run["seconds"] / 60 for run in quick]
    last = ["", "minutes", "", "", f"{statistics.mean(minutes):.0f}", f"{max(minutes):.0f}", ""]
    last += [cell for run in long for cell in ("", f"{run['seconds'] / 60:.0f}")]
    return _table(tuple(head), [*rows, tuple(last)])


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    main()
