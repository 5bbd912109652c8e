"""The memory planner: what a training step holds on each device and a run on disk, counted by part before anything is loaded."""

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


@dataclass(frozen=True, kw_only=True)
class CheckpointBytes:
    """What a run's checkpoints take on disk, without headers and counters."""

    weights: int
    """Of what trains, at each kept step."""
    optimizer: int
    """Moments, and fp32 masters where the weights are not fp32 themselves, at each kept step."""
    frozen: int
    """The rest, once beside the steps."""
    kept: int
    """Steps; while one more is written it stands beside them."""

    @property
    def total(self) -> int:
        return self.kept * (self.weights + self.optimizer) + self.frozen

    def __str__(self) -> str:
        each = self.weights + self.optimizer
        return (
            f"{self.total / 2**30:.2f} GiB of checkpoints: {self.kept} of {each / 2**30:.2f} (what trains: weights "
            f"{self.weights / 2**30:.2f}, optimizer {self.optimizer / 2**30:.2f}), and the frozen rest once, {self.frozen / 2**30:.2f}"
        )


def checkpoint_bytes(
    trained: int, frozen: int, *, kept: int, trained_each: int = 2, frozen_each: int = 2, one_moment: int = 0
) -> CheckpointBytes:
    """Of `trained` weights of `trained_each` bytes and `frozen` ones. AdamW has two moments; Muon has one, of the `one_moment` it moves."""
    moments = 4 * (2 * trained - one_moment)
    return CheckpointBytes(
        weights=trained_each * trained,
        optimizer=moments if trained_each == 4 else moments + 4 * trained,
        frozen=frozen_each * frozen,
        kept=kept,
    )
