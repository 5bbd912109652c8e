"""The shape legend: what each letter of a tensor's suffix stands for, in the whole house."""

import re

LEGEND: dict[str, str] = {
    "T": "tokens, all sequences end to end",
    "S": "sequences",
    "P": "patches, all frames end to end",
    "X": "numbers in one raw patch",
    "M": "visual tokens after the merger",
    "R": "rows of hidden states whose next token is a training target",
    "I": "images or frame groups",
    "D": "text width",
    "C": "vision width",
    "N": "query heads",
    "K": "key/value heads",
    "H": "head width",
    "F": "MLP width",
    "V": "vocabulary",
    "E": "experts",
    "A": "active experts",
    "L": "layers",
    "G": "answers per prompt",
    "B": "cache blocks",
    "Z": "slots per block",
}

_SUFFIX = re.compile(r"[a-z]\w*?_([A-Z0-9]*[A-Z][A-Z0-9]*)$")


def axes(name: str) -> str | None:
    """The shape a name promises, one character an axis: `position_3T` -> "3T", `batch` -> None. A digit is a literal size."""
    match = _SUFFIX.match(name)
    return match[1] if match else None


def broken_promise(name: str, shape: tuple[int, ...], sizes: dict[str, int]) -> str | None:
    """What is wrong with a tensor called `name` of this shape, as half a sentence; None when it keeps its promise.

    `sizes` maps the letters met so far in the same place to their sizes. New letters are added to it.
    """
    promised = axes(name)
    if promised is None:
        return None
    if unknown := sorted({c for c in promised if not c.isdigit() and c not in LEGEND}):
        return f"its suffix uses {', '.join(unknown)}, which the legend in qvl/core/legend.py does not have"
    if len(promised) != len(shape):
        return f"its name promises {len(promised)} axes ({promised}) and it has {len(shape)}"
    for symbol, size in zip(promised, shape, strict=True):
        expected = int(symbol) if symbol.isdigit() else sizes.setdefault(symbol, size)
        if size != expected:
            where = "" if symbol.isdigit() else " in another tensor of the same place"
            return (
                f"axis {symbol} has size {size}, but {expected}{where}" if where else f"axis {symbol} has size {size}"
            )
    return None
