"""The one loop: packs in, a step out, for every stage from the vision pre-stage to reinforcement learning."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from qvl.core.files import writing
from qvl.core.log import JsonlWriter, log, read_jsonl
from qvl.model.qwen3vl import Qwen3VL
from qvl.parallel.data_parallel import World, shard, sum_over_replicas, total_norm
from qvl.train.blocks import compiled_blocks, training_blocks
from qvl.train.checkpoint import Saved, newest, restore_optimizer, restore_weights, save_run
from qvl.train.guard import SpikeGuard
from qvl.train.metrics import averages, memory_bytes, peak_flops, work
from qvl.train.objective import Micro, Objective, Outcome, Prepared
from qvl.train.optimizer import Optimizer, OptimizerConfig
from qvl.train.parameters import freeze
from qvl.train.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    steps: int
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: Schedule = field(default_factory=Schedule)
    clip_norm: float = 1.0
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 saves at the end only."""
    keep: int = 2
    """Checkpoints that stay on disk."""
    spike_sigmas: float = 6.0
    seed: int = 0
    """Of dropout, which is drawn anew from seed, step and rank at each step, so that a resumed run draws the same."""
    checkpoint_vision: bool = False
    """Throw the activations inside the tower's blocks away and make them again in the backward pass: less memory, a third more work."""
    checkpoint_decoder: bool = False
    """The same for the decoder's layers."""
    compile: bool = False
    """Compile every block with torch.compile (a minute or more at the start); numbers change in the last digits."""
    pack_tokens: int | None = None
    """What a pack can hold, for `fill` in the log; None leaves it out."""
    peak_flops: float | None = None
    """Denominator of MFU a device, FLOP/s; None knows common GPUs and leaves it out elsewhere."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.clip_norm <= 0 or self.checkpoint_every < 0 or self.keep < 1:
            raise ValueError(
                f"steps is {self.steps}, clip_norm {self.clip_norm}, checkpoint_every {self.checkpoint_every}, "
                f"keep {self.keep}; expected steps >= 1, clip_norm > 0, checkpoint_every >= 0, keep >= 1."
            )


class Stream(Protocol):
    """Where packs come from; its state is a few KB of JSON, and files where it has the methods of `KeepsFiles`."""

    def next_step(self) -> Sequence[Micro]:
        """This rank's packs of the next optimizer step."""
        ...

    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class KeepsFiles(Protocol):
    """What a stream has beside `state` and `restore` when its state is too large for JSON, such as answers that were sampled."""

    def save_files(self, folder: Path) -> None:
        """Writes what `state` does not say into an empty folder, which becomes part of the checkpoint. Called on every rank with the same
        folder: what ranks write must differ in name."""
        ...

    def restore_files(self, folder: Path) -> None:
        """Reads what `save_files` wrote at the step of `state`, after `restore`. The files are known to be whole, and stay as they are."""
        ...


@dataclass(frozen=True)
class StepReport:
    """What watchers and progress bars see after each step; the same numbers as the line in log.jsonl."""

    step: int
    steps: int
    values: dict[str, float]
    """The line in log.jsonl, and what watchers before this one found."""
    skipped: str | None
    is_saved: bool = False
    """A checkpoint of it lies on disk."""


Watcher = Callable[[StepReport], Mapping[str, float] | None]
"""Called after each step on every rank; numbers that it returns are shown to the watchers after it."""


def fit(
    objective: Objective,
    stream: Stream,
    config: LoopConfig,
    out: Path,
    world: World,
    *,
    watchers: Sequence[Watcher] = (),
    stop_after: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    settings: Mapping[str, Any] | None = None,
) -> int:
    """Train from the newest checkpoint in `out`, or from the start, to `config.steps` (or `stop_after`, for a planned pause).

    A resumed run is bitwise the run that never stopped: weights, optimizer, order of packs, losses (measured on CPUs; on a GPU sums of
    gradients may differ in their last bits). Writes `log.jsonl`, `skipped.jsonl` (of each rank) and `step-*` there. Watchers (evaluation,
    export, progress) are called after each step.

    `should_stop` is asked after each step (a person pressed Ctrl-C); the run is then saved and left, after a refused step once one was
    taken again. `settings` (JSON) and the config are kept in the checkpoint, and a resume under other ones is refused. Returns the step
    that was reached.
    """
    with compiled_blocks(objective.model) if config.compile else nullcontext():
        return _fit(objective, stream, config, out, world, watchers, stop_after, should_stop, settings or {})


def _fit(
    objective: Objective,
    stream: Stream,
    config: LoopConfig,
    out: Path,
    world: World,
    watchers: Sequence[Watcher],
    stop_after: int | None,
    should_stop: Callable[[], bool],
    settings: Mapping[str, Any],
) -> int:
    assert isinstance(objective, nn.Module)
    freeze(objective.model, config.optimizer.rates)
    for name in objective.helpers:
        objective.get_submodule(name).requires_grad_(False)
    shard([objective.model, *_helper_models(objective)], objective, world)
    optimizer = Optimizer(objective, config.optimizer, world)
    run = _Run(objective, stream, optimizer, config, out, world, settings=_settings(config, settings))
    run.resume()
    rows = _log(out, run.step) if world.rank == 0 else None
    last = min(config.steps, stop_after or config.steps)
    objective.train()
    for name in objective.helpers:
        objective.get_submodule(name).eval()
    while run.step < last:
        values, skipped = run.take_step()
        if rows is not None:
            rows.write({"step": run.step, **values, **({"skipped": skipped} if skipped else {})})
        if skipped is not None and run.guard.in_a_row >= 3:
            run.go_back(skipped)
            continue
        # Not in the middle of trouble, nor saved there: a roll-back must find weights from before it.
        is_stopped = world.sum(float(should_stop())) > 0 and run.guard.in_a_row == 0
        is_due = run.step == last or is_stopped or _is_every(config.checkpoint_every, run.step)
        is_saved = run.step == config.steps or (is_due and run.guard.in_a_row == 0)
        if is_saved:
            run.save()
        for watcher in watchers:
            values = values | dict(watcher(StepReport(run.step, config.steps, values, skipped, is_saved)) or {})
        if is_stopped:
            break
    if rows is not None:
        rows.close()
    objective.eval()
    return run.step


def _is_every(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _helper_models(objective: Objective) -> list[Qwen3VL]:
    assert isinstance(objective, nn.Module)
    found = (objective.get_submodule(name) for name in objective.helpers)
    return [module for module in found if isinstance(module, Qwen3VL)]


class _Run:
    """What a run is made of between two steps, and the three things that happen to it: a step, a way back, a save."""

    def __init__(
        self,
        objective: Objective,
        stream: Stream,
        optimizer: Optimizer,
        config: LoopConfig,
        out: Path,
        world: World,
        *,
        settings: dict[str, Any],
    ) -> None:
        self.objective, self.stream, self.optimizer = objective, stream, optimizer
        self.config, self.out, self.world, self.settings = config, out, world, settings
        self.blocks = training_blocks(
            checkpoint_vision=config.checkpoint_vision, checkpoint_decoder=config.checkpoint_decoder
        )
        self.guard = SpikeGuard(sigmas=config.spike_sigmas)
        self.step = 0
        self._went_back, self._went_to = 0, 0
        self._frozen: str | None = None
        """The digest of the frozen weights' file, once they are known to be there."""
        self._peak = config.peak_flops or peak_flops(world.device)

    def take_step(self) -> tuple[dict[str, float], str | None]:
        """One update, or its refusal: (the line of the log, why it was not taken)."""
        began = time.perf_counter()
        micros = self.stream.next_step()
        loaded = time.perf_counter()
        prepared = [self.objective.prepare(micro) for micro in micros]
        denominator = self.world.sum(sum(one.denominator for one in prepared))
        self._check_data(micros, denominator)
        outcomes = self._gradients(prepared, denominator)
        values = averages(outcomes, self.world)
        norm = float(total_norm(self.optimizer.gradients()))
        skipped = self.guard.refuses(values["loss"], norm)
        factor = self.config.schedule.at(self.step, self.config.steps)
        self._update(norm, factor, skipped, micros)
        self.step += 1
        seconds = time.perf_counter() - began
        values |= {
            "grad_norm": norm,
            "lr": self.config.optimizer.lr * factor,
            **work(micros, seconds, self.config.pack_tokens, self.world),
            "seconds": seconds,
            "wait_for_data": (loaded - began) / seconds,
            "memory_gb": memory_bytes(self.world.device) / 1e9,
        }
        if self._peak is not None and all(outcome.flops for outcome in outcomes):
            values["mfu"] = sum(outcome.flops for outcome in outcomes) / seconds / self._peak
        return values, skipped

    def _check_data(self, micros: Sequence[Micro], denominator: float) -> None:
        if not micros:  # on all ranks alike
            self.save()
            raise ValueError(
                f"the data is over after {self.step} of {self.config.steps} steps, and the run is saved in {self.out}; give it "
                f"{self.step} steps, or let its sources repeat (max_epochs)."
            )
        if denominator <= 0:
            raise ValueError(
                f"step {self.step} has no target in any pack; check the roles and masks of its samples: {_ids(micros)[:5]}."
            )

    def _gradients(self, prepared: Sequence[Prepared], denominator: float) -> list[Outcome]:
        """Forward and backward over the step's packs; the gradients of all ranks lie in the masters."""
        outcomes = []
        torch.manual_seed(hash((self.config.seed, self.step, self.world.rank)))
        for one in prepared:
            outcome = self.objective(one, denominator, self.world, self.blocks)
            outcome.loss.backward()
            self.optimizer.gather()
            outcomes.append(outcome)
        sum_over_replicas(self.optimizer.masters.values(), self.world)
        return outcomes

    def _update(self, norm: float, factor: float, skipped: str | None, micros: Sequence[Micro]) -> None:
        if skipped is not None:
            self.optimizer.clear()
            _note_skip(self.out, self.world, self.step, skipped, micros)
            return
        if norm > self.config.clip_norm:
            for gradient in self.optimizer.gradients():
                gradient.mul_(self.config.clip_norm / norm)
        self.optimizer.step(factor)

    def save(self) -> None:
        state = {"stream": self.stream.state(), "guard": self.guard.state(), "settings": self.settings}
        assert isinstance(self.objective, nn.Module)
        self._frozen = save_run(
            self.out,
            self.step,
            self.objective,
            self.optimizer,
            state,
            self.world,
            keep=self.config.keep,
            helpers=self.objective.helpers,
            frozen=self._frozen,
            save_files=self.stream.save_files if isinstance(self.stream, KeepsFiles) else None,
        )
        self._went_back = 0

    def resume(self) -> None:
        """Goes on from the newest checkpoint, where there is one."""
        saved = newest(self.out, self.world)
        if saved is None:
            return
        _check_settings(saved.state["settings"], self.settings, self.out)
        self._restore(saved)
        self.stream.restore(saved.state["stream"])
        _restore_files(self.stream, saved.files, self.out)
        self._went_to, self._frozen = saved.step, saved.frozen
        log.info("resumed from step %d in %s", saved.step, self.out)

    def go_back(self, reason: str) -> None:
        """Weights and optimizer of the newest checkpoint, but the data goes on: the packs that broke the run are not met again.

        What is frozen never changed, so only what trains is read again.
        """
        if self._went_back == 3:
            raise ValueError(
                f"the run went back to the checkpoint of step {self._went_to} three times and steps are still refused ({reason}); look at "
                "the samples in skipped*.jsonl, lower the rate, or raise spike_sigmas."
            )
        log.warning("three steps in a row were refused; going back to the newest checkpoint")
        saved = newest(self.out, self.world, frozen=self._frozen)
        if saved is None:
            raise ValueError(
                f"three steps in a row were refused up to step {self.step} and there is no checkpoint to go back to; lower the rate."
            )
        self._restore(saved, only_trained=self._frozen is not None)
        self.guard.in_a_row = 0
        self._went_back, self._went_to = self._went_back + 1, saved.step

    def _restore(self, saved: Saved, *, only_trained: bool = False) -> None:
        assert isinstance(self.objective, nn.Module)
        restore_weights(self.objective, saved.weights, helpers=self.objective.helpers, only_trained=only_trained)
        restore_optimizer(self.optimizer, saved.optimizer)
        self.guard.restore(saved.state["guard"])
        self.step = saved.step


def _restore_files(stream: Stream, files: Path | None, out: Path) -> None:
    if isinstance(stream, KeepsFiles) != (files is not None):
        raise ValueError(
            f"the checkpoint in {out} has {'no ' if files is None else ''}files of its stream, and this run's stream keeps "
            f"{'some' if files is None else 'none'}; resume with the same kind of data, or start in another folder."
        )
    if isinstance(stream, KeepsFiles) and files is not None:
        stream.restore_files(files)


def _settings(config: LoopConfig, others: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the run's numbers, as JSON; not how often it is saved, nor how long it is."""
    own = asdict(config)
    for name in ("checkpoint_every", "keep", "checkpoint_vision", "checkpoint_decoder", "pack_tokens", "peak_flops"):
        del own[name]
    if not config.compile:  # runs from before there was a choice have no such key
        del own["compile"]
    return json.loads(json.dumps(own | dict(others)))


def _check_settings(before: dict[str, Any], now: dict[str, Any], out: Path) -> None:
    told = {
        name: f"{name} was {before.get(name)!r} and is now {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    }
    longer = told.pop("steps", None)
    if told:
        # The number of steps comes along, for other settings may follow from it.
        first = "; ".join([*([longer] if longer else []), next(iter(told.values()))])
        raise ValueError(
            f"the run in {out} cannot go on: {first}. Give the old value, or another folder for a new run (which may start from what "
            "this one exported)."
        )
    if longer:
        log.warning("%s, so the learning rate follows another schedule from here", longer)


def _log(out: Path, first: int) -> JsonlWriter:
    """log.jsonl without the lines of steps that a killed run took after its last checkpoint; they are taken again."""
    path = out / "log.jsonl"
    JsonlWriter(path).close()  # cuts off half a line, should the kill have left one
    kept = [row for row in read_jsonl(path) if row["step"] <= first]
    with writing(path) as new, JsonlWriter(new) as rows:
        for row in kept:
            rows.write(row)
    return JsonlWriter(path)


def _ids(micros: Sequence[Micro]) -> list[str]:
    return [id for micro in micros for id in micro.ids]


def _note_skip(out: Path, world: World, step: int, reason: str, micros: Sequence[Micro]) -> None:
    log.warning("step %d was not taken: %s", step, reason)
    with JsonlWriter(out / (f"skipped-{world.rank}.jsonl" if world.size > 1 else "skipped.jsonl")) as rows:
        rows.write({"step": step, "reason": reason, "ids": _ids(micros)})
