"""qvl parity: is this checkpoint the same network here as in transformers?"""

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from qvl.eval.parity import BF16_CASE_LIMIT, BF16_LIMIT, GRADIENT_LIMIT, LOGIT_LIMIT, ParityRow, compare
from qvl.outside.hub import resolve


@dataclass(frozen=True, kw_only=True)
class Parity:
    """Compare logits, gradients and bf16 error with transformers (if installed) on random text, pictures and video."""

    model: str
    """Checkpoint folder, or a name on the hub."""
    gradients: bool = True
    """Compare gradients too; needs three times the weights in memory."""
    seed: int = 0
    """Of the random inputs."""


def run(args: Parity) -> int:
    rows = compare(resolve(args.model), with_gradients=args.gradients, seed=args.seed)
    show(rows)
    return 0 if all(row.passed for row in rows) else 1


def show(rows: list[ParityRow]) -> None:
    table = Table(
        title="against transformers, fp32 unless said",
        caption=f"limits: logits {LOGIT_LIMIT:g}, gradients {GRADIENT_LIMIT:g}, bf16 {BF16_CASE_LIMIT:g}, "
        f"{BF16_LIMIT:g} for all together",
    )
    for name in ("input", "logits, max |d|", "gradients, max rel.", "bf16 error, ours / theirs", ""):
        table.add_column(name, justify="left" if name in ("input", "") else "right")
    for row in rows:
        gradient = "-" if row.gradient_error is None else f"{row.gradient_error:.1e}"
        ratio = "-" if row.bf16_ratio is None else f"{row.bf16_ratio:.2f}"
        table.add_row(row.case, f"{row.logit_error:.1e}", gradient, ratio, "same" if row.passed else "DIFFERENT")
    if rows and rows[0].bf16_together is not None:
        table.add_row("all", "", "", f"{rows[0].bf16_together:.2f}", "")
    Console().print(table)
