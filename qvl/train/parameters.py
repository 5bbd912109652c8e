"""Which parameters learn, and how fast: vision, mergers, language, each with its own rate or frozen."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

Part = Literal["vision", "mergers", "language", "helpers"]


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Factors on the run's learning rate; 0 freezes the part (report Table 1: S0 trains the mergers alone)."""

    vision: float = 1.0
    mergers: float = 1.0
    language: float = 1.0

    def __post_init__(self) -> None:
        if min(self.vision, self.mergers, self.language) < 0:
            raise ValueError(f"rates are {self}; expected factors of 0 (frozen) or above.")

    def of(self, part: Part) -> float:
        return {"vision": self.vision, "mergers": self.mergers, "language": self.language, "helpers": 1.0}[part]


@dataclass(frozen=True)
class Group:
    """Parameters that share part and optimizer family. Names are the model's."""

    part: Part
    is_matrix: bool
    """Hidden 2-D weights, which Muon may take; embeddings, head, norms, biases, experts and LoRA's factors are not."""
    names: tuple[str, ...]


def part_of(name: str) -> Part:
    """Of a parameter's name in the model, or in an objective that holds the model as `model` and maybe helpers beside it.

    The DeepStack mergers are mergers: the report's S0 says "merger" and needs them trained too.
    """
    name = name.removeprefix("model.")
    if name.startswith(("visual.merger.", "visual.deepstack_merger_list.")):
        return "mergers"
    if name.startswith("visual."):
        return "vision"
    return "language" if name.startswith(("language_model.", "lm_head.")) else "helpers"


def freeze(model: nn.Module, rates: Rates) -> None:
    """Set requires_grad by part. With a LoRA adapter attached only its own matrices learn, the base stays as it is."""
    names = [name for name, _ in model.named_parameters()]
    has_adapter = any(is_adapter(name) for name in names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(rates.of(part_of(name)) > 0 and (is_adapter(name) or not has_adapter))


def is_adapter(name: str) -> bool:
    return name.endswith((".lora_down", ".lora_up"))


def _is_table(name: str) -> bool:
    """Rows that each learn alone (embeddings, heads), and LoRA's factors. The patch embedding is a matrix in spite of its name: its 1,536
    inputs move together, and at Muon's rates AdamW would turn its output over at every step (dev/LOG.md)."""
    is_rows = ("embed" in name and "patch_embed" not in name) or "lm_head" in name or name == "head.weight"
    return is_rows or is_adapter(name)


def groups(model: nn.Module) -> list[Group]:
    """All trainable parameters, each once."""
    found: dict[tuple[Part, bool], list[str]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found.setdefault((part_of(name), parameter.ndim == 2 and not _is_table(name)), []).append(name)
    if not found:
        raise ValueError("nothing is trainable: every part is frozen. Give at least one part a rate above 0.")
    return [Group(part, is_matrix, tuple(names)) for (part, is_matrix), names in found.items()]
