"""The engine's own CPU kernels: what the plain forward gives, as near as bf16 is fine, and torch's kernels where they do not run."""

import copy
import ctypes
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qvl.core.batch import Sample
from qvl.engine import kernels
from qvl.engine.engine import Engine, EngineSettings
from qvl.engine.kernels import Kernels, Next, attend_many, fits, library
from qvl.engine.kv_cache import KVCache, new_cache
from qvl.engine.prepare import drop, prepare, refresh, rounded
from qvl.engine.request import Request
from qvl.engine.sampling import Best, Draw, Sampler, Sampling
from qvl.engine.tower import vision_block
from qvl.model.attention import Packed, reference
from qvl.model.config import preset
from qvl.model.layers import Linear, RoundedWeight, run_plainly
from qvl.model.lora import LoraConfig, add_adapter
from qvl.model.pack import pack
from qvl.model.qwen3vl import Qwen3VL, new_model
from qvl.outside import compiler
from qvl.outside.compiler import NoLibraryError, shared_library

has_kernels = pytest.mark.skipif(library() is None, reason="this CPU has no AVX512-BF16, or nothing compiles here")


@cache
def model(head_dim: int = 64) -> Qwen3VL:
    """Weights large enough that every token counts. With heads of 128 also three query heads to a key head."""
    config = preset("nano")
    text = replace(config.text, vocab_size=600, num_hidden_layers=3)
    if head_dim == 128:
        rope = replace(text.rope, section=(24, 20, 20))
        text = replace(text, head_dim=128, rope=rope, num_attention_heads=3, num_key_value_heads=1, hidden_size=384)
        config = replace(config, vision=None)
    made = new_model(replace(config, text=text), dtype=torch.bfloat16).requires_grad_(False)
    for parameter in made.parameters():
        if parameter.ndim > 1:
            parameter.mul_(3)
    return made


def words(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 600, (count,), generator=torch.Generator().manual_seed(seed))


def truth(owner: Qwen3VL, token_T: Tensor, dtype: torch.dtype) -> Tensor:
    """Log probabilities after each token, by the plain forward of the whole sequence."""
    plain = Qwen3VL(owner.config).to(dtype)
    plain.load_state_dict(owner.state_dict())
    with torch.inference_mode():
        return plain.logits(plain(pack([Sample(token_T=token_T)], owner.config))).float().log_softmax(-1)


def through_kernels(owner: Qwen3VL, token_T: Tensor, *, block_size: int = 8) -> Tensor:
    """The same, token by token, in blocks that lie anywhere."""
    store = empty_cache(owner, 40, block_size)
    blocks = torch.randperm(40, generator=torch.Generator().manual_seed(1)).tolist()
    own = Kernels(owner, store)
    news = [Next(token=token, position=i, context=i + 1, blocks=blocks) for i, token in enumerate(token_T.tolist())]
    with torch.inference_mode():
        return torch.cat([own.logits(own.decode([new])) for new in news]).float().log_softmax(-1)


def empty_cache(owner: Qwen3VL, num_blocks: int, block_size: int) -> KVCache:
    store = new_cache(
        owner.config.text, num_blocks=num_blocks, block_size=block_size, dtype=torch.bfloat16, device="cpu"
    )
    # What nobody wrote may be no number.
    store.key_LBZKH.fill_(math.nan)
    store.value_LBZKH.fill_(math.nan)
    return store


@has_kernels
@pytest.mark.parametrize("head_dim", [64, 128])
def test_token_by_token_is_as_near_to_fp32_as_the_plain_bf16_forward(head_dim: int) -> None:
    owner, token_T = model(head_dim), words(70)
    exact = truth(owner, token_T, torch.float32)
    theirs = (truth(owner, token_T, torch.bfloat16) - exact).abs().mean()
    ours = (through_kernels(owner, token_T) - exact).abs().mean()
    assert ours < 1.2 * theirs
    assert theirs < 0.05


@has_kernels
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 64])
def test_an_answer_in_a_batch_of_any_size_is_the_answer_alone(rows: int) -> None:
    owner = model()
    alone, together = empty_cache(owner, 64, 4), empty_cache(owner, 64, 4)
    news = [Next(token=5 * i % 600, position=i, context=1, blocks=[63 - i]) for i in range(rows)]
    one, all_rows = Kernels(owner, alone), Kernels(owner, together)
    with torch.inference_mode():
        expected = torch.cat([one.decode([new]) for new in news]).float()
        torch.testing.assert_close(all_rows.decode(news).float(), expected, atol=0.03, rtol=0.03)
    torch.testing.assert_close(
        together.key_LBZKH[:, 64 - rows :, 0].float(), alone.key_LBZKH[:, 64 - rows :, 0].float(), atol=0.03, rtol=0.03
    )


@has_kernels
def test_two_threads_give_the_bits_of_one() -> None:
    before = torch.get_num_threads()
    try:
        each = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            each.append(through_kernels(model(), words(20)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*each)


@has_kernels
@pytest.mark.parametrize(("new", "past"), [(24, 0), (64, 0), (65, 0), (130, 0), (24, 40), (25, 63), (100, 1000)])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 2, 64), (3, 1, 128), (2, 2, 128)])
def test_a_chunk_of_a_prompt_sees_what_the_reference_lets_it_see(
    new: int, past: int, heads: int, kv_heads: int, width: int
) -> None:
    draw = torch.Generator().manual_seed(new + past)
    q, k, v = (torch.randn(past + new, n, width, generator=draw).bfloat16() for n in (heads, kv_heads, kv_heads))
    whole = reference(q.float(), k.float(), v.float(), Packed((past + new,), is_causal=True))[past:]
    out = torch.full((new, heads, width), math.nan, dtype=torch.bfloat16)
    loaded = library()
    assert loaded is not None
    attend_many(loaded, q[past:].contiguous(), k, v, out)
    torch.testing.assert_close(out.float(), whole, atol=0.02, rtol=0.02)


@has_kernels
@pytest.mark.parametrize("weights", ["plain", "packed", "packed by the first picture", "adapted"])
@pytest.mark.parametrize("lengths", [(64,), (4, 4, 4), (100, 36), (16, 0, 300)])
def test_a_block_of_the_tower_gives_what_the_plain_one_gives(lengths: tuple[int, ...], weights: str) -> None:
    owner = new_model(model().config, dtype=torch.bfloat16).requires_grad_(False)
    if weights == "adapted":
        add_adapter(owner, LoraConfig(r=2, target_modules=r".*visual\.blocks.*(qkv|proj|fc1|fc2)"))
    draw, total = torch.Generator().manual_seed(0), sum(lengths)
    for name, parameter in owner.visual.named_parameters():
        parameter.data.normal_(0, 0.1 if name.endswith("bias") else 0.06, generator=draw)
    run_block, block, layout = vision_block(owner), owner.visual.blocks[0], Packed(lengths, is_causal=False)
    assert run_block is not run_plainly
    width, head = owner.config.vision.hidden_size, owner.config.vision.head_dim  # type: ignore[union-attr]
    x_PC = torch.randn(total, width, generator=draw).bfloat16()
    angle_PH = torch.rand(total, head // 2, generator=draw).repeat(1, 2) * 6
    angles = angle_PH.cos(), angle_PH.sin()
    with torch.inference_mode():
        plain = block(x_PC, *angles, layout).float()
        truth = copy.deepcopy(block).float()(x_PC.float(), *angles, layout)
    if weights == "packed":
        prepare(owner, pack=True, free=True)
    late = weights == "packed by the first picture"
    assert not late or not prepare(owner, free=True)
    with torch.inference_mode():
        ours = run_block(block, x_PC, *angles, layout).float()
        assert torch.equal(run_block(block, x_PC, *angles, layout).float(), ours)
    assert block.attn.qkv.weight.is_meta == (late or weights == "packed")
    noise, moved = (plain - truth).abs(), (truth - x_PC.float()).abs().mean()
    assert moved > 20 * noise.mean()
    assert (ours - truth).abs().mean() < 1.1 * noise.mean()
    assert (ours - truth).abs().max() < 1.5 * noise.max()


@has_kernels
@pytest.mark.parametrize("size", [0.0, 1.0, 30.0, 1000.0])
@pytest.mark.parametrize("is_causal", [True, False])
def test_scores_may_be_of_any_size_and_grow_from_key_to_key(size: float, is_causal: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(200, 2, 64, generator=draw) for _ in range(3))
    k = k * torch.linspace(0, size, 200)[:, None, None]
    q, k, v = (x.bfloat16() for x in (q, k, v))
    out, loaded = torch.empty_like(q), library()
    assert loaded is not None
    attend_many(loaded, q, k, v, out, is_causal=is_causal)
    truth = reference(q.double(), k.double(), v.double(), Packed((200,), is_causal=is_causal))
    torch.testing.assert_close(out.double(), truth, atol=0.02, rtol=0.02)


@has_kernels
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_what_is_no_number_reaches_all_who_see_it_and_no_other_head(bad: float, which: str) -> None:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(200, 2, 64, generator=draw).bfloat16() for _ in range(3))
    {"query": q, "key": k, "value": v}[which][150, 1, 7] = bad
    if which == "key":
        q[:, 1, 7] = 1  # so that its score is the largest, not the smallest
    out, loaded = torch.empty_like(q), library()
    assert loaded is not None
    attend_many(loaded, q, k, v, out)
    is_whole = out.isfinite().all(2)
    # Rows of a block meet the same tiles, and nought times NaN is NaN: those from 96 on may be met too.
    assert is_whole[:, 0].all() and is_whole[:96, 1].all()
    assert not is_whole[150 : 151 if which == "query" else None, 1].any()
    assert which != "query" or is_whole[151:, 1].all()


@has_kernels
def test_keys_may_lie_head_by_head_and_nothing_behind_the_last_is_read() -> None:
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(70, 4, 64, generator=draw).bfloat16()
    pool = torch.full((2, 200, 64), math.nan, dtype=torch.bfloat16).transpose(0, 1)
    k, v = (torch.randn(70, 2, 64, generator=draw).bfloat16() for _ in range(2))
    far_k, far_v = pool.clone(memory_format=torch.preserve_format), pool.clone(memory_format=torch.preserve_format)
    far_k[:70], far_v[:70] = k, v
    near, far = torch.empty_like(q), torch.empty_like(q)
    loaded = library()
    assert loaded is not None
    attend_many(loaded, q, k, v, near)
    attend_many(loaded, q, far_k[:70], far_v[:70], far)
    assert far_k.stride() == (64, 200 * 64, 1)
    assert torch.equal(near, far)


@has_kernels
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_what_is_no_number_is_not_passed_over(where: str) -> None:
    draw = torch.Generator().manual_seed(0)
    parts = {name: torch.randn(70, 2, 64, generator=draw).bfloat16() for name in ("query", "key", "value")}
    parts[where][30, 1, 5] = math.nan
    out, loaded = torch.empty_like(parts["query"]), library()
    assert loaded is not None
    attend_many(loaded, *parts.values(), out)
    is_bad = out.isnan().any(-1)
    assert not is_bad[:, 0].any()
    assert is_bad[30, 1] and (where == "query" or is_bad[30:, 1].all())


@has_kernels
def test_the_best_token_and_its_logprob_are_those_of_the_whole_distribution() -> None:
    own = Kernels(model(), empty_cache(model(), 2, 8))
    logits_SV = (torch.randn(5, 603, generator=torch.Generator().manual_seed(0)) * 5).bfloat16()
    logits_SV[1, 602] = 40.0
    expected_SV = logits_SV.float().log_softmax(-1)
    found = own.best(logits_SV)
    assert [best.token for best in found] == logits_SV.float().argmax(-1).tolist()
    for row_V, best in zip(expected_SV, found, strict=True):
        assert best.logprob == pytest.approx(float(row_V.max()), abs=1e-5)
    for bad in (math.nan, math.inf, -math.inf):
        logits_SV[2, 3] = bad
        assert [math.isnan(best.logprob) for best in own.best(logits_SV)] == [False, False, True, False, False]


def test_only_a_greedy_draw_that_asks_for_nothing_else_takes_what_is_known() -> None:
    logits_V = torch.tensor([0.0, 2.0, 1.0])
    told = Best(2, -0.5)  # wrong on purpose, so that it shows who believed it

    def drawn(**changes: object) -> Draw:
        return Sampler(Sampling(**dict(temperature=0.0) | changes), torch.tensor([1]), 3)(logits_V, best=told)  # type: ignore[arg-type]

    assert drawn() == Draw(2, -0.5, ())
    for changes in (
        dict(temperature=1e-9),
        dict(presence_penalty=0.1),
        dict(num_logprobs=1),
        dict(logit_bias=((0, 1.0),)),
    ):
        assert drawn(**changes).logprob == pytest.approx(float(logits_V.log_softmax(0)[1]))
    greedy = Sampler(Sampling(temperature=0.0), torch.tensor([1]), 3)
    assert greedy(logits_V, best=told, forced=0).token == 0
    assert greedy(logits_V, best=told, allowed=torch.tensor([True, False, False])).token == 0
    with pytest.raises(ValueError, match="not finite"):
        greedy(torch.tensor([0.0, math.nan, 1.0]), best=Best(2, math.nan))


def engine_logprobs(owner: Qwen3VL, *, with_kernels: bool = True, n: int = 4) -> list[list[tuple[int, float]]]:
    settings = EngineSettings(num_blocks=200, block_size=8, max_step_tokens=50, kernels=with_kernels)
    engine = Engine(owner, settings)
    greedy = Sampling(temperature=0.0, max_tokens=12, ignore_eos=True)
    for i in range(n):
        engine.submit(Request(id=str(i), sample=Sample(token_T=words(20 + 31 * i, i)), sampling=greedy))
    answers: list[list[tuple[int, float]]] = [[] for _ in range(n)]
    while engine.has_work:
        for event in engine.step():
            assert event.draw is not None, event.error
            answers[int(event.request)].append((event.draw.token, event.draw.logprob))
    return answers


@has_kernels
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_engines_logprobs_are_the_packed_forwards_within_bf16(head_dim: int) -> None:
    owner = model(head_dim)
    for i, answer in enumerate(engine_logprobs(owner)):
        token_T = torch.cat([words(20 + 31 * i, i), torch.tensor([token for token, _ in answer])])
        expected = truth(owner, token_T, torch.float32)[19 + 31 * i : -1]
        noise = (truth(owner, token_T, torch.bfloat16)[19 + 31 * i : -1] - expected).abs().max()
        for row_V, (token, logprob) in zip(expected, answer, strict=True):
            assert abs(float(row_V[token]) - logprob) < 1.5 * noise


@has_kernels
def test_pictures_reach_the_answer_as_they_do_through_the_plain_forward() -> None:
    owner = model()
    marks = dict(image_token_id=505, vision_start_token_id=502, vision_end_token_id=503)
    shown = new_model(replace(owner.config, **marks), dtype=torch.bfloat16).requires_grad_(False)  # type: ignore[arg-type]
    shown.load_state_dict(owner.state_dict())
    patches = torch.randint(0, 256, (64, 1536), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    token_T = torch.cat([words(30) % 500, torch.tensor([502, *[505] * 16, 503, 7, 8])])
    sample = Sample(token_T=token_T, patch_PX=patches, grid_I3=torch.tensor([[1, 8, 8]]))
    said = []
    for settings in (dict(), dict(max_step_tokens=33), dict(kernels=False)):
        engine = Engine(shown, EngineSettings(num_blocks=20, block_size=8, **settings))  # type: ignore[arg-type]
        engine.submit(
            Request(id="one", sample=sample, sampling=Sampling(temperature=0.0, max_tokens=1, num_logprobs=5))
        )
        events = [event for _ in range(2) for event in engine.step()]
        assert events[0].draw is not None
        said.append(dict(events[0].draw.top))
    with torch.inference_mode():
        batch = pack([sample], shown.config)
        expected_V = shown.float().logits(shown(batch))[-1].log_softmax(-1)
    for top in said:
        assert max(abs(float(expected_V[token]) - logprob) for token, logprob in top.items()) < 0.2


@has_kernels
def test_weights_that_are_changed_or_exchanged_are_seen() -> None:
    owner = new_model(model().config, dtype=torch.bfloat16).requires_grad_(False)
    own = Kernels(owner, empty_cache(owner, 2, 8))
    new = Next(token=3, position=0, context=1, blocks=[0])
    first = own.decode([new])
    layer = owner.language_model.layers[0]
    layer.mlp.up_proj.weight.mul_(-2)  # type: ignore[union-attr, operator]
    second = own.decode([new])
    layer.mlp.up_proj.weight.data = layer.mlp.up_proj.weight.data * -0.5  # type: ignore[union-attr]
    assert not torch.equal(first, second)
    assert torch.equal(own.decode([new]), first)


@has_kernels
def test_what_the_kernels_do_not_know_goes_through_torch() -> None:
    def fresh(name: str = "nano", dtype: torch.dtype = torch.bfloat16) -> Qwen3VL:
        config = preset(name)
        return new_model(replace(config, text=replace(config.text, vocab_size=600)), dtype=dtype)

    assert fits(fresh())
    assert not fits(fresh(dtype=torch.float32))
    assert not fits(fresh("nano-moe"))
    adapted, freed = fresh(), fresh()
    add_adapter(adapted, LoraConfig(r=2))
    assert not fits(adapted)
    assert prepare(freed, free=True, pack=True)
    assert not fits(freed)
    assert Engine(freed, EngineSettings(num_blocks=2)).runner.kernels is None
    assert Engine(fresh(), EngineSettings(num_blocks=2, mode="exact")).runner.kernels is None
    assert Engine(fresh(), EngineSettings(num_blocks=2, kernels=False)).runner.kernels is None
    assert Engine(fresh(), EngineSettings(num_blocks=2)).runner.kernels is not None


@pytest.fixture
def no_kernels_yet() -> Iterator[None]:
    library.cache_clear()
    yield
    library.cache_clear()


def test_without_a_compiler_torch_answers_and_says_so(
    no_kernels_yet: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> Path:
        raise NoLibraryError("there is no C++ compiler")

    monkeypatch.setattr(kernels, "shared_library", refuse)
    monkeypatch.setattr("qvl.core.log._said", set())
    owner = model()
    by_torch = engine_logprobs(owner, with_kernels=False, n=2)
    assert engine_logprobs(owner, n=2) == by_torch
    if "avx512_bf16" in kernels.facts().cpu_flags:
        assert "there is no C++ compiler" in caplog.text


@pytest.mark.skipif(compiler.compiler() is None, reason="there is no C++ compiler")
def test_a_library_is_compiled_once_and_again_when_its_text_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "FOLDER", tmp_path / "kept")
    source = tmp_path / "two.cpp"
    source.write_text('extern "C" int two() { return 2; }')
    first = shared_library(source)
    made = first.stat().st_mtime_ns
    assert ctypes.CDLL(str(first)).two() == 2
    assert shared_library(source) == first and first.stat().st_mtime_ns == made
    source.write_text('extern "C" int two() { return 3; }')
    assert ctypes.CDLL(str(shared_library(source))).two() == 3
    source.write_text("no C++")
    with pytest.raises(NoLibraryError, match=r"failed: .*error"):
        shared_library(source)


@pytest.mark.skipif(compiler.compiler() is None, reason="there is no C++ compiler")
def test_a_library_is_never_kept_where_others_may_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept").chmod(0o777)
    monkeypatch.setattr(compiler, "FOLDER", tmp_path / "kept")
    source = tmp_path / "one.cpp"
    source.write_text('extern "C" int one() { return 1; }')
    assert ctypes.CDLL(str(shared_library(source))).one() == 1
    assert list((tmp_path / "kept").iterdir()) == []


def test_without_a_compiler_there_is_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "compiler", lambda: None)
    with pytest.raises(NoLibraryError, match="no C\\+\\+ compiler"):
        shared_library(tmp_path / "any.cpp")


# ---- weights in whole numbers


def test_a_weight_is_rounded_to_the_nearest_step_of_its_row() -> None:
    weight = torch.tensor([[127.0, -63.25, 0.625, 0.0], [0.5, -1.0, 0.25, 0.1]], dtype=torch.bfloat16)
    found = rounded(weight)
    # 1 / 127 is no bf16 number; the next larger one makes 126.5 steps of it
    assert found.value.tolist() == [[127, -63, 1, 0], [63, -126, 32, 13]]
    assert found.scale[0] == 1.0
    assert torch.equal(found.scale.bfloat16().float(), found.scale)
    assert (found.value * found.scale[:, None] - weight.float()).abs().amax() <= 0.5 * found.scale.max()
    assert not rounded(torch.zeros(2, 4, dtype=torch.bfloat16)).value.any()


@has_kernels
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 9, 17, 40])
def test_rounded_weights_mean_the_same_to_the_kernels_and_to_torch(rows: int) -> None:
    owner = new_model(model().config, dtype=torch.bfloat16).requires_grad_(False)
    assert prepare(owner, weights="int8")
    own = Kernels(owner, empty_cache(owner, 2, 8))
    x_SD = torch.randn(rows, owner.config.text.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    head = owner.packed_head
    assert isinstance(head, RoundedWeight)
    expected_SV = x_SD.float() @ (head.value * head.scale[:, None]).T
    with torch.inference_mode():
        torch.testing.assert_close(own.logits(x_SD).float(), expected_SV, atol=0.02, rtol=0.01)
        torch.testing.assert_close(owner.logits(x_SD).float(), expected_SV, atol=0.02, rtol=0.01)


@has_kernels
@pytest.mark.parametrize("free", [False, True])
def test_rounded_answers_are_the_packed_forwards_of_the_rounded_model(free: bool) -> None:
    owner = new_model(model().config, dtype=torch.bfloat16).requires_grad_(False)
    plain = new_model(model().config, dtype=torch.bfloat16).requires_grad_(False)
    for module in plain.language_model.modules():
        if isinstance(module, Linear):
            found = rounded(module.weight)
            module.weight.copy_(found.value * found.scale[:, None])
    prepare(owner, weights="int8", free=free)
    assert fits(owner)
    ours, theirs = engine_logprobs(owner, n=2), engine_logprobs(plain, n=2)
    for answer, other in zip(ours, theirs, strict=True):
        assert answer[0][1] == pytest.approx(other[0][1], abs=0.05)
    assert engine_logprobs(owner, n=2, with_kernels=False)[0][0][1] == pytest.approx(ours[0][0][1], abs=0.05)


def test_rounded_weights_are_made_anew_after_a_change_and_dropped_for_training() -> None:
    owner = new_model(model().config, dtype=torch.bfloat16)
    prepare(owner, weights="int8")
    first = owner.packed_head
    with torch.no_grad():
        owner.head_weight.mul_(2)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="refresh"):
        owner.logits(torch.zeros(1, 256, dtype=torch.bfloat16))
    refresh(owner)
    assert isinstance(first, RoundedWeight) and isinstance(owner.packed_head, RoundedWeight)
    assert torch.equal(owner.packed_head.scale, 2 * first.scale)
    drop(owner)
    assert owner.packed_head is None
    with pytest.raises(ValueError, match="int8 weights are for bfloat16 on a CPU"):
        prepare(new_model(model().config), weights="int8")
