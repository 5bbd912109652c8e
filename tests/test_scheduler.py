"""The scheduler and its blocks, without a model: nothing is lost, nobody waits for ever, whatever comes in whatever order."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from qvl.engine.blocks import BlockManager
from qvl.engine.scheduler import Chunk, QueueFull, Scheduler
from qvl.engine.sequence import Sequence, Span, name_of_block


class Pool:
    """A free list with nothing behind it."""

    def __init__(self, num_blocks: int) -> None:
        self.free = list(range(num_blocks))

    def take(self, count: int) -> tuple[int, ...]:
        return tuple(self.free.pop() for _ in range(count))

    def give_back(self, blocks: list[int]) -> None:
        assert not set(blocks) & set(self.free) and len(set(blocks)) == len(blocks)
        self.free.extend(blocks)


def manager(num_blocks: int = 8, block_size: int = 4, reuse: bool = True) -> BlockManager:
    return BlockManager(Pool(num_blocks), block_size=block_size, reuse=reuse)


def scheduler(blocks: BlockManager, *, running: int = 8, queue: int = 8, tokens: int = 16) -> Scheduler:
    return Scheduler(blocks, max_running=running, max_queue=queue, max_step_tokens=tokens)


def sequence(number: int, num_prompt: int, max_answer: int = 4, *, first: int = 0, **more: object) -> Sequence:
    tokens = list(range(first, first + num_prompt))
    settings = dict(request=str(number), number=number, tokens=tokens, num_prompt=num_prompt)
    return Sequence(**settings, max_length=num_prompt + max_answer, **more)  # type: ignore[arg-type]


def plan(chunks: list[Chunk]) -> list[tuple[str, int, int]]:
    return [(c.sequence.request, c.start, c.count) for c in chunks]


def step(s: Scheduler, token: int = 7) -> list[tuple[str, int, int]]:
    """What goes through the model; each sequence that can draw gets a token, and ends where it is full."""
    chunks = s.schedule()
    shown = plan(chunks)
    s.computed(chunks)
    for own in [c.sequence for c in chunks if c.is_last]:
        own.tokens.append(token)
        if len(own.tokens) == own.max_length:
            s.remove(own)
    return shown


# ---- blocks


def test_a_block_is_free_again_when_its_last_holder_lets_go() -> None:
    blocks = manager(4)
    mine = blocks.take(3)
    assert mine is not None
    blocks.hold(mine[:2])
    blocks.let_go(mine)
    assert blocks.num_available == 2
    blocks.let_go(mine[:2])
    assert blocks.num_available == 4
    with pytest.raises(AssertionError, match="came back twice"):
        blocks.let_go(mine[:1])


def test_more_blocks_than_there_are_is_none_and_takes_nothing() -> None:
    blocks = manager(4)
    assert blocks.take(5) is None
    assert blocks.num_available == 4


def test_a_named_block_is_found_until_it_is_needed_and_the_longest_unused_goes_first() -> None:
    blocks = manager(4)
    for name in (b"a", b"b"):
        [block] = blocks.take(1) or []
        blocks.name(block, name)
        blocks.let_go([block])
    assert len(blocks.find([b"a", b"b", b"c"])) == 2
    blocks.hold(blocks.find([b"a"]))
    blocks.let_go(blocks.find([b"a"]))  # used just now
    assert blocks.take(3) is not None  # two were free, the third is b's
    assert blocks.find([b"b"]) == []
    assert len(blocks.find([b"a"])) == 1


def test_of_two_blocks_with_the_same_content_the_first_keeps_the_name() -> None:
    blocks = manager(4)
    first, second = blocks.take(2) or []
    blocks.name(first, b"a")
    blocks.name(second, b"a")
    blocks.let_go([second])
    assert blocks.find([b"a"]) == [first]
    assert len(blocks.pool.free) == 3


def test_forgotten_blocks_are_found_by_nobody() -> None:
    blocks = manager(4)
    mine = blocks.take(1) or []
    blocks.name(mine[0], b"a")
    blocks.forget(mine)
    blocks.let_go(mine)
    assert blocks.find([b"a"]) == []
    assert len(blocks.pool.free) == 4


# ---- names


def test_a_blocks_name_covers_tokens_what_is_seen_the_blocks_before_and_the_salt() -> None:
    def names(salt: str = "", key: bytes = b"cat", first: int = 0) -> list[bytes]:
        own = sequence(0, 12, first=first, salt=salt, spans=(Span(5, 7, key),))
        own.name_blocks(4, prompt_only=False)
        return own.names

    plain = names()
    assert len(set(plain)) == 3
    assert names() == plain
    assert [a == b for a, b in zip(names(key=b"dog"), plain, strict=True)] == [True, False, False]
    assert not set(names(salt="other")) & set(plain)
    assert not set(names(first=1)) & set(plain)
    assert name_of_block(b"", [1], [b"ab"]) != name_of_block(b"", [1], [b"a", b"b"])


def test_names_stop_at_a_visual_that_has_none_and_where_the_prompt_ends_if_asked() -> None:
    own = sequence(0, 16, spans=(Span(9, 11, None),))
    own.name_blocks(4, prompt_only=False)
    assert len(own.names) == 2
    own = sequence(0, 10)
    own.tokens += [1] * 10
    own.name_blocks(4, prompt_only=True)
    assert len(own.names) == 2
    own.name_blocks(4, prompt_only=False)
    assert len(own.names) == 5


# ---- steps


def test_answers_go_on_while_a_long_prompt_is_read_in_chunks() -> None:
    s = scheduler(manager(20), tokens=4)
    s.add(sequence(0, 3))
    assert step(s) == [("0", 0, 3)]
    s.add(sequence(1, 9))
    assert step(s) == [("0", 3, 1), ("1", 0, 3)]
    assert step(s) == [("0", 4, 1), ("1", 3, 3)]
    assert step(s) == [("0", 5, 1), ("1", 6, 3)]
    assert step(s) == [("1", 9, 1)]


def test_prompts_are_read_on_even_where_answers_fill_the_step() -> None:
    s = scheduler(manager(40), tokens=2)
    for number in range(3):
        s.add(sequence(number, 1, max_answer=9))
    for _ in range(3):
        step(s)
    assert step(s) == [("0", 3, 1), ("1", 3, 1), ("2", 2, 1)]
    s.add(sequence(3, 5))
    assert step(s)[-1] == ("3", 0, 1)


def test_the_youngest_makes_room_and_is_computed_anew_with_its_answer() -> None:
    s = scheduler(manager(4, reuse=False), tokens=64)
    young = sequence(1, 4, max_answer=3)
    s.add(sequence(0, 7, max_answer=6))
    s.add(young)
    assert step(s) == [("0", 0, 7), ("1", 0, 4)]
    assert step(s) == [("0", 7, 1), ("1", 4, 1)]  # now each holds two of the four blocks
    assert step(s) == [("0", 8, 1)]
    assert s.num_preemptions == 1
    assert young.blocks == []
    while s.running:
        assert step(s)[0][0] == "0"
    assert step(s) == [("1", 0, 6)]


def test_a_prompt_is_not_taken_up_where_it_would_be_pushed_out_at_once() -> None:
    s = scheduler(manager(4, reuse=False), tokens=64)
    s.add(sequence(0, 8, max_answer=6))
    s.add(sequence(1, 8, max_answer=3))
    assert step(s) == [("0", 0, 8)]  # two blocks are left, and 0 wants one of them next


def test_a_preempted_answer_goes_before_all_who_came_later() -> None:
    s = scheduler(manager(4, reuse=False), tokens=64)
    first, second = sequence(0, 4, max_answer=13), sequence(1, 4, max_answer=5)
    s.add(first)
    step(s)
    s.add(second)
    s.add(sequence(2, 1))
    while second.num_computed == 0 and s.running:
        step(s)
    assert second.was_running and s.waiting[0].number == 2


def test_a_prompt_that_was_seen_is_found_but_for_its_last_token() -> None:
    s = scheduler(manager(20), tokens=64)
    s.add(sequence(0, 8, max_answer=1))
    assert step(s) == [("0", 0, 8)]
    again = sequence(1, 8, max_answer=1)
    s.add(again)
    assert step(s) == [("1", 4, 4)]  # token 7 must go through the model, and blocks are found whole
    assert again.num_found == 4
    longer = sequence(2, 11, max_answer=1)
    s.add(longer)
    assert step(s) == [("2", 8, 3)]
    assert (s.num_asked_tokens, s.num_found_tokens) == (27, 12)


def test_a_hit_never_ends_inside_a_visual() -> None:
    def show(number: int, tail: int) -> Sequence:
        own = sequence(number, 14, spans=(Span(2, 4, b"a"), Span(5, 11, b"b")), max_answer=1)
        own.tokens[12:] = [tail, tail]
        return own

    s = scheduler(manager(20), tokens=64)
    s.add(show(0, 90))
    step(s)
    s.add(show(1, 91))
    assert step(s) == [("1", 12, 2)]
    # Only 8 tokens are known: that end cuts the second picture, the one at 4 cuts none.
    short = sequence(2, 9, spans=(Span(2, 4, b"a"), Span(5, 9, b"b")), max_answer=1)
    s.add(short)
    assert step(s) == [("2", 4, 5)]


def test_two_salts_share_nothing() -> None:
    s = scheduler(manager(20), tokens=64)
    for number, salt in enumerate(("one", "two", "one")):
        s.add(sequence(number, 9, max_answer=1, salt=salt))
        step(s)
    assert s.num_found_tokens == 8


def test_answers_to_one_prompt_share_its_full_blocks_and_copy_the_last() -> None:
    blocks = manager(8)
    s = scheduler(blocks)
    parent = sequence(0, 6)
    s.add(parent)
    s.computed(s.schedule())
    child = parent.fork(1)
    copied = s.fork(parent, child)
    assert child.blocks[0] == parent.blocks[0]
    assert copied == (parent.blocks[1], child.blocks[1])
    assert blocks.num_available == 8 - 3
    s.remove(parent)
    assert blocks.num_available == 8 - 2
    s.remove(child)
    assert blocks.num_available == 8


def test_an_answer_without_room_beside_the_first_waits() -> None:
    s = scheduler(manager(8), running=1)
    parent = sequence(0, 6)
    s.add(parent)
    s.computed(s.schedule())
    child = parent.fork(1)
    assert s.fork(parent, child) is None
    assert s.waiting == [child]
    assert s.num_queued == 0  # it keeps no new request out


def test_what_can_never_fit_and_what_finds_the_queue_full_is_refused_in_a_sentence() -> None:
    s = scheduler(manager(4), queue=2)
    with pytest.raises(
        ValueError, match=r"needs a cache of 18 tokens \(14 of prompt, up to 4 of answer\), and all .* holds 16"
    ):
        s.add(sequence(0, 14))
    s.add(sequence(0, 13))  # the last token is drawn and never read
    s.add(sequence(1, 3))
    with pytest.raises(QueueFull, match="2 requests wait already; try again later"):
        s.add(sequence(2, 3))
    step(s)
    s.add(sequence(2, 3))


# ---- everything at once


class Machine(RuleBasedStateMachine):
    """Requests of all sizes come, answer, branch, fail and go, in a cache that is nearly always too small."""

    @initialize(
        num_blocks=st.integers(4, 12),
        block_size=st.sampled_from([1, 2, 4]),
        reuse=st.booleans(),
        running=st.integers(1, 6),
        tokens=st.integers(1, 12),
    )
    def start(self, num_blocks: int, block_size: int, reuse: bool, running: int, tokens: int) -> None:
        self.blocks = manager(num_blocks, block_size, reuse)
        self.s = scheduler(self.blocks, running=running, queue=5, tokens=tokens)
        self.arrived = 0
        self.branching: dict[Sequence, int] = {}

    @property
    def all(self) -> list[Sequence]:
        return [*self.s.running, *self.s.waiting]

    @rule(
        num_prompt=st.integers(1, 30),
        max_answer=st.integers(1, 12),
        kind=st.integers(0, 1),
        span=st.tuples(st.integers(0, 20), st.integers(1, 8)),
        n=st.integers(1, 3),
    )
    def come(self, num_prompt: int, max_answer: int, kind: int, span: tuple[int, int], n: int) -> None:
        spans = (Span(span[0], span[0] + span[1], b"x"),) if sum(span) <= num_prompt and kind else ()
        own = sequence(self.arrived, num_prompt, max_answer, spans=spans)
        fits = -(-(own.max_length - 1) // self.blocks.block_size) <= self.blocks.num_blocks
        is_full = self.s.num_queued >= 5
        try:
            self.s.add(own)
        except QueueFull:
            assert fits and is_full
        except ValueError:
            assert not fits
        else:
            assert fits and not is_full
            self.arrived += 1
            self.branching[own] = n

    @precondition(lambda self: self.all)
    @rule(at=st.integers(0, 99), is_broken=st.booleans())
    def cancel(self, at: int, is_broken: bool) -> None:
        own = self.all[at % len(self.all)]
        self.s.remove(own, is_broken=is_broken)
        assert own.blocks == []

    @rule(ends=st.booleans())
    def go(self, ends: bool) -> None:
        self.step(ends)

    def step(self, ends: bool) -> list[Chunk]:
        oldest = min(self.s.running, key=lambda q: q.order) if self.s.running else None
        had = bool(self.all)
        chunks = self.s.schedule()
        assert bool(chunks) == had  # whoever is there, somebody gets on
        if oldest is not None:
            assert any(c.sequence is oldest for c in chunks)  # the oldest always does
        assert len(self.s.running) <= self.s.max_running
        assert len({c.sequence for c in chunks}) == len(chunks)
        answering = sum(c.count == 1 for c in chunks)
        assert sum(c.count for c in chunks) <= max(self.s.max_step_tokens, answering + 1)
        for c in chunks:
            assert c.start == c.sequence.num_computed and c.count >= 1
            assert len(c.sequence.blocks) * self.blocks.block_size >= c.start + c.count
            if not c.sequence.num_computed:
                continue
            for span in c.sequence.spans:  # nobody begins inside a visual that he did not begin himself
                assert not (span.start < c.sequence.num_found < span.end)
        # A block that is written to in this step is in one hand.
        for c in chunks:
            for i in range(c.start // self.blocks.block_size, -(-(c.start + c.count) // self.blocks.block_size)):
                assert self.blocks.holders[c.sequence.blocks[i]] == 1
        self.s.computed(chunks)
        for c in chunks:
            if c.is_last:
                self.draw(c.sequence, ends)
        return chunks

    def draw(self, own: Sequence, ends: bool) -> None:
        for index in range(1, self.branching.pop(own, 1)):
            child = own.fork(index)
            self.s.fork(own, child)
            child.tokens.append(50 + index)
            self.end(child, ends)
        own.tokens.append(50)
        self.end(own, ends)

    def end(self, own: Sequence, ends: bool) -> None:
        if len(own.tokens) >= own.max_length or (ends and len(own.tokens) % 3 == 0):
            self.s.remove(own)

    @invariant()
    def no_block_is_lost_or_in_two_places(self) -> None:
        if not hasattr(self, "blocks"):
            return
        held = [b for q in self.all for b in q.blocks]
        assert {b: held.count(b) for b in set(held)} == self.blocks.holders
        everywhere = [*self.blocks.pool.free, *self.blocks.idle, *self.blocks.holders]
        assert sorted(everywhere) == list(range(self.blocks.num_blocks))
        assert {b: n for n, b in self.blocks.block_of.items()} == self.blocks.name_of
        assert set(self.blocks.idle) <= set(self.blocks.name_of)
        for q in self.all:  # whoever holds a named block has the content that the name says
            own = zip(q.blocks, q.names, strict=False)
            assert all(self.blocks.name_of.get(block, name) == name for block, name in own)
        assert all(not q.blocks and q.num_computed == 0 for q in self.s.waiting)
        assert [q.order for q in self.s.waiting] == sorted(q.order for q in self.s.waiting)

    def teardown(self) -> None:
        """Whatever state it is in, all comes to its end in a bounded number of steps, and every block is free."""
        if not hasattr(self, "blocks"):
            return
        # The oldest gets on in every step; at worst each is computed anew once for each token of those before it.
        bound = sum(2 * q.max_length for q in self.all) * 3 + 10
        bound *= 1 + max((q.max_length for q in self.all), default=0)
        steps = 0
        while self.all:
            self.step(False)
            self.no_block_is_lost_or_in_two_places()
            steps += 1
            assert steps <= bound
        assert self.blocks.num_available == self.blocks.num_blocks


Machine.TestCase.settings = settings(max_examples=80, stateful_step_count=30, deadline=None, derandomize=True)
test_any_schedule_loses_no_block_and_starves_nobody = Machine.TestCase


@pytest.mark.slow
def test_a_thousand_schedules() -> None:
    run_state_machine_as_test(
        Machine, settings=settings(max_examples=1000, stateful_step_count=50, deadline=None, derandomize=True)
    )
