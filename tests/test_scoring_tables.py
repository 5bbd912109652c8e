"""TEDS against hand-computed trees, the forms in which models write tables, and answers that are no table or too large."""

import random

import pytest

from qvl.scoring import tables
from qvl.scoring.rows_places import ROWS
from qvl.scoring.tables import Teds, teds

ONE = "<table><tbody><tr><td>abcd</td></tr></tbody></table>"


def table(rows: list[list[str]]) -> str:
    lines = ("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tbody>{''.join(lines)}</tbody></table>"


@pytest.mark.parametrize(
    ("answer", "gold", "whole", "structure"),
    [
        (ONE, ONE, 1, 1),
        # three nodes below the root; half of the cell's text is edited
        (ONE.replace("abcd", "abxy"), ONE, 1 - 0.5 / 3, 1),
        (ONE.replace("abcd", ""), ONE, 1 - 1 / 3, 1),
        # a cell too many: four nodes, one removed
        (table([["abcd", "e"]]), ONE, 1 - 1 / 4, 1 - 1 / 4),
        (ONE, table([["abcd", "e"]]), 1 - 1 / 4, 1 - 1 / 4),
        # a row of two cells missing of six nodes + tbody
        (table([["a", "b"]]), table([["a", "b"], ["c", "d"]]), 1 - 3 / 7, 1 - 3 / 7),
        # another span: the cell is another
        (ONE.replace("<td>", '<td colspan="2">'), ONE, 1 - 1 / 3, 1 - 1 / 3),
        # a tag inside a cell is an element of its own and two tokens of its text, of six
        (ONE.replace("abcd", "<b>abcd</b>"), ONE, 1 - (2 / 6) / 4, 1),
        # a head is no body
        (ONE.replace("tbody", "thead"), ONE, 1 - 1 / 3, 1 - 1 / 3),
    ],
)
def test_teds_is_one_minus_edits_over_nodes(answer: str, gold: str, whole: float, structure: float) -> None:
    assert ROWS["teds"]({"answer": answer, "gold": gold}) == pytest.approx({"teds": whole, "structure": structure})


@pytest.mark.parametrize(
    "answer",
    [
        "<table><tr><td>abcd</td></tr></table>",
        "<table><tr><th>abcd</th></tr></table>",
        "<table border=1><tr><td>abcd",
        "<TABLE><TBODY><TR><TD>abcd</TD></TR></TBODY></TABLE>",
        "<table>\n  <tr>\n    <td>\n      abcd\n    </td>\n  </tr>\n</table>",
        '<table><tr><td colspan="x" rowspan="1">abcd</td></tr></table>',
        f"Here it is:\n```html\n{ONE}\n```\nDone.",
        f"<think>a table <table></think>{ONE}",
        f"<html><body><div>{ONE}</div></body></html>",
        "| abcd |\n| --- |",
        "The table:\n\nabcd|\n:-:|\n",
    ],
)
def test_the_same_table_is_1_however_it_is_written(answer: str) -> None:
    assert teds(answer, ONE) == Teds(1.0, 1.0)
    if "<think>" not in answer:
        assert teds(ONE, answer) == Teds(1.0, 1.0)


def test_a_markdown_table_has_a_head_where_the_other_has_one() -> None:
    headed = "<table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>1</td><td>x|y</td></tr></tbody></table>"
    assert teds("|a|b|\n|---|---|\n|1|x\\|y|", headed) == Teds(1.0, 1.0)
    assert teds("|a|b|\n|---|---|\n|1|x\\|y|", table([["a", "b"], ["1", "x|y"]])) == Teds(1.0, 1.0)
    assert teds("|a < b|\n|---|", "<table><tr><td>a &lt; b</td></tr></table>") == Teds(1.0, 1.0)


def test_what_is_no_table_is_0_and_two_empties_are_1() -> None:
    assert teds("", "") == Teds(1.0, 1.0)
    assert teds("<table></table>", "<table></table>") == Teds(1.0, 1.0)
    assert teds("", ONE) == teds("There is none.", ONE) == teds(ONE, "") == Teds(0.0, 0.0)
    assert teds("<think>" + ONE, ONE) == Teds(0.0, 0.0)
    with pytest.raises(ValueError, match="holds no table"):
        teds(ONE, "nothing")
    with pytest.raises(ValueError, match="'gold'"):
        ROWS["teds"]({"answer": ONE})
    with pytest.raises(ValueError, match="'answer'"):
        ROWS["teds"]({"answer": 3, "gold": ONE})


def test_a_nested_answer_is_cut_to_0() -> None:
    value = teds("<table><tr><td>zzzz</td></tr>" + "<div>" * 10 + "</table>", ONE)
    assert 0 <= value.teds <= 1
    assert teds(
        '<table><tr><td colspan="2x">a</td></tr></table>', '<table><tr><td colspan="2">a</td></tr></table>'
    ) == Teds(1, 1)


def test_a_huge_table_is_compared_as_a_list_of_nodes() -> None:
    rows = [[f"{i} {j}" for j in range(50)] for i in range(100)]
    other = [[*row] for row in rows]
    other[3][7] = "wrong"
    assert teds(table(rows), table(rows)) == Teds(1.0, 1.0)
    value = teds(table(other), table(rows))
    assert value == Teds(pytest.approx(1 - 1 / 5101), 1.0, True)  # type: ignore[arg-type]
    assert teds(table(other[1:]), table(rows)).is_estimate


def test_the_work_of_one_comparison_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (table([[f"{letter}{i}{j}" for j in range(4)] for i in range(4)]) for letter in "ab")
    assert not teds(one, two).is_estimate
    for limit in ("MAX_RENAMES", "MAX_EDITS", "MAX_PAIRS"):
        with monkeypatch.context() as patch:
            patch.setattr(tables, limit, 30)
            assert teds(one, two).is_estimate
    long = "<table><tr><td>" + "<b>" * 5000
    assert 0 <= teds(long, two).teds <= 1


PIECES = [
    "<table>",
    "<tr>",
    "<td>",
    "<th>",
    "</td>",
    "</table>",
    "<tbody>",
    "<thead>",
    "colspan=",
    '<td colspan="3x" rowspan="0">',
]
PIECES += [
    "| a | b |\n",
    "|---|---|\n",
    "|",
    "\n",
    "a",
    "1",
    "<!--",
    "&amp;",
    "&#0;",
    "\0",
    "<?xml?>",
    "表",
    "🙂",
    "\\frac{1}{2}",
]
PIECES += ["<div>", "<script>", "<svg:g>", "{", "[", '"', "<think>", "</think>", "\ud800", "<caption>"]


def test_no_answer_raises() -> None:
    random.seed(0)
    gold = table([["a", "b"], ["1", "2"]])
    for _ in range(2000):
        answer = "".join(random.choices(PIECES, k=random.randint(0, 40)))
        value = teds(answer, gold)
        assert 0 <= value.teds <= 1 and 0 <= value.structure <= 1
    for piece in PIECES:
        assert 0 <= teds(piece * (100_000 // len(piece)), gold).teds <= 1
