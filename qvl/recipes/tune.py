"""Continual pretraining and supervised fine-tuning of a checkpoint on one's own data, in full or by LoRA."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from qvl.core.device import pick_device, pick_dtype
from qvl.core.log import log
from qvl.data.loader import make_loader
from qvl.data.mixture import read_mixture
from qvl.model.lora import LoraConfig, add_adapter, merge, save_adapter
from qvl.model.weights import load, save
from qvl.outside.hub import resolve
from qvl.parallel.data_parallel import World, join_world
from qvl.prompt.processor import Processor
from qvl.train.checkpoint import newest, restore_weights
from qvl.train.loop import LoopConfig, Watcher, fit
from qvl.train.loss import Denominator
from qvl.train.objective import NextToken
from qvl.train.optimizer import OptimizerConfig
from qvl.train.parameters import Rates
from qvl.train.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Tune:
    """One run. Rates, lengths and steps are ours: the report gives none of them."""

    model: str
    """Checkpoint folder, or a name on the hub."""
    data: Path
    """Mixture file (YAML) over indexed shards; see `qvl data index`."""
    out: Path
    """Folder for checkpoints, log.jsonl and the export. A run that was stopped goes on from here."""
    steps: int = 1000
    pack_tokens: int = 8192
    """Text and visual tokens of one pack; longer samples are cut at a border and counted."""
    pack_patches: int = 32768
    """Patches of one pack, four to a visual token: bounds the vision tower's memory."""
    packs_per_step: int = 8
    """Over all ranks."""
    lr: float = 1e-5
    rates: Rates = field(default_factory=Rates)
    """Factors on lr for vision, mergers and language; 0 freezes."""
    lora_rank: int = 0
    """0 trains the weights themselves; above 0, LoRA factors of this rank on the decoder's linear layers (alpha is twice the rank). The
    adapter is then written to out/adapter, and merged into out/export."""
    power: float = 0.5
    """Loss weight n^-power of each of a sample's n targets: 0.5 is the report's square root, 0 counts tokens, 1 counts samples."""
    denominator: Denominator = "weights"
    optimizer: Literal["adamw", "muon"] = "adamw"
    weight_decay: float = 0.1
    warmup_steps: int = 50
    """At most a tenth of the run."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    checkpoint_every: int = 200
    seed: int = 0
    workers: int = 2
    """Threads that read packs ahead."""
    dtype: str = "auto"
    """What the network is held in; fp32 masters are kept beside bfloat16."""
    device: str = "auto"


def tune(
    run: Tune,
    watchers: Sequence[Watcher] = (),
    *,
    stop_after: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Path | None:
    """Train, then write `out/export`, a folder that transformers loads; with LoRA also `out/adapter` in PEFT's format.

    None when the run was stopped before its last step; the same call goes on with it.
    """
    device = pick_device(run.device)
    world = join_world(device)
    folder = resolve(run.model)
    model = load(folder, dtype=pick_dtype(world.device, run.dtype), device=world.device)
    lora = LoraConfig(r=run.lora_rank, alpha=2.0 * run.lora_rank, seed=run.seed) if run.lora_rank else None
    if lora is not None:
        add_adapter(model, lora)
    loader = make_loader(
        read_mixture(run.data),
        Processor.from_folder(folder),
        model.config,
        pack_tokens=run.pack_tokens,
        pack_patches=run.pack_patches,
        packs_per_step=run.packs_per_step,
        seed=run.seed,
        rank=world.rank,
        world_size=world.size,
        workers=run.workers,
        out=run.out,
    )
    config = LoopConfig(
        steps=run.steps,
        optimizer=OptimizerConfig(
            name=run.optimizer,
            lr=run.lr,
            rates=run.rates,
            weight_decay=run.weight_decay,
        ),
        schedule=Schedule(kind=run.schedule, warmup_steps=min(run.warmup_steps, max(1, run.steps // 10))),
        checkpoint_every=run.checkpoint_every,
        seed=run.seed,
    )
    objective = NextToken(model, power=run.power, denominator=run.denominator, see_always=world.size > 1)
    settings = {
        "model": str(folder.resolve()),
        "lora_rank": run.lora_rank,
        "power": run.power,
        "denominator": run.denominator,
    }
    with loader:
        if world.rank == 0:
            log.info("%s", plan_sentence(run, loader.num_tokens))
        reached = fit(
            objective,
            loader,
            config,
            run.out,
            world,
            watchers=watchers,
            stop_after=stop_after,
            should_stop=should_stop,
            settings=settings,
        )
    return export(run, objective, folder, world, lora) if reached == run.steps else None


def plan_sentence(run: Tune, data_tokens: int) -> str:
    """What the run will read, before it starts."""
    step = run.packs_per_step * run.pack_tokens
    passes = run.steps * step / max(1, data_tokens)
    return (
        f"{run.steps:,} steps of up to {step:,} tokens are about {passes:,.1f} passes over the data's {data_tokens:,} tokens"
        + ("; fewer --steps, or smaller --pack-tokens and --packs-per-step, may be meant" if passes > 20 else "")
    )


def export(run: Tune, objective: NextToken, folder: Path, world: World, lora: LoraConfig | None) -> Path:
    """The trained network as a complete Hugging Face folder, written by rank 0."""
    out = run.out / "export"
    if world.rank > 0:
        return out
    model = objective.model
    if world.size > 1:  # sharded here, whole in the checkpoint
        model = load(folder, dtype=model.head_weight.dtype)
        if lora is not None:
            add_adapter(model, lora)
        saved = newest(run.out)
        assert saved is not None
        restore_weights(NextToken(model), saved.weights)
    if lora is not None:
        save_adapter(model, run.out / "adapter", base=run.model)
        merge(model, keep_base=False)
    save(model.to(torch.bfloat16), out, companions=folder)
    log.info("wrote %s", out)
    return out
