"""JSON by schema and forced tool calls: which tokens may come next, by llguidance. The only file that imports it."""

import json
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qvl.prompt.tokenizer import Tokenizer
from qvl.serve.errors import Refusal

# Between JSON's signs, as people and models write it: a blank, or a line's end and an indent. An open end is an invitation to write blanks
# for ever, and where nothing is indented a small model spends its tokens on them.
WHITESPACE = r"( |\n[ \t]{0,24})?"
KEPT = 64
"""States of one request that are kept: its answers, and a few steps back."""
STRAYED = "the answer can no longer follow the schema; simplify the schema."
"""The one error of a request that comes late and is the client's own: a schema that only turns out too large on the way."""


class Grammars:
    """Makes grammars for one tokenizer. `build` its table of tokens before anybody is served: at 150,000 tokens nothing else runs for
    a second meanwhile."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_tokens: frozenset[int]) -> None:
        self.tokenizer, self.vocab_size, self.end_tokens = tokenizer, vocab_size, end_tokens
        self._guidance: Any = None
        self._table: Any = None

    def build(self) -> None:
        """Nothing happens where llguidance is not installed; a request that needs it is then refused."""
        try:
            import llguidance
        except ImportError:
            return
        table = llguidance.TokenizerWrapper(_Vocabulary(self.tokenizer, self.end_tokens))
        self._table = llguidance.LLTokenizer(table, n_vocab=self.vocab_size, eos_token=sorted(self.end_tokens))
        self._guidance = llguidance

    def json_object(self) -> "Grammar":
        return self.json_schema({"type": "object"})

    def json_schema(self, schema: dict[str, Any]) -> "Grammar":
        return self._grammar("start: body\nbody: %json " + _schema_text(schema))

    def tool_call(self, tools: Sequence[dict[str, Any]], *, many: bool) -> "Grammar":
        """A call of one of the functions, in the template's own form; with `many` also several."""
        if not self.tokenizer.has_control("<tool_call>"):
            raise Refusal(400, "This model's tokenizer has no tool calls; leave out tool_choice.", param="tool_choice")
        calls = [_call_schema(tool["function"]["name"], tool["function"].get("parameters")) for tool in tools]
        lines = [f'call{i}: <tool_call> "\\n" body{i} "\\n" </tool_call>' for i in range(len(calls))]
        lines += [f"body{i}: %json {_schema_text(call)}" for i, call in enumerate(calls)]
        one = " | ".join(f"call{i}" for i in range(len(calls)))
        return self._grammar("\n".join(["start: call" + (' ("\\n" call)*' if many else ""), f"call: {one}", *lines]))

    def _grammar(self, lark: str) -> "Grammar":
        if self._guidance is None:
            raise Refusal(
                400,
                "This server cannot force an answer's form: the package llguidance is not installed. "
                "Leave out response_format and use tool_choice auto.",
                code="unsupported",
            )
        guidance: Any = self._guidance
        # A schema of 500 fields goes past the defaults (2,000 and 50,000 items); these are 25 ms a step, and 100 MB of lexer.
        limits = guidance.LLParserLimits(max_items_in_row=20_000, step_max_items=500_000, max_lexer_states=50_000)
        grammar = guidance.LLMatcher.grammar_from_lark(lark)
        matcher = guidance.LLMatcher(self._table, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            # The compiler's own words may quote the schema and nothing else; still only their kind is told.
            raise Refusal(400, "The JSON schema cannot be used: " + _reason(matcher.get_error()), code="schema")
        grammar = Grammar(matcher, self.vocab_size)
        try:
            grammar.allowed(())
        except ValueError as error:
            raise Refusal(400, "The JSON schema cannot be used: no answer follows it.", code="schema") from error
        return grammar


class _Vocabulary:
    """A tokenizer as llguidance wants to see one."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, end_tokens: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = min(end_tokens)
        self.tokens = [tokenizer.token_bytes(id) for id in range(tokenizer.num_ids)]
        self.special_token_ids = sorted(tokenizer.control_ids)
        self._id_of_byte = {token[0]: id for id, token in enumerate(self.tokens) if len(token) == 1}

    def __call__(self, text: str | bytes) -> list[int]:
        """Ids whose bytes are exactly the text's: llguidance takes them for what must come where a schema leaves no choice."""
        data = text.encode() if isinstance(text, str) else text
        ids = self._tokenizer.encode_text(data.decode("utf-8", errors="replace"))
        if b"".join(self.tokens[id] for id in ids) == data:
            return ids
        # The tokenizer writes letters composed (NFC), the schema had one in parts; or the bytes are no whole text.
        return [self._id_of_byte[byte] for byte in data]


class Grammar:
    """Which tokens may follow the tokens so far (of one answer, after its thought). Answers of one request share one."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._matchers: OrderedDict[tuple[int, ...], Any] = OrderedDict({(): matcher})
        self._start = matcher

    def allowed(self, tokens: Sequence[int]) -> Tensor:
        """bool over the vocabulary; after the grammar's end only the end tokens."""
        matcher = self._matcher(tuple(tokens))
        mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        bits = np.unpackbits(mask, bitorder="little")[: self.vocab_size].astype(bool)
        if matcher.is_error() or not bits.any():
            raise ValueError(STRAYED)
        return torch.from_numpy(bits)

    def _matcher(self, tokens: tuple[int, ...]) -> Any:
        known = self._matchers.get(tokens)
        if known is not None:
            self._matchers.move_to_end(tokens)
            return known
        parent = self._matchers.get(tokens[:-1])
        if parent is None:  # a state long gone (or a first call in the middle): read again from the start
            matcher = self._start.deep_copy()
            is_read = matcher.consume_tokens(list(tokens))
        else:
            matcher = parent.deep_copy()
            is_read = matcher.consume_token(tokens[-1])
        if not is_read:
            raise ValueError(STRAYED)
        self._matchers[tokens] = matcher
        while len(self._matchers) > KEPT:
            self._matchers.popitem(last=False)
        return matcher


def _call_schema(name: str, parameters: dict[str, Any] | None) -> dict[str, Any]:
    """A call's JSON. The parameters' own definitions move to its top, where "#/$defs/..." looks for them."""
    parameters = dict(parameters or {"type": "object"})
    top = {key: parameters.pop(key) for key in ("$defs", "definitions") if key in parameters}
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "arguments": _itself_moved(parameters)},
        "required": ["name", "arguments"],
        "additionalProperties": False,
        **_itself_moved(top),
    }


def _itself_moved(value: Any) -> Any:
    """The schema with "#", which means the parameters as a whole, pointing to where these stand now."""
    if isinstance(value, dict):
        return {
            k: "#/properties/arguments" if k == "$ref" and inner == "#" else _itself_moved(inner)
            for k, inner in value.items()
        }
    return [_itself_moved(inner) for inner in value] if isinstance(value, list) else value


def _schema_text(schema: dict[str, Any]) -> str:
    """The schema with our own rule for blanks, whatever the client's says."""
    return json.dumps({**schema, "x-guidance": {"whitespace_pattern": WHITESPACE}})


def _reason(text: str) -> str:
    line = next((line.strip() for line in text.splitlines() if line.strip()), "it is not valid.")
    return line[:200].rstrip(".") + "."
