"""How blocks run while training: activations kept, or thrown away and made again; as they are, or compiled."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qvl.model.moe import Experts, MoE, pick_dispatch
from qvl.model.qwen3vl import Qwen3VL


@contextmanager
def blocks_as_told(
    model: Qwen3VL, *, checkpoint_vision: bool, checkpoint_decoder: bool, compiled: bool
) -> Iterator[None]:
    """While this is open, the chosen blocks are checkpointed and all of them compiled; afterwards the model is as it was.

    Parameters and their names do not change, so that checkpoints, sharding and exports know nothing of it.
    """
    decoder, vision = model.language_model, model.visual if model.config.vision is not None else None
    with ExitStack() as undo:
        if checkpoint_decoder:
            _set(undo, decoder, "run_block", checkpointed)
        if checkpoint_vision and vision is not None:
            _set(undo, vision, "run_block", checkpointed)
        if compiled:
            for block in (*decoder.layers, *(vision.blocks if vision is not None else ())):
                _compile(undo, block)
        yield


def checkpointed(block: nn.Module, *arguments: Any) -> Any:
    """Keep the block's input alone and run the block once more in the backward pass (arXiv 1604.06174). The second run draws the same
    dropout; router statistics are handed on by the first run alone, because whoever collects them stands outside of the block."""
    return checkpoint(block, *arguments, use_reentrant=False)


def _compile(undo: ExitStack, block: nn.Module) -> None:
    """One graph for all blocks of a kind and all lengths of packs: what changes with every pack stays outside of it."""
    attention: nn.Module = block.attn if hasattr(block, "attn") else block.self_attn  # type: ignore[assignment]
    _set(undo, attention, "attend", torch.compiler.disable(attention.attend))
    if isinstance(mlp := block.mlp, MoE):
        _set(undo, mlp, "dispatch", torch.compiler.disable(mlp.dispatch or _local))
    # The forward alone, so that sharding's hooks around it stay as they are.
    _set(undo, block, "forward", torch.compile(block.forward, dynamic=True))


def _local(x_TD: Tensor, expert_TA: Tensor, weight_TA: Tensor, experts: Experts) -> Tensor:
    return pick_dispatch(x_TD.device.type, x_TD.dtype)(x_TD, expert_TA, weight_TA, experts)


def _set(undo: ExitStack, module: nn.Module, name: str, value: Any) -> None:
    """On this one module, and taken back at the end."""
    held = module.__dict__.get(name)
    has_own = name in module.__dict__
    setattr(module, name, value)
    undo.callback(lambda: setattr(module, name, held) if has_own else delattr(module, name))
