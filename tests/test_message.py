"""Messages: what may be said by whom, and how dictionaries become messages and come back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvl.prompt.message import (
    Document,
    Image,
    Message,
    Text,
    Thinking,
    ToolCall,
    Video,
    assistant,
    system,
    tool,
    user,
)
from qvl.prompt.openai import message_from_dict, message_to_dict, messages_from_dicts, messages_to_dicts


def test_a_string_is_one_text_and_null_or_empty_is_no_part():
    assert message_from_dict({"role": "user", "content": "hi"}) == user("hi")
    assert message_from_dict({"role": "user", "content": ""}) == user()
    assert message_from_dict({"role": "assistant", "content": None}) == assistant()


def test_openai_parts_become_typed_parts_in_their_order():
    content = [
        {"type": "text", "text": "Compare"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "high"}},
        {"type": "video_url", "video_url": {"url": "https://example.org/a.mp4"}, "fps": 1},
        {"type": "file", "file": {"file_data": "data:application/pdf;base64,AAAA", "filename": "a.pdf"}},
    ]
    assert message_from_dict({"role": "user", "content": content}) == user(
        "Compare",
        Image("data:image/png;base64,AAAA"),
        Video("https://example.org/a.mp4", sample_fps=1.0),
        Document("data:application/pdf;base64,AAAA"),
    )


def test_the_short_form_without_type_is_read():
    content = [{"image": "a.png", "max_tokens": 100}, {"text": "What?"}]
    assert message_from_dict({"role": "user", "content": content}) == user(Image("a.png", max_tokens=100), "What?")


def test_pixels_become_tokens_of_1024_pixels():
    part = {"type": "image", "image": "a.png", "min_pixels": 65536, "max_pixels": 1048576}
    image = Image("a.png", min_tokens=64, max_tokens=1024)
    assert message_from_dict({"role": "user", "content": [part]}) == user(image)


def test_a_list_of_frames_needs_its_fps_or_timestamps():
    frames = {"type": "video", "video": ["1.png", "2.png"]}
    assert message_from_dict({"role": "user", "content": [frames | {"fps": 2}]}) == user(
        Video(("1.png", "2.png"), frame_fps=2.0)
    )
    assert message_from_dict({"role": "user", "content": [frames | {"timestamps": [0, 1.5]}]}) == user(
        Video(("1.png", "2.png"), frame_seconds=(0.0, 1.5))
    )
    with pytest.raises(ValueError, match="says nothing about time; give either 'fps'"):
        message_from_dict({"role": "user", "content": [frames]})
    with pytest.raises(ValueError, match="2 frames and 1 timestamps"):
        message_from_dict({"role": "user", "content": [frames | {"timestamps": [0]}]})


def test_a_tool_turn_round():
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = messages_from_dicts(
        [
            {"role": "developer", "content": "Be brief."},
            {"role": "assistant", "content": None, "reasoning": "I add.", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "2"}]},
        ]
    )
    add = ToolCall("add", '{"a": 1}', id="c1")
    assert messages == (system("Be brief."), assistant(thinking="I add.", calls=[add]), tool("2", id="c1"))
    assert add.parsed_arguments() == {"a": 1}


def test_messages_come_back_from_dictionaries_unchanged():
    messages = (
        system("Be brief."),
        user(Image("a.png", max_tokens=9), Text(""), "x", Video("b.mp4", num_frames=8), Document("c.pdf", pages="1-2")),
        user(Text("")),
        user(),
        assistant("yes", thinking="", calls=[ToolCall("f", {"a": [1]}), ToolCall("g", "{}", id="7")]),
        tool("a", Image("d.png"), id="7", name="g"),
        user(Video(("1.png", "2.png"), frame_seconds=(0.0, 0.5), max_tokens=50)),
    )
    assert messages_from_dicts(messages_to_dicts(messages)) == messages
    assert message_to_dict(user("hi")) == {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"role": "wizard", "content": "x"}, "the role 'wizard'; it must be one of system, user, assistant, tool"),
        ({"role": "user", "contents": "x"}, "unknown field 'contents'; did you mean 'content'"),
        ({"role": "user", "content": 3}, "content is int; a string or a list of parts"),
        ({"role": "user", "content": [{"type": "imag", "image": 1}]}, "did you mean 'image'"),
        ({"role": "user", "content": [{"type": "image"}]}, "no 'image' field"),
        ({"role": "user", "content": [{"type": "image", "image": "a", "max_pixel": 1}]}, "did you mean 'max_pixels'"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "image_url has no 'url'"),
        ({"role": "user", "content": [{"type": "text", "text": 5}]}, "text is int; a string was expected"),
        ({"role": "user", "content": [{"type": "video", "video": "a.mp4", "fps": 1e9}]}, "from 0.01 to 240"),
        ({"role": "user", "content": [{"type": "video", "video": "a.mp4", "fps": float("nan")}]}, "a number was"),
        ({"role": "user", "content": [{"type": "video", "video": "a", "fps": 1, "num_frames": 4}]}, "give one of them"),
        ({"role": "user", "content": [{"type": "video", "video": "a", "num_frames": True}]}, "a whole number"),
        ({"role": "user", "content": [{"type": "video", "video": "a", "num_frames": -3}]}, "num_frames is -3"),
        ({"role": "user", "content": [{"type": "image", "image": "a", "max_tokens": 0}]}, "must be at least 1"),
        ({"role": "user", "content": [{"type": "image", "image": "a", "min_tokens": 9, "max_tokens": 3}]}, "above"),
        ({"role": "user", "content": "x", "reasoning_content": "y"}, "only the assistant has thoughts"),
        ({"role": "assistant", "content": "x", "tool_calls": [{"function": {}}]}, "no function name"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 3}}]}, "arguments of type int"),
    ],
)
def test_a_wrong_dictionary_is_refused_in_one_sentence(data, sentence):
    with pytest.raises(ValueError, match=sentence):
        message_from_dict(data)


def test_parts_stand_only_where_the_template_has_a_place_for_them():
    with pytest.raises(ValueError, match="only the assistant has those"):
        Message("user", (Thinking("hm"),))
    with pytest.raises(ValueError, match="before everything else"):
        Message("assistant", (Text("a"), Thinking("hm")))
    with pytest.raises(ValueError, match="tool calls last"):
        Message("assistant", (ToolCall("f", "{}"), Text("a")))
    with pytest.raises(ValueError, match="exactly one ToolResult"):
        Message("tool", (Text("a"),))


def test_an_empty_conversation_is_refused():
    with pytest.raises(ValueError, match="give at least one message"):
        messages_from_dicts([])


SCALARS = st.none() | st.booleans() | st.integers(-5, 300) | st.floats() | st.text(max_size=3)
KEYS = ["role", "content", "type", "text", "image", "image_url", "url", "video", "fps", "timestamps", "num_frames"]
KEYS += ["max_tokens", "max_pixels", "tool_calls", "function", "name", "arguments", "file", "file_data", "reasoning"]
NAMES = st.sampled_from(KEYS)
WORDS = st.sampled_from(
    ["user", "assistant", "tool", "system", "text", "image", "image_url", "video", "file", "document"]
)
DATA = st.recursive(
    SCALARS | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=5),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(NAMES, DATA, max_size=5), WORDS)
def test_any_json_is_read_or_refused_with_a_sentence(data, role):
    try:
        message = message_from_dict({**data, "role": role})
    except ValueError as error:
        assert str(error).endswith(".")
    else:
        assert message_from_dict(message_to_dict(message)) == message or "nan" in repr(message)
