"""A stream says what the whole reply says, however the answer was cut into tokens and by stop strings."""

import asyncio
import re
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from qvl.core.batch import Sample
from qvl.engine.request import Event, Request
from qvl.engine.sampling import Draw, Sampling
from qvl.engine.text import TextOutput
from qvl.prompt.answer import MARKS
from qvl.prompt.processor import Processor
from qvl.prompt.template import Style
from qvl.serve.chat import Prepared, Served
from qvl.serve.metrics import Metrics, Watch
from qvl.serve.protocol import ChatRequest
from qvl.serve.reply import Reply
from real_tokenizer import real_tokenizer, real_tokenizer_folder

TOKENIZER = real_tokenizer()
METRICS = Metrics(["tiny"])
END = TOKENIZER.control_id("<|im_end|>")
BYTES = {TOKENIZER.token_bytes(id): id for id in range(256)}
IDS = {mark: TOKENIZER.control_id(mark) for mark in MARKS}
PIECES = [
    *MARKS,
    *("\n", "\n\n", " ", "hello", "grün", "👩\u200d🚀", "é", "</think", "<tool_call", "\\", '"', "<|im_end|>"),
    '{"name": "f", "arguments": {"a": "}{\\"ü🚀"}}',
    '\n{"name": "g", "arguments": {"x": [1, {"b": 2}]}}\n',
    '{"arguments": {}, "name": "h"}',
]


def test_every_byte_is_a_token() -> None:
    assert sorted(BYTES) == [bytes([i]) for i in range(256)]


def tokens_of(pieces: Sequence[str], cuts: Sequence[int]) -> list[int]:
    """The pieces as tokens a model may as well have drawn: cut after every so many bytes, marks of letters and of one token apart."""
    tokens, number = [], 0
    for piece in pieces:
        if piece in IDS:
            tokens.append(IDS[piece])
            continue
        data = piece.encode()
        while data:
            part, data = data[: cuts[number % len(cuts)]], data[cuts[number % len(cuts)] :]
            number += 1
            text = part.decode(errors="ignore")
            whole = text.encode() == part
            tokens += TOKENIZER.encode_text(text) if whole else [BYTES[bytes([byte])] for byte in part]
    return tokens


def events_of(index: int, tokens: Iterable[int], stop: tuple[str, ...], ends: bool) -> list[Event]:
    """What the engine makes of these tokens."""
    output, events = TextOutput(stop, TOKENIZER.stream()), []

    def event(token: int, text: str, finish: Any) -> Event:
        draw = Draw(token, -0.5 - len(events), ())
        return Event(request="a", index=index, draw=draw, text=text, finish=finish, num_cached_tokens=0)

    for token in tokens:
        text = output.push(token)
        events.append(event(token, text, "stop" if output.is_stopped else None))
        if output.is_stopped:
            return events
    if ends:
        return [*events, event(END, output.end(), "stop")]
    if events:
        events[-1] = replace(events[-1], text=events[-1].text + output.end(), finish="length")
    return events


@cache
def processor(style: Style) -> Processor:
    return Processor.from_folder(real_tokenizer_folder(), template=style)


def reply_to(style: Style, n: int, tools: bool) -> Reply:
    served = Served(
        names=("tiny",),
        processor=processor(style),
        sampling=Sampling(),
        end_tokens=frozenset({END}),
        thinking=None,
        max_context=1000,
        vocab_size=151936,
    )
    request = Request(
        id="a",
        sample=Sample(token_T=torch.zeros(1, dtype=torch.int64)),
        sampling=Sampling(),
        end_tokens=frozenset({END}),
        n=n,
    )
    asked = ChatRequest(messages=[{"role": "user", "content": "x"}], logprobs=True, n=n)
    prepared = Prepared(asked=asked, model="tiny", request=request, media=(), media_seconds=0, reads_calls=tools)
    return Reply(prepared, served, Watch(METRICS, 0.0))


async def one_by_one(events: Iterable[Event]) -> AsyncIterator[Event]:
    for event in events:
        yield event


def whole(reply: Reply, events: Iterable[Event]) -> list[Any]:
    return asyncio.run(reply.whole(one_by_one(events)))["choices"]


def streamed(reply: Reply, events: Iterable[Event]) -> list[Any]:
    """The choices as a client joins them from the chunks."""

    async def joined() -> list[Any]:
        choices: dict[int, Any] = {}
        async for chunk in reply.chunks(one_by_one(events)):
            [piece] = chunk["choices"]
            own = choices.setdefault(
                piece["index"],
                {"index": piece["index"], "message": {"refusal": None}, "logprobs": {"content": [], "refusal": None}},
            )
            assert own.get("finish_reason") is None, "a chunk came after the last"
            message = own["message"]
            for name, value in piece["delta"].items():
                if name == "tool_calls":
                    [call] = value
                    calls = message.setdefault("tool_calls", [])
                    if call["index"] == len(calls):
                        calls.append(
                            {"id": call["id"], "type": call["type"], "function": {"name": "", "arguments": ""}}
                        )
                    for part, text in call["function"].items():
                        calls[call["index"]]["function"][part] += text
                elif name in ("content", "reasoning_content"):
                    message[name] = message.get(name, "") + value
                else:
                    message[name] = value
            own["logprobs"]["content"] += (piece["logprobs"] or {"content": []})["content"]
            own["finish_reason"] = piece["finish_reason"]
        for choice in choices.values():
            if choice["message"].get("tool_calls") and not choice["message"]["content"]:
                choice["message"]["content"] = None
        return [choices[index] for index in sorted(choices)]

    return asyncio.run(joined())


def without_ids(choices: list[Any]) -> str:
    """Calls have ids of chance."""
    return re.sub(r"'call_[0-9a-f]{24}'", "'call'", repr([sorted_deep(choice) for choice in choices]))


def sorted_deep(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: sorted_deep(value[key]) for key in sorted(value)}
    return [sorted_deep(item) for item in value] if isinstance(value, list) else value


@given(
    st.lists(st.lists(st.sampled_from(PIECES), min_size=1, max_size=8), min_size=1, max_size=3),
    st.lists(st.integers(1, 7), min_size=1, max_size=5),
    st.lists(st.sampled_from(["lo", "grün", "🚀", "</think>", "\n", '": ', "elephant"]), max_size=2, unique=True),
    st.sampled_from(["instruct", "thinking"]),
    st.booleans(),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_a_stream_joined_is_the_whole_reply(
    answers: list[list[str]], cuts: list[int], stop: list[str], style: Style, tools: bool, ends: bool, draw: Any
) -> None:
    waiting = [events_of(i, tokens_of(pieces, cuts), tuple(stop), ends) for i, pieces in enumerate(answers)]
    events = []
    while any(waiting):  # the answers of one request come in any order
        events.append(draw.choice([own for own in waiting if own]).pop(0))
    expected = whole(reply_to(style, len(answers), tools), events)
    assert without_ids(streamed(reply_to(style, len(answers), tools), events)) == without_ids(expected)


@given(
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=8),
    st.lists(st.integers(1, 7), min_size=1, max_size=5),
    st.sampled_from(["instruct", "thinking"]),
)
def test_how_a_text_was_cut_into_tokens_changes_no_message(pieces: list[str], cuts: list[int], style: Style) -> None:
    plain = whole(reply_to(style, 1, True), events_of(0, tokens_of(pieces, [1000]), (), True))
    cut = whole(reply_to(style, 1, True), events_of(0, tokens_of(pieces, cuts), (), True))
    for choice in (*plain, *cut):
        del choice["logprobs"]  # one a token
    assert without_ids(cut) == without_ids(plain)
