"""How much each token weighs, and a cross-entropy that never holds all logits."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qvl.core.batch import Batch
from qvl.train.liger import liger_cross_entropy

Denominator = Literal["weights", "samples"]
LossKernel = Literal["ours", "liger"]
CHUNK_BYTES = 256 * 2**20
CACHE_BYTES = 4 * 2**20
"""Of fp32 logits that are worked on at once on a CPU."""


@dataclass(frozen=True)
class Targets:
    """The predictions of one pack that are trained; R of them. Tensors lie on the CPU until `to`."""

    row_R: Tensor
    """Where in the pack each prediction is made: the place before its token."""
    label_R: Tensor
    weight_R: Tensor
    """fp32 n_i^-p, n_i the supervised tokens of the sample."""
    sequence_R: Tensor
    """Which sequence of the pack it belongs to."""

    @property
    def total_weight(self) -> float:
        return float(self.weight_R.double().sum())

    @property
    def num_samples(self) -> int:
        return int(self.sequence_R.unique().numel())

    def denominator(self, kind: Denominator) -> float:
        """What this pack adds to the global denominator."""
        return self.total_weight if kind == "weights" else float(self.num_samples)

    def to(self, device: torch.device | str) -> "Targets":
        moved = (x.to(device, non_blocking=True) for x in (self.row_R, self.label_R, self.weight_R, self.sequence_R))
        return Targets(*moved)


def targets(batch: Batch, *, power: float) -> Targets:
    """Token weights w = n_i^-p for the n_i supervised tokens of sample i (one sequence of the pack).

    p = 0 weighs tokens equally, p = 1 samples equally, p = 0.5 is the report's square-root reweighting. The report names it ("from a
    per-sample loss to a square-root-normalised per-token loss", abstract and introduction) and gives no formula; this is InternVL's
    "square averaging", the nearest published one: L = sum_i n_i^-p S_i / sum_i n_i^(1-p), both sums over the global batch. The other
    reading of the denominator, the number of samples, is `Denominator` "samples".
    """
    if batch.is_target_T is None:
        raise ValueError("the batch does not say which tokens are targets; give its samples is_target_T.")
    is_target_T = batch.is_target_T.clone()
    sequence_T = torch.repeat_interleave(torch.arange(len(batch.lengths)), torch.tensor(batch.lengths))
    is_first_T = torch.ones_like(is_target_T)
    is_first_T[1:] = sequence_T[1:] != sequence_T[:-1]
    is_target_T &= ~is_first_T  # nothing stands before a first token that could predict it
    place = torch.where(is_target_T)[0]
    sequence_R = sequence_T[place]
    count_S = torch.bincount(sequence_R, minlength=len(batch.lengths))
    weight_R = count_S[sequence_R].double().pow(-power).float()
    return Targets(place - 1, batch.token_T[place], weight_R, sequence_R)


def linear_cross_entropy(
    hidden_RD: Tensor, head_VD: Tensor, label_R: Tensor, weight_R: Tensor, *, chunk_bytes: int = CHUNK_BYTES
) -> tuple[Tensor, Tensor]:
    """(sum_r weight_r * nll_r, nll_R without gradient), nll the cross-entropy of hidden @ head.T in fp32.

    Gradients are made chunk by chunk in the forward pass, so beside the gradients themselves only one chunk of logits (`chunk_bytes`)
    ever exists: 0.25 GiB where 256K tokens of a 151,936 vocabulary would be 159 GB in fp32.
    """
    loss, nll_R = _LinearCrossEntropy.apply(hidden_RD, head_VD, label_R, weight_R, chunk_bytes)  # type: ignore[misc]
    return loss, nll_R


LOSS_KERNELS: dict[LossKernel, Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "ours": linear_cross_entropy,
    "liger": liger_cross_entropy,
}


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_RD, head_VD, label_R, weight_R, chunk_bytes):
        rows = max(1, chunk_bytes // (head_VD.element_size() * head_VD.shape[0]))
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        wide = torch.promote_types(head_VD.dtype, torch.float32)
        dhidden_RD = torch.empty_like(hidden_RD) if needs_hidden else None
        dhead_VD: Tensor | None = None
        nll_R = torch.empty_like(weight_R, dtype=wide)
        for low in range(0, hidden_RD.shape[0], rows):
            part = slice(low, low + rows)
            logits = hidden_RD[part] @ head_VD.T
            nll_R[part] = _softmax_in_place(logits, label_R[part], weight_R[part], wide, chunk_bytes)
            if dhidden_RD is not None:
                dhidden_RD[part] = logits @ head_VD
            if needs_head:
                dhead_VD = _add_product(dhead_VD, logits.T, hidden_RD[part], wide)
            del logits  # or the next chunk is made while this one is held
        if needs_head and dhead_VD is None:  # no rows
            dhead_VD = torch.zeros_like(head_VD)
        ctx.save_for_backward(dhidden_RD, None if dhead_VD is None else dhead_VD.to(head_VD.dtype))
        ctx.mark_non_differentiable(nll_R)
        return (nll_R * weight_R).sum(), nll_R

    @staticmethod
    def backward(ctx, *grads):
        dhidden_RD, dhead_VD = ctx.saved_tensors
        # In place, which spares a second copy; torch refuses a second backward pass over the same graph.
        scaled = (None if g is None else g.mul_(grads[0].to(g.dtype)) for g in (dhidden_RD, dhead_VD))
        return (*scaled, None, None, None)


def _add_product(total: Tensor | None, a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """total + a @ b. From the second chunk on in fp32, because bf16 would round the sum once a chunk."""
    if total is None:
        return a @ b
    if total.dtype != wide:
        total = total.to(wide)
    return total.addmm_(a, b) if a.dtype == wide else total.add_(a @ b)


def _softmax_in_place(logits: Tensor, label: Tensor, weight: Tensor, wide: torch.dtype, chunk_bytes: int) -> Tensor:
    """Turn the logits of one chunk into the gradient of its weighted loss; returns each row's -log softmax at its label.

    A few rows at a time, so that on a CPU they stay in cache from the matmul's dtype to fp32 and back: 3.6 times as fast as whole
    passes over 440 rows of 151,936 (one thread).
    """
    num_bytes = CACHE_BYTES if logits.device.type == "cpu" else chunk_bytes // 4
    nlls = []
    for few, label_few, weight_few in zip(
        *(x.split(max(1, num_bytes // (4 * logits.shape[1]))) for x in (logits, label, weight)), strict=True
    ):
        value = few.to(wide)
        highest, right = value.amax(dim=-1), value.gather(1, label_few[:, None])[:, 0]
        probability = value.softmax(dim=-1)
        # The highest probability is 1 / sum(exp(x - highest)) and at least 1 / V, so its log is safe where the label's would not be.
        nlls.append(highest - probability.amax(dim=-1).log() - right)
        probability.mul_(weight_few[:, None]).scatter_add_(1, label_few[:, None], -weight_few[:, None].to(wide))
        few.copy_(probability)
    return torch.cat(nlls)
