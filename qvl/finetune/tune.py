"""Continual pretraining and supervised fine-tuning of a checkpoint on one's own data, in full or by LoRA."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from qvl.core.device import pick_device, pick_dtype
from qvl.core.log import log
from qvl.data.index import fingerprint
from qvl.data.mixture import read_mixture
from qvl.data.packing import PackBudget
from qvl.data.source import open_source
from qvl.data.store import Store
from qvl.finetune.replay import ReplayChoice, with_replay
from qvl.finetune.text_guard import Judgement, TextGuard, TextLostError, held_out_text
from qvl.finetune.tune_data import open_data
from qvl.model.lora import LoraConfig, add_adapter, merge, save_adapter
from qvl.model.qwen3vl import Qwen3VL
from qvl.model.weights import load, save
from qvl.outside.hub import resolve
from qvl.parallel.data_parallel import World, join_world
from qvl.prompt.processor import Processor
from qvl.train.checkpoint import PREFIX, read_run, restore_weights
from qvl.train.loop import LoopConfig, Watcher, fit
from qvl.train.loss import Denominator, LossKernel
from qvl.train.objective import NextToken
from qvl.train.optimizer import OptimizerConfig
from qvl.train.parameters import Rates
from qvl.train.schedule import Schedule
from qvl.train.watch import export_every


@dataclass(frozen=True, kw_only=True)
class Tune:
    """One run. Rates, lengths and steps are ours: the report gives none of them."""

    model: str
    """Checkpoint folder, or a name on the hub."""
    data: Path
    """Mixture file (YAML) over indexed shards; see `qvl data index`."""
    out: Path
    """Folder for checkpoints, log.jsonl, report.json and the export. A run that was stopped goes on from here."""
    steps: int = 1000
    pack_tokens: int = 8192
    """Text and visual tokens of one pack. What is longer is made to fit: long texts become pieces, videos get fewer frames and pictures
    fewer tokens, and only then is text cut; the run says at its end how often."""
    pack_patches: int = 32768
    """Patches of one pack, four to a visual token: bounds the vision tower's memory."""
    packs_per_step: int = 8
    """Over all ranks."""
    replay: str = "auto"
    """What is practised beside your data so that other skills stay. self: texts and chats that the model writes before the first step
    (nothing to download; they keep what it can do, and teach nothing). A path: text and chats of yours, as .txt, .jsonl, shards or a
    mixture file; better, where you have them. none: nothing. auto: the mixture's own `replay:` where it has one, else self."""
    replay_share: float = 0.1
    """Of all tokens, for self and a path; self takes less where it would come round more than four times."""
    replay_samples: int = 512
    """The most texts and chats the model writes; a short run gets by with fewer."""
    held_out: float = 0.05
    """Part of your records that is never trained on and gives the held-out loss, chosen by their content; 0: none."""
    held_out_text: Path | None = None
    """Text that is in no training data (plain, or .jsonl rows with `text`), judged in bits a byte before, during and after. None: 16 KB of
    English from Python's manual; give your own for other languages."""
    max_text_loss: float = 1.05
    """The run stops when that text costs more than so many times the bits of before, and exports the last checkpoint that was within. 0
    measures and never stops."""
    lr: float = 1e-5
    rates: Rates = field(default_factory=Rates)
    """Factors on lr for vision, mergers and language; 0 freezes."""
    lora_rank: int = 0
    """0 trains the weights themselves; above 0, LoRA factors of this rank on the decoder's linear layers, of a MoE its attention alone
    (alpha is twice the rank). The adapter is then written to out/adapter, and merged into out/export."""
    power: float = 0.5
    """Loss weight n^-power of each of a sample's n targets: 0.5 is the report's square root, 0 counts tokens, 1 counts samples."""
    denominator: Denominator = "weights"
    optimizer: Literal["adamw", "muon"] = "adamw"
    weight_decay: float = 0.1
    warmup_steps: int = 50
    """At most a tenth of the run."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    checkpoint_every: int = 200
    """Steps between checkpoints, each of which is judged; at most a quarter of the run."""
    export_every: int = 0
    """Steps between folders on the way, out/export-STEP, each a complete Hugging Face checkpoint; 0: only the one at the end."""
    checkpoint_vision: bool = False
    """Make the activations of the vision tower's blocks again in the backward pass: less memory, a third more work, the same numbers."""
    checkpoint_decoder: bool = False
    """The same for the decoder's layers."""
    compile: bool = False
    """torch.compile every block: a minute or more at the start, then faster; numbers change in the last digits."""
    loss_kernel: LossKernel = "ours"
    """Who computes the cross-entropy: ours, or liger (liger-kernel on a CUDA device)."""
    seed: int = 0
    workers: int = 2
    """Threads that read packs ahead."""
    dtype: str = "auto"
    """What the network is held in; fp32 masters are kept beside bfloat16."""
    device: str = "auto"

    def __post_init__(self) -> None:
        if not 0 < self.replay_share < 1 or not 0 <= self.held_out < 1 or self.replay_samples < 1:
            raise ValueError(
                f"replay_share is {self.replay_share}, held_out {self.held_out}, replay_samples {self.replay_samples}; expected a share "
                "between 0 and 1, a part of at least 0 and below 1, and at least 1."
            )
        if self.steps < 1 or self.checkpoint_every < 1:
            raise ValueError(
                f"steps is {self.steps} and checkpoint_every {self.checkpoint_every}; expected at least 1 of each."
            )

    @property
    def judge_every(self) -> int:
        return min(self.checkpoint_every, -(-self.steps // 4))


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
    device = pick_device(run.device)
    world = join_world(device)
    folder = resolve(run.model)
    processor = Processor.from_folder(folder)
    text = held_out_text(run.held_out_text)
    own = read_mixture(run.data)
    mark, store = fingerprint(processor), Store()
    for source in replace(own, replay=()).resolved():  # before minutes of loading and rehearsal are spent
        open_source(source, mark, store)
    model = load(folder, dtype=pick_dtype(world.device, run.dtype), device=world.device)
    # Before the adapter: what is rehearsed is the model as it came.
    mixture = with_replay(own, replay_choice(run, folder), model, processor, world)
    lora = LoraConfig(r=run.lora_rank, alpha=2.0 * run.lora_rank, seed=run.seed) if run.lora_rank else None
    if lora is not None:
        add_adapter(model, lora)
    loader, held_out = open_data(
        mixture,
        processor,
        model.config,
        PackBudget(tokens=run.pack_tokens, patches=run.pack_patches),
        packs_per_step=run.packs_per_step,
        held_out=run.held_out,
        seed=run.seed,
        world=world,
        workers=run.workers,
        out=run.out,
    )
    objective = NextToken(
        model,
        power=run.power,
        denominator=run.denominator,
        see_always=world.size > 1 and model.config.vision is not None,
        loss_kernel=run.loss_kernel,
    )
    with loader:
        guard = TextGuard(
            objective,
            processor.tokenizer,
            text,
            world,
            run.out,
            every=run.judge_every,
            most=run.max_text_loss,
            held_out=held_out.packs,
            facts={"held_out_records": held_out.num_records, "replay": [vars(entry) for entry in mixture.replay]},
        )
        if world.rank == 0:
            own = loader.sources[: len(mixture.sources)]
            tokens = sum(int(source.lengths.token_S.sum()) for source in own)
            log.info("%s", plan_sentence(run, tokens, sum(entry.share for entry in mixture.replay)))
        guard.begin(max(steps_in(run.out), default=0))
        try:
            reached = fit(
                objective,
                loader,
                loop_config(run),
                run.out,
                world,
                watchers=[*exports_on_the_way(run, model, folder, world), *watchers, guard],
                stop_after=stop_after,
                should_stop=should_stop,
                settings=settings_of(run, folder),
            )
            if world.rank == 0 and (fitted := fitted_sentence(loader.stats["read"])):
                log.info("%s", fitted)
        except TextLostError as error:
            return _end_lost(run, str(error), guard, folder, world, lora)
    if reached < run.steps:
        return None
    export(run, objective.model, folder, world, lora, steps_in(run.out)[reached] if world.size > 1 else None)
    guard.write(exported_step=reached)
    rows = tuple(guard.rows.values())
    return Tuned(step=reached, export=run.out / "export", lost=None, judgements=rows)


def exports_on_the_way(run: Tune, model: Qwen3VL, folder: Path, world: World) -> list[Watcher]:
    return [export_every(run.export_every, model, run.out, world, companions=folder)] if run.export_every else []


def replay_choice(run: Tune, folder: Path) -> ReplayChoice:
    return ReplayChoice(
        what=run.replay,
        model=str(folder.resolve()),
        share=run.replay_share,
        samples=run.replay_samples,
        folder=run.out / "replay",
        run_tokens=run.steps * run.packs_per_step * run.pack_tokens,
        pack_tokens=run.pack_tokens,
        seed=run.seed,
    )


def loop_config(run: Tune) -> LoopConfig:
    return LoopConfig(
        steps=run.steps,
        optimizer=OptimizerConfig(
            name=run.optimizer,
            lr=run.lr,
            rates=run.rates,
            weight_decay=run.weight_decay,
        ),
        schedule=Schedule(kind=run.schedule, warmup_steps=min(run.warmup_steps, max(1, run.steps // 10))),
        checkpoint_every=run.judge_every,
        checkpoint_vision=run.checkpoint_vision,
        checkpoint_decoder=run.checkpoint_decoder,
        compile=run.compile,
        pack_tokens=run.pack_tokens,
        seed=run.seed,
    )


def settings_of(run: Tune, folder: Path) -> dict[str, object]:
    """What else decides the run's numbers; a resume under other ones is refused."""
    return {
        "model": str(folder.resolve()),
        "lora_rank": run.lora_rank,
        "power": run.power,
        "denominator": run.denominator,
        "replay": run.replay,
        "replay_share": run.replay_share,
        "held_out": run.held_out,
        # Runs from before there was a choice have no such key.
        **({} if run.loss_kernel == "ours" else {"loss_kernel": run.loss_kernel}),
    }


def plan_sentence(run: Tune, data_tokens: int, replayed: float) -> str:
    """What the run will read, before it starts."""
    step = run.packs_per_step * run.pack_tokens
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
    guard.write(exported_step=good or None)
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
        model = load(folder, dtype=pick_dtype(world.device, run.dtype))
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
