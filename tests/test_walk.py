"""How many files and forms a request, a row and a pixel pass: the counts may fall, and not rise without a word."""

from pathlib import Path

import pytest

from dev.walk import Walk, walks

MAX_PASSED = {"request": (37, 30), "row": (23, 17), "pixel": (38, 18)}
"""Name -> modules, forms. What is aimed at is 20 and 8 for each. One of the modules is the media loader's file, which all three share."""


@pytest.fixture(scope="module")
def walked(tiny_folder: Path) -> dict[str, Walk]:
    return walks(tiny_folder)


@pytest.mark.parametrize("name", MAX_PASSED)
def test_a_walk_passes_no_more_files_and_forms_than_it_did(walked: dict[str, Walk], name: str) -> None:
    walk, (modules, forms) = walked[name], MAX_PASSED[name]
    assert len(walk.modules) <= modules, list(walk.modules)
    assert len(walk.forms) <= forms, list(walk.forms)


def test_the_walks_pass_what_lies_on_their_way(walked: dict[str, Walk]) -> None:
    assert {"serve/app.py", "engine/engine.py", "model/qwen3vl.py"} <= walked["request"].modules.keys()
    assert {"data/ingest.py", "prompt/template.py"} <= walked["row"].modules.keys() and "Record" in walked["row"].forms
    assert {"model/vision.py", "train/loss.py"} <= walked["pixel"].modules.keys() and "Batch" in walked["pixel"].forms
