"""Attention weights of a few chosen queries, taken while the model runs; no T x T matrix exists."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qvl.core.batch import Batch
from qvl.model.attention import Layout, Packed
from qvl.model.qwen3vl import Qwen3VL


@dataclass(frozen=True)
class Looking:
    """A layout that does what `inner` does, and notes what the chosen queries of its one causal sequence see."""

    inner: Layout
    queries: tuple[int, ...]
    layers: frozenset[int]
    seen: dict[int, Tensor] = field(default_factory=dict)
    """Layer -> fp32 (queries, T): softmax weights, averaged over the heads. Filled by `attend`."""

    def attend(self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, *, layer: int) -> Tensor:
        if layer in self.layers:
            self.seen[layer] = weights_of(q_TNH, k_TKH, self.queries)
        return self.inner.attend(q_TNH, k_TKH, v_TKH, layer=layer)


def weights_of(q_TNH: Tensor, k_TKH: Tensor, queries: Sequence[int], *, max_numbers: int = 2**24) -> Tensor:
    """fp32 (queries, T): causal softmax weights of the queries at these places, averaged over the heads.

    Scores are made for a few queries and the heads of one key head at a time, at most about `max_numbers` of them. Eager attention, the
    usual way to see weights, makes N * T * T of them: 40 GB for a 3B model and one picture.
    """
    num_tokens, num_heads, width = q_TNH.shape
    num_kv = k_TKH.shape[1]
    groups = num_heads // num_kv
    place = torch.tensor(list(queries), device=q_TNH.device)
    token_T = torch.arange(num_tokens, device=q_TNH.device)
    # (queries, kv heads, groups, H)
    chosen = (q_TNH[place].float() * width**-0.5).unflatten(1, (num_kv, groups))
    out = torch.zeros(len(place), num_tokens, device=q_TNH.device)
    block = max(1, max_numbers // (groups * num_tokens))
    for head in range(num_kv):
        keys = k_TKH[:, head].float().T
        for low in range(0, len(place), block):
            rows = slice(low, low + block)
            is_future = token_T[None, None, :] > place[rows, None, None]
            score = (chosen[rows, head] @ keys).masked_fill_(is_future, -torch.inf)
            out[rows] += score.softmax(dim=-1).sum(dim=1)
    return out / num_heads


@torch.inference_mode()
def look(model: Qwen3VL, batch: Batch, queries: Sequence[int], layers: Sequence[int]) -> Tensor:
    """fp32 (layers, queries, T) on the CPU, the layers in the order given. `batch` holds one sequence."""
    if len(batch.lengths) != 1:
        raise ValueError(f"{len(batch.lengths)} sequences came; look at one at a time.")
    count = model.config.text.num_hidden_layers
    if wrong := [layer for layer in layers if not 0 <= layer < count]:
        raise ValueError(f"layer {wrong[0]} was asked for; the model has layers 0 to {count - 1}.")
    if wrong := [query for query in queries if not 0 <= query < batch.num_tokens]:
        raise ValueError(f"token {wrong[0]} was asked for; the sequence has tokens 0 to {batch.num_tokens - 1}.")
    if not queries or not layers:
        raise ValueError("nothing to look at; name at least one token and one layer.")
    looking = Looking(Packed(batch.lengths, is_causal=True), tuple(queries), frozenset(layers))
    model(batch.to(model.device), layout=looking)
    return torch.stack([looking.seen[layer].cpu() for layer in layers])


def layers_named(text: str | None, count: int) -> tuple[int, ...]:
    """ "8,12-16" as numbers from 0; None is the middle half."""
    if text is None:
        return tuple(range(count // 4, max(count // 4 + 1, 3 * count // 4)))
    if text == "all":
        return tuple(range(count))
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if (
            not first.isdigit()
            or (dash and not last.isdigit())
            or int(last or first) >= count
            or int(last or first) < int(first)
        ):
            raise ValueError(f"layers is {text!r}; write all, or numbers from 0 to {count - 1} like 8,12-16.")
        layers += range(int(first), int(last or first) + 1)
    return tuple(dict.fromkeys(layers))
