"""Where keys and values are (the layouts), and which kernel attends to them (one table)."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from qvl.core.device import varlen_runs

try:  # torch >= 2.11 ships it; its kernel runs on CUDA only
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # pragma: no cover
    varlen_attn = None


class Layout(Protocol):
    """Says which keys and values each query sees."""

    def attend(self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, *, layer: int) -> Tensor:
        """Softmax attention with scale H^-0.5; returns o_TNH. Query head n reads key head n * K // N."""
        ...


@dataclass(frozen=True)
class Packed:
    """Sequences end to end; each sees itself only. Text is causal, the patches of a frame see each other in full."""

    lengths: tuple[int, ...]
    is_causal: bool
    kernel: "str | Kernel | None" = None
    """One of KERNELS, or one of somebody's own; None picks by device, dtype and whether gradients flow."""

    def attend(self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, *, layer: int) -> Tensor:
        kernel = self.kernel or pick_kernel(
            q_TNH.device.type, q_TNH.dtype, needs_grad=any(x.requires_grad for x in (q_TNH, k_TKH, v_TKH))
        )
        return (KERNELS[kernel] if isinstance(kernel, str) else kernel)(q_TNH, k_TKH, v_TKH, self)


Kernel = Callable[[Tensor, Tensor, Tensor, Packed], Tensor]
"""(q_TNH, k_TKH, v_TKH, layout) -> o_TNH"""


def pick_kernel(device: str, dtype: torch.dtype, *, needs_grad: bool) -> str:
    """The dispatch table in words; the numbers that decided are in dev/LOG.md ("attention on a CPU")."""
    if device == "cuda":
        return "varlen" if dtype in (torch.bfloat16, torch.float16) and varlen_runs() else "sdpa"
    if device == "cpu" and dtype == torch.bfloat16 and not needs_grad:
        return "blocked"
    return "sdpa"


def describe(device: str) -> dict[str, str]:
    """What `qvl doctor` prints: situation -> kernel."""
    cases = {
        "fp32": (torch.float32, False),
        "bf16 inference": (torch.bfloat16, False),
        "bf16 training": (torch.bfloat16, True),
    }
    return {name: pick_kernel(device, dtype, needs_grad=grad) for name, (dtype, grad) in cases.items()}


def reference(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, layout: Packed) -> Tensor:
    """The oracle of all other kernels: fp32, one T x T block-diagonal mask, no cleverness."""
    groups = q_TNH.shape[1] // k_TKH.shape[1]
    q_NTH, k_NTH, v_NTH = (
        x.float().transpose(0, 1)
        for x in (q_TNH, k_TKH.repeat_interleave(groups, 1), v_TKH.repeat_interleave(groups, 1))
    )
    lengths = torch.tensor(layout.lengths, dtype=torch.int64, device=q_TNH.device)
    sequence_T = torch.repeat_interleave(torch.arange(len(layout.lengths), device=q_TNH.device), lengths)
    is_seen_TT = sequence_T[:, None] == sequence_T[None, :]
    if layout.is_causal:
        is_seen_TT = is_seen_TT.tril()
    score_NTT = (q_NTH @ k_NTH.transpose(1, 2)) * q_NTH.shape[-1] ** -0.5
    weight_NTT = score_NTT.masked_fill(~is_seen_TT, -torch.inf).softmax(dim=-1)
    return (weight_NTT @ v_NTH).transpose(0, 1).to(q_TNH.dtype)


def sdpa(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, layout: Packed) -> Tensor:
    """torch SDPA once for each run of equal lengths (all frames of a video are one run), so no mask and no padding exists."""
    outs = []
    runs = [(count, length) for _, count, length in equal_runs(layout.lengths)]
    # Split, not one narrow for each run: its backward joins the gradients once, a narrow's makes a whole tensor of zeros each time.
    parts = (x.split([count * length for count, length in runs]) for x in (q_TNH, k_TKH, v_TKH))
    for run, qkv in zip(runs, zip(*parts, strict=True), strict=True):
        # (count * length, heads, H) -> (count, heads, length, H): views, no copies
        q, k, v = (x.unflatten(0, run).transpose(1, 2) for x in qkv)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=layout.is_causal, enable_gqa=q.shape[1] != k.shape[1])
        outs.append(out.transpose(1, 2).flatten(0, 1))
    if not outs:
        return torch.empty_like(q_TNH)
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def blocked(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, layout: Packed) -> Tensor:
    """Query blocks of about 256 rows times all their keys, by plain matmuls that stay in cache: bf16 on a CPU, no gradients.

    torch's CPU SDPA runs bf16 no faster than fp32, while the bf16 matmul units are about four times faster than that. Scores are rounded
    to bf16 before the softmax, as transformers' eager attention does. A backward in the same manner was tried and was no faster than
    SDPA's (dev/LOG.md, "attention on a CPU"), so training stays with SDPA.
    """
    out_TNH = torch.empty_like(q_TNH, memory_format=torch.contiguous_format)
    start = 0
    for length in layout.lengths:
        rows = slice(start, start + length)
        blocked_sequence(q_TNH[rows], k_TKH[rows], v_TKH[rows], out_TNH[rows], is_causal=layout.is_causal)
        start += length
    return out_TNH


def blocked_sequence(q: Tensor, k: Tensor, v: Tensor, out: Tensor, *, is_causal: bool) -> None:
    """One sequence: q, out (n, heads, H) over k, v (m, kv heads, H), m >= n; under causality the last query sees all keys."""
    num_queries, num_heads, width = q.shape
    num_keys, num_kv, _ = k.shape
    groups = num_heads // num_kv
    past = num_keys - num_queries
    # (kv heads, n, groups, H): the heads that share keys become rows of one matmul
    grouped = (q * width**-0.5).unflatten(1, (num_kv, groups)).transpose(0, 1).contiguous()
    block = max(1, 256 // groups)
    row = torch.arange(min(block, num_queries), device=q.device)
    is_future = (row[:, None] < row[None, :]).repeat_interleave(groups, 0)
    for head in range(num_kv):
        keys, values = k[:, head].T.contiguous(), v[:, head].contiguous()
        for low in range(0, num_queries, block):
            high = min(low + block, num_queries)
            seen = past + high if is_causal else num_keys
            score = grouped[head, low:high].flatten(0, 1) @ keys[:, :seen]
            if is_causal:
                score[:, past + low :].masked_fill_(is_future[: (high - low) * groups, : high - low], -torch.inf)
            mixed = score.softmax(dim=-1) @ values[:seen]
            out[low:high, head * groups : (head + 1) * groups] = mixed.view(high - low, groups, width)


@dataclass(frozen=True)
class Paged:
    """New tokens of several sequences, whose keys and values lie in blocks of a shared pool (serving).

    `attend` first writes the new tokens' keys and values into their slots, then lets each new token see its sequence's past and itself.
    """

    key_LBZKH: Tensor
    """The pool; filled in place."""
    value_LBZKH: Tensor
    slot_T: Tensor
    """int64: where each new token goes in the pool's B*Z slots."""
    query_lengths: tuple[int, ...]
    """New tokens of each sequence."""
    context_lengths: tuple[int, ...]
    """All tokens of each sequence, the new ones included."""
    blocks: tuple[tuple[int, ...], ...]
    """Each sequence's blocks, in order."""

    def attend(self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, *, layer: int) -> Tensor:
        key, value = self.key_LBZKH[layer].flatten(0, 1), self.value_LBZKH[layer].flatten(0, 1)
        key.index_copy_(0, self.slot_T, k_TKH)
        value.index_copy_(0, self.slot_T, v_TKH)
        return self.attend_past(q_TNH, layer=layer)

    def attend_past(self, q_TNH: Tensor, *, layer: int) -> Tensor:
        """The same when the new tokens' keys and values are in their slots already."""
        key, value = self.key_LBZKH[layer].flatten(0, 1), self.value_LBZKH[layer].flatten(0, 1)
        out_TNH = torch.empty_like(q_TNH)
        start = 0
        for new, total, blocks in zip(self.query_lengths, self.context_lengths, self.blocks, strict=True):
            rows = slice(start, start + new)
            seen_key, seen_value = self._context(key, blocks, total), self._context(value, blocks, total)
            if new == 1:
                out_TNH[rows] = decode_one(q_TNH[start], seen_key, seen_value)
            else:
                self.attend_sequence(q_TNH[rows], seen_key, seen_value, out_TNH[rows])
            start = rows.stop
        return out_TNH

    def attend_sequence(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        """One sequence: q, out (n, heads, H) over k, v (m, kv heads, H), of which the last query sees all."""
        blocked_sequence(q, k, v, out, is_causal=True)

    def _context(self, pool: Tensor, blocks: tuple[int, ...], total: int) -> Tensor:
        """(total, kv heads, H): a view where the blocks follow each other, a gather where they do not."""
        size = self.key_LBZKH.shape[2]
        if blocks[-1] - blocks[0] == len(blocks) - 1 and all(b - a == 1 for a, b in itertools.pairwise(blocks)):
            return pool.narrow(0, blocks[0] * size, total)
        index = torch.tensor(blocks, device=pool.device)
        return pool.unflatten(0, (-1, size)).index_select(0, index).flatten(0, 1)[:total]


def decode_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query (heads, H) over k, v (m, kv heads, H): matmuls batched over the kv heads."""
    num_kv = k.shape[1]
    grouped = (q * q.shape[-1] ** -0.5).view(num_kv, -1, q.shape[-1])
    weight = (grouped @ k.permute(1, 2, 0)).softmax(dim=-1)
    return (weight @ v.transpose(0, 1)).flatten(0, 1)


def varlen(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, layout: Packed) -> Tensor:
    """torch's variable-length flash attention: one CUDA call for the whole pack."""
    assert varlen_attn is not None
    bounds = torch.tensor((0, *itertools.accumulate(layout.lengths)), dtype=torch.int32)
    bounds = bounds.to(q_TNH.device, non_blocking=True)
    longest = max(layout.lengths)
    window = (-1, 0) if layout.is_causal else (-1, -1)
    is_grouped = q_TNH.shape[1] != k_TKH.shape[1]
    out = varlen_attn(q_TNH, k_TKH, v_TKH, bounds, bounds, longest, longest, window_size=window, enable_gqa=is_grouped)
    assert isinstance(out, Tensor)
    return out


KERNELS: dict[str, Kernel] = {
    "reference": reference,
    "sdpa": sdpa,
    "blocked": blocked,
    "varlen": varlen,
}


def equal_runs(lengths: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """(start token, sequences, length of each) for each run of neighbours of equal length; empty sequences are passed over."""
    start = 0
    for length, run in itertools.groupby(lengths):
        count = len(list(run))
        if length:
            yield start, count, length
        start += count * length
