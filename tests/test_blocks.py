"""Blocks that throw their activations away, or are compiled, give what plain blocks give."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qvl.model.decoder import embed
from qvl.model.layers import PLAIN_BLOCKS, Blocks
from qvl.model.lora import LoraConfig, add_adapter
from qvl.model.pack import pack
from qvl.model.qwen3vl import Qwen3VL, new_model
from qvl.train.blocks import compiled_blocks, training_blocks
from qvl.train.objective import NextToken
from test_train import ALONE, Drawn, Pack, sample, settings, small, trained

DECODER = training_blocks(checkpoint_vision=False, checkpoint_decoder=True)
CHECKPOINTED = {
    "vision": training_blocks(checkpoint_vision=True, checkpoint_decoder=False),
    "decoder": DECODER,
    "both": training_blocks(checkpoint_vision=True, checkpoint_decoder=True),
}


def gradients(model: Qwen3VL, blocks: Blocks) -> tuple[list[float], dict[str, Tensor], int]:
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
    for one in prepared:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            loss = objective(one, total, ALONE, blocks).loss
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
    losses, expected, all_bytes = gradients(model, PLAIN_BLOCKS)
    again, found, fewer_bytes = gradients(model, CHECKPOINTED[where])
    assert again == losses
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
    assert fewer_bytes < all_bytes


def test_vision_and_decoder_are_chosen_apart() -> None:
    model = model_of("dense")
    kept = {where: gradients(model, blocks)[2] for where, blocks in CHECKPOINTED.items()}
    everything = gradients(model, PLAIN_BLOCKS)[2]
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
    outcome = objective(prepared, prepared.denominator, ALONE, DECODER)
    outcome.loss.backward()
    assert runs == {"layer 0": 3, "layer 1": 3, "layer 2": 3}  # plain, checkpointed, once more in the backward
    assert outcome.sums == plain.sums


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_each_block_of_both_halves_runs_once_and_in_order_as_the_call_says_and_the_next_call_knows_nothing_of_it(
    kind: str,
) -> None:
    model, ran = model_of(kind), []

    def watched(block: torch.nn.Module, *arguments: Any) -> Any:
        ran.append(block)
        return block(*arguments)

    [micro] = Drawn(model.config, 1).next_step()
    with torch.no_grad():
        plain = model(micro.batch)
        assert torch.equal(model(micro.batch, blocks=Blocks(vision=watched, decoder=watched)), plain)
        assert ran == [*model.visual.blocks, *model.language_model.layers]
        # Decoder layers that are all skipped leave the embedding with DeepStack's levels on top: the loop adds them, not the block.
        skipped = Blocks(decoder=lambda layer, x_TD, *_: (x_TD, None))
        features, visual_M = model.encode(micro.batch), micro.batch.visual_M
        x_TD = embed(model.language_model, micro.batch.token_T, visual_M, features.merged_MD)
        assert visual_M is not None and len(features.deepstack) > 0
        for level in features.deepstack:
            x_TD[visual_M] += level
        assert torch.equal(model(micro.batch, blocks=skipped), model.language_model.norm(x_TD))
        ran.clear()
        assert torch.equal(model(micro.batch), plain) and not ran


def test_afterwards_the_model_is_as_it_was() -> None:
    model = model_of("experts")
    before = [dict(module.__dict__) for module in model.modules()]
    with compiled_blocks(model):
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
    blocks, model = CHECKPOINTED.get(where, PLAIN_BLOCKS), model_of(kind)
    losses, expected, _ = gradients(model, PLAIN_BLOCKS)
    with compiled_blocks(model):
        again, found, _ = gradients(model, blocks)
    assert again == pytest.approx(losses, rel=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-3, msg=name)

    objective, graphs = NextToken(model).train(), []
    with compiled_blocks(model):
        for count in range(1, 9):  # packs of 1 to 8 samples and pictures: no two have equal lengths
            g = torch.Generator().manual_seed(count)
            batch = pack([sample(g, 5 + i, picture=True) for i in range(count)], model.config)
            micro = Pack(batch, ("x",) * count, ("x",) * count)
            objective(objective.prepare(micro), 1.0, ALONE, blocks).loss.backward()
            graphs.append(counters["stats"]["unique_graphs"])
    # A length that equals some width by chance may cost one more graph; then every length has one.
    assert graphs[-1] == graphs[3], graphs
    assert graphs[-1] <= graphs[0] + 1, graphs
