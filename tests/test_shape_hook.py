"""The shape hook catches what it promises to catch, and nothing else."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from qvl.core.legend import LEGEND, axes
from shape_hook import PACKAGE, ShapeWatch

pytestmark = pytest.mark.no_shape_hook


def made_in_the_package(source: str) -> Callable[..., Any]:
    """A function `f` that looks as if it stood in qvl/core/made_up.py."""
    space: dict[str, Any] = {"torch": torch, "np": np}
    exec(compile(source, f"{PACKAGE}core/made_up.py", "exec"), space)
    return space["f"]


def broken(source: str, *args: Any) -> list[str]:
    function, watch = made_in_the_package(source), ShapeWatch()
    watch.start()
    try:
        function(*args)
    finally:
        found = watch.stop()
    return found


def test_a_tensor_with_too_few_axes_is_caught() -> None:
    assert broken("def f():\n  x_TD = torch.zeros(3)") == [
        "core/made_up.py, f: x_TD has shape (3,): its name promises 2 axes (TD) and it has 1"
    ]


def test_one_letter_with_two_sizes_in_a_function_is_caught() -> None:
    source = "def f(x_TD):\n  y_TF = torch.zeros(4, 2)\n  return y_TF"
    assert broken(source, torch.zeros(3, 2)) == [
        "core/made_up.py, f: y_TF has shape (4, 2): axis T has size 4, but 3 in another tensor of the same place"
    ]
    assert broken(source, torch.zeros(4, 2)) == []


def test_one_letter_twice_in_a_name_is_one_size() -> None:
    assert len(broken("def f():\n  mask_TT = torch.zeros(3, 4)")) == 1
    assert broken("def f():\n  mask_TT = torch.zeros(3, 3)") == []


def test_a_digit_is_a_literal_size() -> None:
    assert broken("def f():\n  position_3T = torch.zeros(4, 7)") == [
        "core/made_up.py, f: position_3T has shape (4, 7): axis 3 has size 4"
    ]
    assert broken("def f():\n  position_3T = torch.zeros(3, 7)") == []


def test_a_letter_outside_the_legend_is_caught() -> None:
    [found] = broken("def f():\n  x_TQ = torch.zeros(3, 4)")
    assert "suffix uses Q, which the legend" in found


def test_numpy_arrays_count_too() -> None:
    assert len(broken("def f():\n  x_T = np.zeros((3, 4))")) == 1


def test_names_without_suffix_and_values_that_are_no_tensors_are_free() -> None:
    assert (
        broken(
            "def f():\n  x = torch.zeros(3)\n  LIMIT_T = torch.zeros(3, 3)\n  n_T = 5\n  y_TD = None\n  z_Td = torch.zeros(1)"
        )
        == []
    )


def test_code_outside_the_package_is_free() -> None:
    def outside() -> None:
        x_TD = torch.zeros(3)
        assert x_TD.ndim == 1

    watch = ShapeWatch()
    watch.start()
    outside()
    assert watch.stop() == []


def test_a_function_that_raises_promised_nothing() -> None:
    def refuse() -> None:
        with pytest.raises(ValueError, match="too few"):
            made_in_the_package("def f(x_TD):\n  raise ValueError('too few axes')")(torch.zeros(3))

    watch = ShapeWatch()
    watch.start()
    refuse()
    assert watch.stop() == []


def test_a_function_that_returns_none_is_checked() -> None:
    assert len(broken("def f(x_TD):\n  if x_TD is None:\n    return 1\n  return None", torch.zeros(3))) == 1


def test_fields_of_a_returned_dataclass_are_checked_together() -> None:
    source = """
from dataclasses import dataclass
@dataclass
class Pair:
    token_T: torch.Tensor
    is_target_T: torch.Tensor
def f(n):
    return Pair(torch.zeros(3), torch.zeros(n))
"""
    [found] = broken(source, 4)
    assert found.startswith("core/made_up.py, Pair from f: is_target_T has shape (4,)")
    assert broken(source, 3) == []


def test_generators_are_checked_at_every_yield() -> None:
    source = "def g():\n  x_T = torch.zeros(2)\n  yield 1\n  x_T = torch.zeros(2, 2)\n  yield 2\ndef f():\n  return list(g())"
    assert broken(source) == ["core/made_up.py, g: x_T has shape (2, 2): its name promises 1 axes (T) and it has 2"]


def test_threads_started_meanwhile_are_watched() -> None:
    function, watch = made_in_the_package("def f():\n  x_TD = torch.zeros(3)"), ShapeWatch()
    watch.start()
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()
    assert len(watch.stop()) == 1


def test_fake_tensors_are_left_alone() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert broken("def f():\n  x_TD = torch.zeros(3)") == []


def test_suffixes_are_read_from_names() -> None:
    assert {
        name: axes(name) for name in ("x_TD", "position_3T", "is_target_T", "x_3", "batch", "TABLE_T", "cos_TH")
    } == {
        "x_TD": "TD",
        "position_3T": "3T",
        "is_target_T": "T",
        "x_3": None,
        "batch": None,
        "TABLE_T": None,
        "cos_TH": "TH",
    }
    assert all(len(letter) == 1 and letter.isupper() for letter in LEGEND)


def test_a_broken_promise_fails_the_test_it_happens_in(pytester: pytest.Pytester) -> None:
    pytester.makeconftest("pytest_plugins = ('shape_hook',)")
    pytester.makepyfile(
        f"""
        import pytest, torch
        space = {{"torch": torch}}
        exec(compile("def f(): x_TD = torch.zeros(3)", {PACKAGE + "core/made_up.py"!r}, "exec"), space)
        def test_caught(): space["f"]()
        @pytest.mark.no_shape_hook
        def test_left_alone(): space["f"]()
        """
    )
    result = pytester.runpytest_inprocess("-p", "no:randomly", "-p", "no:xdist")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*shape suffixes: core/made_up.py, f: x_TD has shape (3,)*"])
