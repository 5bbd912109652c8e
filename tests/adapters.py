"""A LoRA adapter's matrices, found by their names alone."""

from torch import nn


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if name.endswith((".lora_down", ".lora_up"))}
