"""The memory planner: what a training step holds on each device, counted by part before anything is loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qvl.model.config import ModelConfig, VisionConfig


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Layers of one width that a pack passes."""

    rows: int
    """Tokens or patches of a pack."""
    width: int
    depth: int
    inner: int
    """Numbers a row inside the MLP."""
    recomputes: bool = True
    """Only each layer's input is kept, and the rest is recomputed in the backward pass."""

    def activation_bytes(self, each: int) -> dict[str, int]:
        """`each`: bytes of a number."""
        layer = self.rows * (8 * self.width + self.inner) * each
        if not self.recomputes:
            return {"kept activations": layer * self.depth}
        return {"kept activations": self.rows * self.width * self.depth * each, "one layer's activations": layer}


def decoder_stack(config: ModelConfig, tokens: int, *, recomputes: bool = True) -> Stack:
    text = config.text
    inner = 3 * (text.moe.intermediate_size * text.moe.num_experts_per_tok if text.moe else text.intermediate_size)
    return Stack(rows=tokens, width=text.hidden_size, depth=text.num_hidden_layers, inner=inner, recomputes=recomputes)


def vision_stack(vision: VisionConfig, patches: int, *, recomputes: bool = True) -> Stack:
    return Stack(
        rows=patches,
        width=vision.hidden_size,
        depth=vision.depth,
        inner=2 * vision.intermediate_size,
        recomputes=recomputes,
    )


def head_bytes(config: ModelConfig, tokens: int, each: int = 2) -> dict[str, int]:
    """Of the loss, which never holds all logits."""
    return {"head, one chunk": 2**28 + tokens * config.text.hidden_size * each}


def training_memory(
    total: int,
    trained: int,
    stacks: Sequence[Stack],
    *,
    devices: int,
    last: Mapping[str, int],
    each: int = 2,
    is_sharded: bool = True,
) -> dict[str, int]:
    """Bytes on each device by what they hold: weights of `each` bytes, of `trained` ones fp32 gradients and two moments, and masters
    where the weights are not fp32 themselves; of every stack the activations of one pack.

    A count, not a measurement: what the allocator and the kernels take comes on top.
    """
    moments = 8 if each == 4 else 12
    held = {
        "weights": each * total // devices,
        "gradients": 4 * trained // devices,
        "optimizer" if each == 4 else "optimizer (masters, moments)": moments * trained // devices,
    }
    if is_sharded:
        depth = sum(stack.depth for stack in stacks)
        held["one layer gathered"] = 2 * each * (total // (depth + 2))
    for stack in stacks:
        for what, size in stack.activation_bytes(each).items():
            # A layer of one stack is recomputed after those of the other.
            held[what] = max(held.get(what, 0), size) if what.startswith("one") else held.get(what, 0) + size
    return held | dict(last)
