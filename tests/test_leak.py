"""No leak and no order: neighbours, packing order and splits change nothing, also with blocks checkpointed or compiled."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qvl.core.batch import Sample
from qvl.model.layers import PLAIN_BLOCKS, Blocks
from qvl.model.pack import pack
from qvl.model.qwen3vl import Qwen3VL
from qvl.train.blocks import compiled_blocks, training_blocks
from qvl.train.objective import NextToken
from test_packing import NAMES, assert_same_gradients, distance, double, gradients, logits, random_sample
from test_train import ALONE, Pack

BOTH = training_blocks(checkpoint_vision=True, checkpoint_decoder=True)
CHECKPOINTED = {
    "vision checkpointed": training_blocks(checkpoint_vision=True, checkpoint_decoder=False),
    "decoder checkpointed": training_blocks(checkpoint_vision=False, checkpoint_decoder=True),
    "both checkpointed": BOTH,
}
COMPILED = {"compiled": PLAIN_BLOCKS, "compiled and checkpointed": BOTH}


def assert_no_leak(model: Qwen3VL, blocks: Blocks) -> None:
    before, sample, after, stranger = (random_sample(seed) for seed in (3, 9, 14, 21))
    together = [before, sample, after]
    expected_logits, expected = logits(model, together, blocks)[1], gradients(model, together, [1], blocks)
    assert expected_logits.requires_grad
    for neighbours in ([stranger, sample, after], [before, sample, stranger], [sample]):
        place = next(i for i, s in enumerate(neighbours) if s is sample)
        assert distance(logits(model, neighbours, blocks)[place].detach(), expected_logits.detach()) <= 1e-6
        assert_same_gradients(gradients(model, neighbours, [place], blocks), expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", CHECKPOINTED)
def test_changing_a_neighbour_leaves_a_samples_logits_and_gradients(name: str, how: str) -> None:
    assert_no_leak(double(name), CHECKPOINTED[how])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", COMPILED)
def test_changing_a_neighbour_leaves_a_sample_alone_when_blocks_are_compiled(name: str, how: str) -> None:
    model = double(name)
    torch._dynamo.reset()  # pyright: ignore[reportPrivateImportUsage]
    with compiled_blocks(model):
        assert_no_leak(model, COMPILED[how])


def marked(seed: int) -> Sample:
    """Every second token is a target, from the third on; patches in the model's float64."""
    sample = random_sample(seed)
    is_target_T = torch.arange(sample.num_tokens) % 2 == 0
    is_target_T[0] = False
    patch_PX = None if sample.patch_PX is None else sample.patch_PX.double()
    return replace(sample, is_target_T=is_target_T, patch_PX=patch_PX)


def loss_and_gradients(
    model: Qwen3VL, packs: Sequence[Sequence[Sample]], blocks: Blocks = PLAIN_BLOCKS
) -> tuple[float, dict[str, Tensor]]:
    objective = NextToken(model)
    micros = [
        Pack(pack(list(part), model.config), tuple("abcdefgh"[: len(part)]), ("x",) * len(part)) for part in packs
    ]
    prepared = [objective.prepare(micro) for micro in micros]
    total = sum(one.denominator for one in prepared)
    model.zero_grad()
    loss = 0.0
    for one in prepared:
        outcome = objective(one, total, ALONE, blocks)
        outcome.loss.backward()
        loss += float(outcome.loss.detach())
    return loss, {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("how", ["plain", "both checkpointed"])
def test_loss_and_gradients_do_not_depend_on_order_nor_on_how_samples_are_split(how: str) -> None:
    # Dense: a router's balance is meant to be that of the whole pack.
    model = double("dense_tied")
    samples = [marked(seed) for seed in (3, 8, 9, 14, 21, 30)]
    loss, expected = loss_and_gradients(model, [samples])
    draw = random.Random(1)
    blocks = CHECKPOINTED.get(how, PLAIN_BLOCKS)
    for sizes in ((6,), (6,), (3, 3), (1, 5), (2, 3, 1), (1,) * 6):
        mixed, parts = draw.sample(samples, 6), []
        for size in sizes:
            parts.append(mixed[:size])
            mixed = mixed[size:]
        other, found = loss_and_gradients(model, parts, blocks)
        assert other == pytest.approx(loss, rel=1e-6)
        assert_same_gradients(found, expected)
