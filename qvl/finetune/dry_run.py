"""The dry run: what a training run would read, train, hold in memory and reach, counted without training or writing anything."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from rich.table import Table
from torch import nn

from qvl.core.device import pick_device, pick_dtype, place
from qvl.data.index import fingerprint
from qvl.data.mixture import read_mixture
from qvl.data.source import open_source
from qvl.data.store import Store
from qvl.finetune.captions import probe, with_images
from qvl.finetune.config import Tune
from qvl.finetune.pre_stage import (
    SCORE,
    check_vision,
    num_helper_parameters,
    pre_stage_loop,
    text_tower_config,
)
from qvl.finetune.tune import expectations, loop_config, lora_config
from qvl.finetune.tune_data import split
from qvl.model.config import ModelConfig, read_config
from qvl.model.flops import forward_flops, vision_flops
from qvl.model.lora import num_adapter_parameters
from qvl.model.pool import AttentionPool
from qvl.model.qwen3vl import empty_model
from qvl.model.siglip_text import TextTower, TextTowerConfig, load_text_tower
from qvl.outside.hub import resolve
from qvl.parallel.memory import (
    CheckpointBytes,
    checkpoint_bytes,
    decoder_stack,
    head_bytes,
    training_memory,
    vision_stack,
)
from qvl.prompt.processor import Processor
from qvl.train.contrastive import pre_stage_flops
from qvl.train.metrics import peak_flops
from qvl.train.parameters import Part, freeze, groups, part_of

MFU = 0.4
"""Part of the peak that a good run reaches; what yours reaches stands in its log."""


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """Counts, not measurements."""

    device: str
    num_devices: int
    dtype: str
    parameters: dict[str, int]
    """By part, the adapter's among them."""
    trained: dict[str, int]
    records: dict[str, int]
    """By source of the mixture, those held out left aside."""
    held_out_records: int
    data_tokens: int
    """Of one epoch over the records."""
    steps: int
    step_tokens: int
    """The most that a step reads."""
    replay: str
    memory_bytes: dict[str, int]
    """On each device, by what it holds."""
    checkpoint_bytes: CheckpointBytes
    """On disk."""
    flops: float
    """Of all steps, forward and backward, as if every part learned."""
    days: float | None
    """At MFU of the devices' peak; None where the peak is not known, as on a CPU."""
    expect: tuple[str, ...]
    """What the run says it will reach."""

    @property
    def epochs(self) -> float:
        """Over the data, replay not counted."""
        return self.steps * self.step_tokens / max(1, self.data_tokens)


def dry_run(run: Tune) -> DryRun:
    """Reads the model's config and the data's indexes, and refuses what `tune` would refuse of them."""
    device, num_devices = pick_device(run.compute.device), place().world_size
    dtype = pick_dtype(device, run.compute.dtype)
    folder = resolve(run.model)
    processor, config = Processor.from_folder(folder), read_config(folder)
    parameters, trained = count_parameters(run)
    mixture, store, mark = read_mixture(run.data), Store(), fingerprint(processor)
    records: dict[str, int] = {}
    held_out = tokens = patches = square = token_square = pairs = 0
    own = replace(mixture, replay=())
    if run.stage == "v0":
        own = probe(own, processor, store)
    for source in (open_source(one, mark, store) for one in own.resolved()):
        source = with_images(source) if run.stage == "v0" else source
        learned, kept = split(source, run.forgetting.held_out)
        records[source.config.path] = learned.lengths.num_records
        held_out += kept.lengths.num_records
        tokens += int(learned.lengths.token_S.sum())
        token_square += int(np.square(learned.lengths.token_S.astype(np.int64)).sum())
        patches += int(learned.lengths.patch_S.sum())
        square += int(learned.lengths.square_S.sum())
        pairs += learned.lengths.num_records
    each = dtype.itemsize
    total_tokens = run.steps * run.packs.step_tokens
    part = total_tokens / max(1, tokens)  # of an epoch
    # Sequences and frames of one length, chosen so that attention costs what it costs in the data.
    frames = (square // patches,) * (patches * patches // square) if patches else ()
    length = min(run.packs.pack_tokens, max(1, token_square // max(1, tokens)))
    if run.stage == "v0":
        flops = part * pre_stage_flops(config, text_of(run, config, processor), frames, pairs)
    else:
        visual = 3 * part * vision_flops(config, frames)
        flops = visual + total_tokens / length * forward_flops(config, (length,)).training
    peak = peak_flops(device)
    stacks, last = [], {}
    if run.stage != "v0":  # which runs no decoder
        stacks.append(decoder_stack(config, run.packs.pack_tokens, recomputes=run.compute.checkpoint_decoder))
        last = head_bytes(config, run.packs.pack_tokens, each)
    if config.vision is not None and trained.get("vision", 0):  # a frozen vision encoder keeps no activations
        stacks.append(vision_stack(config.vision, run.packs.pack_patches, recomputes=run.compute.checkpoint_vision))
    memory = training_memory(
        sum(parameters.values()),
        sum(trained.values()),
        stacks,
        devices=num_devices,
        last=last,
        each=each,
        is_sharded=num_devices > 1,
    )
    return DryRun(
        device=str(device),
        num_devices=num_devices,
        dtype=str(dtype).removeprefix("torch."),
        parameters=parameters,
        trained=trained,
        records=records,
        held_out_records=held_out,
        data_tokens=tokens,
        steps=run.steps,
        step_tokens=run.packs.step_tokens,
        replay="none" if run.stage == "v0" else run.replay.replay,
        memory_bytes=memory,
        checkpoint_bytes=checkpoint_bytes(
            sum(trained.values()),
            sum(parameters.values()) - sum(trained.values()),
            kept=loop_config(run).keep,
            trained_each=each if lora_config(run) is None else 4,  # an adapter is fp32 whatever it adapts
            frozen_each=each,
            one_moment=count_muon(run),
        ),
        flops=flops,
        days=None if peak is None else flops / (num_devices * peak * MFU) / 86400,
        expect=(f"{SCORE} at least what it is before",) if run.stage == "v0" else tuple(map(str, expectations(run))),
    )


def count_parameters(run: Tune) -> tuple[dict[str, int], dict[str, int]]:
    """(of the model, of what learns), by part."""
    config, lora = read_config(resolve(run.model)), lora_config(run)
    model = empty_model(config, dtype=torch.bfloat16, device="meta")
    counts: dict[Part, int] = {}
    for name, parameter in model.named_parameters():
        counts[part_of(name)] = counts.get(part_of(name), 0) + parameter.numel()
    rates = run.optimizer.rates
    if run.stage == "v0":
        rates = pre_stage_loop(run).optimizer.rates
        text = text_of(run, config, Processor.from_folder(resolve(run.model)))
        counts["helpers"] = num_helper_parameters(check_vision(run, config), text)
    if lora is None:
        return {**counts}, {part: count for part, count in counts.items() if rates.of(part) > 0}
    adapter = {"adapter": num_adapter_parameters(model, lora)}
    return {**counts, **adapter}, adapter if rates.language > 0 else {}


def count_muon(run: Tune) -> int:
    """The parameters that Muon moves, which have one moment."""
    config, rates = read_config(resolve(run.model)), run.optimizer.rates
    if run.optimizer.optimizer != "muon" or lora_config(run) is not None:  # an adapter's factors are AdamW's
        return 0
    modules: dict[str, nn.Module] = {"model": empty_model(config, dtype=torch.bfloat16, device="meta")}
    if run.stage == "v0":
        vision, rates = check_vision(run, config), pre_stage_loop(run).optimizer.rates
        with torch.device("meta"):
            modules["text"] = TextTower(text_of(run, config, Processor.from_folder(resolve(run.model))))
            modules["pool"] = AttentionPool(vision.hidden_size, vision.intermediate_size, vision.num_heads)
    objective = nn.ModuleDict(modules)
    freeze(objective, rates)
    sizes = {name: parameter.numel() for name, parameter in objective.named_parameters()}
    return sum(sizes[name] for group in groups(objective) if group.is_matrix for name in group.names)


def text_of(run: Tune, config: ModelConfig, processor: Processor) -> TextTowerConfig:
    """The text tower of V0."""
    vision, siglip = check_vision(run, config), run.pre_stage.siglip
    if siglip is not None:
        return load_text_tower(resolve(str(siglip))).config
    return text_tower_config(vision, processor.tokenizer.num_ids, run.pre_stage.caption_tokens)


def table_of(found: DryRun) -> Table:
    total, trained = sum(found.parameters.values()), sum(found.trained.values())
    table = Table(title="dry run: nothing is trained or written", show_header=False, title_justify="left")
    memory = sum(found.memory_bytes.values())
    rows = {
        "devices": f"{found.num_devices} x {found.device}",
        "dtype": found.dtype,
        "parameters": f"{total:,}: " + ", ".join(f"{part} {count:,}" for part, count in found.parameters.items()),
        "trained": f"{trained:,}: " + ", ".join(f"{part} {count:,}" for part, count in found.trained.items()),
        "records": f"{sum(found.records.values()):,}, and {found.held_out_records:,} held out",
        "tokens": f"{found.data_tokens:,} in one epoch; the run reads up to {found.steps * found.step_tokens:,}, replay ({found.replay}) "
        f"included: {found.epochs:,.1f} epochs",
        "steps": f"{found.steps:,} of up to {found.step_tokens:,} tokens",
        "memory": f"{memory / 2**30:.2f} GiB on each device, one pack at a time: "
        + ", ".join(f"{what} {size / 2**30:.2f}" for what, size in found.memory_bytes.items()),
        "disk": str(found.checkpoint_bytes),
        "FLOPs": f"{found.flops:.2e}",
        "time": "not known without the device's peak"
        if found.days is None
        else f"{24 * found.days:,.1f} hours at {MFU:.0%} of the devices' peak",
        "expected": "; ".join(found.expect) or "nothing",
    }
    for what, said in rows.items():
        table.add_row(what, said)
    return table
