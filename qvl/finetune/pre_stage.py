"""V0, the vision pre-stage, as a run: image-caption pairs in, a vision encoder out, judged by zero-shot retrieval before and after."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from qvl.core.device import pick_device, pick_dtype
from qvl.core.files import write_text
from qvl.core.log import log
from qvl.data.mixture import read_mixture
from qvl.data.packing import PackBudget
from qvl.finetune.captions import Encode, HeldOutPairs, open_pairs, own_encoding, siglip_encoding
from qvl.finetune.config import Tune
from qvl.finetune.text_guard import REPORT
from qvl.finetune.tune import exports_on_the_way, loop_config, steps_in
from qvl.model.config import ModelConfig, VisionConfig, read_config
from qvl.model.pool import AttentionPool
from qvl.model.siglip_text import TextTower, TextTowerConfig
from qvl.model.weights import load, save
from qvl.outside.hub import resolve
from qvl.parallel.data_parallel import World, join_world
from qvl.prompt.processor import Processor
from qvl.train.checkpoint import read_run, restore_weights
from qvl.train.contrastive import Contrastive, load_contrastive, new_contrastive, zero_shot
from qvl.train.loop import LoopConfig, Watcher
from qvl.train.parameters import Rates
from qvl.train.run import Expect, Run, judged

SCORE = "zero-shot retrieval, image to text top-1"


@dataclass(frozen=True, kw_only=True)
class ZeroShot:
    """Share of held-out images whose nearest caption, of all held-out captions, is their own."""

    images: int
    captions: int
    before: float
    after: float | None = None


@dataclass(frozen=True, kw_only=True)
class PreTrained:
    """How a run of V0 ended."""

    step: int
    export: Path
    zero_shot: ZeroShot | None
    """None where nothing was held out."""


def train_pre_stage(
    run: Tune,
    watchers: Sequence[Watcher] = (),
    *,
    stop_after: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> PreTrained | None:
    """Train, then write `out/export`, the model with its new vision encoder. None when the run was stopped before its last step; the same
    call goes on with it, to the bit."""
    world = join_world(pick_device(run.compute.device))
    folder = resolve(run.model)
    check_vision(run, read_config(folder))
    processor = Processor.from_folder(folder)
    objective, encode = open_objective(run, folder, processor, world)
    loader, held_out = open_pairs(
        replace(read_mixture(run.data), replay=()),
        processor,
        objective.model.config,
        PackBudget(tokens=run.packs.pack_tokens, patches=run.packs.pack_patches),
        encode,
        packs_per_step=run.packs.packs_per_step,
        held_out=run.forgetting.held_out,
        seed=run.seed,
        world=world,
        workers=run.packs.workers,
        out=run.out,
    )
    with loader:
        before = score(objective, held_out)  # of the weights that came, also where the run goes on
        if before is None and world.rank == 0:
            log.warning(
                "nothing is held out, so there is no zero-shot score; give more records, or a larger --held-out"
            )
        zero = None
        if before is not None:
            zero = ZeroShot(images=held_out.num_images, captions=len(held_out.classes()[1]), before=before)
        planned = Run(
            objective=objective,
            stream=loader,
            loop=pre_stage_loop(run),
            out=run.out,
            settings=settings_of(run, folder),
            expect=() if before is None else (Expect(name=SCORE, at_least=before),),
        )
        if world.rank == 0:
            _report(planned, zero, None)
        on_the_way = exports_on_the_way(run, objective.model, folder, world)
        reached = planned.fit(world, [*on_the_way, *watchers], stop_after=stop_after, should_stop=should_stop)
    if reached < run.steps:
        return None
    if world.rank == 0:
        if world.size > 1:  # the weights are in shards here, and whole in the checkpoint
            objective, _ = open_objective(run, folder, processor, world)
            restore_weights(objective, read_run(steps_in(run.out)[reached]).weights)
        if zero is not None:
            zero = replace(zero, after=score(objective, held_out))
        _report(planned, zero, reached)
        objective.hand_over()
        save(objective.model.to(torch.bfloat16), run.out / "export", companions=folder)
        log.info("wrote %s", run.out / "export")
    return PreTrained(step=reached, export=run.out / "export", zero_shot=zero)


def check_vision(run: Tune, config: ModelConfig) -> VisionConfig:
    """What V0 trains; ValueError where the model has none."""
    if config.vision is None:
        raise ValueError(
            f"{run.model} is a text-only model; --stage v0 trains a vision encoder. Give a model that has one."
        )
    return config.vision


def open_objective(run: Tune, folder: Path, processor: Processor, world: World) -> tuple[Contrastive, Encode]:
    """The model with the helpers that V0 trains beside it, and how they read captions."""
    model = load(folder, dtype=pick_dtype(world.device, run.compute.dtype), device=world.device)
    if run.pre_stage.siglip is not None:
        siglip = resolve(str(run.pre_stage.siglip))
        objective = load_contrastive(model, siglip)
        return objective, siglip_encoding(siglip, objective.text.config.max_length)
    vision = model.config.vision
    assert vision is not None
    tokenizer, length = processor.tokenizer, run.pre_stage.caption_tokens
    text = text_tower_config(vision, tokenizer.num_ids, length)
    return new_contrastive(model, text, seed=run.seed), own_encoding(tokenizer, length)


def text_tower_config(vision: VisionConfig, vocab_size: int, caption_tokens: int) -> TextTowerConfig:
    """SigLIP-2's rule: a text tower has the shape of its vision encoder."""
    return TextTowerConfig(
        vocab_size=vocab_size,
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_layers=vision.depth,
        num_heads=vision.num_heads,
        projection_size=vision.hidden_size,
        max_length=caption_tokens,
    )


def num_helper_parameters(vision: VisionConfig, text: TextTowerConfig) -> int:
    """What V0 trains beside the vision encoder: text tower, pooling head, a LayerNorm, scale and bias."""
    with torch.device("meta"):
        helpers = (TextTower(text), AttentionPool(vision.hidden_size, vision.intermediate_size, vision.num_heads))
    return sum(p.numel() for helper in helpers for p in helper.parameters()) + 2 * vision.hidden_size + 2


def pre_stage_loop(run: Tune) -> LoopConfig:
    loop = loop_config(run)
    rates = Rates(vision=run.optimizer.rates.vision, mergers=0.0, language=0.0)
    # Packs hold images and no tokens of the language model, so `fill` would say nothing.
    return replace(loop, optimizer=replace(loop.optimizer, rates=rates), pack_tokens=None)


def settings_of(run: Tune, folder: Path) -> dict[str, object]:
    """What else decides the run's numbers; a resume under other ones is refused."""
    return {
        "stage": run.stage,
        "model": str(folder.resolve()),
        "siglip": None if run.pre_stage.siglip is None else str(run.pre_stage.siglip),
        "caption_tokens": run.pre_stage.caption_tokens,
        "held_out": run.forgetting.held_out,
    }


def score(objective: Contrastive, held_out: HeldOutPairs) -> float | None:
    """None where nothing is held out."""
    if not held_out.packs:
        return None
    was_training = objective.training
    objective.eval()
    caption_ST, caption_id_S = held_out.classes()
    found = zero_shot(objective, caption_ST, caption_id_S, held_out.packs)
    objective.train(was_training)
    return found


def _report(run: Run, zero: ZeroShot | None, exported_step: int | None) -> None:
    found = {} if zero is None or zero.after is None else {SCORE: zero.after}
    facts = {
        "stage": "v0",
        "zero_shot": None if zero is None else {**asdict(zero), "chance": 1 / zero.captions},
        "exported_step": exported_step,
        "expect": judged(run.expect, found),
    }
    run.out.mkdir(parents=True, exist_ok=True)
    write_text(run.out / REPORT, json.dumps(facts, indent=2) + "\n")
