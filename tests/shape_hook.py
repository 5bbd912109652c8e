"""A pytest plugin that proves shape suffixes: at every return inside qvl/, each suffixed tensor has the axes its name promises.

A profile function sees each return. Frames outside qvl/ and frames without suffixed names cost one dict look-up. What is found is
collected and fails the test when its body is done, because an exception raised inside a profile function would end the profiling.
"""

import dataclasses
import dis
import sys
import threading
from collections.abc import Generator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
import pytest
import torch

from qvl.core.legend import axes, broken_promise

PACKAGE = str(Path(__file__).resolve().parent.parent / "qvl") + "/"
# Exactly these: subclasses (fake tensors, DTensor) stand for something else than their numbers.
REAL = (torch.Tensor, torch.nn.Parameter, np.ndarray)
_ENDS = {dis.opmap[name] for name in ("RETURN_VALUE", "RETURN_CONST", "YIELD_VALUE") if name in dis.opmap}


@dataclasses.dataclass(frozen=True)
class Watched:
    """What the hook remembers of a function: its suffixed locals, and its bytecode to tell a return from an exception."""

    names: tuple[str, ...]
    code: bytes


class ShapeWatch:
    """Collects broken promises between start and stop, in this thread and in threads started meanwhile."""

    def __init__(self, package: str = PACKAGE) -> None:
        self.package = package
        self.broken: list[str] = []
        self._functions: dict[CodeType, Watched | None] = {}
        self._classes: dict[type, tuple[str, ...]] = {}

    def start(self) -> None:
        self._before = sys.getprofile()
        threading.setprofile(self._see)
        sys.setprofile(self._see)

    def stop(self) -> list[str]:
        sys.setprofile(self._before)
        threading.setprofile(None)
        broken, self.broken = list(dict.fromkeys(self.broken)), []
        return broken

    def _see(self, frame: FrameType, event: str, result: Any) -> None:
        if event != "return":
            return
        code = frame.f_code
        try:
            watched = self._functions[code]
        except KeyError:
            watched = self._functions[code] = self._watch(code)
        if watched is None:
            return
        # An exception passing through also arrives as "return" with None: the function kept no promise, it made none.
        if result is None and watched.code[frame.f_lasti] not in _ENDS:
            return
        if watched.names:
            values = frame.f_locals
            found = {name: values[name] for name in watched.names if name in values}
            self._check(found, f"{code.co_filename.removeprefix(self.package)}, {code.co_qualname}")
        names = self._classes.get(type(result))
        if names is None:
            names = self._classes[type(result)] = _suffixed_fields(type(result))
        if names:
            fields = {name: getattr(result, name, None) for name in names}
            self._check(
                fields,
                f"{code.co_filename.removeprefix(self.package)}, {type(result).__name__} from {code.co_qualname}",
            )

    def _watch(self, code: CodeType) -> Watched | None:
        if not code.co_filename.startswith(self.package):
            return None
        names = dict.fromkeys((*code.co_varnames, *code.co_cellvars, *code.co_freevars))
        return Watched(names=tuple(name for name in names if axes(name)), code=code.co_code)

    def _check(self, values: dict[str, Any], where: str) -> None:
        sizes: dict[str, int] = {}
        for name, value in values.items():
            if type(value) in REAL and (wrong := broken_promise(name, tuple(value.shape), sizes)):
                self.broken.append(f"{where}: {name} has shape {tuple(value.shape)}: {wrong}")


def _suffixed_fields(cls: type) -> tuple[str, ...]:
    if not dataclasses.is_dataclass(cls):
        return ()
    return tuple(f.name for f in dataclasses.fields(cls) if axes(f.name))


_watch = ShapeWatch()


def _watched(item: pytest.Item) -> Generator[None, Any, Any]:
    if item.get_closest_marker("no_shape_hook"):
        return (yield)
    _watch.start()
    try:
        result = yield
    finally:
        broken = _watch.stop()
    if broken:
        pytest.fail("shape suffixes: " + "; ".join(broken), pytrace=False)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, Any, Any]:
    return (yield from _watched(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    return (yield from _watched(item))
