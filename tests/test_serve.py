"""qvl serve: the official openai client, unchanged, against a server on loopback."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from adapters import adapter_parameters
from media_files import encoded, gradient, numbered_frame, pdf, write_video
from qvl.commands.serve import Serve
from qvl.model.lora import LoraConfig, add_adapter, save_adapter
from qvl.model.weights import load
from qvl.serve.run import Server
from serve_doubles import address, data_uri, image, noise, picture, running, user, video
from tiny_checkpoint import tiny_checkpoint

MODEL = "tiny"
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0}


@pytest.fixture(scope="module")
def server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = load(tiny_folder)
    add_adapter(model, LoraConfig(r=2, alpha=64))
    for weight in adapter_parameters(model).values():
        weight.data.fill_(0.3)
    adapter = tmp_path_factory.mktemp("adapter")
    save_adapter(model, adapter)
    with running(tiny_folder, adapters={"tuned": adapter}) as server:
        yield server


@pytest.fixture
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{address(server)}/v1", api_key="none", max_retries=0)


def test_a_question_gets_an_answer_with_its_cost(client: OpenAI) -> None:
    reply = client.chat.completions.create(**GREEDY, messages=user("What?"), max_tokens=5)
    assert reply.object == "chat.completion" and reply.model == MODEL and reply.id.startswith("chatcmpl-")
    [choice] = reply.choices
    assert choice.message.role == "assistant" and choice.message.content and choice.finish_reason == "length"
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (10, 5, 15)


def test_two_pictures_are_answered_at_once_and_each_as_if_alone(server: Server) -> None:
    async def ask(client: AsyncOpenAI, seed: int) -> tuple[str, Any]:
        stream = await client.chat.completions.create(
            **GREEDY, messages=user(image(noise(seed)), "What?"), stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices), chunks[-1].usage

    async def both() -> list[tuple[str, Any]]:
        async with AsyncOpenAI(base_url=f"{address(server)}/v1", api_key="none") as client:
            return [*await asyncio.gather(ask(client, 1), ask(client, 2)), await ask(client, 1), await ask(client, 2)]

    (one, usage), (two, _), (one_alone, _), (two_alone, _) = asyncio.run(both())
    assert one == one_alone and two == two_alone and one != two
    assert usage.prompt_tokens == 16 and usage.completion_tokens == 8
    assert usage.prompt_tokens_details.image_tokens == 4


def test_a_stream_says_what_the_whole_reply_says(client: OpenAI) -> None:
    asked = {**GREEDY, "messages": user(image(picture()), "What is it?"), "max_tokens": 12}
    whole = client.chat.completions.create(**asked).choices[0]
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == whole.finish_reason == "length"


def test_media_keep_their_order(client: OpenAI, tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", [numbered_frame(i) for i in range(20)], fps="10")
    film = data_uri((tmp_path / "clip.mp4").read_bytes(), "video/mp4")
    paper = data_uri(pdf([(100, 100), (100, 200)]), "application/pdf")
    frames = [picture(), picture()]
    parts = (
        image(picture(64, 96)),
        video(film, num_frames=4),
        "then",
        {"type": "file", "file": {"file_data": paper, "filename": "two.pdf"}},
        {"type": "video_frames", "video_frames": frames, "fps": 2},
        image(picture(96, 64), max_tokens=4),
    )
    reply = client.chat.completions.create(**GREEDY, messages=user(*parts), max_tokens=2, extra_body={"explain": True})
    applied = reply.model_dump()["applied"]
    kinds = [(medium["kind"], medium["tokens"]) for medium in applied["media"]]
    assert [kind for kind, _ in kinds] == ["image", "video", "page", "page", "video", "image"]
    assert kinds[0] == ("image", 6) and kinds[-1] == ("image", 2)
    assert len(applied["media"][1]["frame_indices"]) == 4 and applied["media"][4]["timestamps"] == [0.25]
    assert applied["sampling"]["temperature"] == 0 and applied["sampling"]["max_tokens"] == 2
    assert applied["image_budget"] == {"min_tokens": 4, "max_tokens": 64}


def test_n_answers_with_a_seed_differ_and_come_again(client: OpenAI) -> None:
    asked = {"model": MODEL, "messages": user("Tell."), "n": 3, "seed": 7, "temperature": 1.5, "max_tokens": 6}
    first, again = (client.chat.completions.create(**asked) for _ in range(2))
    answers = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2] and len(set(answers)) == 3
    assert [choice.message.content for choice in again.choices] == answers
    assert first.usage is not None and first.usage.completion_tokens == 18


def test_a_stop_ends_the_answer_before_it(client: OpenAI) -> None:
    whole = client.chat.completions.create(**GREEDY, messages=user("What?"), max_tokens=8).choices[0].message.content
    assert whole is not None
    stop = whole[len(whole) // 2 :][:4]
    choice = client.chat.completions.create(**GREEDY, messages=user("What?"), max_tokens=8, stop=[stop]).choices[0]
    assert choice.message.content == whole[: whole.index(stop)] and choice.finish_reason == "stop"


def test_logprobs_name_each_token_and_its_rivals(client: OpenAI) -> None:
    asked = {**GREEDY, "messages": user("What?"), "max_tokens": 4, "logprobs": True, "top_logprobs": 3}
    choice = client.chat.completions.create(**asked).choices[0]
    assert choice.logprobs is not None and choice.logprobs.content is not None
    tokens = choice.logprobs.content
    assert len(tokens) == 4 and b"".join(bytes(t.bytes or ()) for t in tokens).decode() == choice.message.content
    assert all(len(t.top_logprobs) == 3 and t.top_logprobs[0].logprob == t.logprob for t in tokens)  # greedy
    chunks = client.chat.completions.create(**asked, stream=True)
    streamed = [t.logprob for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content or ()]
    assert streamed == pytest.approx([t.logprob for t in tokens], abs=1e-4)


def test_a_prompt_seen_before_comes_from_the_cache(client: OpenAI) -> None:
    long = user("word " * 200 + "What?")
    salt = {"cache_salt": "mine"}
    first, second = (
        client.chat.completions.create(**GREEDY, messages=long, max_tokens=2, extra_body=salt) for _ in range(2)
    )
    other = client.chat.completions.create(**GREEDY, messages=long, max_tokens=2, extra_body={"cache_salt": "yours"})
    cached = [r.usage.prompt_tokens_details.cached_tokens for r in (first, second, other)]  # type: ignore[union-attr]
    assert cached == [0, 192, 0]


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a town",
        "parameters": {
            "type": "object",
            "properties": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["days"],
            "additionalProperties": False,
        },
    },
}


def test_a_forced_tool_call_is_a_call_in_the_whole_reply_and_in_the_stream(client: OpenAI) -> None:
    asked: dict[str, Any] = {
        **GREEDY,
        "messages": user("Weather?"),
        "tools": [WEATHER],
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
        "max_tokens": 80,
    }
    choice = client.chat.completions.create(**asked).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.tool_calls
    call = choice.message.tool_calls[0]
    assert call.type == "function" and call.function.name == "weather" and call.id.startswith("call_")
    assert 1 <= json.loads(call.function.arguments)["days"] <= 9
    name, arguments, finish = "", "", None
    for chunk in client.chat.completions.create(**asked, stream=True):
        for piece in chunk.choices[0].delta.tool_calls or ():
            assert piece.index == 0 and piece.function is not None
            name += piece.function.name or ""
            arguments += piece.function.arguments or ""
        finish = chunk.choices[0].finish_reason or finish
    assert (name, arguments, finish) == ("weather", call.function.arguments, "tool_calls")


def test_a_tools_answer_goes_back_into_the_conversation(client: OpenAI) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"days": 2}'}}
    messages = [
        *user("Weather?"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "sun"}, image(picture())]},
    ]
    reply = client.chat.completions.create(**GREEDY, messages=messages, tools=[WEATHER], max_tokens=2)  # type: ignore[list-item]
    assert reply.usage is not None and reply.usage.completion_tokens == 2


def test_json_follows_its_schema(client: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green"]}, "count": {"type": "integer", "maximum": 99, "minimum": 0}},
        "required": ["colour", "count"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, "strict": True}}
    asked = {**GREEDY, "messages": user("Describe."), "max_tokens": 100, "n": 2}
    for choice in client.chat.completions.create(**asked, response_format=form).choices:
        assert choice.finish_reason == "stop"
        data = json.loads(choice.message.content or "")
        assert data.keys() == {"colour", "count"} and data["colour"] in ("red", "green")


def test_a_schema_that_makes_no_sense_is_refused(client: OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "string", "pattern": "(("}}}
    with pytest.raises(openai.BadRequestError, match="JSON schema cannot be used"):
        client.chat.completions.create(**GREEDY, messages=user("x"), response_format=form)


@pytest.mark.parametrize(
    ("field", "value"), [("chat_template_kwargs", {"enable_thinking": False}), ("reasoning_effort", "low")]
)
def test_a_switch_of_other_servers_is_refused_with_what_to_do_instead(client: OpenAI, field: str, value: Any) -> None:
    with pytest.raises(openai.BadRequestError, match=f"{field} is not taken.*thinking_budget"):
        client.chat.completions.create(**GREEDY, messages=user("x"), extra_body={field: value})


def test_an_adapter_answers_by_its_name_and_the_base_stays_itself(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL, "tuned"]
    asked: dict[str, Any] = {"messages": user("What?"), "temperature": 0, "max_tokens": 6}
    base = client.chat.completions.create(model=MODEL, **asked).choices[0].message.content
    tuned = client.chat.completions.create(model="tuned", **asked).choices[0].message.content
    assert tuned != base
    assert client.chat.completions.create(model=MODEL, **asked).choices[0].message.content == base


def test_places_come_in_pixels_when_asked_for(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    from qvl.serve import reply

    said = reply.read_boxes('[{"bbox_2d": [0, 500, 1000, 1000], "label": "cat"}]')
    monkeypatch.setattr(reply, "read_boxes", lambda text: said)
    asked = {**GREEDY, "messages": user(image(picture(64, 96)), "Where?"), "grounding": {"format": "pixels"}}
    message = httpx.post(f"{address(server)}/v1/chat/completions", json=asked).json()["choices"][0]["message"]
    assert message["grounding"]["size"] == [96, 64]
    assert message["grounding"]["pixels"] == [{"bbox_2d": [0, 32, 96, 64], "label": "cat"}]
    assert message["grounding"]["relative1000"] == [{"bbox_2d": [0, 500, 1000, 1000], "label": "cat"}]


def test_tokenize_counts_words_and_media(server: Server) -> None:
    url = f"{address(server)}/tokenize"
    words = httpx.post(url, json={"prompt": "a red cat<|im_end|>"}).json()
    assert words["count"] == len(words["tokens"]) > 5 and max(words["tokens"]) < 151643  # no control token
    talk = httpx.post(url, json={"messages": user(image(picture()), "What?"), "return_tokens": False}).json()
    assert talk["count"] == 18 and "tokens" not in talk
    assert [medium["tokens"] for medium in talk["media"]] == [6]


def test_a_thought_is_apart_from_the_answer(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "thinking", "thinking")
    with running(folder) as server:
        client = OpenAI(base_url=f"{address(server)}/v1", api_key="none", max_retries=0)
        asked: dict[str, Any] = {
            **GREEDY,
            "messages": user("Why?"),
            "max_tokens": 12,
            "extra_body": {"thinking_budget": 4},
        }
        reply = client.chat.completions.create(**asked)
        message = reply.choices[0].message.model_dump()
        assert message["reasoning_content"] and message["content"] and "</think>" not in message["content"]
        assert reply.usage is not None and reply.usage.completion_tokens_details is not None
        assert reply.usage.completion_tokens_details.reasoning_tokens == 5  # the closing mark is one
        thought, words = "", ""
        for chunk in client.chat.completions.create(**asked, stream=True):
            delta = chunk.choices[0].delta.model_dump()
            thought += delta.get("reasoning_content") or ""
            words += delta.get("content") or ""
        assert (thought, words) == (message["reasoning_content"], message["content"])


def test_metrics_count_what_happened(server: Server, client: OpenAI) -> None:
    client.chat.completions.create(**GREEDY, messages=user(image(picture()), "What?"))
    text = httpx.get(f"{address(server)}/metrics").text
    for name in (
        'qvl_requests_total{route="/v1/chat/completions",status="200"}',
        "qvl_time_to_first_token_seconds_count",
        "qvl_inter_token_seconds_count",
        "qvl_request_seconds_count",
        "qvl_media_seconds_count",
        'qvl_engine_waiting{model="tiny"}',
        'qvl_engine_prefix_tokens_found{model="tiny"}',
    ):
        assert name in text


def test_what_runs_can_be_printed_as_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    from qvl.commands import cli

    assert cli.main(["serve", "--model", "x", "--adapter", "a=b", "--print-config"]) == 0
    assert "host: 127.0.0.1" in capsys.readouterr().out
    assert Serve().host == "127.0.0.1"


def test_a_picture_in_each_format_is_read(client: OpenAI) -> None:
    for format in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        url = data_uri(encoded(gradient(64, 96), format), f"image/{format.lower()}")
        client.chat.completions.create(**GREEDY, messages=user(image(url), "?"), max_tokens=1)
