"""The settings of a training run, in groups; flags and YAML keys are the names of the single fields."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from qvl.core.config import FLAT
from qvl.train.loss import Denominator, LossKernel
from qvl.train.parameters import Rates

UNPREFIXED = arg(name="")
"""A group's fields are flags of their own: --lr, not --optimizer.lr."""


@dataclass(frozen=True, kw_only=True)
class PackSettings:
    """How much is read at once."""

    pack_tokens: int = 8192
    """Text and visual tokens of one pack. What is longer is made to fit: long texts become pieces, videos get fewer frames and pictures
    fewer tokens, and only then is text cut; the run says at its end how often."""
    pack_patches: int = 32768
    """Patches of one pack, four to a visual token: bounds the vision tower's memory."""
    packs_per_step: int = 8
    """Over all ranks."""
    workers: int = 2
    """Threads that read packs ahead."""

    @property
    def step_tokens(self) -> int:
        """The most that a step reads."""
        return self.packs_per_step * self.pack_tokens


@dataclass(frozen=True, kw_only=True)
class ReplaySettings:
    """What is practised beside the data."""

    replay: str = "auto"
    """What is practised beside your data so that other skills stay. self: texts and chats that the model writes before the first step
    (nothing to download; they keep what it can do, and teach nothing). A path: text and chats of yours, as .txt, .jsonl, shards or a
    mixture file; better, where you have them. none: nothing. auto: the mixture's own `replay:` where it has one, else self."""
    replay_share: float = 0.1
    """Of all tokens, for self and a path; self takes less where it would come round more than four times."""
    replay_samples: int = 512
    """The most texts and chats the model writes; a short run gets by with fewer."""

    def __post_init__(self) -> None:
        if not 0 < self.replay_share < 1 or self.replay_samples < 1:
            raise ValueError(
                f"replay_share is {self.replay_share} and replay_samples {self.replay_samples}; expected a share between 0 and 1, and "
                "at least 1."
            )


@dataclass(frozen=True, kw_only=True)
class ForgettingSettings:
    """What the model is judged by before, during and after."""

    held_out: float = 0.05
    """Part of your records that is never trained on and gives the held-out loss, chosen by their content; 0: none."""
    held_out_text: Path | None = None
    """Text that is in no training data (plain, or .jsonl rows with `text`), judged in bits a byte before, during and after. None: 16 KB of
    English from Python's manual; give your own for other languages."""
    max_text_loss: float = 1.05
    """The run stops when that text costs more than so many times the bits of before, and exports the last checkpoint that was within. 0
    measures and never stops."""

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}; expected a part of at least 0 and below 1.")


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """What learns, how fast, and by which rule."""

    lr: float = 1e-5
    rates: Rates = field(default_factory=Rates)
    """Factors on lr for vision, mergers and language; 0 freezes."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    weight_decay: float = 0.1
    warmup_steps: int = 50
    """At most a tenth of the run."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Training of a few added weights instead of all."""

    lora_rank: int = 0
    """0 trains the weights themselves; above 0, LoRA factors of this rank on the decoder's linear layers, of a MoE its attention alone
    (alpha is twice the rank). The adapter is then written to out/adapter, and merged into out/export."""


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Next-token prediction: how targets count, and who computes it."""

    power: float = 0.5
    """Loss weight n^-power of each of a sample's n targets: 0.5 is the report's square root, 0 counts tokens, 1 counts samples."""
    denominator: Denominator = "weights"
    loss_kernel: LossKernel = "ours"
    """Who computes the cross-entropy: ours, or liger (liger-kernel on a CUDA device)."""


@dataclass(frozen=True, kw_only=True)
class SavingSettings:
    """What is written on the way."""

    checkpoint_every: int = 200
    """Steps between checkpoints, each of which is judged; at most a quarter of the run."""
    export_every: int = 0
    """Steps between folders on the way, out/export-STEP, each a complete Hugging Face checkpoint; 0: only the one at the end."""

    def __post_init__(self) -> None:
        if self.checkpoint_every < 1:
            raise ValueError(f"checkpoint_every is {self.checkpoint_every}; expected at least 1.")


@dataclass(frozen=True, kw_only=True)
class ComputeSettings:
    """Where and how it is computed; nothing here changes what is learned but in the last digits."""

    checkpoint_vision: bool = False
    """Make the activations of the vision tower's blocks again in the backward pass: less memory, a third more work, the same numbers."""
    checkpoint_decoder: bool = False
    """The same for the decoder's layers."""
    compile: bool = False
    """torch.compile every block: a minute or more at the start, then faster; numbers change in the last digits."""
    dtype: str = "auto"
    """What the network is held in; fp32 masters are kept beside bfloat16."""
    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class PreStageSettings:
    """Of --stage v0 alone: the text tower that captions are read by."""

    siglip: Path | None = None
    """V0: the SigLIP-2 folder that the model's vision encoder started from; its text tower, pooling head, scale and bias go on learning.
    None: new ones, which read captions by the model's own tokenizer. They are thrown away at the end."""
    caption_tokens: int = 64
    """V0 without --siglip: tokens of a caption; longer ones are cut."""

    def __post_init__(self) -> None:
        if self.caption_tokens < 2:
            raise ValueError(f"caption_tokens is {self.caption_tokens}; expected at least 2.")


@dataclass(frozen=True, kw_only=True)
class Tune:
    """One run. Rates, lengths and steps are ours: the report gives none of them."""

    model: str
    """Checkpoint folder, or a name on the hub."""
    data: Path
    """Mixture file (YAML) over indexed shards; see `qvl data index`."""
    out: Path
    """Folder for checkpoints, log.jsonl, report.json and the export. A run that was stopped goes on from here."""
    stage: Literal["auto", "v0"] = "auto"
    """auto: next-token prediction, pretraining or fine-tuning as the records' kinds say. v0: the vision pre-stage, in which the vision
    encoder learns from images and their captions by a contrastive loss, and nothing else does."""
    steps: int = 1000
    packs: Annotated[PackSettings, UNPREFIXED] = field(default_factory=PackSettings, metadata=FLAT)
    replay: Annotated[ReplaySettings, UNPREFIXED] = field(default_factory=ReplaySettings, metadata=FLAT)
    forgetting: Annotated[ForgettingSettings, UNPREFIXED] = field(default_factory=ForgettingSettings, metadata=FLAT)
    optimizer: Annotated[OptimizerSettings, UNPREFIXED] = field(default_factory=OptimizerSettings, metadata=FLAT)
    lora: Annotated[LoraSettings, UNPREFIXED] = field(default_factory=LoraSettings, metadata=FLAT)
    loss: Annotated[LossSettings, UNPREFIXED] = field(default_factory=LossSettings, metadata=FLAT)
    saving: Annotated[SavingSettings, UNPREFIXED] = field(default_factory=SavingSettings, metadata=FLAT)
    pre_stage: Annotated[PreStageSettings, UNPREFIXED] = field(default_factory=PreStageSettings, metadata=FLAT)
    seed: int = 0
    compute: Annotated[ComputeSettings, UNPREFIXED] = field(default_factory=ComputeSettings, metadata=FLAT)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; expected at least 1.")
        if self.stage == "v0" and self.lora.lora_rank:
            raise ValueError("--lora-rank adapts the decoder, which --stage v0 does not run; leave one of them out.")
        if self.stage == "v0" and self.replay.replay not in ("auto", "none"):
            raise ValueError(f"replay is {self.replay.replay}, but --stage v0 trains no language; leave --replay out.")

    @property
    def judge_every(self) -> int:
        return min(self.saving.checkpoint_every, -(-self.steps // 4))
