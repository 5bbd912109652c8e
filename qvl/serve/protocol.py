"""What a client may send to /v1/chat/completions and /tokenize, and how much of it."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator

from qvl.serve.limits import Limits

LIMITS = Limits()
"""Counts that stand in the published schema; a server's own limits may be tighter."""

Name = Annotated[str, Field(max_length=256)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Stop = Annotated[str, Field(min_length=1, max_length=LIMITS.max_stop_length)]
Token = Annotated[str, Field(pattern=r"^[0-9]{1,7}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]


def _not_wide(value: Any) -> Any:
    """Before its items are looked at: a mistake is written for each, and a hundred thousand take a second."""
    if isinstance(value, dict) and len(value) > LIMITS.max_logit_bias:
        raise ValueError(f"{len(value):,} fields; at most {LIMITS.max_logit_bias:,} are allowed.")
    return value


class Strict(BaseModel):
    """No unknown fields, no text where a number belongs, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())
    _checks_width = model_validator(mode="before")(_not_wide)


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False
    """Accepted; nothing is padded."""


class Function(Strict):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.\-]{1,64}$")]
    description: Annotated[str, Field(max_length=16384)] | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function

    def as_given(self) -> dict[str, Any]:
        """The fields that were given, in this class's order, for the template to show."""
        return self.model_dump(exclude_unset=True)


class NamedFunction(Strict):
    name: Name


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Strict):
    name: Name = "answer"
    description: Annotated[str, Field(max_length=16384)] | None = None
    schema_: Annotated[dict[str, JsonValue], Field(alias="schema")]
    strict: bool | None = None


class TextFormat(Strict):
    type: Literal["text"]


class JsonObjectFormat(Strict):
    type: Literal["json_object"]


class JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class Grounding(Strict):
    """Boxes and points of the answer, also in pixels of a picture (the model writes thousandths)."""

    format: Literal["pixels"] = "pixels"
    image: Annotated[int, Field(ge=-1024, lt=1024)] = -1
    """Which picture of the conversation, counted from 0; -1 is the last."""


NOT_TAKEN = {
    "chat_template_kwargs": "Qwen3-VL's template has no switches: a checkpoint thinks or does not, and thinking_budget says how long.",
    "reasoning_effort": "A Qwen3-VL checkpoint thinks or does not; give thinking_budget, in tokens, to one that does.",
}
"""Fields that clients of other servers send, and what to do instead. Who sends them wants another answer than they would get."""


class ChatRequest(Strict):
    model: Name | None = None
    # The parts of a message are read by qvl.prompt.openai, which names a wrong field and its like.
    messages: Annotated[list[dict[str, JsonValue]], Field(min_length=1, max_length=LIMITS.max_messages)]
    tools: Annotated[list[Tool], Field(max_length=LIMITS.max_tools)] | None = None

    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=LIMITS.max_answers)] | None = 1
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = None
    """0 and -1 keep all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[
        dict[Token, Bias] | None, Field(max_length=LIMITS.max_logit_bias), BeforeValidator(_not_wide)
    ] = None
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=LIMITS.max_stop)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    thinking_budget: Annotated[int, Field(ge=1, le=2**31)] | None = None
    """Most tokens of a Thinking model's thought; then it is closed."""
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """Prompts and their media are looked up in the caches only among those with the same salt."""
    grounding: Grounding | None = None
    explain: bool = False
    """Say in the reply which sampling, pixel and frame budgets were applied."""
    # Taken because clients send them; without effect here.
    user: Name | None = None
    metadata: Annotated[dict[str, JsonValue], Field(max_length=64)] | None = None
    safety_identifier: Name | None = None
    prompt_cache_key: Name | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is given without logprobs; set logprobs to true.")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is given without stream; set stream to true.")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are both given; give one of them.")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) != len(names):
            raise ValueError("Two tools have one name; give each its own.")
        if self.tool_choice not in (None, "none", "auto"):
            if not names:
                raise ValueError("tool_choice asks for a call and there are no tools; give tools.")
            if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
                raise ValueError("tool_choice names a function that is not among the tools.")
            if self.response_format is not None and self.response_format.type != "text":
                raise ValueError("tool_choice and response_format both decide the answer's form; give one of them.")
        check_schemas(self)
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class TokenizeRequest(Strict):
    """Either a prompt of plain words, or a conversation as in a chat."""

    model: Name | None = None
    prompt: Annotated[str, Field(max_length=LIMITS.max_text)] | None = None
    messages: Annotated[list[dict[str, JsonValue]], Field(min_length=1, max_length=LIMITS.max_messages)] | None = None
    tools: Annotated[list[Tool], Field(max_length=LIMITS.max_tools)] | None = None
    add_generation_prompt: bool = True
    return_tokens: bool = True
    """False: only the counts."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("Give either prompt or messages.")
        check_schemas(self)
        return self


def check_schemas(request: "ChatRequest | TokenizeRequest") -> None:
    """Size and depth of what a grammar compiler or the template would have to walk through."""
    schemas: list[Any] = [tool.as_given() for tool in request.tools or ()]
    if isinstance(request, ChatRequest) and isinstance(request.response_format, JsonSchemaFormat):
        schemas.append(request.response_format.json_schema.schema_)
    if any(is_deeper(schema, LIMITS.max_schema_depth + 3) for schema in schemas):  # a tool wraps its schema three times
        raise ValueError(f"A schema is nested more than {LIMITS.max_schema_depth} deep; flatten it.")
    size = sum(len(json.dumps(schema, ensure_ascii=False)) for schema in schemas)
    if size > LIMITS.max_schema_bytes:
        raise ValueError(f"The schemas have {size:,} characters; at most {LIMITS.max_schema_bytes:,} are allowed.")


def is_deeper(value: Any, depth: int) -> bool:
    """Whether lists and objects stand in each other more than `depth` times. Walks level by level, without recursion."""
    level = [value]
    for _ in range(depth + 1):
        level = [
            inner
            for item in level
            if isinstance(item, (Mapping, list))
            for inner in (item.values() if isinstance(item, Mapping) else item)
        ]
        if not level:
            return False
    return True
