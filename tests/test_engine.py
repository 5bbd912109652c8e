"""The engine: many requests in one batch, each answered as if it were alone, each failing alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from qvl.core.batch import Sample
from qvl.engine.engine import Engine, EngineSettings, QueueFull
from qvl.engine.request import Event, Grammar, Request, ThinkingBudget, rows_of_visuals
from qvl.engine.sampling import Sampling
from qvl.model.config import preset
from qvl.model.pack import pack
from qvl.model.qwen3vl import Qwen3VL, new_model

START, END, IMAGE, VIDEO = 502, 503, 505, 506
GREEDY = Sampling(temperature=0.0, max_tokens=8)


@cache
def model(name: str = "nano", dtype: torch.dtype = torch.float32) -> Qwen3VL:
    """Three layers, and weights large enough that every token counts."""
    config = preset(name)
    text = replace(config.text, vocab_size=600, num_hidden_layers=3)
    marks = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)
    made = new_model(replace(config, text=text, **marks)).eval().requires_grad_(False)
    for parameter in made.parameters():
        if parameter.ndim > 1:
            parameter.mul_(3)
    return made.to(dtype)


def words(count: int, seed: int = 0) -> Sample:
    return Sample(token_T=torch.randint(0, 480, (count,), generator=torch.Generator().manual_seed(seed)))


def shown(
    seed: int, *, before: int = 20, after: int = 7, grids: Sequence[tuple[int, int]] = ((4, 6),), id: int = IMAGE
) -> Sample:
    """Words, then a picture (or slices of a film) for each grid, then words."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 480, (before,), generator=draw).tolist()
    for height, width in grids:
        tokens += [START, *[id] * (height * width // 4), END]
    tokens += torch.randint(0, 480, (after,), generator=draw).tolist()
    patches = sum(height * width for height, width in grids)
    return Sample(
        token_T=torch.tensor(tokens),
        patch_PX=torch.randint(0, 256, (patches, 1536), dtype=torch.uint8, generator=draw),
        grid_I3=torch.tensor([(1, *grid) for grid in grids]),
    )


def mixed(max_tokens: int = 10) -> list[Request]:
    """Words, pictures and a film; one, two or three answers."""
    samples = [
        words(40),
        shown(1, before=37),
        shown(2, grids=((4, 4), (2, 6))),
        shown(3, grids=((4, 4),) * 3, id=VIDEO),
    ]
    keys = [(), (b"one",), (b"two", b"three"), (b"film",)]
    return [
        Request(
            id=f"r{i}",
            sample=sample,
            sampling=Sampling(seed=i, max_tokens=max_tokens + 2 * i, num_logprobs=2),
            n=1 + i % 3,
            media_keys=key,
        )
        for i, (sample, key) in enumerate(zip(samples, keys, strict=True))
    ]


def engine(name: str = "nano", dtype: torch.dtype = torch.float32, **settings: Any) -> Engine:
    return Engine(model(name, dtype), EngineSettings(**dict(num_blocks=100, block_size=8) | settings))


@dataclass(frozen=True)
class Said:
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    top: tuple[Any, ...]
    finish: str | None
    error: str | None


def drain(e: Engine) -> dict[tuple[str, int], list[Event]]:
    events: dict[tuple[str, int], list[Event]] = {}
    while e.has_work:
        for event in e.step():
            events.setdefault((event.request, event.index), []).append(event)
    return events


def answers(e: Engine, *requests: Request) -> dict[tuple[str, int], Said]:
    for request in requests:
        e.submit(request)
    return {
        key: Said(
            tokens=tuple(x.draw.token for x in events if x.draw),
            logprobs=tuple(x.draw.logprob for x in events if x.draw),
            top=tuple(x.draw.top for x in events if x.draw),
            finish=events[-1].finish,
            error=events[-1].error,
        )
        for key, events in drain(e).items()
    }


def alone(
    request: Request, name: str = "nano", dtype: torch.dtype = torch.float32, mode: str = "exact"
) -> dict[tuple[str, int], Said]:
    return answers(engine(name, dtype, mode=mode, prefix_cache=False, max_step_tokens=512), request)


def is_empty(e: Engine) -> bool:
    stats = e.stats()
    return stats.blocks_free == stats.blocks_total and stats.running == stats.waiting == 0 and not e.has_work


# ---- exact: the same to the bit


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("nano", torch.float32),
        ("nano", torch.bfloat16),
        pytest.param("nano-moe", torch.float32, marks=pytest.mark.slow),
    ],
)
def test_exact_answers_are_the_same_to_the_bit_alone_in_company_pushed_out_and_from_the_cache(
    name: str, dtype: torch.dtype
) -> None:
    by_itself: dict[tuple[str, int], Said] = {}
    for request in mixed():
        by_itself |= alone(request, name, dtype)
    assert len(by_itself) == 7
    roomy = engine(name, dtype, mode="exact")
    assert answers(roomy, *mixed()) == by_itself
    # The second time each prompt's beginning is found, computed in whatever company it was.
    assert answers(roomy, *mixed()) == by_itself
    assert roomy.stats().prefix_tokens_found > 0
    tight = engine(name, dtype, mode="exact", num_blocks=10, max_step_tokens=13, max_running=5)
    assert answers(tight, *mixed()) == by_itself
    assert tight.stats().preemptions > 0
    assert is_empty(roomy) and is_empty(tight)


@pytest.mark.parametrize("name", ["nano", "nano-moe"])
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_logprobs_are_the_packed_forwards(name: str, mode: str) -> None:
    requests = [replace(r, n=1) for r in mixed()]
    said = answers(engine(name, mode=mode, max_step_tokens=29), *requests)
    for request in requests:
        own = said[request.id, 0]
        whole = replace(request.sample, token_T=torch.cat((request.sample.token_T, torch.tensor(own.tokens))))
        with torch.no_grad():
            packed = model(name)
            logits = packed.logits(packed(pack([whole], packed.config)))
        expected = logits[request.sample.num_tokens - 1 : -1].log_softmax(-1)
        found = expected[torch.arange(len(own.tokens)), torch.tensor(own.tokens)]
        torch.testing.assert_close(torch.tensor(own.logprobs), found, atol=1e-5, rtol=5e-6)


def test_a_machine_whose_rows_depend_on_their_place_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Qwen3VL.logits

    def crooked(self: Qwen3VL, hidden_TD: Tensor) -> Tensor:
        logits = plain(self, hidden_TD).clone()
        logits[3] *= 1 + 1e-6
        return logits

    monkeypatch.setattr(Qwen3VL, "logits", crooked)
    with pytest.raises(ValueError, match="exact mode cannot keep its promise here: in a tile of 128 rows"):
        engine(mode="exact")


# ---- fast: the same tokens


def test_what_is_in_the_cache_changes_no_token() -> None:
    expected: dict[tuple[str, int], Said] = {}
    for request in mixed():
        expected |= alone(request, mode="fast")
    e = engine()
    for _ in range(2):
        found = answers(e, *mixed())
        assert {key: said.tokens for key, said in found.items()} == {key: said.tokens for key, said in expected.items()}
    stats = e.stats()
    # 40, 47 of 50 or so: all but each prompt's last block, and no cut inside a picture
    assert stats.prefix_tokens_found == sum(found_of(e, r) for r in mixed())
    assert stats.prefix_tokens_found > 0.5 * stats.prefix_tokens_asked / 2


def found_of(e: Engine, request: Request) -> int:
    """What a prompt that was seen in full should find, reckoned without the engine."""
    length, size = request.sample.num_tokens, 8
    end = (length - 1) // size * size
    is_visual = [token in (IMAGE, VIDEO) for token in request.sample.token_T.tolist()]
    while end and is_visual[end - 1] and is_visual[end]:
        end -= size
    return end


def test_another_picture_under_the_same_words_is_not_found() -> None:
    e = engine()
    first, second = shown(1, before=3, grids=((8, 8),), after=20), shown(1, before=3, grids=((8, 8),), after=20)
    second = replace(second, patch_PX=255 - (second.patch_PX if second.patch_PX is not None else torch.empty(0)))
    ask = Request(id="a", sample=first, sampling=GREEDY, media_keys=(b"first",))
    answers(e, ask)
    other = Request(id="b", sample=second, sampling=GREEDY, media_keys=(b"second",))
    assert answers(e, other)["b", 0].tokens == alone(other, mode="fast")["b", 0].tokens
    assert e.stats().prefix_tokens_found == 0
    answers(e, replace(ask, id="c"))
    assert e.stats().prefix_tokens_found == 40


def test_without_keys_only_what_stands_before_the_first_picture_is_found() -> None:
    e = engine()
    ask = Request(id="a", sample=shown(1, before=21), sampling=GREEDY)
    answers(e, ask)
    answers(e, ask)
    assert e.stats().prefix_tokens_found == 16
    assert e.stats().encoder_found == 0


def test_salts_keep_tenants_apart() -> None:
    e = engine()
    for salt, found in (("one", 0), ("two", 0), ("one", 32)):
        e.submit(Request(id=salt, sample=words(40), sampling=GREEDY, salt=salt))
        [events] = drain(e).values()
        assert {event.num_cached_tokens for event in events} == {found}


def test_salts_keep_tenants_pictures_apart() -> None:
    """How soon a picture is answered would tell one that another has shown it."""
    e = engine(prefix_cache=False)
    for salt, found in (("one", 0), ("two", 0), ("one", 1)):
        ask = replace(Request(id=salt, sample=shown(1), sampling=GREEDY), media_keys=(b"a picture",), salt=salt)
        e.submit(ask)
        drain(e)
        assert e.stats().encoder_found == found


def test_a_conversation_goes_on_from_the_cached_answer() -> None:
    e = engine()
    no_pictures = tuple((mark, -100.0) for mark in (START, END, IMAGE, VIDEO))
    sampling = replace(GREEDY, max_tokens=20, logit_bias=no_pictures)
    first = answers(e, Request(id="a", sample=words(20), sampling=sampling))["a", 0]
    whole = torch.cat((words(20).token_T, torch.tensor(first.tokens), torch.tensor([7, 8, 9])))
    answers(e, Request(id="b", sample=Sample(token_T=whole), sampling=GREEDY))
    assert e.stats().prefix_tokens_found == 32  # of 43; the last token of the first answer was never read


# ---- answers to one prompt


def test_n_answers_are_those_of_n_seeds_and_share_the_prompt() -> None:
    ask = Request(id="a", sample=shown(1), sampling=Sampling(seed=30, max_tokens=9), n=4)
    e = engine(mode="exact")
    together = answers(e, ask)
    assert e.stats().tokens_prefilled == ask.sample.num_tokens
    for i in range(4):
        [single] = alone(replace(ask, n=1, sampling=replace(ask.sampling, seed=30 + i))).values()
        assert together["a", i] == single
    assert len({said.tokens for said in together.values()}) == 4


def test_more_answers_than_may_run_come_one_after_another() -> None:
    ask = Request(id="a", sample=words(20), sampling=Sampling(seed=1, max_tokens=9), n=5)
    assert answers(engine(mode="exact", max_running=2), ask) == answers(engine(mode="exact"), ask)


# ---- cancelling, queueing, refusing


def test_cancelling_at_any_moment_frees_every_block_within_a_step() -> None:
    for moment in range(14):
        e = engine(max_step_tokens=16, num_blocks=30)
        for request in mixed()[1:3]:
            e.submit(request)
        before = [event for _ in range(moment) for event in e.step()]
        done = {(x.request, x.index) for x in before if x.finish}
        for request in mixed()[1:3]:
            e.cancel(request.id)
        assert e.stats().blocks_free == e.stats().blocks_total
        rest = e.step()
        assert {(x.request, x.index, x.finish) for x in rest} == {
            (r.id, i, "cancelled") for r in mixed()[1:3] for i in range(r.n) if (r.id, i) not in done
        }
        assert is_empty(e)
        assert e.step() == []


def test_cancelling_one_leaves_the_other_as_it_is() -> None:
    first, second = mixed()[:2]
    e = engine(mode="exact")
    e.submit(first)
    e.submit(second)
    seen = [event for _ in range(3) for event in e.step()]
    e.cancel(first.id)
    e.cancel("nobody")
    seen += [x for events in drain(e).values() for x in events]
    expected = alone(second)
    for (id, index), said in expected.items():
        assert tuple(x.draw.token for x in seen if (x.request, x.index) == (id, index) and x.draw) == said.tokens


def test_the_queue_has_a_bound() -> None:
    e = engine(max_queue=2, max_running=1)
    for i in range(2):
        e.submit(Request(id=str(i), sample=words(9), sampling=GREEDY))
    with pytest.raises(QueueFull, match="2 requests wait already"):
        e.submit(Request(id="2", sample=words(9), sampling=GREEDY))
    e.step()
    e.submit(Request(id="2", sample=words(9), sampling=GREEDY))
    assert {key for key in drain(e)} == {("0", 0), ("1", 0), ("2", 0)}


def test_what_can_never_be_answered_is_refused_in_a_sentence() -> None:
    e = engine(num_blocks=8)
    assert e.describe().longest_context == 65
    assert e.describe().requests(17) == 4
    assert e.describe().sentence.endswith("GiB: one request of up to 65 tokens, or 1 of 65 at once.")

    def refused(sentence: str, sample: Sample | None = None, **more: Any) -> None:
        with pytest.raises(ValueError, match=sentence):
            e.submit(Request(**dict(id="x", sample=sample or words(9), sampling=GREEDY) | more))

    refused(r"needs a cache of 68 tokens \(60 of prompt, up to 8 of answer\), and all of the cache holds 64", words(60))
    refused("the prompt is empty", words(0))
    refused("token ids from 600 to 600, the model knows 0 to 599", Sample(token_T=torch.tensor([600])))
    refused("n is 17; a request may ask for 1 to 16 answers", n=17)
    refused("stop strings need a text_stream", sampling=replace(GREEDY, stop=("x",)))
    refused("logit_bias names token 600", sampling=replace(GREEDY, logit_bias=((600, 1.0),)))
    picture = shown(1)
    refused("brings 20 patches, but its grids say 24", replace(picture, patch_PX=torch.zeros(20, 1536)))
    refused("2 media keys came for 1 grids", picture, media_keys=(b"a", b"b"))
    assert is_empty(e)
    e.submit(Request(id="x", sample=words(9), sampling=GREEDY))
    refused("a request with the id 'x' is under way")


def test_settings_out_of_range_are_refused() -> None:
    for name in ("block_size", "max_running", "max_queue", "max_step_tokens"):
        with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
            EngineSettings(**{name: 0})
    with pytest.raises(ValueError, match="mode is 'quick'; expected exact or fast"):
        EngineSettings(mode="quick")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one block of 64 tokens takes"):
        Engine(model(), EngineSettings(memory_gib=1e-9))


# ---- faults


def test_logits_that_are_no_numbers_end_one_request_and_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Qwen3VL.forward

    def forward(self: Qwen3VL, batch: Any, **more: Any) -> Tensor:
        hidden_TD = plain(self, batch, **more)
        return hidden_TD.masked_fill((batch.token_T == 599)[:, None], torch.nan)

    monkeypatch.setattr(Qwen3VL, "forward", forward)
    sick = Sample(token_T=torch.cat((words(24).token_T, torch.tensor([599]))))
    good = Request(id="good", sample=words(24), sampling=GREEDY)
    e = engine()
    said = answers(e, good, Request(id="sick", sample=sick, sampling=GREEDY, n=2))
    for index in range(2):
        assert said["sick", index].tokens == ()
        assert said["sick", index].finish == "error"
        assert said["sick", index].error is not None and "logits are not finite" in said["sick", index].error
    assert said["good", 0].tokens == alone(good, mode="fast")["good", 0].tokens
    assert is_empty(e)


def test_pictures_that_cannot_be_encoded_end_their_request_alone_and_say_nothing_of_the_inside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    e = engine()
    plain = e.encoder._encode

    def encode(sample: Sample, group: Any) -> Any:
        if sample is bad.sample:
            raise RuntimeError("CUDA error at /secret/path.cu:12")
        return plain(sample, group)

    bad, good = [replace(r, n=1) for r in mixed()[1:3]]
    monkeypatch.setattr(e.encoder, "_encode", encode)
    said = answers(e, bad, good)
    assert said[bad.id, 0].error == "the request failed: its pictures or video could not be encoded."
    assert said[good.id, 0].tokens == alone(good, mode="fast")[good.id, 0].tokens
    assert is_empty(e)


def test_a_forward_that_fails_is_tried_for_each_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Qwen3VL.forward

    def forward(self: Qwen3VL, batch: Any, **more: Any) -> Tensor:
        if bool((batch.token_T == 598).any()):
            raise torch.OutOfMemoryError("tried to allocate 80 GiB")
        return plain(self, batch, **more)

    monkeypatch.setattr(Qwen3VL, "forward", forward)
    greedy_eater = Request(id="big", sample=Sample(token_T=torch.tensor([598, 3])), sampling=GREEDY)
    good = Request(id="good", sample=words(24), sampling=GREEDY)
    e = engine()
    said = answers(e, greedy_eater, good)
    assert said["big", 0].error == "the request failed: memory ran out."
    assert said["good", 0].tokens == alone(good, mode="fast")["good", 0].tokens
    assert is_empty(e)
    with pytest.raises(torch.OutOfMemoryError):
        answers(engine(isolate_faults=False), greedy_eater)


# ---- thoughts and grammars


OPEN, CLOSE = 580, 581


class Even(Grammar):
    """Even tokens only; notes what it was asked about."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, ...]] = []

    def allowed(self, tokens: Sequence[int]) -> Tensor:
        self.asked.append(tuple(tokens))
        return torch.arange(500) % 2 == 0  # shorter than the vocabulary: the rest is forbidden


def thinking(prompt: Sequence[int], budget: int | None, *, max_tokens: int = 12, **more: Any) -> tuple[int, ...]:
    ask = Request(
        id="t",
        sample=Sample(token_T=torch.tensor(prompt)),
        sampling=Sampling(seed=3, max_tokens=max_tokens),
        thinking=ThinkingBudget(open=OPEN, close=CLOSE, max_tokens=budget, last_words=more.pop("last_words", ())),
        **more,
    )
    return answers(engine(), ask)["t", 0].tokens


def test_a_thought_is_closed_when_its_budget_is_used_up() -> None:
    tokens = thinking([1, 2, OPEN], 4)
    assert tokens[4] == CLOSE
    assert CLOSE not in tokens[:4]
    assert len(tokens) == 12
    assert thinking([1, 2, OPEN], 0)[0] == CLOSE
    assert thinking([1, 2, OPEN], 3, last_words=(11, 12))[3:6] == (11, 12, CLOSE)


def test_without_a_thought_the_budget_does_nothing() -> None:
    plain = answers(engine(), Request(id="t", sample=words(5), sampling=Sampling(seed=3, max_tokens=12)))["t", 0].tokens
    prompt = words(5).token_T.tolist()
    assert thinking(prompt, 0) == plain
    assert thinking([OPEN, 4, CLOSE, *prompt[3:]], 0)[0] != CLOSE


def test_a_thought_that_the_answer_opens_itself_counts_too() -> None:
    bias = ((OPEN, 100.0),)
    ask = Request(
        id="t",
        sample=words(5),
        sampling=Sampling(temperature=0.0, max_tokens=6, logit_bias=bias),
        thinking=ThinkingBudget(open=OPEN, close=CLOSE, max_tokens=0),
    )
    assert answers(engine(), ask)["t", 0].tokens == (OPEN, CLOSE) * 3


def test_a_grammar_starts_after_the_thought() -> None:
    even = Even()
    tokens = thinking([1, OPEN], 5, grammar=even)
    assert any(token % 2 for token in tokens[:5])
    assert tokens[5] == CLOSE
    assert all(token % 2 == 0 and token < 500 for token in tokens[6:])
    assert even.asked == [tokens[6:end] for end in range(6, 12)]


def test_an_answer_whose_grammar_is_still_to_come_does_not_end_in_its_thought() -> None:
    first = thinking([1, OPEN], 3)[0]
    end = frozenset({first, 10_000})  # one that the vocabulary does not have
    assert thinking([1, OPEN], 3, end_tokens=end) == (first,)
    tokens = thinking([1, OPEN], 3, grammar=Even(), end_tokens=end)
    assert first not in tokens[:3] and tokens[3] == CLOSE and len(tokens) > 4


def test_a_grammar_that_allows_nothing_ends_the_request_with_a_sentence() -> None:
    class Nothing(Grammar):
        def allowed(self, tokens: Sequence[int]) -> Tensor:
            return torch.zeros(600, dtype=torch.bool)

    ask = Request(id="g", sample=words(5), sampling=GREEDY, grammar=Nothing())
    said = answers(engine(), ask)["g", 0]
    assert (said.finish, said.error) == ("error", "the grammar allows no token here; the answer cannot go on.")


# ---- pictures and films


def test_a_picture_that_was_seen_is_not_encoded_again_within_the_bound() -> None:
    ask = Request(id="a", sample=shown(1, before=2), sampling=GREEDY, media_keys=(b"cat",))
    e = engine(prefix_cache=False)
    first = answers(e, ask)
    second = answers(e, replace(ask, sample=replace(ask.sample)))
    assert first == second
    assert (e.stats().encoder_asked, e.stats().encoder_found) == (2, 1)
    assert e.stats().encoder_bytes == 6 * 256 * 4 * 4  # tokens, width, merger and three levels, bytes
    small = engine(prefix_cache=False, encoder_cache_gib=1e-9)
    answers(small, ask)
    answers(small, ask)
    assert (small.stats().encoder_found, small.stats().encoder_bytes) == (0, 0)


def test_a_film_is_encoded_slice_after_slice_as_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    film = shown(4, grids=((4, 4),) * 12, id=VIDEO)
    ask = Request(id="a", sample=film, sampling=GREEDY, media_keys=(b"film",))
    expected = alone(ask)
    monkeypatch.setattr("qvl.engine.encoder.GROUP_PATCHES", 40)
    e = engine(mode="exact", max_step_tokens=9)
    e.submit(ask)
    tokens, most = [], 0
    while e.has_work:
        tokens += [x.draw.token for x in e.step() if x.draw]
        most = max([most, *(len(task.prompt.visuals.held) for task in e._tasks.values())])
    assert e.stats().encoder_asked == 6  # two slices of 16 patches at once
    assert most == 1
    assert tuple(tokens) == expected["a", 0].tokens


def test_media_keys_speak_of_whole_visuals() -> None:
    def rows(id: int, grids: Sequence[tuple[int, int]], keys: int, given: tuple[int, ...] = ()) -> tuple[int, ...]:
        own = tuple(bytes([i]) for i in range(keys))
        ask = Request(id="a", sample=shown(1, grids=grids, id=id), sampling=GREEDY, media_keys=own, media_rows=given)
        return rows_of_visuals(ask, model().config)

    assert rows(IMAGE, ((4, 4), (4, 4)), 2) == (1, 1)
    assert rows(VIDEO, ((4, 4),) * 3, 1) == (3,)
    assert rows(VIDEO, ((4, 4), (4, 4), (4, 8)), 2) == (2, 1)
    assert rows(VIDEO, ((4, 4),) * 4, 2, given=(1, 3)) == (1, 3)
    with pytest.raises(ValueError, match="2 media keys came for 4 grids; give media_rows"):
        rows(VIDEO, ((4, 4),) * 4, 2)
