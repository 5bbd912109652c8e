"""A request becomes what the engine takes: messages, media, numbers, sampling, grammar."""

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from qvl.engine.request import Request, ThinkingBudget, media_key
from qvl.engine.sampling import Sampling
from qvl.prompt.media import MediaItem
from qvl.prompt.message import Message
from qvl.prompt.openai import messages_from_dicts
from qvl.prompt.processor import Encoded, Processor
from qvl.serve.errors import Refusal, safe_sentence
from qvl.serve.grammar import Grammar, Grammars
from qvl.serve.media import Kitchen, facts_of
from qvl.serve.protocol import (
    ChatRequest,
    JsonObjectFormat,
    JsonSchemaFormat,
    NamedTool,
    TokenizeRequest,
    Tool,
)


@dataclass(frozen=True, kw_only=True)
class Served:
    """What this server answers with."""

    names: tuple[str, ...]
    """The model's, then its adapters'."""
    processor: Processor
    sampling: Sampling
    """Holds where a request says nothing."""
    end_tokens: frozenset[int]
    thinking: ThinkingBudget | None
    """How thoughts are marked; None where the model has none."""
    max_context: int
    """Tokens of a prompt with its answer."""
    vocab_size: int

    def name(self, wanted: str | None) -> str:
        if wanted is None:
            return self.names[0]
        if wanted not in self.names:
            known = ", ".join(self.names)
            raise Refusal(404, f"There is no such model here; there is {known}.", param="model", code="model_not_found")
        return wanted

    @property
    def is_thinking(self) -> bool:
        return self.processor.starts_in_thought


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A request the engine can take, and what its reply needs to know."""

    asked: ChatRequest
    model: str
    request: Request
    media: tuple[MediaItem, ...]
    media_seconds: float
    reads_calls: bool

    def applied(self, served: Served) -> dict[str, Any]:
        """Which sampling, pixel and frame budgets held; of an answer's tokens, what the model reads leaves."""
        sampling = {name: value for name, value in asdict(self.request.sampling).items() if name != "num_logprobs"}
        left = served.max_context - self.request.sample.num_tokens
        sampling["max_tokens"] = min(sampling["max_tokens"], left)
        images, videos = served.processor.image_budget, served.processor.video_sampling
        return {
            "sampling": sampling,
            "image_budget": None if images is None else asdict(images),
            "video_sampling": None if videos is None else asdict(videos),
            "media": [facts_of(item) for item in self.media],
        }


class Cook:
    """Prepares requests; called from worker threads."""

    def __init__(self, served: Served, kitchen: Kitchen) -> None:
        self.served, self.kitchen = served, kitchen
        self.grammars = Grammars(served.processor.tokenizer, served.vocab_size, served.end_tokens)

    def prepare(self, asked: ChatRequest, *, is_cancelled: Callable[[], bool] = lambda: False) -> Prepared:
        model = self.served.name(asked.model)
        sampling = self._sampling(asked)
        tools = None if asked.tool_choice == "none" else asked.tools
        messages = read_messages(asked.messages)
        grammar = self._grammar(asked)
        encoded, media, seconds = self._encoded(messages, tools, True, is_cancelled)
        left = self.served.max_context - encoded.sample.num_tokens
        if left < 1:
            raise Refusal(
                400,
                f"The conversation has {encoded.sample.num_tokens:,} tokens; the model reads {self.served.max_context:,} with "
                "its answer. Shorten it, or send fewer or smaller pictures.",
                param="messages",
                code="context_length_exceeded",
            )
        if asked.most_tokens is None:
            sampling = replace(sampling, max_tokens=min(sampling.max_tokens, left))
        request = Request(
            id=f"chatcmpl-{uuid.uuid4().hex}",
            sample=encoded.sample,
            sampling=sampling,
            end_tokens=self.served.end_tokens,
            text_stream=self.served.processor.tokenizer.stream,
            n=asked.n or 1,
            salt=asked.cache_salt or "",
            media_keys=tuple(media_key(v.grid_I3, v.patch_PX, v.kind) for v in encoded.visuals),
            media_rows=tuple(len(visual.grid_I3) for visual in encoded.visuals),
            thinking=self._thinking(asked),
            grammar=grammar,
        )
        return Prepared(
            asked=asked,
            model=model,
            request=request,
            media=tuple(media),
            media_seconds=seconds,
            reads_calls=bool(tools),
        )

    def tokenize(self, asked: TokenizeRequest, *, is_cancelled: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        self.served.name(asked.model)
        start = time.monotonic()
        media: list[MediaItem] = []
        if asked.prompt is not None:
            ids = self.served.processor.tokenizer.encode_text(asked.prompt)
        else:
            messages = read_messages(asked.messages or [])
            encoded, media, _ = self._encoded(messages, asked.tools, asked.add_generation_prompt, is_cancelled)
            ids = encoded.sample.token_T.tolist()
        if asked.return_tokens and len(ids) > self.served.max_context:
            raise Refusal(
                400,
                f"{len(ids):,} tokens are more than a request's {self.served.max_context:,}; set return_tokens to false to count them.",
                param="return_tokens",
                code="context_length_exceeded",
            )
        return {
            "count": len(ids),
            "max_model_len": self.served.max_context,
            **({"tokens": ids} if asked.return_tokens else {}),
            "media": [facts_of(item) for item in media],
            "seconds": round(time.monotonic() - start, 3),
        }

    def _encoded(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None,
        add_generation_prompt: bool,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> tuple[Encoded, list[MediaItem], float]:
        self.kitchen.check(messages)
        loaded, media, seconds = self.kitchen.load(messages, is_cancelled=is_cancelled)
        try:
            given = [tool.as_given() for tool in tools] if tools else None
            encoded = self.served.processor(loaded, tools=given, add_generation_prompt=add_generation_prompt)
        except ValueError as error:
            raise Refusal(400, safe_sentence(error), param="messages") from error
        return encoded, [item.without_patches() for item in media], seconds

    def _sampling(self, asked: ChatRequest) -> Sampling:
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty")
        given: dict[str, Any] = {
            name: getattr(asked, name)
            for name in (*names, "frequency_penalty", "seed")
            if getattr(asked, name) is not None
        }
        if given.get("top_k") == -1:
            given["top_k"] = 0
        if asked.most_tokens is not None:
            given["max_tokens"] = asked.most_tokens
        if asked.stops:
            given["stop"] = asked.stops
        if asked.logit_bias:
            bias = {int(id): float(value) for id, value in asked.logit_bias.items()}
            if max(bias) >= self.served.vocab_size:
                raise Refusal(
                    400, f"logit_bias names a token past {self.served.vocab_size - 1}, the last.", param="logit_bias"
                )
            given["logit_bias"] = tuple(sorted(bias.items()))
        try:
            sampling = replace(self.served.sampling, num_logprobs=asked.top_logprobs or 0, **given)
        except ValueError as error:
            raise Refusal(400, safe_sentence(error)) from error
        most = self.kitchen.limits.max_logprobs
        tokens = (asked.n or 1) * min(sampling.max_tokens, self.served.max_context)
        entries = tokens * (1 + sampling.num_logprobs)
        if asked.logprobs and entries > most:
            raise Refusal(
                400,
                f"n x max_tokens x (1 + top_logprobs) is {entries:,}; at most {most:,} logprobs are given. Ask for fewer.",
                param="logprobs",
            )
        return sampling

    def _thinking(self, asked: ChatRequest) -> ThinkingBudget | None:
        thinking, budget = self.served.thinking, asked.thinking_budget
        if budget is None:
            return thinking
        if thinking is None:
            raise Refusal(400, "This model has no thoughts; leave out thinking_budget.", param="thinking_budget")
        return replace(thinking, max_tokens=budget)

    def _grammar(self, asked: ChatRequest) -> Grammar | None:
        form, choice = asked.response_format, asked.tool_choice
        if isinstance(form, JsonObjectFormat):
            return self.grammars.json_object()
        if isinstance(form, JsonSchemaFormat):
            return self.grammars.json_schema(form.json_schema.schema_)
        if choice == "required" or isinstance(choice, NamedTool):
            tools = [tool.as_given() for tool in asked.tools or ()]
            if isinstance(choice, NamedTool):
                tools = [tool for tool in tools if tool["function"]["name"] == choice.function.name]
            many = choice == "required" and asked.parallel_tool_calls is not False
            return self.grammars.tool_call(tools, many=many)
        return None


def read_messages(data: Sequence[Mapping[str, Any]]) -> tuple[Message, ...]:
    """An assistant's message may come back as it was given, with what OpenAI's form does not know and its client fills in as null."""
    own = {"grounding", "problems"}
    bare = [
        {k: v for k, v in message.items() if v is not None and not (message.get("role") == "assistant" and k in own)}
        if isinstance(message, Mapping)
        else message
        for message in data
    ]
    try:
        return messages_from_dicts(bare)
    except ValueError as error:
        raise Refusal(400, safe_sentence(error, "A message cannot be read."), param="messages") from error
