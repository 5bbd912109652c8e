"""`qvl score`: rows of answers in, scores out in their order; what cannot be scored says why, and nothing raises."""

import json
from pathlib import Path
from typing import Any

import pytest

from qvl.commands import cli
from qvl.scoring.rows import ROW_SCORERS, score_row

TABLE = (
    "math choice anls relaxed_pix2struct edit_distance ocrbench mra temporal_iou read_boxes box_iou point_in_box box3d_iou map teds "
    "repetition language_mix rouge_l cider pass_at_k standard_error code sandbox"
)


def scored(tmp_path: Path, lines: list[str]) -> list[dict[str, Any]]:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text("\n".join(lines) + "\n")
    assert cli.main(["score", str(rows), "--out", str(out)]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_every_scorer_of_the_table_is_there() -> None:
    assert set(TABLE.split()) <= ROW_SCORERS.keys()


@pytest.mark.parametrize(
    ("scorer", "given", "value"),
    [
        ("choice", {"answer": "The answer is (B).", "letters": ["A", "B", "C"]}, "B"),
        ("anls", {"answer": "helo", "golds": ["hello"]}, 0.8),
        ("relaxed_pix2struct", {"answer": "104", "gold": "100"}, 1.0),
        ("edit_distance", {"answer": "kitten", "gold": "sitting"}, {"distance": 3, "normalised": 3 / 7}),
        ("temporal_iou", {"answer": "<10.2 seconds> to <15.0 seconds>", "span": [10.2, 15.0]}, 1.0),
        ("box_iou", {"a": [0, 0, 2, 2], "b": [1, 1, 3, 3]}, 1 / 7),
        ("pass_at_k", {"samples": 4, "correct": 1, "k": 2}, {"pass_at_k": 0.5, "pass_hat_k": 0.0}),
    ],
)
def test_a_row_gets_its_value(tmp_path: Path, scorer: str, given: dict[str, Any], value: Any) -> None:
    (found,) = scored(tmp_path, [json.dumps({"id": 7, "scorer": scorer, "input": given})])
    assert (found["id"], found["path"], found["reason"]) == (7, "rule", "")
    assert found["value"] == pytest.approx(value) if not isinstance(value, str) else found["value"] == value


def test_what_cannot_be_scored_says_why_and_the_rest_is_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = json.dumps({"id": "good", "scorer": "anls", "input": {"answer": "a", "golds": ["a"]}})
    rows = [
        "{not json",
        json.dumps([1]),
        json.dumps({"id": 1, "scorer": "anlss", "input": {}}),
        json.dumps({"id": 2, "scorer": "anls", "input": []}),
        json.dumps({"id": 3, "scorer": "anls", "input": {"answer": "a"}}),
        json.dumps({"id": 4, "scorer": "choice", "input": {"answer": "I cannot tell.", "letters": ["A", "B"]}}),
        good,
    ]
    found = scored(tmp_path, rows)
    assert [row["path"] for row in found] == ["failed"] * 6 + ["rule"]
    assert all(row["reason"] and row["value"] is None for row in found[:6])
    assert "did you mean 'anls'" in found[2]["reason"] and "golds" in found[4]["reason"]
    out = capsys.readouterr().out
    assert "1 of 7 rows are scored" in out and "6 are not" in out


def test_a_missing_file_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["score", str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "out.jsonl")]) == 2
    assert "none.jsonl" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("row", [None, 3, "x", [], {}, {"scorer": []}, {"scorer": "map", "input": {}}, {"input": {}}])
def test_no_row_raises(row: Any) -> None:
    assert score_row(row).path == "failed"
