"""Jinja text, run in a sandbox with limits on time and size."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from types import FrameType
from typing import Any

import jinja2
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import SecurityError
from jinja2.nodes import Concat
from jinja2.sandbox import ImmutableSandboxedEnvironment


@dataclass(frozen=True, kw_only=True)
class RenderLimits:
    """What a foreign template may use up."""

    template_bytes: int = 256_000
    output_chars: int = 16_000_000
    string_chars: int = 16_000_000
    seconds: float = 5.0


def run_template(
    template: str,
    variables: Mapping[str, Any],
    *,
    limits: RenderLimits | None = None,
    to_json: Callable[..., str] | None = None,
) -> str:
    """Renders Jinja text as Hugging Face does, in jinja2's immutable sandbox with limits on time and size."""
    limits = limits or RenderLimits()
    if len(template.encode()) > limits.template_bytes:
        raise ValueError(f"The chat template has more than {limits.template_bytes} bytes; it is refused.")
    environment = _Sandbox(limits, to_json or hf_json)
    try:
        with _deadline(limits.seconds):
            pieces: list[str] = []
            size = 0
            for piece in environment.from_string(template).generate(**variables):
                size += len(piece)
                if size > limits.output_chars:
                    raise ValueError(
                        f"The chat template writes more than {limits.output_chars} characters; it is stopped."
                    )
                pieces.append(piece)
            return "".join(pieces)
    except jinja2.TemplateError as error:
        raise ValueError(f"The folder's chat template failed: {str(error).rstrip('.')}.") from error
    except (TypeError, AttributeError, KeyError, IndexError, ArithmeticError, RecursionError, MemoryError) as error:
        raise ValueError(f"The folder's chat template failed: {type(error).__name__}: {error}.") from error


class _CheckedCode(CodeGenerator):
    """Sends `a ~ b` through the sandbox too, which has no hook for it."""

    def visit_Concat(self, node: Concat, frame: Any) -> None:
        self.write("environment.join_checked((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


# Filters that ask for a size inside text or reach for things a prompt has no use for.
REFUSED_FILTERS = ("center", "format", "wordwrap", "urlize", "filesizeformat", "random", "pprint", "xmlattr", "indent")
REFUSED_METHODS = ("format", "format_map", "expandtabs", "translate")


class _Sandbox(ImmutableSandboxedEnvironment):
    code_generator_class = _CheckedCode
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, limits: RenderLimits, to_json: Callable[..., str]) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], finalize=self._text
        )
        self.limits, self.to_json = limits, to_json
        kept = {name: self.globals[name] for name in ("range", "dict", "namespace")}
        self.globals = kept | {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self.filters = {name: filter for name, filter in self.filters.items() if name not in REFUSED_FILTERS}
        self.filters |= {"join": self._join, "replace": self._replace, "string": self._text, "tojson": self._to_json}

    def wrap_str_format(self, value: Any) -> Any:
        if isinstance(getattr(value, "__self__", None), str) and value.__name__ in REFUSED_METHODS:
            raise SecurityError(f"str.{value.__name__} is refused")
        return None

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return super().is_safe_attribute(obj, attr, value) and not (isinstance(obj, str) and attr in REFUSED_METHODS)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            raise SecurityError("text may not be formatted with %")
        if operator == "+" and _is_sized(left) and _is_sized(right):
            self.check_size(len(left) + len(right))
        if operator == "*" and (_is_sized(left) or _is_sized(right)):
            self.check_size(len(left) * right if _is_sized(left) else len(right) * left)
        if operator == "**" and (abs(right) > 64 or abs(left) > 2**64):
            raise SecurityError("a power is too large")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, str) and name == "join" and args:
            args = (self._joinable(args[0], owner), *args[1:])
        if isinstance(owner, str) and name == "replace" and len(args) >= 2:
            self._check_replace(owner, args[0], args[1])
        # str.center(10**9) and the like take their size as a number.
        for value in (*args, *kwargs.values()):
            if isinstance(value, int):
                self.check_size(value)
        return super().call(context, obj, *args, **kwargs)

    def _join(self, value: Any, d: Any = "", attribute: Any = None) -> str:
        """The filter; `attribute`, which would look into objects, is not taken."""
        if attribute is not None:
            raise SecurityError("join takes no attribute here")
        return str(d).join(self._joinable(value, str(d)))

    def _joinable(self, value: Any, between: str) -> list[str]:
        parts = [self._text(part) for part in value]
        self.check_size(sum(map(len, parts)) + len(between) * len(parts))
        return parts

    def _text(self, value: Any) -> str:
        """str, whose C code no clock would stop half-way in a list of lists."""
        self._check_whole(value)
        return value if isinstance(value, str) else str(value)

    def _to_json(self, value: Any, *args: Any, **kwargs: Any) -> str:
        self._check_whole(value)
        return self.to_json(value, *args, **kwargs)

    def _check_whole(self, value: Any) -> None:
        """As many numbers, letters and places in lists as a string may have, counted in Python so that the clock is looked at."""
        left, waiting = self.limits.string_chars, [value]
        while waiting:
            item = waiting.pop()
            if isinstance(item, Mapping):
                item = [*item.keys(), *item.values()]
            left -= len(item) if _is_sized(item) else 1
            if left < 0:
                self.check_size(self.limits.string_chars + 1)
            if isinstance(item, list | tuple):
                waiting += item

    def _replace(self, value: Any, old: Any, new: Any, count: int | None = None) -> str:
        text, old, new = self._text(value), self._text(old), self._text(new)
        self._check_replace(text, old, new)
        return text.replace(old, new, -1 if count is None else count)

    def _check_replace(self, text: Any, old: Any, new: Any) -> None:
        self.check_size(len(text) + (str(text).count(str(old)) + 1) * len(str(new)))

    def join_checked(self, parts: Sequence[Any]) -> str:
        texts = [self._text(part) for part in parts]
        self.check_size(sum(map(len, texts)))
        return "".join(texts)

    def check_size(self, size: int) -> None:
        if size > self.limits.string_chars:
            raise SecurityError(f"a string or list is longer than {self.limits.string_chars}")


def _is_sized(value: Any) -> bool:
    return isinstance(value, (str, list, tuple))


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def hf_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Stops Python code of this thread after a time, by looking at the clock on each line that runs."""
    end = time.monotonic() + seconds
    before = sys.gettrace()

    def watch(frame: FrameType, event: str, argument: Any) -> Any:
        if time.monotonic() > end:
            raise ValueError(f"The chat template runs longer than {seconds:g} seconds; it is stopped.")
        return watch

    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)
