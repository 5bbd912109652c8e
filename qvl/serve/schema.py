"""What the routes answer, as OpenAPI says it: refusals, completions, models, tokens."""

from typing import Any


def _object(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    return {"type": "object", "required": [*required], "properties": {**required, **optional}}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


TEXT, COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}
ERROR = _object({"error": _object({"message": TEXT, "type": TEXT, "param": _or_null(TEXT), "code": _or_null(TEXT)})})
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"description": words, "content": {"application/json": {"schema": ERROR}}}
    for status, words in {
        400: "A field is wrong, or the request cannot be answered as it is.",
        401: "The key is missing or wrong.",
        404: "There is no such model.",
        405: "The route does not take that method.",
        408: "The request did not arrive in time.",
        413: "The request is too large.",
        415: "The request is no JSON.",
        421: "The server has another name.",
        429: "Too many requests; Retry-After says when to come again.",
        500: "The model failed on this request.",
        503: "The server is shutting down.",
    }.items()
}
CALL = _object({"id": TEXT, "type": {"const": "function"}, "function": _object({"name": TEXT, "arguments": TEXT})})
MESSAGE = _object(
    {"role": {"const": "assistant"}, "content": _or_null(TEXT)},
    reasoning_content=TEXT,
    tool_calls={"type": "array", "items": CALL},
)
CHOICE = _object(
    {
        "index": COUNT,
        "message": MESSAGE,
        "logprobs": _or_null(_object({"content": {"type": "array"}})),
        "finish_reason": {"enum": ["stop", "length", "tool_calls", "cancelled", "error"]},
    }
)
COMPLETION = _object(
    {
        "id": TEXT,
        "object": {"const": "chat.completion"},
        "created": COUNT,
        "model": TEXT,
        "choices": {"type": "array", "minItems": 1, "items": CHOICE},
        "usage": _object({"prompt_tokens": COUNT, "completion_tokens": COUNT, "total_tokens": COUNT}),
    },
    applied={"type": "object"},
)
EVENT = _object({"data": TEXT})
"""One of a stream: a chunk as JSON, and at the end [DONE]. Before OpenAPI 3.2 a stream's schema is that of its events."""
MODEL = _object({"id": TEXT, "object": {"const": "model"}, "created": COUNT, "max_model_len": COUNT})
MODELS = _object({"object": {"const": "list"}, "data": {"type": "array", "items": MODEL}})
TOKENS = _object(
    {"count": COUNT, "max_model_len": COUNT, "media": {"type": "array", "items": {"type": "object"}}},
    tokens={"type": "array", "items": COUNT},
)


def replies(schema: dict[str, Any], **more: Any) -> dict[int | str, dict[str, Any]]:
    """For a route's `responses`: its reply is JSON of this schema; `more` are other media types."""
    return {200: {"description": "The reply.", "content": {"application/json": {"schema": schema}, **more}}}
