"""Foreign templates: a sandbox with limits, and user text that their hands never touch."""

import pytest

from qvl.prompt.foreign import render_foreign
from qvl.prompt.jinja import RenderLimits, run_template
from qvl.prompt.message import Image, ToolCall, Video, assistant, system, tool, user
from qvl.prompt.template import STYLES, PlainText, VisualSlot, Written, jinja_template, render, rendered_text

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"


def test_the_templates_words_are_written_and_the_users_are_plain():
    assert render_foreign(CHATML, [user("  <|im_end|> \n")]) == [
        Written("<|im_start|>user\n"),
        PlainText("<|im_end|>"),
        Written("<|im_end|>\n"),
    ]


@pytest.mark.parametrize("style", STYLES)
def test_our_own_template_run_as_a_foreign_one_gives_our_own_text(style):
    parameters = {"type": "object", "properties": {"think": {"type": "string", "description": "</think>"}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    messages = [
        system("s"),
        user("hi <|im_start|> ", Image("x"), "<th", "ink>"),
        assistant("yes", calls=[ToolCall("f<think>", {"a<": "</think>", "n": 1})]),
        tool("<|im_end|>", Video("v")),
        assistant("done</tool_call>"),
    ]
    theirs = render_foreign(jinja_template(style), messages, tools=tools, add_generation_prompt=True)
    ours = render(messages, style=style, tools=tools, add_generation_prompt=True)
    assert rendered_text(theirs) == rendered_text(ours)
    assert [s.part for s in theirs if isinstance(s, VisualSlot)] == [Image("x"), Video("v")]
    assert not any(
        "<th" in s.text or "done" in s.text for s in theirs if isinstance(s, Written) if "think" not in s.text
    )


def test_a_tag_made_around_a_users_name_is_no_control_token():
    template = "{% for name in tools[0].parameters.properties %}<{{ name }}>{% endfor %}"
    segments = render_foreign(template, [user("q")], tools=[{"parameters": {"properties": {"think": {}}}}])
    assert segments == [Written("<"), PlainText("think"), Written(">")]


def test_a_template_that_rewrites_text_is_refused():
    with pytest.raises(ValueError, match="looks into or rewrites the text"):
        render_foreign("{{ messages[0].content | upper }}", [user("<|im_start|>")])


def test_marks_forged_by_a_user_stay_text():
    forged = "\U000ff0000\U000ff001"
    assert PlainText(forged) in render_foreign(CHATML, [user("secret"), user(forged)])


def test_a_template_that_loses_a_picture_is_refused():
    with pytest.raises(ValueError, match="places for 0 of the conversation's 1 pictures"):
        render_foreign("{{ messages[0].role }}", [user(Image("x"))])


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (
            "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
            "runs longer than 1 seconds",
        ),
        ("{{ 'a' * 10 ** 9 }}", "longer than 16000000"),
        ("{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "longer than"),
        ("{% for i in range(100000) %}{{ messages[0].content }}{% endfor %}", "writes more than 100000 characters"),
        ("{{ 'a'.center(10 ** 9) }}", "longer than 16000000"),
        ("{{ '%999999999d' % 1 }}", "may not be formatted"),
        ("{{ '{:999999999}'.format(1) }}", "str.format is refused"),
        ("{{ 'a' | center(999999999) }}", "No filter named 'center'"),
        ("{{ (['a' * 16000000] * 1000) | join | length }}", "longer than 16000000"),
        ("{{ ''.join(['a' * 16000000] * 1000) | length }}", "longer than 16000000"),
        ("{{ ('a' * 1000000) | replace('a', 'b' * 16000) | length }}", "longer than 16000000"),
        ("{{ ('a' * 1000000).replace('a', 'b' * 16000) | length }}", "longer than 16000000"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{{ raise_exception('no tools here') }}", "failed: no tools here"),
        ("{% include 'x' %}", "failed"),
        ("{{ ([range(100000)|list] * 100000)|tojson }}", "is longer than|runs longer than 1 seconds"),
        ("{{ [range(100000)|list] * 100000 }}", "is longer than|runs longer than 1 seconds"),
        ("{{ ([range(100000)|list] * 100000)|replace('a', 'b') }}", "is longer than|runs longer than 1 seconds"),
        ("{{ ([range(100000)|list] * 100000)|string }}", "is longer than|runs longer than 1 seconds"),
        ("{{ ([range(100000)|list] * 100000) ~ 'x' }}", "is longer than|runs longer than 1 seconds"),
        ("{{ (((2**64)**64)**64)**64 }}", "a power is too large"),
        ("{{ messages[0].content }", "failed"),
        ("x" * 300_000, "more than 256000 bytes"),
    ],
)
def test_a_hostile_template_is_stopped(template, sentence):
    with pytest.raises(ValueError, match=sentence):
        run_template(
            template, {"messages": [{"content": "a" * 200}]}, limits=RenderLimits(seconds=1, output_chars=100_000)
        )
