"""Rows with a chosen and a rejected answer, as ms-swift, LLaMA-Factory and TRL write them, become two rows of one conversation each."""

from collections.abc import Mapping, Sequence
from typing import Any

from qvl.data.record import answer_place, same_turn

REJECTED_KEYS = {"rejected_response", "rejected_messages"}
PAIR_KEYS = {"prompt", "chosen", "rejected"} | REJECTED_KEYS
"""Keys of a row that are read when it is imported as a pref record."""
_ASSISTANTS = ("assistant", "gpt", "bot")
_ROLE_KEYS = ("role", "from")
_MEDIA = ("image", "images", "video", "videos")


def split_pair(row: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(chosen row, rejected row), each with its conversation where a row without a pair has it. ValueError says what is lacking.

    Read are ms-swift's `rejected_response` (in place of the last answer) and `rejected_messages` (a conversation, or its end),
    LLaMA-Factory's `chosen` and `rejected` behind `conversations` or `messages`, and TRL's with a `prompt` or with the prompt in both.
    """
    for name in _MEDIA:
        if row.get(f"rejected_{name}") and row[f"rejected_{name}"] != row.get(name):
            raise ValueError(
                f"the row has 'rejected_{name}' of its own; a pair asks one question, so both answers see the same media."
            )
    rest = {key: value for key, value in row.items() if key not in PAIR_KEYS}
    if row.get("chosen") or row.get("rejected"):
        place, before, keeps_prompt = _prompt(row)
        chosen, rejected = (_turns(row, name, keeps_prompt, before, place) for name in ("chosen", "rejected"))
        return {**rest, place: chosen}, {**rest, place: rejected}
    if messages := row.get("rejected_messages"):
        return rest, _with_messages(rest, _list(messages, "rejected_messages"))
    if text := row.get("rejected_response"):
        if not isinstance(text, str):
            raise ValueError(f"rejected_response is a {type(text).__name__}; text was expected.")
        return rest, _with_answer(rest, text)
    raise ValueError(
        "the row has no rejected answer; a pref record needs rejected_response, rejected_messages, or chosen and rejected."
    )


def rejected_turns(
    chosen: Sequence[Mapping[str, Any]], rejected: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """What stands in the second conversation in place of the first one's answer. ValueError where they part before it."""
    place = answer_place(chosen)
    if answer_place(rejected) != place or not all(map(same_turn, chosen[:place], rejected[:place])):
        raise ValueError(
            "the chosen and the rejected conversation differ before the answer to the last question; a pair has one prompt."
        )
    return list(rejected[place:])


def _prompt(row: Mapping[str, Any]) -> tuple[str, list[Any], bool]:
    """(key of the conversation, what is said before both answers, whether the answers repeat it)."""
    for key in ("conversations", "messages"):
        if row.get(key):
            return key, _list(row[key], key), False
    prompt, chosen = row.get("prompt"), row.get("chosen")
    if isinstance(chosen, Sequence) and not isinstance(chosen, str) and chosen and not _is_answer(chosen[0]):
        return "messages", [], True
    if not prompt:
        raise ValueError(
            "the row has a chosen and a rejected answer and no question; give prompt, messages or conversations."
        )
    return (
        "messages",
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _list(prompt, "prompt"),
        False,
    )


def _turns(row: Mapping[str, Any], name: str, keeps_prompt: bool, before: list[Any], place: str) -> list[Any]:
    """The conversation that ends with this answer."""
    value = row.get(name)
    if not value:
        raise ValueError(f"the row has no {name!r} answer; a pref record needs chosen and rejected.")
    if isinstance(value, str):
        said = {"from": "gpt", "value": value} if place == "conversations" else {"role": "assistant", "content": value}
        turns: list[Any] = [said]
    else:
        turns = [value] if isinstance(value, Mapping) else _list(value, name)
    if keeps_prompt == _is_answer(turns[0]):
        raise ValueError("one of chosen and rejected repeats the question and the other does not; make them alike.")
    return [*before, *turns]


def _with_messages(row: Mapping[str, Any], messages: list[Any]) -> dict[str, Any]:
    if _is_answer(messages[0]) and row.get("messages"):
        given = _list(row["messages"], "messages")
        while given and (_is_answer(given[-1]) or _role(given[-1]) in ("tool", "tool_call", "tool_response")):
            given = given[:-1]
        messages = [*given, *messages]
    others = {key: value for key, value in row.items() if key not in ("query", "response", "history", "system")}
    return {**others, "messages": messages}


def _with_answer(row: Mapping[str, Any], text: str) -> dict[str, Any]:
    if "response" in row:
        return {**row, "response": text}
    key = "conversations" if row.get("conversations") else "messages"
    turns = _list(row.get(key), key)
    if not _is_answer(turns[-1]):
        raise ValueError("rejected_response stands in place of the last answer, and the conversation ends with none.")
    return {**row, key: [*turns[:-1], {"role": "assistant", "content": text}]}


def _list(value: Any, name: str) -> list[Any]:
    if isinstance(value, str | Mapping) or not isinstance(value, Sequence) or not value:
        raise ValueError(f"{name} is {str(value)[:60]!r}; a list that is not empty was expected.")
    return list(value)


def _role(turn: Any) -> Any:
    return next((turn[key] for key in _ROLE_KEYS if turn.get(key)), None) if isinstance(turn, Mapping) else None


def _is_answer(turn: Any) -> bool:
    return _role(turn) in _ASSISTANTS
