"""qvl plan: what a pretraining stage of the report trains, on which tokens, and what it would cost on your devices."""

import json
from dataclasses import asdict, dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table

from qvl.data.yaml_file import yaml_text
from qvl.recipes.pretrain import STAGES, cost, train_settings


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Counts, not measurements: tokens, steps, FLOPs, days, memory and disk of V0 and S0 to S3 (report Table 1) at a published size."""

    size: Literal["2B", "4B", "8B", "32B", "30B-A3B", "235B-A22B"] = "8B"
    stage: Literal["all", "v0", "s0", "s1", "s2", "s3"] = "all"
    devices: int = 256
    peak_tflops: float = 989.0
    """Dense bf16 peak of one device; 989 is an H100's or H200's."""
    mfu: float = 0.4
    """Part of the peak that is reached; 0.4 is a good run, measure your own."""
    json: bool = False
    """Print one JSON object for each stage."""
    yaml: bool = False
    """Print the settings of `qvl train` that make it this stage, for its --config."""


def run(args: Plan) -> None:
    if args.yaml:
        if args.stage == "all":
            raise ValueError("--yaml prints one stage; say which with --stage v0, s0, s1, s2 or s3.")
        print(yaml_text(train_settings(STAGES[args.stage]())), end="")
        return
    console = Console()
    for name in STAGES if args.stage == "all" else (args.stage,):
        stage = STAGES[name]()
        made = cost(stage, args.size, devices=args.devices, peak=args.peak_tflops * 1e12, mfu=args.mfu)
        memory = sum(made.memory_bytes.values())
        if args.json:
            print(
                json.dumps({"stage": asdict(stage), "steps": stage.steps, "cost": asdict(made), "memory_bytes": memory})
            )
            continue
        table = Table(title=f"{name}: {stage.goal} ({args.size})", show_header=False, title_justify="left")
        trained = ", ".join(f"{part} x{stage.rates.of(part):g}" for part in made.parameters if stage.rates.of(part) > 0)
        rows = {
            "trained": f"{trained}: {made.trained:,} of {sum(made.parameters.values()):,} parameters",
            **(
                {"pictures": f"{stage.pictures:,} with captions of {stage.caption_tokens} tokens"}
                if stage.pictures
                else {}
            ),
            "tokens": f"{stage.tokens:,} in packs of {stage.pack_tokens:,}",
            "steps": f"{stage.steps:,} of {stage.tokens_per_step:,} tokens ({stage.packs_per_step:,} packs)",
            "mixture": ", ".join(f"{category} {share:.0%}" for category, share in stage.mixture.items()),
            "FLOPs": f"{made.flops:.2e}",
            "time": f"{made.days:,.1f} days on {args.devices} devices at {args.mfu:.0%} of {args.peak_tflops:g} TFLOP/s",
            "memory": f"{memory / 2**30:.1f} GiB on each device, one pack at a time: "
            + ", ".join(f"{what} {size / 2**30:.1f}" for what, size in made.memory_bytes.items()),
            "disk": str(made.checkpoint_bytes),
            "ours": "; ".join(stage.ours) + "; batch size, shares and rates are in no report",
        }
        for what, said in rows.items():
            table.add_row(what, said)
        console.print(table)
