"""What the engine gives becomes OpenAI's reply: one object, or chunks as they come."""

import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from qvl.engine.request import Event
from qvl.engine.sampling import Draw
from qvl.prompt.coordinates import Boxes, item_to_dict, read_boxes
from qvl.prompt.tokenizer import Tokenizer
from qvl.serve.chat import Prepared, Served
from qvl.serve.engine_thread import BROKEN
from qvl.serve.errors import Refusal, draining
from qvl.serve.grammar import STRAYED
from qvl.serve.metrics import Watch
from qvl.serve.split import CallArguments, CallStart, Delta, Splitter, Thought, Words, marks_of


@dataclass
class Answer:
    """One of the n answers while it grows."""

    index: int
    splitter: Splitter
    thought: str = ""
    words: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    num_tokens: int = 0
    num_thought: int = 0
    finish: str | None = None
    error: str | None = None

    def take(self, deltas: list[Delta]) -> list[dict[str, Any]]:
        """Adds to the answer; gives the same as OpenAI's deltas."""
        given: list[dict[str, Any]] = []
        for delta in deltas:
            match delta:
                case Thought(text):
                    self.thought += text
                    given.append({"reasoning_content": text})
                case Words(text):
                    self.words += text
                    given.append({"content": text})
                case CallStart(index, name):
                    call = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function"}
                    self.calls.append({**call, "function": {"name": name, "arguments": ""}})
                    given.append(
                        {"tool_calls": [{"index": index, **call, "function": {"name": name, "arguments": ""}}]}
                    )
                case CallArguments(index, text):
                    self.calls[index]["function"]["arguments"] += text
                    given.append({"tool_calls": [{"index": index, "function": {"arguments": text}}]})
        return given


class Reply:
    """Follows the answers of one request."""

    def __init__(self, prepared: Prepared, served: Served, watch: Watch) -> None:
        self.prepared, self.served, self.watch = prepared, served, watch
        self.created = int(time.time())
        self.num_cached = 0
        marks = marks_of(served.processor.tokenizer)
        self.answers = [
            Answer(
                index=i,
                splitter=Splitter(
                    marks,
                    in_thought=served.is_thinking,
                    reads_calls=prepared.reads_calls,
                    most_calls=1 if prepared.asked.parallel_tool_calls is False else None,
                ),
            )
            for i in range(prepared.request.n)
        ]

    def push(self, event: Event) -> tuple[Answer, list[dict[str, Any]], list[dict[str, Any]]]:
        """The answer it belongs to, its new deltas and its new logprobs."""
        answer = self.answers[event.index]
        self.num_cached = max(self.num_cached, event.num_cached_tokens)
        logprobs: list[dict[str, Any]] = []
        deltas: list[Delta] = []
        if event.draw is not None:
            self.watch.token(event.index)
            answer.num_tokens += 1
            answer.num_thought += answer.splitter.in_thought
            deltas = answer.splitter.push(event.draw.token, event.text)
            if self.prepared.asked.logprobs and event.draw.token not in self.prepared.request.end_tokens:
                logprobs = [token_logprob(event.draw, self.served.processor.tokenizer)]
                answer.logprobs += logprobs
        if event.finish is not None:
            deltas += answer.splitter.end()
            answer.error = event.error
        given = answer.take(deltas)
        if event.finish is not None:
            is_called = event.finish == "stop" and answer.calls and not answer.splitter.is_cut
            answer.finish = "tool_calls" if is_called else event.finish
        return answer, given, logprobs

    async def whole(self, events: AsyncIterator[Event]) -> dict[str, Any]:
        """The reply in one piece."""
        async for event in events:
            self.push(event)
        if all(answer.finish == "error" for answer in self.answers):
            raise failed(self.answers[0].error)
        if all(answer.finish == "cancelled" for answer in self.answers):
            raise draining()
        choices = [
            {
                "index": answer.index,
                "message": self._message(answer),
                "logprobs": {"content": answer.logprobs, "refusal": None} if self.prepared.asked.logprobs else None,
                "finish_reason": answer.finish,
                **({"error": answer.error} if answer.error else {}),
            }
            for answer in self.answers
        ]
        return {**self._head("chat.completion"), "choices": choices, "usage": self.usage(), **self._applied()}

    async def chunks(self, events: AsyncIterator[Event]) -> AsyncIterator[dict[str, Any]]:
        """The reply as it grows. Errors of single answers come last: a client gives up at the first, and the others are not to be lost."""
        errors: list[dict[str, Any]] = []
        with_usage = bool(self.prepared.asked.stream_options and self.prepared.asked.stream_options.include_usage)
        for answer in self.answers:
            first = self._chunk(answer, {"role": "assistant", "content": ""}, None, with_usage)
            yield first | (self._applied() if answer.index == 0 else {})
        waiting: dict[int, list[dict[str, Any]]] = {answer.index: [] for answer in self.answers}
        async for event in events:
            answer, deltas, logprobs = self.push(event)
            waiting[answer.index] += logprobs
            for delta in deltas:
                chunk = self._chunk(answer, delta, None, with_usage)
                if self.prepared.asked.logprobs:
                    chunk["choices"][0]["logprobs"] = {"content": waiting[answer.index], "refusal": None}
                    waiting[answer.index] = []
                yield chunk
            if event.finish is not None:
                chunk = self._chunk(answer, self._extras(answer), answer.finish, with_usage)
                if waiting[answer.index]:
                    chunk["choices"][0]["logprobs"] = {"content": waiting[answer.index], "refusal": None}
                yield chunk
                if answer.error:
                    errors.append(failed(answer.error).body)
        if with_usage:
            yield {**self._head("chat.completion.chunk"), "choices": [], "usage": self.usage()}
        for error in errors:
            yield error

    def usage(self) -> dict[str, Any]:
        prompt, answer = self.prepared.request.sample.num_tokens, sum(a.num_tokens for a in self.answers)
        visual = sum(medium.visual.num_tokens for medium in self.prepared.media)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
            "prompt_tokens_details": {"cached_tokens": self.num_cached, "image_tokens": visual},
            "completion_tokens_details": {"reasoning_tokens": sum(a.num_thought for a in self.answers)},
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.prepared.request.id,
            "object": kind,
            "created": self.created,
            "model": self.prepared.model,
        }

    def _chunk(self, answer: Answer, delta: dict[str, Any], finish: str | None, with_usage: bool) -> dict[str, Any]:
        choice = {"index": answer.index, "delta": delta, "logprobs": None, "finish_reason": finish}
        usage = {"usage": None} if with_usage else {}
        return {**self._head("chat.completion.chunk"), "choices": [choice], **usage}

    def _message(self, answer: Answer) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": answer.words, "refusal": None}
        if answer.calls:
            message["content"] = answer.words or None
            message["tool_calls"] = answer.calls
        if answer.thought:
            message["reasoning_content"] = answer.thought
        return message | self._extras(answer)

    def _extras(self, answer: Answer) -> dict[str, Any]:
        """What OpenAI's reply does not know: boxes in pixels where they were asked for, tool calls that could not be read."""
        problems = {"problems": answer.splitter.problems} if answer.splitter.problems else {}
        wish = self.prepared.asked.grounding
        if wish is None:
            return problems
        pictures = [medium.visual for medium in self.prepared.media if medium.kind != "video"]
        boxes = read_boxes(answer.words)
        if not -len(pictures) <= wish.image < len(pictures):
            return problems | {"grounding": None}
        visual = pictures[wish.image]
        return problems | {"grounding": grounding(boxes, visual.source_width, visual.source_height)}

    def _applied(self) -> dict[str, Any]:
        return {"applied": self.prepared.applied(self.served)} if self.prepared.asked.explain else {}


def failed(said: str | None) -> Refusal:
    """Why an answer has no good end: a schema that cannot be followed is the client's, all else is ours."""
    if said == STRAYED:
        return Refusal(400, said, code="schema")
    return Refusal(500, said or BROKEN, code="engine")


def grounding(boxes: Boxes, width: int, height: int) -> dict[str, Any]:
    """Places of an answer in pixels of the picture as it was sent, and as the model wrote them."""
    return {
        "size": [width, height],
        "pixels": [item_to_dict(item) for item in boxes.to_pixels(width, height)],
        "relative1000": [item_to_dict(item) for item in boxes],
        "is_truncated": boxes.is_truncated,
    }


def token_logprob(draw: Draw, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        **_spelled(draw.token, draw.logprob, tokenizer),
        "top_logprobs": [_spelled(*t, tokenizer) for t in draw.top],
    }


def _spelled(token: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    data = tokenizer.token_bytes(token)
    # JSON knows no -inf; OpenAI writes -9999 for a token that cannot come.
    return {
        "token": data.decode("utf-8", errors="replace"),
        "logprob": max(logprob, -9999.0),
        "bytes": list(data),
    }
