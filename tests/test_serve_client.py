"""What a client may ask for, each through the official openai client: the model's words are given, how it comes to them is left to it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import APIError, OpenAI

from media_files import numbered_frame, pdf, write_video
from qvl.engine.answer import Answer
from qvl.serve.run import Server
from serve_doubles import address, data_uri, picture, running, user
from tiny_checkpoint import tiny_checkpoint

ASKED: dict[str, Any] = {"model": "tiny", "temperature": 1.5, "max_tokens": 120}
Says = Callable[[str], None]


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[Server]:
    with running(tiny_folder) as server:
        yield server


@pytest.fixture(scope="module")
def thinking(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    del tiny_folder  # for its tokenizer, which is read once
    with running(tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny", "thinking")) as server:
        yield server


def client_of(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{address(server)}/v1", api_key="none", max_retries=0)


@pytest.fixture
def client(server: Server) -> OpenAI:
    return client_of(server)


@pytest.fixture
def says(server: Server, monkeypatch: pytest.MonkeyPatch) -> Says:
    """Whatever is asked, the model says what this grammar allows."""
    cook = server.config.app.state.service.cook  # type: ignore[union-attr]
    return lambda lark: monkeypatch.setattr(cook, "_grammar", lambda asked: cook.grammars._grammar("start: " + lark))


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def joined(stream: Any) -> dict[str, Any]:
    """What a client makes of the chunks of one answer: message, finish, how many pieces of arguments came, usage, extras."""
    found: dict[str, Any] = {
        "content": "",
        "reasoning_content": "",
        "calls": [],
        "pieces": 0,
        "extra": {},
        "usage": None,
    }
    for chunk in stream:
        found["usage"] = chunk.usage or found["usage"]
        found["extra"] |= chunk.model_extra or {}
        for choice in chunk.choices:
            delta = choice.delta
            found["content"] += delta.content or ""
            found["reasoning_content"] += (delta.model_extra or {}).get("reasoning_content", "")
            found["extra"] |= {k: v for k, v in (delta.model_extra or {}).items() if k != "reasoning_content"}
            for piece in delta.tool_calls or ():
                if piece.index == len(found["calls"]):
                    found["calls"].append([piece.function.name, ""])
                found["calls"][piece.index][1] += piece.function.arguments or ""
                found["pieces"] += bool(piece.function.arguments)
            found["finish"] = choice.finish_reason or found.get("finish")
    return found


# ---- words


TEXT = 'Grüße, 👩\u200d🚀! "a\\b"\n\tende\u0301'


def test_the_same_words_come_whole_and_streamed(client: OpenAI, says: Says) -> None:
    says(quoted(TEXT))
    reply = client.chat.completions.create(**ASKED, messages=user("Hello"))
    assert reply.choices[0].message.content == TEXT and reply.choices[0].finish_reason == "stop"
    found = joined(client.chat.completions.create(**ASKED, messages=user("Hello"), stream=True))
    assert (found["content"], found["finish"]) == (TEXT, "stop")


def test_a_stop_string_is_found_across_tokens(client: OpenAI, says: Says) -> None:
    says(quoted(TEXT))
    for stop, before in ((["!", "\u200d🚀! "], "Grüße, 👩\u200d🚀"), (["e, 👩\u200d🚀", "zz"], "Grüß")):
        asked: dict[str, Any] = {**ASKED, "messages": user("Hello"), "stop": stop}
        choice = client.chat.completions.create(**asked).choices[0]
        assert (choice.message.content, choice.finish_reason) == (before, "stop")
        assert joined(client.chat.completions.create(**asked, stream=True))["content"] == before


def test_answers_of_one_request_keep_apart_in_a_stream(client: OpenAI) -> None:
    asked: dict[str, Any] = {**ASKED, "messages": user("Tell."), "n": 3, "seed": 5, "max_tokens": 7}
    whole = [choice.message.content for choice in client.chat.completions.create(**asked).choices]
    parts = ["", "", ""]
    for chunk in client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            parts[choice.index] += choice.delta.content or ""
    assert parts == whole and len(set(parts)) == 3


# ---- tools


def tool(name: str, **properties: Any) -> Any:
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [tool("look", where={"type": "string", "maxLength": 8}), tool("wait", days={"type": "integer", "maximum": 9})]
ARGUMENTS = ['{"where": "Zürich 🚀 \\"}{\\"", "more": [1, {"b": null}]}', "{}"]


def call_of(name: str, arguments: str) -> str:
    """A call in the template's form, as a grammar."""
    body = '\n{"name": "' + name + '", "arguments": ' + arguments + "}\n"
    return f"<tool_call> {quoted(body)} </tool_call>"


def test_calls_come_piece_by_piece_and_are_those_of_the_whole_reply(client: OpenAI, says: Says) -> None:
    words = quoted("Let me see.\n")
    says(f'{words} {call_of("look", ARGUMENTS[0])} "\\n" {call_of("wait", ARGUMENTS[1])}')
    asked: dict[str, Any] = {**ASKED, "messages": user("Where?"), "tools": TOOLS, "max_tokens": 300}
    choice = client.chat.completions.create(**asked).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me see."
    calls = [[c.function.name, c.function.arguments] for c in choice.message.tool_calls or () if c.type == "function"]
    assert calls == [["look", ARGUMENTS[0]], ["wait", ARGUMENTS[1]]]
    found = joined(client.chat.completions.create(**asked, stream=True))
    assert (found["content"], found["calls"], found["finish"]) == ("Let me see.", calls, "tool_calls")
    assert found["pieces"] > 5  # long before they are whole


def test_tool_choice_none_makes_a_call_plain_words(client: OpenAI, says: Says) -> None:
    says(call_of("look", "{}"))
    asked: dict[str, Any] = {**ASKED, "messages": user("Where?"), "tools": TOOLS, "tool_choice": "none"}
    choice = client.chat.completions.create(**asked).choices[0]
    text = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (text, None, "stop")
    assert joined(client.chat.completions.create(**asked, stream=True))["content"] == text


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "wait"}}])
def test_a_call_can_be_demanded(client: OpenAI, choice: Any) -> None:
    asked: dict[str, Any] = {**ASKED, "messages": user("Where?"), "tools": TOOLS, "max_tokens": 300}
    for seed in range(2):
        found = joined(
            client.chat.completions.create(
                **asked, tool_choice=choice, parallel_tool_calls=False, seed=seed, stream=True
            )
        )
        [[name, arguments]] = found["calls"]
        assert name == "wait" or (choice == "required" and name == "look")
        assert json.loads(arguments).keys() == ({"days"} if name == "wait" else {"where"})
        assert (found["content"], found["finish"]) == ("", "tool_calls")


def test_a_demanded_calls_parameters_may_have_definitions_and_be_recursive(client: OpenAI) -> None:
    """As pydantic writes them: "#/$defs/..." and "#" mean the parameters, not the call around them."""
    day = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9}}, "required": ["n"]}
    parameters = {
        "type": "object",
        "properties": {"day": {"$ref": "#/$defs/Day"}, "then": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}},
        "required": ["day", "then"],
        "additionalProperties": False,
        "$defs": {"Day": {**day, "additionalProperties": False}},
    }
    wait: Any = {"type": "function", "function": {"name": "wait", "parameters": parameters}}
    asked: dict[str, Any] = {**ASKED, "messages": user("When?"), "tools": [wait], "max_tokens": 300}
    for seed in range(3):
        [[name, arguments]] = joined(
            client.chat.completions.create(
                **asked, tool_choice="required", parallel_tool_calls=False, seed=seed, stream=True
            )
        )["calls"]
        given = json.loads(arguments)
        assert name == "wait" and given.keys() == {"day", "then"} and given["day"].keys() == {"n"}
        assert given["then"] is None or given["then"].keys() == {"day", "then"}


def test_a_message_comes_back_as_it_was_given(client: OpenAI, says: Says) -> None:
    says(quoted('[{"point_2d": [250, 250], "label": "ear"}]'))
    talk: list[Any] = [*user(image(picture(64, 96)), "Where?")]
    asked: dict[str, Any] = {**ASKED, "max_tokens": 300, "extra_body": {"grounding": {}}}
    message = client.chat.completions.create(messages=talk, **asked).choices[0].message
    for again in (message, message.model_dump()):
        client.chat.completions.create(messages=[*talk, again, *user("Sure?")], **asked)  # type: ignore[list-item]


def test_one_call_is_given_where_no_parallel_ones_are_wanted(client: OpenAI, says: Says) -> None:
    says(f'{call_of("look", ARGUMENTS[0])} "\\n" {call_of("wait", ARGUMENTS[1])}')
    asked: dict[str, Any] = {**ASKED, "messages": user("Where?"), "tools": TOOLS, "max_tokens": 300}
    for wanted, count in ((True, 2), (False, 1)):
        message = client.chat.completions.create(**asked, parallel_tool_calls=wanted).choices[0].message
        assert len(message.tool_calls or ()) == count
        assert (
            len(joined(client.chat.completions.create(**asked, parallel_tool_calls=wanted, stream=True))["calls"])
            == count
        )


def test_a_call_that_cannot_be_read_stays_words_and_says_so(client: OpenAI, says: Says) -> None:
    says('<tool_call> "no JSON" </tool_call>')
    asked: dict[str, Any] = {**ASKED, "messages": user("Where?"), "tools": TOOLS}
    message = client.chat.completions.create(**asked).choices[0].message
    assert message.content == "<tool_call>no JSON</tool_call>" and not message.tool_calls
    assert message.model_extra is not None and len(message.model_extra["problems"]) == 1
    found = joined(client.chat.completions.create(**asked, stream=True))
    assert (found["content"], found["extra"]["problems"]) == (message.content, message.model_extra["problems"])


def test_a_call_that_breaks_off_is_no_call_to_make(client: OpenAI, says: Says) -> None:
    says(call_of("look", ARGUMENTS[0]))
    asked: dict[str, Any] = {**ASKED, "messages": user("Where?"), "tools": TOOLS, "max_tokens": 300}
    assert client.chat.completions.create(**asked).choices[0].finish_reason == "tool_calls"
    choice = client.chat.completions.create(**asked, stop="more").choices[0]
    assert choice.finish_reason == "stop" and choice.message.tool_calls
    assert choice.message.model_extra is not None and choice.message.model_extra["problems"]


def test_one_answer_that_fails_in_a_stream_does_not_cost_the_others(
    client: OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = Answer.take

    def fails(answer: Answer, *given: Any, **more: Any) -> Any:
        if answer.sequence.index == 1:
            raise ValueError("no token can be drawn.")
        return take(answer, *given, **more)

    monkeypatch.setattr(Answer, "take", fails)
    ends: dict[int, str] = {}
    usage = None
    asked: dict[str, Any] = {**ASKED, "messages": user("Hi"), "n": 3, "stream_options": {"include_usage": True}}
    with pytest.raises(APIError, match="no token can be drawn"):
        for chunk in client.chat.completions.create(**asked, stream=True):
            usage = chunk.usage or usage
            ends |= {choice.index: choice.finish_reason for choice in chunk.choices if choice.finish_reason}
    assert sorted(ends) == [0, 1, 2] and ends[1] == "error" and "error" not in (ends[0], ends[2])
    assert usage is not None


# ---- JSON, thoughts, places


def test_a_json_object_is_one(client: OpenAI) -> None:
    for seed in range(2):  # a model of random weights may go on until its tokens are used up
        reply = client.chat.completions.create(
            **ASKED, messages=user("JSON"), seed=seed, response_format={"type": "json_object"}
        )
        choice = reply.choices[0]
        assert choice.message.content is not None and choice.message.content.lstrip().startswith("{")
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)


def test_letters_of_a_schema_come_as_it_writes_them(client: OpenAI) -> None:
    """The tokenizer composes e and an accent to one letter; what the schema leaves no choice about is not its to change."""
    names = ["cafe\u0301", "日本\U0001f680"]
    schema = {"type": "object", "properties": {names[0]: {"const": names[1]}}, "required": [names[0]]}
    form: Any = {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": schema | {"additionalProperties": False}},
    }
    choice = client.chat.completions.create(**ASKED, messages=user("?"), response_format=form).choices[0]
    assert choice.finish_reason == "stop" and json.loads(choice.message.content or "") == {names[0]: names[1]}


def test_a_schema_holds_after_the_thought(thinking: Server) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    asked: dict[str, Any] = {
        **ASKED,
        "messages": user("?"),
        "response_format": form,
        "extra_body": {"thinking_budget": 5},
    }
    client = client_of(thinking)
    for seed in range(2):
        message = client.chat.completions.create(**asked, seed=seed).choices[0].message
        assert json.loads(message.content or "")["a"] in (1, 2)
        assert message.model_extra is not None and message.model_extra["reasoning_content"]
        found = joined(client.chat.completions.create(**asked, seed=seed, stream=True))
        assert json.loads(found["content"])["a"] in (1, 2) and found["reasoning_content"]


def image(url: str, **wishes: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}, **wishes}


def test_places_come_in_pixels_of_the_picture_asked_about(client: OpenAI, says: Says) -> None:
    said = '[{"bbox_2d": [0, 500, 1000, 1000], "label": "cat"}, {"point_2d": [250, 250], "label": "ear"}]'
    says(quoted(said))
    pictures = (image(picture(64, 96)), image(picture(128, 64)))
    for number, width, height in ((0, 96, 64), (1, 64, 128), (-1, 64, 128)):
        asked: dict[str, Any] = {
            **ASKED,
            "messages": user(*pictures, "Where?"),
            "max_tokens": 300,
            "extra_body": {"grounding": {"format": "pixels", "image": number}},
        }
        message = client.chat.completions.create(**asked).choices[0].message
        assert message.content == said and message.model_extra is not None
        places = message.model_extra["grounding"]
        assert places["size"] == [width, height]
        assert places["pixels"][0]["bbox_2d"] == [0, height / 2, width, height]
        assert places["pixels"][1]["point_2d"] == [width / 4, height / 4]
        assert places["relative1000"] == json.loads(said)
        assert joined(client.chat.completions.create(**asked, stream=True))["extra"]["grounding"] == places


# ---- media and what they cost


def test_a_reply_and_a_stream_say_which_budgets_were_applied(client: OpenAI, tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", [numbered_frame(i) for i in range(30)], fps="10")
    film = data_uri((tmp_path / "clip.mp4").read_bytes(), "video/mp4")
    paper = data_uri(pdf([(100, 100), (100, 200), (200, 100)]), "application/pdf")
    parts = (
        image(picture(640, 960), max_tokens=9),
        image(picture(64, 96)),
        {"type": "video_url", "video_url": {"url": film}, "fps": 4, "max_tokens": 40},
        {"type": "video_frames", "video_frames": [picture()] * 4, "fps": 2},
        {"type": "video_frames", "video_frames": [picture()] * 4, "timestamps": [0, 1, 5, 9]},
        {"type": "file", "file": {"file_data": paper, "filename": "a.pdf"}, "pages": "3,1"},
        "?",
    )
    asked: dict[str, Any] = {**ASKED, "messages": user(*parts), "max_tokens": 2, "extra_body": {"explain": True}}
    asked |= {"top_p": 0.9, "presence_penalty": 1.0, "seed": 3}
    applied = client.chat.completions.create(**asked).model_dump()["applied"]
    small, plain, clip, by_rate, by_time, *pages = applied["media"]
    assert small["budget"] == {"min_tokens": 4, "max_tokens": 9} and small["tokens"] <= 9
    assert plain["budget"] == {"min_tokens": 4, "max_tokens": 64} == applied["image_budget"]
    assert (clip["budget"]["fps"], clip["budget"]["max_tokens"]) == (4, 40) and clip["tokens"] <= 40
    assert len(clip["frame_indices"]) == 12 and clip["fps"] == 10
    assert (by_rate["timestamps"], by_time["timestamps"]) == ([0.25, 1.25], [0.5, 7.0])
    # 200 dots to the inch of 1/72, and then within the budget
    assert [page["source_size"][0] > page["source_size"][1] for page in pages] == [True, False]
    assert applied["sampling"]["top_p"] == 0.9 and applied["sampling"]["temperature"] == 1.5
    assert applied["sampling"]["presence_penalty"] == 1.0 and applied["sampling"]["seed"] == 3
    assert joined(client.chat.completions.create(**asked, stream=True))["extra"]["applied"] == applied
    quiet = {**asked, "extra_body": {}}
    assert "applied" not in client.chat.completions.create(**quiet).model_dump()


def test_frames_without_their_times_are_refused(client: OpenAI) -> None:
    frames = {"type": "video_frames", "video_frames": [picture()] * 2}
    with pytest.raises(openai.APIStatusError, match="frames") as refused:
        client.chat.completions.create(**ASKED, messages=user(frames))
    assert refused.value.status_code == 400


def test_a_stream_counts_cached_tokens_too(client: OpenAI) -> None:
    asked: dict[str, Any] = {
        **ASKED,
        "messages": user("sentence " * 150, image(picture())),
        "max_tokens": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
        "extra_body": {"cache_salt": "counted"},
    }
    cached = [
        joined(client.chat.completions.create(**asked))["usage"].prompt_tokens_details.cached_tokens for _ in range(2)
    ]
    assert cached == [0, 128]
