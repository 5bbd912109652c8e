"""The pretraining stages at every published size: what is trained, on how much of what, and what that costs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from qvl.finetune.pre_stage import num_helper_parameters, text_tower_config
from qvl.model.config import ModelConfig, VisionConfig, preset
from qvl.model.flops import forward_flops, vision_flops
from qvl.model.qwen3vl import Qwen3VL, empty_model
from qvl.parallel.memory import (
    CheckpointBytes,
    checkpoint_bytes,
    decoder_stack,
    head_bytes,
    training_memory,
    vision_stack,
)
from qvl.train.contrastive import V0_RATES, pre_stage_flops
from qvl.train.loop import LoopConfig
from qvl.train.parameters import Part, Rates, part_of


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One row of the report's Table 1, with what the report leaves open chosen by us (each `ours` says which and why)."""

    name: str
    goal: str
    rates: Rates
    tokens: int
    """Budget in tokens, text and visual (report Table 1; of V0 ours)."""
    pack_tokens: int
    """Sequence length (report Table 1); packs are filled to it."""
    tokens_per_step: int
    """Ours: from S0 on 4M tokens, usual at this scale; the report gives no batch size."""
    lr: float
    mixture: Mapping[str, float]
    """Share of tokens by the report's categories. The report names what grows and shrinks, no numbers: the shares are ours."""
    visual_share: float
    """Ours: part of the tokens that stand for patches, for the cost of the vision tower."""
    mean_length: int
    """Ours: mean tokens of a document inside a pack, for the cost of attention."""
    caption_tokens: int = 0
    """V0: of each caption, padding included. They are read by SigLIP-2's text tower; the language model is not run."""
    ours: tuple[str, ...] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        total = sum(self.mixture.values())
        if abs(total - 1) > 1e-9:
            raise ValueError(f"the mixture of {self.name} sums to {total}; make it 1.")

    @property
    def steps(self) -> int:
        return -(-self.tokens // self.tokens_per_step)

    @property
    def packs_per_step(self) -> int:
        return self.tokens_per_step // self.pack_tokens

    @property
    def pictures(self) -> int:
        """V0: pairs of a picture and its caption; 0 in the stages that count tokens."""
        return self.tokens // self.mean_length if self.caption_tokens else 0


def train_settings(stage: Stage) -> dict[str, Any]:
    """What of `qvl train` makes it this stage; model, data and out are the user's.

    The stages' mixtures hold their own text, so nothing is rehearsed and no loss of text stops the run; it is still judged.
    """
    own = {"stage": "v0", "caption_tokens": stage.caption_tokens} if stage.caption_tokens else {}
    is_long = stage.pack_tokens > 8192
    return own | {
        "steps": stage.steps,
        "pack_tokens": stage.pack_tokens,
        "pack_patches": 4 * stage.pack_tokens,
        "packs_per_step": stage.packs_per_step,
        "lr": stage.lr,
        "rates": asdict(stage.rates),
        "warmup_steps": WARMUP,
        "replay": "none",
        "held_out": 0.0005,
        "max_text_loss": 0,
        "checkpoint_vision": is_long,
        "checkpoint_decoder": is_long,
    }


BATCH = 4 * 2**20
GEMMA_IDS = 256_000
WARMUP = 1000
"""Ours, in steps."""
PAIRS_PER_STEP = 32 * 2**10


def v0() -> Stage:
    """Vision pre-stage: SigLIP-2's tower goes on learning, CLIP-style, at the pictures' own sizes (report 1.2; 13, Table 11).

    The report gives neither objective, data nor budget: every number here is ours. `qvl.train.contrastive` is the objective.
    """
    picture, caption = FRAME_PATCHES // 4, 64
    pair = picture + caption
    return Stage(
        name="v0",
        goal="see at any size",
        rates=V0_RATES,
        tokens=2 * 10**9 * pair,
        pack_tokens=128 * pair,
        tokens_per_step=PAIRS_PER_STEP * pair,
        lr=1e-4,
        mixture={"image captions": 1.0},
        visual_share=picture / pair,
        mean_length=pair,
        caption_tokens=caption,
        ours=(
            "2 billion pairs: a twentieth of the 40 billion that SigLIP-2 saw, to get used to new sizes and not to learn to see anew",
            "32,768 pairs a step as in SigLIP-2; a loss sees the pairs of one pack on every device, so 256 devices see them all",
            "lr 1e-4: a tenth of SigLIP's peak",
            "pictures of 256 visual tokens on average",
            "once for each tower: 2B and 4B share one, the others the other",
        ),
    )


def s0() -> Stage:
    """Vision-language alignment: the mergers alone, DeepStack's too (report Table 1: 67B tokens at 8,192)."""
    return Stage(
        name="s0",
        goal="align the tower with the language model",
        rates=Rates(vision=0, mergers=1, language=0),
        tokens=67 * 10**9,
        pack_tokens=8192,
        tokens_per_step=BATCH,
        lr=1e-3,
        mixture={"image captions": 0.6, "knowledge": 0.2, "ocr": 0.2},
        visual_share=0.6,
        mean_length=1000,
        ours=("lr 1e-3: only fresh mergers learn", "captions 3 : knowledge 1 : OCR 1"),
    )


def s1() -> Stage:
    """Multimodal pretraining: everything learns (report Table 1: about 1T tokens at 8,192)."""
    return Stage(
        name="s1",
        goal="learn to see and read, in one model",
        rates=Rates(vision=0.1),
        tokens=10**12,
        pack_tokens=8192,
        tokens_per_step=BATCH,
        lr=1e-4,
        mixture={
            "text": 0.25,
            "image captions": 0.2,
            "interleaved": 0.15,
            "knowledge": 0.05,
            "ocr and documents": 0.12,
            "grounding and counting": 0.06,
            "spatial and 3d": 0.03,
            "code": 0.03,
            "stem": 0.07,
            "video": 0.02,
            "agent": 0.02,
        },
        visual_share=0.45,
        mean_length=1750,
        ours=("tower at a tenth of the rate, which kept small towers from forgetting", "a quarter of text"),
    )


def s2() -> Stage:
    """Long context: more text, and among pictures much more video and agent data (report Table 1: about 1T tokens at 32,768)."""
    return Stage(
        name="s2",
        goal="read long documents and watch video",
        rates=Rates(vision=0.1),
        tokens=10**12,
        pack_tokens=32768,
        tokens_per_step=BATCH,
        lr=5e-5,
        mixture={
            "text": 0.35,
            "image captions": 0.08,
            "interleaved": 0.1,
            "knowledge": 0.03,
            "ocr and documents": 0.1,
            "grounding and counting": 0.03,
            "spatial and 3d": 0.02,
            "code": 0.03,
            "stem": 0.06,
            "video": 0.13,
            "agent": 0.07,
        },
        visual_share=0.4,
        mean_length=6000,
        ours=("half of S1's rate", "text from .25 to .35, video from .02 to .13, agent from .02 to .07"),
    )


def s3() -> Stage:
    """Ultra-long adaptation: long video and long documents (report Table 1: 100B tokens at 262,144)."""
    return Stage(
        name="s3",
        goal="use the whole window of 262,144 tokens",
        rates=Rates(vision=0.1),
        tokens=100 * 10**9,
        pack_tokens=262144,
        tokens_per_step=BATCH,
        lr=2e-5,
        mixture={"text": 0.35, "long documents": 0.25, "video": 0.25, "interleaved": 0.05, "stem": 0.05, "agent": 0.05},
        visual_share=0.45,
        mean_length=60000,
        ours=("a fifth of S1's rate", "half of it long documents and video, the rest shorter replay"),
    )


STAGES = {"v0": v0, "s0": s0, "s1": s1, "s2": s2, "s3": s3}
FRAME_PATCHES = 1024
"""Ours: a picture or frame of 512 x 512, for the cost of the tower's attention."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a stage takes at one size. Estimates by counting, not measurements."""

    parameters: dict[Part, int]
    trained: int
    flops: float
    """Of the whole stage, forward and backward, without recomputation."""
    days: float
    """On `devices` at `mfu` of `peak`."""
    memory_bytes: dict[str, int]
    """On each device under FSDP, by what it holds."""
    checkpoint_bytes: CheckpointBytes
    """On disk, under AdamW."""


def cost(stage: Stage, size: str, *, devices: int, peak: float, mfu: float) -> Cost:
    """Raises ValueError where a pack cannot be dealt out."""
    if devices < 1 or not 0 < mfu <= 1 or peak <= 0:
        raise ValueError(
            f"devices is {devices}, mfu {mfu}, peak {peak}; expected devices >= 1, 0 < mfu <= 1, peak > 0."
        )
    config = preset(size)
    parameters = count_parameters(config)
    if stage.caption_tokens:  # neither mergers nor language take part, and a run need not hold them
        del parameters["mergers"], parameters["language"]
        parameters["helpers"] = count_helpers(config, stage.caption_tokens)
    trained = sum(count for part, count in parameters.items() if stage.rates.of(part) > 0)
    flops = pack_flops(stage, config) * stage.tokens / stage.pack_tokens
    return Cost(
        parameters=parameters,
        trained=trained,
        flops=flops,
        days=flops / (devices * peak * mfu) / 86400,
        memory_bytes=memory(stage, config, sum(parameters.values()), trained, devices),
        checkpoint_bytes=checkpoint_bytes(trained, sum(parameters.values()) - trained, kept=LoopConfig.keep),
    )


def count_parameters(config: ModelConfig) -> dict[Part, int]:
    model: Qwen3VL = empty_model(config, dtype=torch.bfloat16, device="meta")
    counts: dict[Part, int] = {}
    for name, parameter in model.named_parameters():
        counts[part_of(name)] = counts.get(part_of(name), 0) + parameter.numel()
    return counts


def count_helpers(config: ModelConfig, caption_tokens: int) -> int:
    """With SigLIP-2's text tower, which has the shape of its vision tower, and Gemma's vocabulary."""
    vision = _vision(config)
    return num_helper_parameters(vision, text_tower_config(vision, GEMMA_IDS, caption_tokens))


def _vision(config: ModelConfig) -> VisionConfig:
    assert config.vision is not None, "every published size has a tower"
    return config.vision


def pair_flops(stage: Stage, config: ModelConfig) -> float:
    """One pack of V0, forward and backward: what a run counts, and the scores of its images with all captions of the step."""
    vision, pictures = _vision(config), stage.pack_tokens // stage.mean_length
    text = text_tower_config(vision, GEMMA_IDS, stage.caption_tokens)
    scores = 2 * pictures * PAIRS_PER_STEP * text.projection_size
    return pre_stage_flops(config, text, (FRAME_PATCHES,) * pictures, pictures) + 3 * scores


def pack_flops(stage: Stage, config: ModelConfig) -> float:
    """One pack, forward and backward.

    A part that learns costs three forwards. A frozen part that the gradient must pass (the language model in S0) costs two, a frozen part
    before all that learns (the tower in S0) one. Prompts and visual tokens have no loss, but their rows are left out of the head.
    """
    if stage.caption_tokens:
        return pair_flops(stage, config)
    whole, rest = divmod(stage.pack_tokens, stage.mean_length)
    lengths = (stage.mean_length,) * whole + ((rest,) if rest else ())
    visual = int(stage.pack_tokens * stage.visual_share)
    frames = max(1, visual * 4 // FRAME_PATCHES)
    text = forward_flops(config, lengths, num_logits=stage.pack_tokens - visual)
    tower = vision_flops(config, (FRAME_PATCHES,) * frames)
    language = 3 if stage.rates.language > 0 else 2
    return language * text.forward + (3 if stage.rates.vision > 0 else 1) * tower


def memory(stage: Stage, config: ModelConfig, total: int, trained: int, devices: int) -> dict[str, int]:
    """bf16 weights, fp32 gradients, masters and two moments, sharded; activations of one pack with each layer recomputed."""
    stack, last = decoder_stack(config, stage.pack_tokens), head_bytes(config, stage.pack_tokens)
    if stage.caption_tokens:
        vision, pictures = _vision(config), stage.pack_tokens // stage.mean_length
        stack = vision_stack(vision, pictures * FRAME_PATCHES)
        last = {"pair scores": 3 * 4 * pictures * PAIRS_PER_STEP}
    return training_memory(total, trained, (stack,), devices=devices, last=last)
