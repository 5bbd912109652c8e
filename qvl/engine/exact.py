"""Arithmetic in tiles of fixed shape: a row's numbers are the same to the bit whatever stands in the other rows."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qvl.core.batch import Batch
from qvl.model.layers import Blocks
from qvl.model.moe import Experts
from qvl.model.qwen3vl import Qwen3VL

PROMPT_ROWS = 128
ANSWER_ROWS = 16
"""Rows of a tile. A token of a prompt always goes through tiles of the first kind, a token of an answer through the second, also when it is
computed again. A matmul picks its kernel, and with it the order of its sums, by its shape: torch's fp32 rows differ between 3 rows and 4.
Inside one shape they depend neither on their place nor on their neighbours; `check_rows` proves that where the engine runs."""
PROMPT_QUERIES = 32
"""Queries that meet a tile of keys in one matmul; one by one in answers."""
KEYS = 256


@dataclass(frozen=True)
class Segment:
    """Rows [row, row + count) of a tile: `count` tokens that follow `past` cached ones."""

    row: int
    past: int
    count: int
    slots: Tensor
    """Where the keys of all past + count tokens lie, in order."""


@dataclass(frozen=True)
class Tiled:
    """Paged keys and values, met in tiles of KEYS from the sequence's start with a running softmax in fp32.

    Tiles that lie wholly in a query's future add zero to its sums and multiply them by 1, so how far other queries see makes no difference.
    """

    key_LBZKH: Tensor
    value_LBZKH: Tensor
    segments: tuple[Segment, ...]
    num_queries: int
    """Queries in one matmul."""

    def attend(self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, *, layer: int) -> Tensor:
        key, value = self.key_LBZKH[layer].flatten(0, 1), self.value_LBZKH[layer].flatten(0, 1)
        out_TNH = torch.zeros_like(q_TNH)
        for segment in self.segments:
            rows = slice(segment.row, segment.row + segment.count)
            new = segment.slots[segment.past :]
            key.index_copy_(0, new, k_TKH[rows])
            value.index_copy_(0, new, v_TKH[rows])
            out_TNH[rows] = self._attend(q_TNH[rows], key, value, segment)
        return out_TNH

    def _attend(self, q: Tensor, key: Tensor, value: Tensor, segment: Segment) -> Tensor:
        """(count, heads, H) over the segment's keys (slots, kv heads, H)."""
        num_kv, size = key.shape[1], self.num_queries
        groups, width = q.shape[1] // num_kv, q.shape[2]
        states = [
            _State.of(q[low : low + size], size=size, num_kv=num_kv, past=segment.past + low)
            for low in range(0, segment.count, size)
        ]
        for start in range(0, len(segment.slots), KEYS):
            slots = segment.slots[start : start + KEYS]
            # Zeros behind the last key: what lies in unwritten memory may be no number, and 0 times that is none either.
            keys, values = (F.pad(pool[slots].float(), (0, 0, 0, 0, 0, KEYS - len(slots))) for pool in (key, value))
            keys, values = keys.permute(1, 2, 0).contiguous(), values.transpose(0, 1).contiguous()
            for state in states:
                state.meet(keys, values, start)
        outs = [(s.mixed / s.total).view(num_kv, size, groups, width).transpose(0, 1).flatten(1, 2) for s in states]
        return torch.cat(outs)[: segment.count].to(q.dtype)


@dataclass
class _State:
    """A running softmax: `size` queries of each kv head's group as rows."""

    query: Tensor
    """(kv heads, size * groups, H), scaled."""
    place: Tensor
    """The last key that each row sees."""
    top: Tensor
    total: Tensor
    mixed: Tensor

    @classmethod
    def of(cls, q: Tensor, *, size: int, num_kv: int, past: int) -> "_State":
        count, heads, width = q.shape
        padded = F.pad(q.float() * width**-0.5, (0, 0, 0, 0, 0, size - count))
        query = padded.view(size, num_kv, heads // num_kv, width).transpose(0, 1).reshape(num_kv, -1, width)
        place = torch.zeros(size, dtype=torch.int64, device=q.device)
        place[:count] = torch.arange(past, past + count, device=q.device)
        rows = (num_kv, query.shape[1], 1)
        return cls(
            query=query.contiguous(),
            place=place.repeat_interleave(heads // num_kv),
            top=torch.full(rows, -torch.inf, device=q.device),
            total=torch.zeros(rows, device=q.device),
            mixed=torch.zeros_like(query),
        )

    def meet(self, keys: Tensor, values: Tensor, start: int) -> None:
        """keys (kv heads, H, KEYS), values (kv heads, KEYS, H) of the tokens from `start`."""
        is_future = torch.arange(start, start + KEYS, device=keys.device) > self.place[:, None]
        score = (self.query @ keys).masked_fill(is_future, -torch.inf)
        top = torch.maximum(self.top, score.amax(-1, keepdim=True))
        weight, shrink = (score - top).exp(), (self.top - top).exp()
        self.total = self.total * shrink + weight.sum(-1, keepdim=True)
        self.mixed = self.mixed * shrink + weight @ values
        self.top = top


def by_tiles(x_TD: Tensor, expert_TA: Tensor, weight_TA: Tensor, experts: Experts) -> Tensor:
    """Each expert sees as many rows as the tile has, however many chose it (moe.Dispatch)."""
    part_TAD = x_TD.new_zeros(*expert_TA.shape, x_TD.shape[1])
    for expert in expert_TA.unique().tolist():
        token, choice = torch.where(expert_TA == expert)
        inner = torch.zeros_like(x_TD)
        inner[: len(token)] = x_TD[token]
        gate, up = F.linear(inner, experts.gate_up_proj[expert]).chunk(2, dim=-1)
        out = F.linear(F.silu(gate) * up, experts.down_proj[expert])
        part_TAD[token, choice] = out[: len(token)] * weight_TA[token, choice, None]
    out_TD = part_TAD[:, 0]
    for choice in range(1, expert_TA.shape[1]):
        out_TD = out_TD + part_TAD[:, choice]
    return out_TD


def run_in_tiles(layer: nn.Module, *arguments: Any) -> Any:
    """A decoder layer whose experts, if it has any, keep the tile's shape (layers.RunBlock)."""
    return layer(*arguments, dispatch=by_tiles)


EXACT_BLOCKS = Blocks(decoder=run_in_tiles)


class _Alone:
    """A layout in which every token sees itself only."""

    def attend(self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, *, layer: int) -> Tensor:
        return v_TKH.repeat_interleave(q_TNH.shape[1] // v_TKH.shape[1], dim=1)


@torch.inference_mode()
def check_rows(model: Qwen3VL) -> None:
    """One token in every row of a tile must give one answer. Raises ValueError where this machine's kernels do not keep that promise."""
    for rows in (PROMPT_ROWS, ANSWER_ROWS):
        batch = Batch(token_T=torch.full((rows,), 1), position_3T=torch.full((3, rows), 5), lengths=(1,) * rows).to(
            model.device
        )
        hidden_TD = model(batch, layout=_Alone(), blocks=EXACT_BLOCKS)
        logits_TV = model.logits(hidden_TD[:ANSWER_ROWS])
        if not (_rows_agree(hidden_TD) and _rows_agree(logits_TV)):
            raise ValueError(
                f"exact mode cannot keep its promise here: in a tile of {rows} rows, {model.dtype} on {model.device.type}, a row's "
                "numbers depend on its place. Run fast mode, or another number of threads (1 is the safest)."
            )


def _rows_agree(x: Tensor) -> bool:
    # As bits: numbers that are none are also the same in every row.
    bits = x.view(torch.int32 if x.element_size() == 4 else torch.int16)
    return bool((bits == bits[:1]).all())
