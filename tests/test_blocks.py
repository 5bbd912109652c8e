"""Blocks that throw their activations away, or are compiled, give what plain blocks give."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qvl.model.lora import LoraConfig, add_adapter
from qvl.model.pack import pack
from qvl.model.qwen3vl import Qwen3VL, new_model
from qvl.train.blocks import blocks_as_told
from qvl.train.objective import NextToken
from test_train import ALONE, Drawn, Pack, sample, settings, small, trained

PLAIN = {"checkpoint_vision": False, "checkpoint_decoder": False, "compiled": False}
VISION, DECODER = PLAIN | {"checkpoint_vision": True}, PLAIN | {"checkpoint_decoder": True}
CHECKPOINTED = {"vision": VISION, "decoder": DECODER, "both": VISION | {"checkpoint_decoder": True}}


def gradients(model: Qwen3VL, told: dict[str, bool]) -> tuple[list[float], dict[str, Tensor], int]:
    """Losses, gradients, and the bytes that autograd keeps between forward and backward outside of checkpointed blocks."""
    objective = NextToken(model).train()
    micros = Drawn(model.config, 2).next_step()
    prepared = [objective.prepare(micro) for micro in micros]
    total = sum(one.denominator for one in prepared)
    kept: list[int] = []

    def note(x: Tensor) -> Tensor:
        kept.append(x.nbytes)
        return x

    losses = []
    torch.manual_seed(5)
    with blocks_as_told(model, **told):
        for one in prepared:
            with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
                loss = objective(one, total, ALONE).loss
            loss.backward()
            losses.append(float(loss.detach()))
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return losses, found, sum(kept)


def model_of(kind: str) -> Qwen3VL:
    model = new_model(small(experts=kind == "experts"))
    if kind == "dropout":
        add_adapter(model, LoraConfig(r=4, dropout=0.3, target_modules="all-linear"))
        for name, parameter in model.named_parameters():
            if name.endswith("lora_up"):
                torch.nn.init.normal_(parameter, std=0.02)
    return model


@pytest.mark.parametrize("kind", ["dense", "experts", "dropout"])
@pytest.mark.parametrize("where", CHECKPOINTED)
def test_losses_and_gradients_are_to_the_bit_those_of_blocks_that_keep_everything(kind: str, where: str) -> None:
    model = model_of(kind)
    losses, expected, all_bytes = gradients(model, PLAIN)
    again, found, fewer_bytes = gradients(model, CHECKPOINTED[where])
    assert again == losses
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
    assert fewer_bytes < all_bytes


def test_vision_and_decoder_are_chosen_apart() -> None:
    model = model_of("dense")
    kept = {where: gradients(model, told)[2] for where, told in CHECKPOINTED.items()}
    everything = gradients(model, PLAIN)[2]
    saved = {where: everything - count for where, count in kept.items()}
    assert saved["vision"] > 0
    assert saved["decoder"] > 0
    assert saved["both"] == saved["vision"] + saved["decoder"]


def test_router_statistics_are_counted_once_though_layers_run_twice() -> None:
    model = model_of("experts")
    runs: Counter[str] = Counter()
    for number, layer in enumerate(model.language_model.layers):
        layer.register_forward_pre_hook(lambda *_, number=number: runs.update([f"layer {number}"]))
    objective = NextToken(model)
    [micro] = Drawn(model.config, 1).next_step()
    prepared = objective.prepare(micro)
    plain = objective(prepared, prepared.denominator, ALONE)
    with blocks_as_told(model, **DECODER):
        outcome = objective(prepared, prepared.denominator, ALONE)
        outcome.loss.backward()
    assert runs == {"layer 0": 3, "layer 1": 3, "layer 2": 3}  # plain, checkpointed, once more in the backward
    assert outcome.sums == plain.sums


def test_afterwards_the_model_is_as_it_was() -> None:
    model = model_of("experts")
    before = [dict(module.__dict__) for module in model.modules()]
    with blocks_as_told(model, checkpoint_vision=True, checkpoint_decoder=True, compiled=True):
        assert [dict(module.__dict__) for module in model.modules()] != before
    assert [dict(module.__dict__) for module in model.modules()] == before


def test_a_run_may_go_on_with_checkpointing_and_is_to_the_bit_the_run_without(tmp_path: Path) -> None:
    def adapted() -> Qwen3VL:
        model = new_model(small())
        add_adapter(model, LoraConfig(r=4, dropout=0.3))
        return model

    straight = trained(tmp_path / "straight", adapted(), settings(4))
    trained(tmp_path / "halves", adapted(), settings(4), stop_after=2)
    saving = settings(4, checkpoint_vision=True, checkpoint_decoder=True)
    resumed = trained(tmp_path / "halves", adapted(), saving)
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in resumed] == [row[key] for row in straight]


def test_a_run_does_not_go_on_compiled_because_its_numbers_would_change(tmp_path: Path) -> None:
    trained(tmp_path, new_model(small()), settings(3), stop_after=2)
    with pytest.raises(ValueError, match="compile was None and is now True"):
        trained(tmp_path, new_model(small()), settings(3, compile=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "experts"])
@pytest.mark.parametrize("where", ["nowhere", "both"])
def test_compiled_blocks_give_the_same_losses_and_are_compiled_once_for_all_lengths(kind: str, where: str) -> None:
    counters = pytest.importorskip("torch._dynamo.utils").counters
    torch._dynamo.reset()  # pyright: ignore[reportPrivateImportUsage]
    told: dict[str, Any] = CHECKPOINTED.get(where, PLAIN) | {"compiled": True}
    model = model_of(kind)
    losses, expected, _ = gradients(model, PLAIN)
    again, found, _ = gradients(model, told)
    assert again == pytest.approx(losses, rel=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-3, msg=name)

    objective, graphs = NextToken(model).train(), []
    with blocks_as_told(model, **told):
        for count in range(1, 9):  # packs of 1 to 8 samples and pictures: no two have equal lengths
            g = torch.Generator().manual_seed(count)
            batch = pack([sample(g, 5 + i, picture=True) for i in range(count)], model.config)
            micro = Pack(batch, ("x",) * count, ("x",) * count)
            objective(objective.prepare(micro), 1.0, ALONE).loss.backward()
            graphs.append(counters["stats"]["unique_graphs"])
    # A length that equals some width by chance may cost one more graph; then every length has one.
    assert graphs[-1] == graphs[3], graphs
    assert graphs[-1] <= graphs[0] + 1, graphs
