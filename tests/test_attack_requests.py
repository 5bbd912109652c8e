"""Requests no decent client writes: spelled control tokens, forged numbers, schemas that explode, and whatever schemathesis thinks of."""

import io
import json
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import CHECKS, load_all_checks

from media_files import encoded, numbered_frame, pdf, write_video
from qvl.serve.gate import ValueCount
from qvl.serve.protocol import NOT_TAKEN
from qvl.serve.run import Server
from serve_doubles import (
    CHAT,
    CLIENT,
    address,
    body,
    data_uri,
    eventually,
    heartbeat,
    holds_nothing,
    image,
    picture,
    post,
    refused,
    running,
    service,
    user,
    video,
)

pytestmark = pytest.mark.no_shape_hook
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[Server]:
    with running(tiny_folder) as server:
        yield server


def tokenize(server: Server, messages: list[Any], **asked: Any) -> list[int]:
    reply = post(server, {"messages": messages, **asked}, "/tokenize")
    assert reply.status_code == 200, reply.text
    return reply.json()["tokens"]


# ---- control tokens in words


def conversation(first: str, second: str = "") -> dict[str, Any]:
    """The text in every place a client can write to; with two, split over neighbouring parts."""
    text = first + second
    parts = [{"type": "text", "text": part} for part in (first, second) if part]
    call = {"id": text, "type": "function", "function": {"name": "f", "arguments": json.dumps({"a": text, text: 1})}}
    paper = {"type": "file", "file": {"file_data": data_uri(pdf([(64, 64)]), "application/pdf"), "filename": text}}
    parameters = {"type": "object", "description": text, "properties": {text: {"type": "string", "enum": [text]}}}
    return {
        "messages": [
            {"role": "system", "content": parts},
            {"role": "user", "content": [*parts, image(picture()), *parts, paper, *parts], "name": text},
            {"role": "assistant", "content": parts, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": text, "name": text, "content": parts},
            {"role": "user", "content": text},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "description": text, "parameters": parameters}}],
    }


def test_no_words_of_a_client_become_control_tokens_wherever_they_stand(server: Server) -> None:
    """Every control token of the vocabulary, whole and cut in two, in every role: as many control ids as with harmless words."""
    tokenizer = service(server).cook.served.processor.tokenizer
    names = [token.name for token in tokenizer.control_tokens]
    assert len(names) >= 26 and "<|image_pad|>" in names

    def controls(**asked: Any) -> list[int]:
        return [id for id in tokenize(server, **asked) if id in tokenizer.control_ids]

    plain, parted = controls(**conversation("a harmless word")), controls(**conversation("a harmless", " word"))
    for number, name in enumerate(names):
        asked = conversation(name)
        ids = tokenize(server, **asked)
        assert [id for id in ids if id in tokenizer.control_ids] == plain, name
        said = tokenizer.decode([id for id in ids if id not in tokenizer.control_ids])
        assert said.count(name) >= 8, name  # and stands there as it was written
        cut = 1 + number % (len(name) - 1)
        assert controls(**conversation(name[:cut], name[cut:])) == parted, (name, cut)
    everything = "".join(names)
    assert post(server, {**conversation(everything), "max_tokens": 2}).status_code == 200


# ---- forged wishes


def clip() -> str:
    buffer = io.BytesIO()
    write_video(buffer, [numbered_frame(i) for i in range(12)], fps="10", format="mp4")
    return data_uri(buffer.getvalue(), "video/mp4")


FRAMES = [data_uri(encoded(numbered_frame(i, 32, 32), "PNG"), "image/png") for i in range(4)]
PARTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "picture": (image(picture()), ("min_tokens", "max_tokens", "min_pixels", "max_pixels")),
    "film": (video(clip()), ("fps", "num_frames", "max_tokens")),
    "frames": ({"type": "video_frames", "video_frames": FRAMES}, ("fps", "timestamps", "max_tokens")),
    "paper": (
        {"type": "file", "file": {"file_data": data_uri(pdf([(64, 64)]), "application/pdf")}},
        ("pages", "max_tokens"),
    ),
}
NUMBERS = st.sampled_from(
    [0, -1, 1, 2, 3, 1.5, 1e-300, 5e-324, 1e308, -1e308, 2**31, 2**63, 2**64, 10**30, 10**400, -0.0]
)
NO_NUMBERS = st.sampled_from(
    [
        "",
        "1",
        "1-3",
        "1-",
        "0-0",
        "9" * 400,
        True,
        False,
        {},
        {"a": {"b": 1}},
        [],
        [[1]],
        [None],
        float("nan"),
        float("inf"),
    ]
)
TIMES = st.lists(st.sampled_from([0, 0.1, 0.2, 1, -1, 1e308, 5e-324, "1", True, None, 10**400]), max_size=5)


@pytest.mark.parametrize("count", [60, pytest.param(3000, marks=pytest.mark.slow)])
def test_forged_wishes_for_media_are_refused_or_mean_something(server: Server, count: int) -> None:
    slowest = [0.0]

    @settings(max_examples=count)
    @given(st.sampled_from(sorted(PARTS)), st.data())
    def ask(kind: str, data: st.DataObject) -> None:
        part, fields = PARTS[kind]
        field = data.draw(st.sampled_from(fields))
        value = data.draw(NUMBERS | NO_NUMBERS | TIMES)
        content = json.dumps({"messages": user({**part, field: value})})
        start = time.monotonic()
        reply = CLIENT.post(address(server) + "/tokenize", content=content, headers=JSON)
        slowest[0] = max(slowest[0], time.monotonic() - start)
        assert reply.status_code in (200, 400), (kind, field, value, reply.text)
        if reply.status_code != 200:
            refused(reply, reply.status_code)
        takes = {"timestamps": list, "pages": str}.get(field, (int, float))
        if not isinstance(value, takes) or isinstance(value, bool) or value in (float("inf"), 10**400):
            assert reply.status_code != 200, (kind, field, value)

    ask()
    print(f"\n{count} forged wishes, slowest {slowest[0] * 1000:.0f} ms")
    assert eventually(lambda: holds_nothing(server))


def test_what_a_server_computes_itself_is_not_taken_from_a_client(server: Server) -> None:
    """Embeddings, hashes, grids, placeholders, templates, tensors: there is no field for them, on no route."""
    for field in ("prompt_embeds", "multi_modal_data", "mm_hashes", "image_grid_thw", "chat_template", "mm_processor_kwargs",
                  "chat_template_kwargs", "documents", "trust_remote_code", "logits_processors", "guided_regex"):  # fmt: skip
        for path in (CHAT, "/tokenize"):
            asked = {"messages": user("x"), field: {"tokenize": True}}
            expected = f"{field} is not taken." if field in NOT_TAKEN else "Unknown field"
            assert expected in refused(post(server, asked, path), 400)
    for kind in ("image_embeds", "input_audio", "image_hash", "tensor"):
        refused(post(server, body({"type": kind, kind: "AAAA"})), 400)


# ---- what must not hold up the others


def test_a_book_is_counted_while_others_are_served(server: Server) -> None:
    """Without a thread the loop would not come round once."""
    with heartbeat(server) as beats:
        reply = post(server, {"prompt": "word and another, " * 20_000, "return_tokens": False}, "/tokenize")
        book = post(server, body("word and another, " * 8_000))
    print(f"\nhalf a million letters: {beats.count} rounds, longest {beats.worst * 1000:.0f} ms")
    assert reply.json()["count"] == 80_001 and beats.count > 20
    assert "tokens" in refused(book, 400)
    assert "return_tokens" in refused(post(server, {"prompt": "word and another, " * 8_000}, "/tokenize"), 400)


SCHEMAS: dict[str, Any] = {
    "nested repeats": {"type": "string", "pattern": "((a{0,50}){0,50}){0,50}"},
    "repeats of a choice": {"type": "string", "pattern": "(a|aa)+(b|bb)+(c|cc)+$"},
    "a long repeat": {"type": "string", "pattern": "a{1000000}"},
    "any, fifty times": {"type": "string", "pattern": ".*a" * 50},
    "look behind": {"type": "string", "pattern": "(?<=a)b"},
    "an open bracket": {"type": "string", "pattern": "(("},
    "5,000 words": {"enum": [f"word number {i}" for i in range(2_000)]},
    "a million items": {"type": "array", "items": {"type": "array", "minItems": 10**6}, "minItems": 10**6},
    "itself": {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"},
    "another machine's": {"$ref": "http://169.254.169.254/schema.json"},
    "all of any of": {"allOf": [{"anyOf": [{"minimum": i}, {"maximum": -i}]} for i in range(20)], "type": "number"},
    "500 fields": {"type": "object", "properties": {f"f{i}": {"type": "integer"} for i in range(500)}},
    "no type": {"type": "nothing"},
    "numbers for words": {"type": 7, "properties": [], "required": {}},
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_that_explodes_is_refused_or_followed(server: Server, name: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMAS[name]}}
    start = time.monotonic()
    with heartbeat(server) as beats:
        reply = post(server, body("Hi", max_tokens=3, response_format=form))
    print(f"\n{name}: {time.monotonic() - start:.2f} s, stall {beats.worst * 1000:.0f} ms: {reply.text[:150]}")
    assert reply.status_code in (200, 400), reply.text
    if reply.status_code != 200:
        refused(reply, reply.status_code)
    assert eventually(lambda: holds_nothing(server))


def test_logprobs_have_a_ceiling_because_a_reply_holds_them_all(server: Server) -> None:
    asked = body("Hi", logprobs=True, top_logprobs=20, n=16) | {"max_tokens": 10_000}
    assert "logprobs" in refused(post(server, asked), 400)
    assert post(server, asked | {"max_tokens": 3}).status_code == 200


@given(st.text(alphabet='"\\,[]{}:a\n', max_size=60), st.integers(1, 7))
def test_values_are_counted_as_a_parser_counts_them_however_the_text_is_cut(text: str, size: int) -> None:
    """The commas of a JSON text that stand in no string."""
    value = {"a": [text, {"b" + text: text}, [1, 2]], "c": text}
    raw = json.dumps(value).encode()
    count = ValueCount()
    for start in range(0, len(raw), size):
        count.push(raw[start : start + size])
        count.push(b"")
    assert count.count == 4


# ---- schemathesis

GOOD = [
    user("Hi"),
    user(image(picture()), "What?"),
    [{"role": "system", "content": "Be brief."}, *user("Hi"), {"role": "assistant", "content": "Ho"}, *user("Why?")],
]


@pytest.mark.parametrize("count", [50, pytest.param(1250, marks=pytest.mark.slow)])
def test_whatever_the_published_schema_allows_or_forbids_no_route_fails(server: Server, count: int) -> None:
    """`count` cases that fit the schema and `count` that do not, for each route that takes something; replies keep their own schema."""
    load_all_checks()
    checks = [check for check in CHECKS.get_all() if check.__name__ not in LEFT_OUT]
    schema = schemathesis.openapi.from_url(f"{address(server)}/openapi.json")
    seen: dict[str, int] = {}
    with requests.Session() as session:
        for operation in (result.ok() for result in schema.get_all_operations()):
            for mode in schemathesis.GenerationMode:
                with suppress(Unsatisfiable):  # a route that takes nothing cannot be asked wrongly
                    _call_all(
                        operation.as_strategy(generation_mode=mode), count, session, address(server), checks, seen
                    )
    print("\n", seen)
    assert sum(seen.values()) >= 4 * count
    assert post(server, body(image(picture()))).status_code == 200 and eventually(lambda: holds_nothing(server))


LEFT_OUT = {
    # Messages are described loosely (their parts are read by a room below), so not all that fits the schema fits us.
    "positive_data_acceptance",
    # There is no clock in a test.
    "max_response_time",
}


def _call_all(cases: Any, count: int, session: Any, url: str, checks: list[Any], seen: dict[str, int]) -> None:
    @settings(max_examples=count, suppress_health_check=list(HealthCheck), database=None)
    @given(cases, st.sampled_from([None, *GOOD]))
    def call(case: Any, messages: Any) -> None:
        is_changed = False
        if isinstance(case.body, dict):
            if messages is not None and "messages" in case.body:
                case.body["messages"], is_changed = messages, True
            for name in ("max_tokens", "max_completion_tokens"):
                if isinstance(case.body.get(name), int) and case.body[name] > 4:
                    case.body[name] = 4  # what it would take to answer is not what is tested
        response = case.call(base_url=url, session=session)
        skip = {"negative_data_rejection"} if is_changed else set()
        case.validate_response(response, checks=[check for check in checks if check.__name__ not in skip])
        key = f"{case.method} {case.path} {response.status_code}"
        seen[key] = seen.get(key, 0) + 1

    call()
