"""An example: one question with its truth and the scorer's name; worlds make them, benchmarks ask them, rewards judge their answers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qvl.prompt.message import Message


@dataclass(frozen=True, kw_only=True)
class Example:
    """One question about one piece of evidence. The user's last part is the question; all before it is the evidence."""

    id: str
    category: str
    messages: tuple[Message, ...]
    answer: str
    truth: Mapping[str, Any]
    """What the scorer of that name needs, and facts about the scene."""
    scorer: str
    facts: Any = None
    """The plan's: what is shown, for exact labels of its parts."""
