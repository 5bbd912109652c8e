"""The network against transformers: logits, losses and every gradient, in both expert layouts, fp32 and bf16."""

from functools import cache

import pytest
import torch
from torch import Tensor

from qvl.core.batch import Batch
from qvl.eval import parity
from qvl.model.moe import RouterStats, load_balancing_loss
from qvl.model.padded import batch_from_padded, to_padded
from qvl.model.qwen3vl import Qwen3VL
from qvl.model.weights import load, to_checkpoint_name
from tests.golden import (
    AUX_WEIGHT,
    CASES,
    LAYOUTS,
    MODELS,
    answer,
    case_inputs,
    folder,
    reference,
    shifted_loss,
)

MOE = [name for name in MODELS if name.startswith("moe")]
DENSE = [name for name in MODELS if name.startswith("dense")]


@cache
def ours(name: str, layout: str = "v5", dtype: torch.dtype = torch.float32) -> Qwen3VL:
    return load(folder(name, layout), dtype=dtype).eval()


def packed(model: Qwen3VL, inputs: dict[str, Tensor]) -> Batch:
    return batch_from_padded(inputs, model.config)


def padded_logits(model: Qwen3VL, inputs: dict[str, Tensor]) -> Tensor:
    return to_padded(model.logits(model(packed(model, inputs))), inputs["attention_mask"])


def real(padded: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    return padded[inputs["attention_mask"].bool()]


def worst(ours_: Tensor, theirs: Tensor) -> float:
    assert ours_.shape == theirs.shape
    return (ours_ - theirs).abs().max().item()


def gradient_errors(model: Qwen3VL, theirs: dict[str, Tensor]) -> dict[str, float]:
    """max|g - g'| / max|g'| for every parameter; what transformers' loss does not reach, ours must not reach either."""
    errors = {}
    for name, weight in model.named_parameters():
        mine = torch.zeros_like(weight) if weight.grad is None else weight.grad
        golden = theirs.get(to_checkpoint_name(name, model.config), torch.zeros_like(weight))
        golden = golden.view_as(mine)  # the patch embedding is a Conv3d there, a matrix here
        scale = golden.abs().max().item() or 1.0
        errors[to_checkpoint_name(name, model.config)] = worst(mine, golden) / scale
    assert set(theirs) <= set(errors)
    return errors


def assert_all_within(tolerance: float, errors: dict[str, float]) -> None:
    name, error = max(errors.items(), key=lambda item: item[1])
    assert error <= tolerance, f"{name}: {error}"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_fp32_logits_are_within_1e_4_of_transformers(name: str, layout: str, case: str) -> None:
    golden = answer(name, case)
    with torch.no_grad():
        logits = padded_logits(ours(name, layout), golden.inputs)
    assert worst(real(logits, golden.inputs), real(golden.logits, golden.inputs)) <= 1e-4


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MODELS)
def test_every_gradient_is_within_1e_4_of_transformers(name: str, case: str) -> None:
    golden, model = answer(name, case), ours(name)
    model.zero_grad()
    loss = shifted_loss(padded_logits(model, golden.inputs), golden.labels)
    loss.backward()
    assert loss.item() == pytest.approx(golden.loss, rel=1e-5)
    assert_all_within(1e-4, gradient_errors(model, golden.gradients))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MOE)
def test_with_the_load_balancing_loss_too(name: str, case: str) -> None:
    golden, model = answer(name, case), ours(name)
    assert golden.aux_loss is not None and golden.gradients_with_aux is not None
    model.zero_grad()
    stats: list[RouterStats] = []
    hidden_TD = model(packed(model, golden.inputs), router_out=stats)
    aux_loss = load_balancing_loss(stats)
    logits = to_padded(model.logits(hidden_TD), golden.inputs["attention_mask"])
    (shifted_loss(logits, golden.labels) + AUX_WEIGHT * aux_loss).backward()
    assert aux_loss.item() == pytest.approx(golden.aux_loss, rel=1e-5)
    assert_all_within(1e-4, gradient_errors(model, golden.gradients_with_aux))


@pytest.mark.parametrize("name", MOE)
def test_the_load_balancing_loss_moves_the_router(name: str) -> None:
    """Or the test above would pass without it: its share of the router's gradient is hundreds of tolerances."""
    golden = answer(name, "video")
    assert golden.gradients_with_aux is not None
    key = "model.language_model.layers.0.mlp.gate.weight"
    without, with_aux = golden.gradients[key], golden.gradients_with_aux[key]
    assert worst(without, with_aux) / with_aux.abs().max().item() > 0.02


def test_position_ids_are_those_of_transformers_at_every_real_token() -> None:
    for case in CASES[1:]:
        golden = answer("dense_tied", case)
        assert golden.positions is not None
        theirs = torch.stack([real(axis, golden.inputs) for axis in golden.positions])
        assert torch.equal(packed(ours("dense_tied"), golden.inputs).position_3T, theirs)


def test_both_layouts_of_one_checkpoint_are_the_same_model_to_the_bit() -> None:
    for name in MODELS:
        v5, hub = ours(name, "v5").state_dict(), ours(name, "hub").state_dict()
        assert all(torch.equal(v5[key], hub[key]) for key in v5.keys() | hub.keys())


def test_padding_on_either_side_gives_the_same_packed_batch() -> None:
    model = ours("moe")
    left, right = packed(model, case_inputs("batch_left")), packed(model, case_inputs("batch_right"))
    assert left.lengths == right.lengths
    assert torch.equal(left.token_T, right.token_T)
    assert torch.equal(left.position_3T, right.position_3T)
    with torch.no_grad():
        assert torch.equal(model(left), model(right))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_yarn_at_four_times_the_original_length_is_within_1e_4_of_transformers(layout: str) -> None:
    golden = answer("yarn", "long")
    assert golden.inputs["input_ids"].shape[1] == 4 * 64
    with torch.no_grad():
        logits = padded_logits(ours("yarn", layout), golden.inputs)
    assert worst(logits, golden.logits) <= 1e-4


def rms(x: Tensor) -> float:
    return x.float().square().mean().sqrt().item()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", DENSE)
def test_bf16_errs_at_most_a_fifth_more_than_transformers_bf16(name: str, case: str) -> None:
    golden = answer(name, case)
    exact = real(golden.logits, golden.inputs)
    hf = reference(name, torch.bfloat16)
    with torch.no_grad():
        hf.model.rope_deltas = None
        theirs = real(hf(**golden.inputs, use_cache=False).logits, golden.inputs)
        mine = real(padded_logits(ours(name, dtype=torch.bfloat16), golden.inputs), golden.inputs)
    assert rms(mine - exact) <= 1.2 * rms(theirs - exact)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), 1.0])
def test_a_gradient_that_is_not_finite_or_that_one_network_alone_has_fails(
    monkeypatch: pytest.MonkeyPatch, odd: float
) -> None:
    """Second of three, where max() would pass over a nan."""
    same, one = torch.ones(2), {"a": torch.ones(2), "c": torch.ones(2)}

    def outcomes(network: object, _folder: object, _config: object, cases: dict[str, object], **_: object):
        gradients = one if network is parity._theirs else {"a": one["a"], "b": torch.tensor([odd, 0.0]), "c": one["c"]}
        if network is parity._theirs and odd != 1.0:
            gradients = one | {"b": torch.ones(2)}
        return {case: parity._Outcome(same, gradients, same + 1) for case in cases}

    monkeypatch.setattr(parity, "_outcomes", outcomes)
    rows = parity.compare(folder(DENSE[0], "v5"))
    assert {(row.worst_parameter, row.gradient_error, row.passed) for row in rows} == {("b", float("inf"), False)}
