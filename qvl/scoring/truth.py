"""Reading a truth: what a scorer needs must be there, or the example is at fault, not the answer."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

Truth = Mapping[str, Any]


def needed(truth: Truth, key: str) -> Any:
    if key not in truth:
        raise ValueError(f"the truth has {', '.join(map(repr, truth)) or 'nothing'}; this scorer needs {key!r}.")
    return truth[key]


def golds(truth: Truth, key: str = "answer") -> list[str]:
    """One right answer or a list of them."""
    value = needed(truth, key)
    texts = [value] if isinstance(value, str) else list(value)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"the truth's {key!r} is {value!r}; give a text or a list of texts.")
    return texts


def numbers(value: Any, length: int, name: str) -> tuple[float, ...]:
    is_list = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == length
    if not is_list or not all(isinstance(n, int | float) and math.isfinite(n) for n in value):
        raise ValueError(f"the truth's {name!r} is {value!r}; give {length} finite numbers.")
    return tuple(float(n) for n in value)
