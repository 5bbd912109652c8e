"""Config: frozen dataclasses to plain dicts and back, every value checked, every mistake answered in one sentence.

Plain means what YAML and JSON can hold: dict, list, str, int, float, bool, None. Fields may be these, or Path, Literal, Enum (written by
its member's name), Optional and other unions, tuple, list, dict with str keys, and nested dataclasses. Where a field takes one of several
dataclasses, the plain form carries `kind: ClassName`. A nested dataclass whose field is marked FLAT shares its parent's keys: groups of
settings for the code, one level of names for whoever writes YAML or flags.
"""

import dataclasses
import difflib
import enum
import functools
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

C = TypeVar("C")
FLAT: Mapping[str, bool] = types.MappingProxyType({"is_flat": True})
"""The metadata of a field whose dataclass shares its parent's keys: `field(default_factory=Group, metadata=FLAT)`."""
REQUIRED: Any = object()
"""Passed as `missing`: a field without a default must be given."""


def read_json(path: Path, what: str = "a JSON file") -> Any:
    """What a JSON file holds. ValueError in one sentence when it is missing, unreadable or not JSON; `what` says what it should be."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; {what} was expected.") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); {what} was expected.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from None


def read_object(path: Path, what: str = "a JSON file") -> dict[str, Any]:
    """The same for a file that must hold an object."""
    found = read_json(path, what)
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, expected a JSON object.")
    return found


def from_dict(cls: type[C], data: Mapping[str, Any], *, where: str = "config", missing: Any = REQUIRED) -> C:
    """Builds `cls` from plain data. `where` names the source in errors.

    With `missing`, fields that are neither given nor have a default hold that object, and __post_init__ does not run: a half-filled
    config, to be completed by someone who checks it, such as a command line.
    """
    return _build(cls, data, where, "", missing)


def to_dict(config: Any) -> dict[str, Any]:
    """The plain form of a config; `from_dict(type(config), to_dict(config))` equals it."""
    hints, plain = _hints(type(config)), {}
    for f in dataclasses.fields(config):
        if f.init:
            value = getattr(config, f.name)
            plain |= to_dict(value) if _is_flat(f) else {f.name: _plain(value, hints[f.name])}
    return plain


def near_miss(word: str, known: typing.Iterable[str]) -> str:
    """ "; did you mean 'temperature'?" when one of the known words is near, else the list of them."""
    known = sorted(known)
    return did_you_mean(word, known) or f"; known: {', '.join(known) or 'none'}"


def did_you_mean(word: str, known: typing.Iterable[str], cutoff: float = 0.6) -> str:
    """The first half of that; nothing where no known word is near."""
    near = difflib.get_close_matches(
        word[:64], list(known), n=1, cutoff=cutoff
    )  # a word may come from a stranger, a megabyte long
    return f"; did you mean {near[0]!r}?" if near else ""


def _build(cls: type[C], data: Any, where: str, path: str, missing: Any) -> C:
    if not isinstance(data, Mapping):
        raise ValueError(f"{_place(path, where)} is {_show(data)}; expected keys of {cls.__name__}")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    hints, known = _hints(cls), keys_of(cls)
    for key in data:
        if key not in known:
            raise ValueError(f"unknown key {path + str(key)!r} in {where}{near_miss(str(key), known)}")
    groups = {name: keys_of(hints[name]) for name, f in fields.items() if _is_flat(f)}
    data = {k: v for k, v in data.items() if not any(k in keys for keys in groups.values())} | {
        name: {k: data[k] for k in keys if k in data} for name, keys in groups.items()
    }
    values = {
        name: _build(hints[name], data[name], where, path, missing)
        if name in groups
        else _value(data[name], hints[name], where, path + name, missing)
        for name in fields
        if name in data
    }
    lacking = [
        name
        for name, f in fields.items()
        if name not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if lacking and missing is REQUIRED:
        names = ", ".join(path + name for name in lacking)
        raise ValueError(
            f"{where} lacks {names}; {cls.__name__} has no default for {'it' if len(lacking) == 1 else 'them'}"
        )
    if missing is REQUIRED:
        return cls(**values)
    half = object.__new__(cls)
    for name, f in fields.items():
        value = values.get(name, missing if name in lacking else _default(f))
        object.__setattr__(half, name, value)
    return half


def keys_of(cls: type) -> list[str]:
    """The keys of its plain form, those of flat fields in their place."""
    return [f.name for f in fields_of(cls)]


def fields_of(cls: type) -> list[dataclasses.Field[Any]]:
    """The fields behind these keys."""
    own = [f for f in dataclasses.fields(cls) if f.init]
    return [found for f in own for found in (fields_of(_hints(cls)[f.name]) if _is_flat(f) else [f])]


def _is_flat(field: dataclasses.Field[Any]) -> bool:
    return bool(field.metadata.get("is_flat", False))


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _value(value: Any, hint: Any, where: str, path: str, missing: Any) -> Any:
    """`value` as what `hint` asks for, or ValueError."""
    origin, args = get_origin(hint), get_args(hint)
    refuse = ValueError(f"{_place(path, where)} is {_show(value)}; expected {describe(hint)}")
    if hint is Any or hint is object:
        return value
    if origin is Literal:
        # `1 == True` in Python, hence the type beside the value.
        if (type(value), value) in [(type(a), a) for a in args]:
            return value
        raise _with_hint(refuse, value, args)
    if origin in (Union, types.UnionType):
        return _one_of(value, args, where, path, missing, refuse)
    if hint is None or hint is type(None):
        if value is None:
            return None
        raise refuse
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise refuse
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_value(v, args[0], where, f"{path}[{i}]", missing) for i, v in enumerate(value))
        if len(args) != len(value):
            raise refuse
        return tuple(
            _value(v, a, where, f"{path}[{i}]", missing) for i, (v, a) in enumerate(zip(value, args, strict=True))
        )
    if origin is list:
        if not isinstance(value, list | tuple):
            raise refuse
        return [_value(v, args[0], where, f"{path}[{i}]", missing) for i, v in enumerate(value)]
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
            raise refuse
        return {k: _value(v, args[1], where, f"{path}.{k}", missing) for k, v in value.items()}
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else _build(hint, value, where, path + ".", missing)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        if isinstance(value, hint):
            return value
        if isinstance(value, str) and value in hint.__members__:
            return hint[value]
        raise _with_hint(refuse, value, tuple(hint.__members__))
    if hint is Path:
        if isinstance(value, str | Path):
            return Path(value)
        raise refuse
    if hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        raise refuse
    if hint in (int, str, bool):
        if type(value) is hint:
            return value
        raise refuse
    raise TypeError(f"config fields cannot have type {hint!r} ({path})")


def _one_of(value: Any, options: tuple[Any, ...], where: str, path: str, missing: Any, refuse: ValueError) -> Any:
    if value is None and type(None) in options:
        return None
    kinds = {o.__name__: o for o in options if dataclasses.is_dataclass(o) and isinstance(o, type)}
    if isinstance(value, tuple(kinds.values())):
        return value
    if len(kinds) > 1 and isinstance(value, Mapping):
        kind = value.get("kind")
        if kind not in kinds:
            given = f"kind {kind!r}" if "kind" in value else "no kind"
            raise ValueError(f"{_place(path, where)} has {given}{near_miss(str(kind), kinds)}")
        return _build(kinds[kind], {k: v for k, v in value.items() if k != "kind"}, where, path + ".", missing)
    rest = [o for o in options if o is not type(None)]
    if len(rest) == 1:
        return _value(value, rest[0], where, path, missing)
    # The exact type first, so that 1 stays an int in `float | int` and True is never a number.
    for option in sorted(rest, key=lambda o: o is not type(value)):
        try:
            return _value(value, option, where, path, missing)
        except ValueError:
            continue
    raise refuse


def _plain(value: Any, hint: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        options = [o for o in get_args(hint) if dataclasses.is_dataclass(o)]
        tag = {"kind": type(value).__name__} if len(options) > 1 else {}
        return tag | to_dict(value)
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, Path):
        return str(value)
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType) and isinstance(value, list | tuple | dict):
        hint = next((a for a in args if get_origin(a) is type(value)), Any)
        origin, args = get_origin(hint), get_args(hint)
    if isinstance(value, list | tuple):
        fixed = origin is tuple and Ellipsis not in args and len(args) == len(value)
        hints = args if fixed else [args[0] if args else Any] * len(value)
        return [_plain(v, h) for v, h in zip(value, hints, strict=True)]
    if isinstance(value, dict):
        return {k: _plain(v, args[1] if args else Any) for k, v in value.items()}
    return value


def describe(hint: Any) -> str:
    """A type in words a person who writes YAML knows."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(repr(a) for a in args)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(a) for a in args)
    if origin is tuple:
        if len(args) == 2 and args[1] is Ellipsis:
            return f"a list of {describe(args[0])}"
        return f"a list of {len(args)}: " + ", ".join(describe(a) for a in args)
    if origin is list:
        return f"a list of {describe(args[0])}"
    if origin in (dict, Mapping):
        return f"a mapping from names to {describe(args[1])}"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "one of " + ", ".join(hint.__members__)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return f"keys of {hint.__name__}"
    words = {
        int: "a whole number",
        float: "a number",
        str: "text",
        bool: "true or false",
        Path: "a path",
        type(None): "null",
    }
    return words.get(hint, str(hint))


def _with_hint(error: ValueError, value: Any, known: tuple[Any, ...]) -> ValueError:
    near = difflib.get_close_matches(str(value), [str(k) for k in known], n=1)
    return ValueError(f"{error}; did you mean {near[0]!r}?") if near else error


def _place(path: str, where: str) -> str:
    return f"{path.rstrip('.')!r} in {where}" if path else where


def _show(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
