"""Continual pretraining and supervised fine-tuning of a checkpoint on one's own data, in full or by LoRA."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from qvl.core.device import pick_device, pick_dtype
from qvl.core.log import log
from qvl.data.index import fingerprint
from qvl.data.mixture import read_mixture
from qvl.data.packing import PackBudget
from qvl.data.source import open_source
from qvl.data.store import Store
from qvl.finetune.config import Tune
from qvl.finetune.replay import ReplayChoice, needs_model, with_replay
from qvl.finetune.text_guard import TEXT_RATIO, Judgement, TextGuard, TextLostError, held_out_text
from qvl.finetune.tune_data import open_data
from qvl.model.lora import LoraConfig, add_adapter, merge, save_adapter
from qvl.model.qwen3vl import Qwen3VL
from qvl.model.weights import load, load_empty, save
from qvl.outside.hub import resolve
from qvl.parallel.data_parallel import World, fill_shards, join_world, shard
from qvl.prompt.processor import Processor
from qvl.train.checkpoint import PREFIX, read_run, restore_weights
from qvl.train.loop import LoopConfig, Watcher
from qvl.train.objective import NextToken
from qvl.train.optimizer import OptimizerConfig
from qvl.train.parameters import freeze
from qvl.train.run import Expect, Run, judged
from qvl.train.schedule import Schedule
from qvl.train.watch import export_every


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """How a run ended."""

    step: int
    """Of the weights that were written."""
    export: Path | None
    """None where text was lost before any checkpoint was found good."""
    lost: str | None
    """The sentence of the rule that stopped it."""
    judgements: tuple[Judgement, ...]


def tune(
    run: Tune,
    watchers: Sequence[Watcher] = (),
    *,
    stop_after: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Tuned | None:
    """Train, then write `out/export`, a folder that transformers loads; with LoRA also `out/adapter` in PEFT's format.

    None when the run was stopped before its last step; the same call goes on with it.
    """
    if run.stage != "auto":
        raise ValueError(f"stage is {run.stage}; this is next-token training, V0 is qvl.finetune.pre_stage.")
    device = pick_device(run.compute.device)
    world = join_world(device)
    folder = resolve(run.model)
    processor = Processor.from_folder(folder)
    text = held_out_text(run.forgetting.held_out_text)
    own = read_mixture(run.data)
    mark, store = fingerprint(processor), Store()
    for source in replace(own, replay=()).resolved():  # before minutes of loading and rehearsal are spent
        open_source(source, mark, store)
    dtype, choice = pick_dtype(world.device, run.compute.dtype), replay_choice(run, folder)
    is_deferred = reads_shards(run, world, needs_model(own, choice))
    model = load_empty(folder, dtype=dtype) if is_deferred else load(folder, dtype=dtype, device=world.device)
    # Before the adapter: what is rehearsed is the model as it came.
    mixture = with_replay(own, choice, model, processor, world)
    lora = lora_config(run)
    if lora is not None:
        add_adapter(model, lora)
    loader, held_out = open_data(
        mixture,
        processor,
        model.config,
        PackBudget(tokens=run.packs.pack_tokens, patches=run.packs.pack_patches),
        packs_per_step=run.packs.packs_per_step,
        held_out=run.forgetting.held_out,
        seed=run.seed,
        world=world,
        workers=run.packs.workers,
        out=run.out,
    )
    objective = NextToken(
        model,
        power=run.loss.power,
        denominator=run.loss.denominator,
        see_always=world.size > 1 and model.config.vision is not None,
        loss_kernel=run.loss.loss_kernel,
    )
    if is_deferred:
        freeze(model, run.optimizer.rates)
        shard([model], objective, world)
        fill_shards(model, objective, folder, world)
    with loader:
        guard = TextGuard(
            objective,
            processor.tokenizer,
            text,
            world,
            run.out,
            every=run.judge_every,
            most=run.forgetting.max_text_loss,
            held_out=held_out.packs,
            facts={"held_out_records": held_out.num_records, "replay": [vars(entry) for entry in mixture.replay]},
        )
        if world.rank == 0:
            own = loader.sources[: len(mixture.sources)]
            tokens = sum(int(source.lengths.token_S.sum()) for source in own)
            log.info("%s", plan_sentence(run, tokens, sum(entry.share for entry in mixture.replay)))
        guard.begin(max(steps_in(run.out), default=0))
        planned = Run(
            objective=objective,
            stream=loader,
            loop=loop_config(run),
            out=run.out,
            settings=settings_of(run, folder),
            expect=expectations(run),
        )
        try:
            reached = planned.fit(
                world,
                [*exports_on_the_way(run, model, folder, world), *watchers, guard],
                stop_after=stop_after,
                should_stop=should_stop,
            )
            if world.rank == 0 and (fitted := fitted_sentence(loader.stats["read"])):
                log.info("%s", fitted)
        except TextLostError as error:
            return _end_lost(run, str(error), guard, folder, world, lora)
    if reached < run.steps:
        return None
    export(run, objective.model, folder, world, lora, steps_in(run.out)[reached] if world.size > 1 else None)
    guard.write(exported_step=reached, expect=judged(expectations(run), guard.found()))
    rows = tuple(guard.rows.values())
    return Tuned(step=reached, export=run.out / "export", lost=None, judgements=rows)


def reads_shards(run: Tune, world: World, is_model_needed: bool) -> bool:
    """Whether each rank reads only its own rows of the model's folder. It reads all where it trains all, where the model first writes its
    own replay, which generation does with whole weights, and for liger, which asks where the weights are before they are there."""
    is_whole = world.sum(float(is_model_needed)) > 0 or run.loss.loss_kernel == "liger"
    return world.size > 1 and not world.replicates and not is_whole


def exports_on_the_way(run: Tune, model: Qwen3VL, folder: Path, world: World) -> list[Watcher]:
    return (
        [export_every(run.saving.export_every, model, run.out, world, companions=folder)]
        if run.saving.export_every
        else []
    )


def lora_config(run: Tune) -> LoraConfig | None:
    rank = run.lora.lora_rank
    return LoraConfig(r=rank, alpha=2.0 * rank, seed=run.seed) if rank else None


def expectations(run: Tune) -> tuple[Expect, ...]:
    """What the run says it will reach; judged in report.json."""
    most = run.forgetting.max_text_loss
    return (Expect(name=TEXT_RATIO, at_most=most),) if most else ()


def replay_choice(run: Tune, folder: Path) -> ReplayChoice:
    return ReplayChoice(
        what=run.replay.replay,
        model=str(folder.resolve()),
        share=run.replay.replay_share,
        samples=run.replay.replay_samples,
        folder=run.out / "replay",
        run_tokens=run.steps * run.packs.step_tokens,
        pack_tokens=run.packs.pack_tokens,
        seed=run.seed,
    )


def loop_config(run: Tune) -> LoopConfig:
    return LoopConfig(
        steps=run.steps,
        optimizer=OptimizerConfig(
            name=run.optimizer.optimizer,
            lr=run.optimizer.lr,
            rates=run.optimizer.rates,
            weight_decay=run.optimizer.weight_decay,
        ),
        schedule=Schedule(
            kind=run.optimizer.schedule, warmup_steps=min(run.optimizer.warmup_steps, max(1, run.steps // 10))
        ),
        checkpoint_every=run.judge_every,
        checkpoint_vision=run.compute.checkpoint_vision,
        checkpoint_decoder=run.compute.checkpoint_decoder,
        compile=run.compute.compile,
        pack_tokens=run.packs.pack_tokens,
        seed=run.seed,
    )


def settings_of(run: Tune, folder: Path) -> dict[str, object]:
    """What else decides the run's numbers; a resume under other ones is refused."""
    return {
        "model": str(folder.resolve()),
        "lora_rank": run.lora.lora_rank,
        "power": run.loss.power,
        "denominator": run.loss.denominator,
        "replay": run.replay.replay,
        "replay_share": run.replay.replay_share,
        "held_out": run.forgetting.held_out,
        # Runs from before there was a choice have no such key.
        **({} if run.loss.loss_kernel == "ours" else {"loss_kernel": run.loss.loss_kernel}),
    }


def plan_sentence(run: Tune, data_tokens: int, replayed: float) -> str:
    """What the run will read, before it starts."""
    step = run.packs.step_tokens
    passes = run.steps * step * (1 - replayed) / max(1, data_tokens)
    return (
        f"{run.steps:,} steps of up to {step:,} tokens, {replayed:.1%} of them replay, are about {passes:,.1f} passes over the data's "
        f"{data_tokens:,} tokens"
        + ("; fewer --steps, or smaller --pack-tokens and --packs-per-step, may be meant" if passes > 20 else "")
    )


def fitted_sentence(read: Mapping[str, int]) -> str:
    """What was done to samples longer than a pack; nothing where all fitted."""
    names = {"pieces": "pieces of long texts", "rebudgeted": "with fewer frames or smaller pictures", "cut": "cut"}
    told = [f"{read[name]:,} {words}" for name, words in names.items() if read[name]]
    return f"of {read['samples']:,} samples read here, to fit --pack-tokens: {', '.join(told)}" if told else ""


def _end_lost(run: Tune, sentence: str, guard: TextGuard, folder: Path, world: World, lora: LoraConfig | None) -> Tuned:
    """Sets the checkpoints after the last good one aside, so that nothing goes on from them, and exports that one."""
    saved = steps_in(run.out)
    good = max(saved.keys() & guard.good_steps, default=0)
    world.barrier()  # everyone has looked
    for step, path in saved.items():
        if step > good and world.rank == 0:
            path.rename(_free(run.out / f"lost-{path.name}"))
    exported = export(run, None, folder, world, lora, saved[good]) if good else None
    guard.write(exported_step=good or None, expect=judged(expectations(run), guard.found()))
    return Tuned(step=good, export=exported, lost=sentence, judgements=tuple(guard.rows.values()))


def steps_in(out: Path) -> dict[int, Path]:
    """The checkpoints in a folder, by step."""
    return {int(path.name.removeprefix(PREFIX)): path for path in out.glob(f"{PREFIX}*")}


def _free(path: Path) -> Path:
    """`path`, or the first of path-2, path-3, ... that is not taken."""
    taken = 1
    while (free := path if taken == 1 else path.with_name(f"{path.name}-{taken}")).exists():
        taken += 1
    return free


def export(
    run: Tune, model: Qwen3VL | None, folder: Path, world: World, lora: LoraConfig | None, saved: Path | None
) -> Path:
    """The trained network as a complete Hugging Face folder, written by rank 0: `model` as it stands, or what a checkpoint holds."""
    out = run.out / "export"
    if world.rank > 0:
        return out
    if saved is not None:  # sharded here, or older than what stands here
        model = load(folder, dtype=pick_dtype(world.device, run.compute.dtype))
        if lora is not None:
            add_adapter(model, lora)
        restore_weights(NextToken(model), read_run(saved).weights)
    assert model is not None
    if lora is not None:
        save_adapter(model, run.out / "adapter", base=run.model)
        merge(model, keep_base=False)
    save(model.to(torch.bfloat16), out, companions=folder)
    log.info("wrote %s", out)
    return out
