"""qvl train: go on training a checkpoint on your own data, in full or by LoRA; a stopped run goes on where it was."""

from dataclasses import dataclass, replace

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qvl.model.lora import LoraConfig
from qvl.recipes.tune import Tune, tune
from qvl.train.loop import StepReport


@dataclass(frozen=True, kw_only=True)
class Train(Tune):
    """Continual pretraining or supervised fine-tuning, as the records' kinds say; under torchrun on many devices."""

    lora_rank: int = 0
    """Above 0: train LoRA factors of this rank on the decoder's linear layers instead of the weights."""


def run(args: Train) -> None:
    lora = args.lora or (LoraConfig(r=args.lora_rank, alpha=2.0 * args.lora_rank) if args.lora_rank else None)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[now]}"),
    ) as progress:
        task = progress.add_task("training", total=args.steps, now="")

        def show(report: StepReport) -> None:
            now = f"loss {report.values['loss']:.3f}  {report.values['tokens_per_second']:,.0f} tokens/s"
            progress.update(task, completed=report.step, now=report.skipped or now)

        folder = tune(replace(args, lora=lora), [show])
    print(f"wrote {folder}")
