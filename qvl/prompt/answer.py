"""What the model wrote becomes an assistant's message: thought, words, tool calls."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qvl.prompt.message import Message, Text, Thinking, ToolCall
from qvl.prompt.tokenizer import Tokenizer

MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
ENDS = ("<|im_end|>", "<|endoftext|>")


@dataclass(frozen=True, kw_only=True)
class Answer:
    message: Message
    is_thought_closed: bool = True
    """False when the text ended before `</think>`; all of it is then the thought."""
    problems: tuple[str, ...] = ()
    """One sentence for each tool call that could not be read; its text stays among the words."""


@dataclass(frozen=True)
class _Piece:
    text: str
    is_mark: bool


def parse_answer(
    answer: str | Sequence[int], *, tokenizer: Tokenizer | None = None, starts_in_thought: bool = False
) -> Answer:
    """Reads ids or text.

    Ids are the surer form: `</tool_call>` spelled in letters inside an argument is then no end of a call.
    `starts_in_thought`: the prompt ended in `<think>`, as the Thinking template's does, so the text up to `</think>` is
    the thought.
    """
    if isinstance(answer, str):
        pieces = _pieces_of_text(answer)
    elif tokenizer is None:
        raise ValueError("Ids were given without a tokenizer; give one, or the text.")
    else:
        pieces = _pieces_of_ids(answer, tokenizer)
    thought, is_closed, pieces = _split_thought(pieces, starts_in_thought)
    words, calls, problems = _split_calls(pieces)
    parts = [] if thought is None else [Thinking(thought.strip("\n"))]
    if thought is not None:
        words = words.lstrip("\n")
    message = Message("assistant", (*parts, *([Text(words)] if words else []), *calls))
    return Answer(message=message, is_thought_closed=is_closed, problems=tuple(problems))


def _pieces_of_text(text: str) -> list[_Piece]:
    for end in ENDS:
        text = text.split(end)[0]
    pattern = "(" + "|".join(map(re.escape, MARKS)) + ")"
    return [_Piece(piece, i % 2 == 1) for i, piece in enumerate(re.split(pattern, text)) if piece]


def _pieces_of_ids(ids: Sequence[int], tokenizer: Tokenizer) -> list[_Piece]:
    ends = {tokenizer.control_id(name) for name in ENDS if tokenizer.has_control(name)}
    marks = {tokenizer.control_id(name): name for name in MARKS if tokenizer.has_control(name)}
    pieces: list[_Piece] = []
    run: list[int] = []
    for id in [*ids, None]:
        if id is not None and id not in ends and id not in marks:
            run.append(id)
            continue
        if run:
            pieces.append(_Piece(tokenizer.decode(run), False))
            run = []
        if id is None or id in ends:
            break
        pieces.append(_Piece(marks[id], True))
    return pieces


def _split_thought(pieces: list[_Piece], starts_in_thought: bool) -> tuple[str | None, bool, list[_Piece]]:
    """(thought or None, whether it was closed, the rest)."""
    opening = next((i for i, piece in enumerate(pieces) if piece.text.strip()), len(pieces))
    opens_itself = opening < len(pieces) and pieces[opening] == _Piece("<think>", True)
    if not (starts_in_thought or opens_itself):
        return None, True, pieces
    if opens_itself:
        pieces = pieces[opening + 1 :]
    end = next((i for i, piece in enumerate(pieces) if piece == _Piece("</think>", True)), None)
    if end is None:
        return _join(pieces), False, []
    return _join(pieces[:end]), True, pieces[end + 1 :]


def _split_calls(pieces: list[_Piece]) -> tuple[str, list[ToolCall], list[str]]:
    words = ""
    calls: list[ToolCall] = []
    problems: list[str] = []
    at = 0
    while at < len(pieces):
        piece = pieces[at]
        if piece != _Piece("<tool_call>", True):
            words += piece.text
            at += 1
            continue
        end = next((i for i in range(at, len(pieces)) if pieces[i] == _Piece("</tool_call>", True)), None)
        if end is None:
            problems.append("The answer ends inside a tool call.")
            words += _join(pieces[at:])
            break
        call = read_call(_join(pieces[at + 1 : end]))
        if isinstance(call, ToolCall):
            calls.append(call)
            words = words.removesuffix("\n")  # the template's own line break before a call
        else:
            problems.append(call)
            words += _join(pieces[at : end + 1])
        at = end + 1
    return words if words.strip() or not calls else "", calls, problems


def _join(pieces: Iterable[_Piece]) -> str:
    return "".join(piece.text for piece in pieces)


CALL_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*')


def read_call(body: str) -> ToolCall | str:
    """A call from the JSON between its marks, or a sentence that says what is wrong with it.

    The arguments stay the text the model wrote, so that the conversation renders to the same ids when it comes back.
    """
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        return f"A tool call is no JSON: {error}."
    if not isinstance(data, dict) or not isinstance(data.get("name"), str) or not data["name"]:
        return "A tool call has no name."
    arguments = data.get("arguments", {})
    if isinstance(arguments, str):  # some write the object as text inside the JSON
        try:
            inner = json.loads(arguments)
        except (ValueError, RecursionError):
            inner = None
        return (
            ToolCall(data["name"], arguments) if isinstance(inner, dict) else "A tool call's arguments are no object."
        )
    if not isinstance(arguments, dict):
        return "A tool call's arguments are no object."
    head = CALL_HEAD.match(body)
    if head is None or data.keys() != {"name", "arguments"}:
        return ToolCall(data["name"], json.dumps(arguments, ensure_ascii=False))
    _, end = json.JSONDecoder().raw_decode(body, head.end())
    return ToolCall(data["name"], body[head.end() : end])
