"""How blocks run while training: activations kept, or thrown away and made again; as they are, or compiled."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qvl.model.layers import Blocks, run_plainly
from qvl.model.moe import Experts, MoE, pick_dispatch
from qvl.model.qwen3vl import Qwen3VL


def training_blocks(*, checkpoint_vision: bool, checkpoint_decoder: bool) -> Blocks:
    """The chosen halves' blocks are recomputed in the backward pass."""
    return Blocks(
        vision=recomputed if checkpoint_vision else run_plainly,
        decoder=recomputed if checkpoint_decoder else run_plainly,
    )


def recomputed(block: nn.Module, *arguments: Any) -> Any:
    """Keep the block's input alone and run the block once more in the backward pass (arXiv 1604.06174). The second run draws the same
    dropout; router statistics are handed on by the first run alone, because whoever collects them stands outside of the block."""
    return checkpoint(block, *arguments, use_reentrant=False)


@contextmanager
def compiled_blocks(model: Qwen3VL) -> Iterator[None]:
    """While this is open, all blocks are compiled; afterwards the model is as it was.

    Not handed in with the call as other ways to run a block are: what is compiled is a block's forward alone, below the hooks with which
    sharding gathers the block's weights, and a caller reaches a block only through them. Parameters and their names do not change, so
    that checkpoints, sharding and exports know nothing of it.
    """
    vision = model.visual if model.config.vision is not None else None
    dispatch = torch.compiler.disable(_local)
    with ExitStack() as undo:
        for block in (*model.language_model.layers, *(vision.blocks if vision is not None else ())):
            _compile(undo, block, {"dispatch": dispatch} if isinstance(block.mlp, MoE) else {})
        yield


def _compile(undo: ExitStack, block: nn.Module, outside: dict[str, Any]) -> None:
    """One graph for all blocks of a kind and all lengths of packs: what changes with every pack stays outside of it."""
    attention: nn.Module = block.attn if hasattr(block, "attn") else block.self_attn  # type: ignore[assignment]
    _set(undo, attention, "attend", torch.compiler.disable(attention.attend))
    _set(undo, block, "forward", partial(torch.compile(block.forward, dynamic=True), **outside))


def _local(x_TD: Tensor, expert_TA: Tensor, weight_TA: Tensor, experts: Experts) -> Tensor:
    return pick_dispatch(x_TD.device.type, x_TD.dtype)(x_TD, expert_TA, weight_TA, experts)


def _set(undo: ExitStack, module: nn.Module, name: str, value: Any) -> None:
    """On this one module, and taken back at the end."""
    held = module.__dict__.get(name)
    has_own = name in module.__dict__
    setattr(module, name, value)
    undo.callback(lambda: setattr(module, name, held) if has_own else delattr(module, name))
