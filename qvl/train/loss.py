"""How much each token weighs, and the cross-entropy of the tokens that are trained."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qvl.core.batch import Batch
from qvl.train.liger import liger_cross_entropy
from qvl.train.row_loss import CHUNK_BYTES, row_loss

Denominator = Literal["weights", "samples"]
LossKernel = Literal["ours", "liger"]


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
    advantage_R: Tensor | None = None
    """fp32, of the answer that the token is part of; of reinforcement learning alone."""
    old_logp_R: Tensor | None = None
    """fp32 log-probability that the sampling policy gave the token."""

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
        moved = [x if x is None else x.to(device, non_blocking=True) for x in vars(self).values()]
        return Targets(*moved)  # type: ignore[arg-type]


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
    """(sum_r weight_r * nll_r, nll_R without gradient), a chunk of logits at a time."""

    def weighted(nll: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        return nll * weight_R[rows], weight_R[rows]

    return row_loss(hidden_RD, head_VD, label_R, weighted, chunk_bytes=chunk_bytes)


LOSS_KERNELS: dict[LossKernel, Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "ours": linear_cross_entropy,
    "liger": liger_cross_entropy,
}
