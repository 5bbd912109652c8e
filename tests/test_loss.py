"""The square-root loss and the cross-entropy that never holds all logits."""

import pytest
import torch
from torch.nn import functional as F

from memory_watch import MemoryWatch
from qvl.core.batch import Batch
from qvl.train.loss import linear_cross_entropy, targets


def pack_of(lengths: tuple[int, ...], is_target: list[bool]) -> Batch:
    count = sum(lengths)
    return Batch(
        token_T=torch.arange(count),
        position_3T=torch.zeros(3, count, dtype=torch.int64),
        lengths=lengths,
        is_target_T=torch.tensor(is_target),
    )


def test_a_sample_of_four_targets_weighs_half_a_token_each() -> None:
    batch = pack_of((5, 2), [False, True, True, True, True, False, True])
    aim = targets(batch, power=0.5)
    assert aim.weight_R.tolist() == [0.5, 0.5, 0.5, 0.5, 1.0]
    assert aim.row_R.tolist() == [0, 1, 2, 3, 5]
    assert aim.label_R.tolist() == [1, 2, 3, 4, 6]
    assert aim.denominator("weights") == 3.0
    assert aim.denominator("samples") == 2.0


@pytest.mark.parametrize(("power", "expected"), [(0.0, [1.0, 1.0, 1.0]), (1.0, [0.5, 0.5, 1.0])])
def test_power_0_weighs_tokens_and_power_1_samples_equally(power: float, expected: list[float]) -> None:
    batch = pack_of((3, 2), [False, True, True, False, True])
    assert targets(batch, power=power).weight_R.tolist() == expected


def test_a_first_token_is_never_a_target_because_nothing_stands_before_it_in_its_sample() -> None:
    batch = pack_of((2, 2), [True, True, True, True])
    assert targets(batch, power=0.5).row_R.tolist() == [0, 2]


def test_a_batch_that_does_not_say_what_is_trained_is_refused() -> None:
    batch = pack_of((2,), [True, True])
    with pytest.raises(ValueError, match="is_target_T"):
        targets(Batch(token_T=batch.token_T, position_3T=batch.position_3T, lengths=(2,)), power=0.5)


@pytest.mark.parametrize("rows_a_chunk", [1, 3, 7, 100])
def test_chunked_cross_entropy_equals_torchs_in_value_and_gradients(rows_a_chunk: int) -> None:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 5, generator=g, dtype=torch.float32).requires_grad_()
    head = torch.randn(11, 5, generator=g).requires_grad_()
    label, weight = torch.randint(0, 11, (7,), generator=g), torch.rand(7, generator=g)
    loss, nll = linear_cross_entropy(hidden, head, label, weight, chunk_bytes=4 * 11 * rows_a_chunk)
    (loss * 3).backward()
    ours = [loss.detach(), nll, hidden.grad, head.grad]
    hidden.grad = head.grad = None
    expected_nll = F.cross_entropy(hidden @ head.T, label, reduction="none")
    (3 * (expected_nll * weight).sum()).backward()
    for a, b in zip(ours, [(expected_nll * weight).sum(), expected_nll, hidden.grad, head.grad], strict=True):
        torch.testing.assert_close(a, b.detach(), atol=2e-6, rtol=2e-6)


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_the_same_one() -> None:
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(4, 5, generator=g).requires_grad_()
    head = torch.randn(11, 5, generator=g)
    label, weight = torch.tensor([1, 2, 3, 4]), torch.ones(4)
    linear_cross_entropy(hidden, head, label, weight)[0].backward()
    got = hidden.grad
    hidden.grad = None
    F.cross_entropy(hidden @ head.T, label, reduction="sum").backward()
    torch.testing.assert_close(got, hidden.grad, atol=1e-6, rtol=1e-6)
    assert head.grad is None


def test_at_most_one_chunk_of_logits_is_held() -> None:
    hidden, head = torch.randn(4000, 64, requires_grad=True), torch.randn(20_000, 64)
    label, weight, chunk = torch.zeros(4000, dtype=torch.int64), torch.ones(4000), 128 * 2**20
    linear_cross_entropy(hidden, head, label, weight, chunk_bytes=2**20)  # threads and workspaces are there
    with (watch := MemoryWatch()):
        linear_cross_entropy(hidden, head, label, weight, chunk_bytes=chunk)
    assert watch.rise < 1.6 * chunk
