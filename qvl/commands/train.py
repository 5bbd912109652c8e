"""qvl train: go on training a checkpoint on your own data, in full or by LoRA; a stopped run goes on where it was."""

import signal
from dataclasses import dataclass
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qvl.core.device import place
from qvl.finetune.config import Tune
from qvl.finetune.dry_run import dry_run
from qvl.finetune.dry_run import table_of as table_of_dry_run
from qvl.finetune.pre_stage import PreTrained, train_pre_stage
from qvl.finetune.text_guard import table_of
from qvl.finetune.tune import Tuned, tune
from qvl.parallel.data_parallel import leave_world
from qvl.train.loop import StepReport


@dataclass(frozen=True, kw_only=True)
class Train(Tune):
    """Continual pretraining or supervised fine-tuning, as the records' kinds say. Writes checkpoints and log.jsonl to --out, and at the end
    --out/export, a complete Hugging Face folder.

    A tenth of the tokens is replay, by default texts and chats that the model writes itself before the first step, so that it keeps what
    it could do (--replay, --replay-share). Held-out text and a part of your records are judged before, during and after (a table at the
    end, --out/report.json); a run that loses text ability stops, exports its last good checkpoint and leaves with code 1
    (--max-text-loss).

    --stage v0 trains the vision encoder on records of one image and its caption instead; some are held out, and each of
    their images looks for its caption among all of theirs, before and after.

    Ctrl-C (or SIGTERM) finishes the step, saves, and leaves; the same command goes on from there. A second Ctrl-C leaves at once.
    On many devices: torchrun --no-python --nproc-per-node=8 qvl train ...
    """

    dry_run: bool = False
    """Print devices, dtype, parameters, records, tokens, steps and memory by part, and stop; --out is not touched."""


class Stopper:
    """Remembers the first SIGINT or SIGTERM, and lets the second one through."""

    def __init__(self) -> None:
        self.is_asked = False
        self.is_training = False
        """Before the first step there is nothing to save, and the first signal stops at once."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if not self.is_training:
            raise KeyboardInterrupt
        self.is_asked = True
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        Console(stderr=True).print("stopping after this step; once more to stop at once, without saving")


def run(args: Train) -> int:
    if args.dry_run:
        if place().rank == 0:
            Console().print(table_of_dry_run(dry_run(args)))
        return 0
    stopper = Stopper()
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[now]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("training", total=args.steps, now="", visible=False)

        def show(report: StepReport) -> None:
            stopper.is_training = True
            now = f"loss {report.values['loss']:.3f}  {report.values['tokens_per_second']:,.0f} tokens/s"
            progress.update(task, completed=report.step, now=report.skipped or now, visible=True)

        if args.stage == "v0":
            made = train_pre_stage(args, [show], should_stop=lambda: stopper.is_asked)
        else:
            made = tune(args, [show], should_stop=lambda: stopper.is_asked)
    code = tell_pre_stage(args, made) if made is None or isinstance(made, PreTrained) else tell(args, made)
    leave_world(code)
    return code


def tell_pre_stage(args: Train, made: PreTrained | None) -> int:
    """How a run of V0 ended, or that a run was stopped, and its exit code."""
    if made is None:
        print(f"stopped and saved in {args.out}; the same command goes on from there")
        return 130
    if (zero := made.zero_shot) is not None and zero.after is not None:
        print(
            f"zero-shot retrieval, {zero.images:,} held-out images among {zero.captions:,} captions: {zero.before:.3f} before, "
            f"{zero.after:.3f} after, {1 / zero.captions:.3f} by chance"
        )
    print(f"wrote {made.export}")
    return 0


def tell(args: Train, tuned: Tuned) -> int:
    """How the run ended, and its exit code."""
    Console().print(table_of(tuned.judgements))
    if (risen := held_out_has_risen(tuned)) is not None:
        print(risen)
    if tuned.lost is not None:
        print(tuned.lost)
    if tuned.export is None:
        print("no checkpoint lies before it, so nothing was exported")
    else:
        where = f"{tuned.export}" + (f" and {args.out / 'adapter'}" if args.lora.lora_rank else "")
        print(f"wrote {where}" + (f", the weights of step {tuned.step}" if tuned.lost else ""))
    return 0 if tuned.lost is None else 1


RISEN = 1.01
"""A held-out loss this many times its lowest is said to have risen; less is noise of a few records."""


def held_out_has_risen(tuned: Tuned) -> str | None:
    """One sentence where an earlier step was better on the held-out records than the weights that were written."""
    losses = {row.step: row.held_out_loss for row in tuned.judgements if row.held_out_loss is not None}
    if tuned.step not in losses:
        return None
    best = min(losses, key=lambda step: (losses[step], step))
    if losses[tuned.step] <= RISEN * losses[best]:
        return None
    return (
        f"the held-out loss was lowest at step {best} ({losses[best]:.3f}) and has risen to {losses[tuned.step]:.3f} at step {tuned.step}, "
        f"whose weights were written: the run learns its records by heart. Run with --steps {max(best, 1)}, or on more data."
    )
