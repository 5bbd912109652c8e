"""What an ablation found: verdicts as a table, report.json, and a page with a point for every seed."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from qvl.recipes.ablate.ablation import Ablation
from qvl.recipes.ablate.compare import Difference, compare
from qvl.recipes.ablate.runner import Row
from qvl.show.curves import Line, Plot
from qvl.show.page import Html, figure, page, section, table, text


def differences(ablation: Ablation, rows: Sequence[Row]) -> list[Difference]:
    """Every other arm against the first, on every probe, over the seeds that both have."""
    first, *others = ablation.arms
    found = []
    for label, probe in ablation.probes.items():
        floor = probe.without_looking() if probe.without_looking else None
        for other in others:
            seeds = [seed for seed in _values(rows, first, label) if seed in _values(rows, other, label)]
            mine, theirs = ([_values(rows, arm, label)[seed] for seed in seeds] for arm in (other, first))
            found.append(
                compare(
                    label,
                    other,
                    first,
                    mine,
                    theirs,
                    is_less_better=probe.is_less_better,
                    without_looking=floor,
                )
            )
    return found


def write_report(ablation: Ablation, rows: Sequence[Row], out: Path) -> list[Difference]:
    """report.json and report.html in `out`."""
    found = differences(ablation, rows)
    report: dict[str, Any] = {
        "ablation": ablation.name,
        "question": ablation.question,
        "expectation": ablation.expectation,
        "notes": list(ablation.notes),
        "arms": {name: asdict(arm) for name, arm in ablation.arms.items()},
        "steps": rows[0]["steps"],
        "samples": rows[0]["steps"] * ablation.samples,
        "differences": [asdict(d) | {"verdict": d.verdict} for d in found],
        "rows": list(rows),
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (out / "report.html").write_text(_page(ablation, rows, found), encoding="utf-8")
    return found


def show(found: Sequence[Difference], console: Console) -> None:
    """A line for each probe: means, then the verdict."""
    for d in found:
        floor = "" if d.without_looking is None else f", without looking {d.without_looking:.3f}"
        console.print(
            f"{d.probe}: {d.arm} {d.arm_mean:.3f}, {d.against} {d.against_mean:.3f}{floor}: [bold]{d.verdict}[/bold]",
            highlight=False,
            soft_wrap=True,
        )
    console.print("+- is one standard error over seeds", style="dim", highlight=False)


def _values(rows: Sequence[Row], arm: str, label: str) -> dict[int, float]:
    return {row["seed"]: row["probes"][label] for row in rows if row["arm"] == arm}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _page(ablation: Ablation, rows: Sequence[Row], found: Sequence[Difference]) -> str:
    heads = ("probe", "arm", "its mean", "against", "mean", "without looking", "verdict")
    body: list[str] = [
        section(
            "What was found",
            table(
                heads,
                [
                    (d.probe, d.arm, d.arm_mean, d.against, d.against_mean, _number(d.without_looking), d.verdict)
                    for d in found
                ],
            ),
            text(
                "A difference is called seen when zero lies outside its 95% interval (paired t test over seeds). What the seeds would "
                "have seen is the true difference that such a test finds four times in five. No correction for the number of probes."
            ),
        ),
        section("What was expected", text(ablation.expectation), *(text(note) for note in ablation.notes)),
        section("Every seed", *(_figure(ablation, rows, label) for label in ablation.probes)),
        section(
            "The runs",
            table(
                ("arm", "seed", "parameters", "seconds", "last loss", "steps not taken"),
                [[r[k] for k in ("arm", "seed", "parameters", "seconds", "loss", "skipped_steps")] for r in rows],
            ),
        ),
    ]
    lead = f"{len(ablation.arms)} arms, {rows[0]['steps']} steps of {ablation.samples} samples a run"
    return page(ablation.question, body, lead=lead)


def _figure(ablation: Ablation, rows: Sequence[Row], label: str) -> Html:
    """Seeds across, a dot for each arm."""
    lines = []
    for name in ablation.arms:
        values = _values(rows, name, label)
        lines.append(Line(name=name, x=[float(seed) for seed in values], y=list(values.values()), dots=True))
    probe = ablation.probes[label]
    better = "less" if probe.is_less_better else "more"
    plot = Plot(lines=lines, title=label, x_label="seed", y_label=f"{probe.unit} ({better} is better)", height=220)
    return figure(Html(plot.svg()))
