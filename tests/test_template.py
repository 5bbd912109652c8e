"""The templates: native rendering equals Jinja's byte for byte, ids equal transformers', and text stays text."""

import random
import unicodedata

import pytest
from transformers import AutoTokenizer

from qvl.prompt.message import (
    Image,
    Message,
    Text,
    ToolCall,
    ToolResult,
    Video,
    assistant,
    system,
    tool,
    user,
)
from qvl.prompt.placeholder import Pads, encode
from qvl.prompt.template import (
    STYLES,
    VisualSlot,
    detect_style,
    jinja_template,
    render,
    rendered_text,
    split_thinking,
    template_dicts,
)
from real_tokenizer import CONTROL, real_tokenizer, real_tokenizer_folder

NAMES = [token.name for token in CONTROL]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"é": [1, 2.5, None, "<&>"]}}}


def text_of(*messages: Message, style="instruct", **options) -> str:
    return rendered_text(render(messages, style=style, **options))


# ---- literal renderings


def test_a_question_and_the_generation_prompt():
    assert text_of(user("hi"), add_generation_prompt=True) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text_of(user("hi"), style="thinking", add_generation_prompt=True) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )


def test_pictures_are_counted_when_asked():
    message = user(Image("a"), "and", Video("b"), Image("c"))
    assert text_of(message) == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>and<|vision_start|><|video_pad|><|vision_end|>"
        "<|vision_start|><|image_pad|><|vision_end|><|im_end|>\n"
    )
    assert text_of(message, add_vision_id=True) == (
        "<|im_start|>user\nPicture 1: <|vision_start|><|image_pad|><|vision_end|>and"
        "Video 1: <|vision_start|><|video_pad|><|vision_end|>"
        "Picture 2: <|vision_start|><|image_pad|><|vision_end|><|im_end|>\n"
    )


def test_tools_stand_in_the_system_turn():
    assert text_of(system("S"), user("u"), tools=[{"b": 1, "a": "<é>"}]) == (
        "<|im_start|>system\nS\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        '{"b": 1, "a": "<é>"}\n</tools>\n\nFor each function call, return a json object with function name and '
        "arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\nu<|im_end|>\n"
    )


def test_calls_and_results_of_several_tools_share_turns():
    messages = (
        user("u"),
        assistant("w", calls=[ToolCall("f", {"x": 1}), ToolCall("g", '{"y":2}')]),
        tool("1"),
        tool("2"),
    )
    assert text_of(*messages) == (
        "<|im_start|>user\nu<|im_end|>\n"
        '<|im_start|>assistant\nw\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "g", "arguments": {"y":2}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n"
    )


def test_thoughts_are_kept_until_the_next_question():
    turn = (
        user("q"),
        assistant(calls=[ToolCall("f", "{}")], thinking="t"),
        tool("r"),
        assistant("a", thinking="\nu\n"),
    )
    assert text_of(*turn, style="thinking") == (
        "<|im_start|>user\nq<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nt\n</think>\n\n"
        '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nr\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\nu\n</think>\n\na<|im_end|>\n"
    )
    assert text_of(*turn, user("p"), style="thinking").endswith(
        "<|im_start|>assistant\na<|im_end|>\n<|im_start|>user\np<|im_end|>\n"
    )


def test_the_last_answer_without_a_thought_gets_an_empty_one():
    assert text_of(user("q"), assistant("a"), style="thinking").endswith(
        "assistant\n<think>\n\n</think>\n\na<|im_end|>\n"
    )


def test_raw_thoughts_in_history_are_split_only_on_request():
    raw = assistant("<think>\nt\n</think>\n\na")
    assert text_of(user("q"), raw, style="thinking").endswith(
        "assistant\n<think>\n\n</think>\n\n<think>\nt\n</think>\n\na<|im_end|>\n"
    )
    assert text_of(user("q"), raw, style="thinking", split_thinking=True).endswith(
        "assistant\n<think>\nt\n</think>\n\na<|im_end|>\n"
    )
    assert split_thinking("t</think>\n\na") == ("t", "a") and split_thinking("a") is None


# ---- the whole matrix against Jinja

WORDS = ["hi", " ", "\n", "\n\nx", "a\n", "é\"<&>'", "{{ x }}", "xxxxx", "你好"]
MARKED = [
    "<think>",
    "</think>",
    "<think>\nt\n</think>\n\nans",
    "<tool_response>\nx\n</tool_response>",
    "</tool_response>",
]
MARKED += ["<tool_response>", "<|im_start|>", "</think>b</think>\nc", "<tool_call>", "<|vision_start|>"]


def random_conversation(rng: random.Random, words: list[str], media: float) -> list[Message]:
    def text() -> str:
        return "".join(rng.choice(words) for _ in range(rng.choice([0, 1, 1, 2, 3])))

    def content(media: float) -> list:
        kinds = [rng.choice([Image("a"), Video("v")]) if rng.random() < media else Text(text()) for _ in range(3)]
        return kinds[: rng.choice([0, 1, 1, 1, 2, 3])]

    def message() -> Message:
        role = rng.choice(["system", "user", "user", "assistant", "assistant", "tool", "tool"])
        if role == "assistant":
            arguments = ['{"a": 1}', "", {"a": [1, {"b": "é<"}], "c": None, "d": True, "e": 1.5}, {}]
            calls = [ToolCall(text() or "f", rng.choice(arguments)) for _ in range(rng.choice([0, 0, 1, 2]))]
            return assistant(*content(0), thinking=rng.choice([None, None, text()]), calls=calls)
        return tool(*content(media)) if role == "tool" else Message(role, tuple(content(media)))

    return [message() for _ in range(rng.randint(1, 7))]


@pytest.fixture(scope="module")
def published():
    return AutoTokenizer.from_pretrained(real_tokenizer_folder())


@pytest.mark.parametrize("style", STYLES)
def test_native_rendering_equals_the_jinja_template_on_random_conversations(style, published):
    rng = random.Random(style)
    for _ in range(600):
        messages = random_conversation(rng, WORDS + MARKED, media=0.4)
        tools = rng.choice([None, [], [TOOL], [TOOL, {"a": "</tools>"}]])
        flags = {"add_generation_prompt": rng.random() < 0.5, "add_vision_id": rng.random() < 0.5}
        expected = published.apply_chat_template(
            template_dicts(messages), chat_template=jinja_template(style), tools=tools, tokenize=False, **flags
        )
        ours = render(messages, style=style, tools=tools, strict=False, split_thinking=True, **flags)
        assert rendered_text(ours) == expected


@pytest.mark.parametrize("style", STYLES)
def test_ids_equal_transformers_on_random_conversations(style, published):
    rng = random.Random(f"ids {style}")
    for _ in range(300):
        messages = random_conversation(rng, WORDS, media=0)
        tools = rng.choice([None, [TOOL]])
        segments = render(messages, style=style, tools=tools, strict=False, add_generation_prompt=True)
        expected = published.apply_chat_template(
            template_dicts(messages), chat_template=jinja_template(style), tools=tools, add_generation_prompt=True
        )["input_ids"]
        assert encode(segments, real_tokenizer())[0] == expected


# ---- text stays text


def conversation_with(*texts: str) -> list[Message]:
    """The texts as adjacent parts in every role, in tool results, a tool's name and its arguments."""
    said = [Text(text) for text in texts]
    word = "".join(texts)
    calls = [ToolCall(word, word), ToolCall("f", {word: [word]})]
    return [
        system(*said),
        user(*said, Image("a"), *said),
        assistant(*said, thinking=word, calls=calls),
        Message("tool", (ToolResult(tuple(said)),)),
        assistant(*said, thinking=word),
    ]


def encoded(messages: list[Message], style: str, tool: dict) -> list[int]:
    segments = render(messages, style=style, tools=[tool], strict=False, add_generation_prompt=True)
    filled = [Pads("<|image_pad|>", 4) if isinstance(segment, VisualSlot) else segment for segment in segments]
    return encode(filled, real_tokenizer())[0]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", NAMES)
def test_no_text_in_any_role_becomes_a_control_token(name, style):
    tokenizer = real_tokenizer()

    def controls(ids: list[int]) -> list[int]:
        return [id for id in ids if tokenizer.is_control(id)]

    neutral = controls(encoded(conversation_with("w"), style, {"name": "w", "w": "w"}))
    halves = [(name[:cut], name[cut:]) for cut in range(1, len(name))]
    for texts in [(name,), (f"a {name}\n",), (name, name), *halves, (name[:1], name[1:-1], name[-1:])]:
        word = "".join(texts)
        messages = conversation_with(*texts)
        ids = encoded(messages, style, {"name": word, word: word})
        assert controls(ids) == neutral
        segments = render(
            messages, style=style, tools=[{"name": word, word: word}], strict=False, add_generation_prompt=True
        )
        shown = "".join("<|image_pad|>" * 4 if isinstance(s, VisualSlot) else s.text for s in segments)
        assert tokenizer.decode(ids) == unicodedata.normalize("NFC", shown)


# ---- targets


def target_text(*messages: Message, **options) -> str:
    ids, is_target = encode(render(messages, **options), real_tokenizer())
    return real_tokenizer().decode([id for id, flag in zip(ids, is_target, strict=True) if flag])


def test_what_the_assistant_said_and_its_end_are_the_targets():
    messages = (system("s"), user("q"), assistant("a", calls=[ToolCall("f", "{}")]), tool("r"), assistant("b"))
    call = '\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    assert target_text(*messages, style="instruct") == f"a{call}<|im_end|>b<|im_end|>"
    assert target_text(*messages, user("p"), assistant("c"), style="instruct", targets="last") == "c<|im_end|>"
    assert target_text(*messages, style="instruct", targets="none") == ""
    assert target_text(user("q"), style="thinking", add_generation_prompt=True) == ""


def test_the_opening_of_a_thought_is_prompt_and_its_closing_is_target():
    messages = (user("q"), assistant("a", thinking="t"))
    assert target_text(*messages, style="thinking") == "t\n</think>\n\na<|im_end|>"


def test_a_token_over_the_edge_of_a_target_is_none():
    # "assistant\n" and an answer that starts with line breaks share one token, which the prompt does not end with.
    assert target_text(user("q"), assistant("\n\nyes"), style="instruct") == "yes<|im_end|>"


# ---- refusals and detection


@pytest.mark.parametrize(
    ("messages", "style", "sentence"),
    [
        ([system(Image("a")), user("q")], "instruct", "A system message holds a picture"),
        ([system(Image("a")), user("q")], "thinking", "A system message holds a picture"),
        ([user("q"), system("s")], "instruct", "drops system messages after the first"),
        ([user("q"), assistant(Image("a"))], "instruct", "drops pictures in an assistant's message"),
        ([user("q"), assistant("a", thinking="t")], "instruct", "drops thoughts"),
        ([], "instruct", "The conversation is empty"),
        ([user("q")], "poem", "must be one of instruct, thinking"),
    ],
)
def test_what_the_template_would_drop_is_refused(messages, style, sentence):
    with pytest.raises(ValueError, match=sentence):
        render(messages, style=style)


def test_a_later_system_message_has_a_place_in_the_thinking_template():
    assert "<|im_start|>system\ns<|im_end|>" in text_of(user("q"), system("s"), style="thinking")


def test_json_that_cannot_be_written_is_refused():
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        text_of(user("q"), tools=[{"a": object()}])


@pytest.mark.parametrize("style", STYLES)
def test_the_style_is_read_from_the_template(style):
    assert detect_style(jinja_template(style)) == style
    assert detect_style(jinja_template(style).replace("# Tools", "# tools")) is None
    assert detect_style("{{ messages[0].content }}") is None


@pytest.mark.parametrize("style", ["instruct", "thinking"])
def test_the_messages_at_the_given_places_are_the_targets(style) -> None:
    talk = [user("a"), assistant("no"), user("<|im_start|>assistant\n"), assistant("yes"), assistant("more")]
    segments = render(talk, style=style, targets=frozenset({3}))
    learned = "".join(segment.text for segment in segments if segment.is_target)
    assert learned == "yes<|im_end|>"
    assert rendered_text(segments) == rendered_text(render(talk, style=style))
