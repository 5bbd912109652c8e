"""Losses of a language-model head, a chunk of rows at a time, so that all logits never exist at once.

A row is one prediction: its hidden state, and the token that came. Three entries:

- `row_loss`: one pass, for a loss that is a function of each row's own nll (cross-entropy, SAPO, GRPO, DAPO, CISPO);
- `linear_nll`: nll with gradient, two passes, for a loss that must see the rows of whole sequences first (GSPO, masks by sequence), and
  for log-probabilities wherever they are needed;
- `divergence_loss`: two heads, for distillation.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

CHUNK_BYTES = 256 * 2**20
CACHE_BYTES = 4 * 2**20
"""Of fp32 logits that are worked on at once on a CPU."""

RowFunction = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""(nll of some rows, which of all rows they are) -> (loss of each, its derivative by nll). Pure: rows come in parts of any size."""


def row_loss(
    hidden_RD: Tensor, head_VD: Tensor, label_R: Tensor, function: RowFunction, *, chunk_bytes: int = CHUNK_BYTES
) -> tuple[Tensor, Tensor]:
    """(sum of the rows' losses, nll_R without gradient), nll the cross-entropy of hidden @ head.T in fp32.

    Gradients are made chunk by chunk in the forward pass, so beside the gradients themselves only one chunk of logits (`chunk_bytes`)
    ever exists: 0.25 GiB where 256K tokens of a 151,936 vocabulary would be 159 GB in fp32.
    """
    loss, nll_R = _RowLoss.apply(hidden_RD, head_VD, label_R, function, chunk_bytes)  # type: ignore[misc]
    return loss, nll_R


def linear_nll(hidden_RD: Tensor, head_VD: Tensor, label_R: Tensor, *, chunk_bytes: int = CHUNK_BYTES) -> Tensor:
    """nll_R (fp32, or fp64 of fp64), minus the log-probability of each row's label, with gradient to hidden states and head.

    The backward pass makes each chunk's logits again, when the whole loss has said what a row's nll is worth: a third more matmuls than
    `row_loss`, and no more memory.
    """
    return _LinearNll.apply(hidden_RD, head_VD, label_R, chunk_bytes)  # type: ignore[return-value]


def divergence_loss(
    hidden_RD: Tensor,
    head_VD: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    weight_R: Tensor,
    *,
    beta: float,
    temperature: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:
    """(sum_r weight_r * divergence_r, divergence_R without gradient) of a student's and a teacher's distribution in each row.

    beta 0: KL(teacher, student), forward; 1: KL(student, teacher), reverse; between: the generalised Jensen-Shannon divergence
    beta KL(teacher, M) + (1 - beta) KL(student, M), M = beta teacher + (1 - beta) student (arXiv 2306.13649, equation 1). The teacher's
    hidden states and head may have another width, not another vocabulary. The student gets the gradient, the teacher none.
    """
    if not 0 <= beta <= 1 or temperature <= 0:
        raise ValueError(f"beta is {beta} and temperature {temperature}; expected 0 <= beta <= 1 and temperature > 0.")
    if head_VD.shape[0] != teacher_head.shape[0]:
        raise ValueError(
            f"the student has {head_VD.shape[0]:,} tokens and the teacher {teacher_head.shape[0]:,}; a divergence needs one vocabulary."
        )
    loss, divergence_R = _Divergence.apply(  # type: ignore[misc]
        hidden_RD,
        head_VD,
        teacher_hidden.detach(),
        teacher_head.detach(),
        weight_R,
        beta,
        temperature,
        chunk_bytes,
    )
    return loss, divergence_R


def divergence(student_RV: Tensor, teacher_RV: Tensor, *, beta: float, temperature: float = 1.0) -> Tensor:
    """divergence_R of two sets of whole logits, as `divergence_loss` has it of each chunk."""
    student_RV = (student_RV / temperature).log_softmax(-1)
    teacher_RV = (teacher_RV / temperature).log_softmax(-1)
    if beta == 0:
        return _kl(teacher_RV, student_RV)
    if beta == 1:
        return _kl(student_RV, teacher_RV)
    log_beta = torch.tensor(beta, dtype=student_RV.dtype, device=student_RV.device).log()
    log_rest = torch.tensor(1 - beta, dtype=student_RV.dtype, device=student_RV.device).log()
    mixed_RV = torch.logaddexp(teacher_RV + log_beta, student_RV + log_rest)
    return beta * _kl(teacher_RV, mixed_RV) + (1 - beta) * _kl(student_RV, mixed_RV)


def _kl(p_RV: Tensor, q_RV: Tensor) -> Tensor:
    """KL(p, q) of log-probabilities."""
    return (p_RV.exp() * (p_RV - q_RV)).sum(-1)


# ---- the kernels --------------------------------------------------------------------------------------------------


class _RowLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_RD, head_VD, label_R, function, chunk_bytes):
        gradients = _Gradients(ctx, hidden_RD, head_VD)
        # Written in place: small tensors kept between the large ones of a chunk would hold their memory apart.
        loss_R, nll_R = (hidden_RD.new_empty(len(label_R), dtype=gradients.wide) for _ in range(2))

        def turn(few: Tensor, rows: slice) -> None:
            probability, nll = _softmax_nll(few, label_R[rows], gradients.wide)
            nll_R[rows] = nll
            loss_R[rows], slope = function(nll, rows)
            _gradient_in_place(few, probability, label_R[rows], slope)

        gradients.add_chunks(turn, chunk_bytes)
        ctx.save_for_backward(*gradients.finished())
        ctx.mark_non_differentiable(nll_R)
        return loss_R.sum(), nll_R

    @staticmethod
    def backward(ctx, *grads):
        return (*_scaled(ctx, grads[0]), None, None, None)


class _LinearNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_RD, head_VD, label_R, chunk_bytes):
        wide = torch.promote_types(head_VD.dtype, torch.float32)
        nll_R = hidden_RD.new_empty(len(label_R), dtype=wide)

        def measure(few: Tensor, rows: slice) -> None:
            nll_R[rows] = _softmax_nll(few, label_R[rows], wide)[1]

        _each_few(hidden_RD, head_VD, measure, chunk_bytes)
        ctx.save_for_backward(hidden_RD, head_VD, label_R)
        ctx.chunk_bytes = chunk_bytes
        return nll_R

    @staticmethod
    def backward(ctx, *grads):
        hidden_RD, head_VD, label_R = ctx.saved_tensors
        gradients = _Gradients(ctx, hidden_RD, head_VD)

        def turn(few: Tensor, rows: slice) -> None:
            probability, _ = _softmax_nll(few, label_R[rows], gradients.wide)
            _gradient_in_place(few, probability, label_R[rows], grads[0][rows])

        gradients.add_chunks(turn, ctx.chunk_bytes)
        return (*gradients.finished(), None, None)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_RD, head_VD, teacher_hidden, teacher_head, weight_R, beta, temperature, chunk_bytes):
        gradients = _Gradients(ctx, hidden_RD, head_VD)
        divergence_R = hidden_RD.new_empty(len(weight_R), dtype=gradients.wide)

        def turn(few: Tensor, rows: slice) -> None:
            with torch.enable_grad():
                student = few.detach().to(gradients.wide, copy=True).requires_grad_()
                teacher = (teacher_hidden[rows] @ teacher_head.T).to(gradients.wide)
                each = divergence(student, teacher, beta=beta, temperature=temperature)
                (slope,) = torch.autograd.grad((each * weight_R[rows]).sum(), student)
            few.copy_(slope)
            divergence_R[rows] = each.detach()

        gradients.add_chunks(turn, chunk_bytes)
        ctx.save_for_backward(*gradients.finished())
        ctx.mark_non_differentiable(divergence_R)
        return (divergence_R * weight_R).sum(), divergence_R

    @staticmethod
    def backward(ctx, *grads):
        return (*_scaled(ctx, grads[0]), *[None] * 6)


Work = Callable[[Tensor, slice], None]
"""Gets the logits of a few rows, and which of all rows they are."""


def _each_few(
    hidden_RD: Tensor,
    head_VD: Tensor,
    work: Work,
    chunk_bytes: int,
    after: Callable[[slice, Tensor], None] = lambda part, logits: None,
) -> None:
    """Makes the logits a chunk at a time, and works on a few rows of them at once; `after` gets each chunk as the work has left it.

    A few rows stay in cache on a CPU from the matmul's dtype to fp32 and back: 3.6 times as fast as whole passes over 440 rows of 151,936
    (one thread).
    """
    rows = max(1, chunk_bytes // (head_VD.element_size() * head_VD.shape[0]))
    num_bytes = CACHE_BYTES if hidden_RD.device.type == "cpu" else chunk_bytes // 4
    few = max(1, num_bytes // (4 * head_VD.shape[0]))
    for low in range(0, hidden_RD.shape[0], rows):
        part = slice(low, low + rows)
        logits = hidden_RD[part] @ head_VD.T
        for start in range(0, len(logits), few):
            end = min(start + few, len(logits))
            work(logits[start:end], slice(low + start, low + end))
        after(part, logits)
        del logits  # or the next chunk is made while this one is held


class _Gradients:
    """Gradients by hidden states and head, added up over the chunks; of a frozen one none is made."""

    def __init__(self, ctx, hidden_RD: Tensor, head_VD: Tensor) -> None:
        self.hidden_RD, self.head_VD = hidden_RD, head_VD
        needs_hidden, self.needs_head = ctx.needs_input_grad[:2]
        self.wide = torch.promote_types(head_VD.dtype, torch.float32)
        self.dhidden_RD = torch.empty_like(hidden_RD) if needs_hidden else None
        self.dhead_VD: Tensor | None = None

    def add_chunks(self, turn: Work, chunk_bytes: int) -> None:
        """`turn` makes the logits of a few rows into the loss's derivative by them, in place."""
        _each_few(self.hidden_RD, self.head_VD, turn, chunk_bytes, self._add)

    def _add(self, part: slice, dlogits: Tensor) -> None:
        if self.dhidden_RD is not None:
            self.dhidden_RD[part] = dlogits @ self.head_VD
        if self.needs_head:
            self.dhead_VD = _add_product(self.dhead_VD, dlogits.T, self.hidden_RD[part], self.wide)

    def finished(self) -> tuple[Tensor | None, Tensor | None]:
        if self.needs_head and self.dhead_VD is None:  # no rows
            self.dhead_VD = torch.zeros_like(self.head_VD)
        return self.dhidden_RD, None if self.dhead_VD is None else self.dhead_VD.to(self.head_VD.dtype)


def _scaled(ctx, factor: Tensor) -> Iterator[Tensor | None]:
    # In place, which spares a second copy; torch refuses a second backward pass over the same graph.
    return (None if g is None else g.mul_(factor.to(g.dtype)) for g in ctx.saved_tensors)


def _add_product(total: Tensor | None, a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """total + a @ b. From the second chunk on in fp32, because bf16 would round the sum once a chunk."""
    if total is None:
        return a @ b
    if total.dtype != wide:
        total = total.to(wide)
    return total.addmm_(a, b) if a.dtype == wide else total.add_(a @ b)


def _softmax_nll(few: Tensor, label: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """(softmax of some rows of logits, minus the log of it at each label)."""
    value = few.to(wide)
    highest, right = value.amax(dim=-1), value.gather(1, label[:, None])[:, 0]
    probability = value.softmax(dim=-1)
    # The highest probability is 1 / sum(exp(x - highest)) and at least 1 / V, so its log is safe where the label's would not be.
    return probability, highest - probability.amax(dim=-1).log() - right


def _gradient_in_place(few: Tensor, probability: Tensor, label: Tensor, slope: Tensor) -> None:
    """Turns the logits of some rows into slope * d nll / d logits."""
    slope = slope.to(probability.dtype)
    probability.mul_(slope[:, None]).scatter_add_(1, label[:, None], -slope[:, None])
    few.copy_(probability)
