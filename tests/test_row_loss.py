"""Losses of rows, of sequences and of two heads, a chunk at a time: equal to autograd over whole logits."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qvl.train.row_loss import divergence_loss, linear_nll, row_loss

R, V, D = 12, 11, 5
CHUNKS = [1, 5, 100]


def drawn(seed: int = 0, width: int = D) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head and labels in fp64."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(R, width, generator=g, dtype=torch.float64).requires_grad_()
    head = torch.randn(V, width, generator=g, dtype=torch.float64).requires_grad_()
    return hidden, head, torch.randint(0, V, (R,), generator=g)


def whole_nll(hidden: Tensor, head: Tensor, label: Tensor) -> Tensor:
    return -(hidden @ head.T).log_softmax(-1).gather(1, label[:, None])[:, 0]


def same_gradients(loss: Tensor, expected: Tensor, *leaves: Tensor) -> None:
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(3 * loss, leaves), torch.autograd.grad(3 * expected, leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


@pytest.mark.no_shape_hook
@pytest.mark.parametrize("rows", CHUNKS)
def test_a_clipped_ratio_of_each_row_is_what_autograd_makes_of_it(rows: int) -> None:
    hidden, head, label = drawn()
    g = torch.Generator().manual_seed(1)
    old = -whole_nll(hidden, head, label).detach() + 0.3 * torch.randn(R, generator=g, dtype=torch.float64)
    advantage = torch.randn(R, generator=g, dtype=torch.float64)

    def clipped(nll: Tensor, logp_old: Tensor, gain: Tensor) -> Tensor:
        ratio = (-nll - logp_old).exp()
        return -torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain)

    def function(nll: Tensor, which: slice) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            nll = nll.detach().requires_grad_()
            loss = clipped(nll, old[which], advantage[which])
            (slope,) = torch.autograd.grad(loss.sum(), nll)
        return loss.detach(), slope

    loss, nll = row_loss(hidden, head, label, function, chunk_bytes=8 * V * rows)
    expected_nll = whole_nll(hidden, head, label)
    torch.testing.assert_close(nll, expected_nll.detach(), atol=1e-12, rtol=1e-12)
    same_gradients(loss, clipped(expected_nll, old, advantage).sum(), hidden, head)


@pytest.mark.parametrize("rows", CHUNKS)
def test_a_ratio_of_whole_sequences_crosses_chunks(rows: int) -> None:
    hidden, head, label = drawn(2)
    lengths = torch.tensor([7, 1, 4])  # the first one spans two chunks of five rows
    sequence = torch.repeat_interleave(torch.arange(3), lengths)
    old = -whole_nll(hidden, head, label).detach() + 0.2
    gain = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)

    def of_sequences(nll: Tensor) -> Tensor:
        mean = torch.zeros(3, dtype=torch.float64).index_add(0, sequence, -nll - old) / lengths
        return -(mean.exp() * gain).sum()

    loss = of_sequences(linear_nll(hidden, head, label, chunk_bytes=8 * V * rows))
    same_gradients(loss, of_sequences(whole_nll(hidden, head, label)), hidden, head)


def reference_divergence(student: Tensor, teacher: Tensor, beta: float, temperature: float) -> Tensor:
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a.log() - b.log())).sum(-1)

    mixed = beta * p + (1 - beta) * q
    return kl(p, q) if beta == 0 else kl(q, p) if beta == 1 else beta * kl(p, mixed) + (1 - beta) * kl(q, mixed)


@pytest.mark.parametrize("rows", CHUNKS)
@pytest.mark.parametrize(("beta", "temperature"), [(0.0, 1.0), (1.0, 1.0), (0.5, 2.0), (0.1, 0.7)])
def test_a_divergence_goes_to_the_student_alone(rows: int, beta: float, temperature: float) -> None:
    hidden, head, _ = drawn(3)
    g = torch.Generator().manual_seed(4)
    teacher_hidden = torch.randn(R, 9, generator=g, dtype=torch.float64).requires_grad_()
    teacher_head = torch.randn(V, 9, generator=g, dtype=torch.float64).requires_grad_()
    weight = torch.rand(R, generator=g, dtype=torch.float64)
    loss, each = divergence_loss(
        hidden, head, teacher_hidden, teacher_head, weight, beta=beta, temperature=temperature, chunk_bytes=8 * V * rows
    )
    expected = reference_divergence(hidden @ head.T, (teacher_hidden @ teacher_head.T).detach(), beta, temperature)
    torch.testing.assert_close(each, expected.detach(), atol=1e-12, rtol=1e-12)
    same_gradients(loss, (expected * weight).sum(), hidden, head)
    assert torch.autograd.grad(loss, [teacher_hidden], allow_unused=True) == (None,)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, head, label = drawn()
    head = head.detach()
    linear_nll(hidden, head, label).sum().backward()
    assert hidden.grad is not None and head.grad is None


def test_no_rows_cost_nothing() -> None:
    hidden, head, label = drawn()
    assert linear_nll(hidden[:0], head, label[:0]).shape == (0,)
    loss, _ = row_loss(hidden[:0], head, label[:0], lambda nll, _: (nll, nll))
    assert float(loss.detach()) == 0.0


def test_two_vocabularies_have_no_divergence() -> None:
    hidden, head, _ = drawn()
    with pytest.raises(ValueError, match="the student has 11 tokens and the teacher 10; a divergence needs one vocab"):
        divergence_loss(hidden, head, hidden, head[:10], torch.ones(R), beta=0.5)


class Largest(TorchDispatchMode):
    """The most elements that any tensor made inside has."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.most = max(self.most, made.numel())
        return made


@pytest.mark.parametrize("loss", ["rows", "sequences", "divergence"])
def test_no_tensor_is_larger_than_a_chunk_of_logits(loss: str) -> None:
    hidden, head, label = drawn(width=2)  # narrow, so that gradients are no larger than two rows of logits
    chunk_bytes = 8 * V * 2
    weight = torch.ones(R, dtype=torch.float64)
    runs: dict[str, Callable[[], Tensor]] = {
        "rows": lambda: row_loss(
            hidden, head, label, lambda nll, _: (nll, torch.ones_like(nll)), chunk_bytes=chunk_bytes
        )[0],
        "sequences": lambda: linear_nll(hidden, head, label, chunk_bytes=chunk_bytes).sum(),
        "divergence": lambda: divergence_loss(hidden, head, hidden, head, weight, beta=0.5, chunk_bytes=chunk_bytes)[0],
    }
    with Largest() as largest:
        runs[loss]().backward()
    assert largest.most <= max(2 * V, R * 2) < 3 * V, "two rows of logits, or a gradient itself"
