"""TEDS of tables in HTML and Markdown, with and without text, as PubTabNet defines it: the one place that needs apted and lxml."""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rapidfuzz.distance import Levenshtein

from qvl.scoring.extract import final_text

MAX_PAIRS = 120_000
"""Nodes of one tree times nodes of the other, up to which trees are compared exactly: about 300 cells each, 3 seconds."""
MAX_RENAMES = 1_500_000
"""Comparisons of two nodes before the exact distance is given up. A count and no clock, so that a value is the same on every machine."""
MAX_EDITS = 10_000_000
"""Characters of cells that are compared (and 1/64 of the products of their lengths), before the exact distance is given up."""
MAX_CHARACTERS = 1_000_000
"""Of a table that is read at all."""
MAX_SPAN = 10_000


@dataclass(frozen=True)
class Teds:
    """1 for equal tables, 0 for nothing alike."""

    teds: float
    """Tags, spans and the text of cells."""
    structure: float
    """Tags and spans only."""
    is_estimate: bool = False
    """The trees were too large to compare exactly; see `teds`."""


def teds(answer: str, gold: str) -> Teds:
    """1 - tree edit distance / nodes of the larger table (its root not counted), as PubTabNet's code, cut to 0..1.

    Before that, on both sides: `<th>` is `<td>`; a table whose rows stand in no section gets a `<tbody>` where the other has sections;
    a span that is no number is 1; line breaks of the source around a cell's text do not count. The first table of the text is read
    (thought not counted), a Markdown table where there is no HTML; its first row is a head where the other table has one. Two empty
    texts give 1, one without a table 0.

    Trees beyond MAX_PAIRS, MAX_RENAMES or MAX_EDITS are compared as lists of nodes in reading order, where any change of a cell costs 1:
    an estimate.

    ValueError where `gold` is not empty and holds no table.
    """
    right = _table(gold, None)
    if right is None and html.unescape(re.sub(r"<[^>]*>", "", gold[:MAX_CHARACTERS])).strip():
        raise ValueError(f"the gold {gold[:60]!r} holds no table; expected HTML (<table>...) or an empty string.")
    said = _table(final_text(answer) or "", right)
    if right is None or said is None:
        both = float(right is None and not (final_text(answer) or "").strip())
        return Teds(both, both)
    if _has_sections(right) != _has_sections(said):
        _add_section(right)
        _add_section(said)
    most = max(_count(right), _count(said))
    if most == 0:
        return Teds(1.0, 1.0)
    whole, is_estimate = _distance(said, right)
    for node in (*_nodes(said), *_nodes(right)):
        node.content = ()
    bare, is_bare_estimate = _distance(said, right)
    value, structure = (max(0.0, min(1.0, 1.0 - distance / most)) for distance in (whole, bare))
    return Teds(value, structure, is_estimate or is_bare_estimate)


@dataclass(eq=False)
class _Node:
    tag: str
    spans: tuple[int, int] | None = None
    """Columns and rows, of a cell."""
    content: Sequence[str] = ()
    """A cell's characters, each tag inside it as one."""
    size: int = 1
    """HTML elements that the node stands for: a cell, with all inside it."""
    children: list["_Node"] = field(default_factory=list)

    @property
    def kind(self) -> tuple[str, tuple[int, int] | None]:
        return self.tag, self.spans


def _nodes(root: _Node) -> list[_Node]:
    """Parents before their children, in reading order."""
    found, waiting = [], [root]
    while waiting:
        node = waiting.pop()
        found.append(node)
        waiting += reversed(node.children)
    return found


def _count(table: _Node) -> int:
    """Elements within the table, as PubTabNet counts: the tags inside of cells too."""
    return sum(node.size for node in _nodes(table)) - 1


# ---- distance -----------------------------------------------------------------------------------------------------


def _distance(one: _Node, two: _Node) -> tuple[float, bool]:
    """Of the trees, and whether it is an estimate."""
    if _written(one) == _written(two):
        return 0.0, False
    if len(_nodes(one)) * len(_nodes(two)) <= MAX_PAIRS:
        try:
            return _tree_distance(one, two), False
        except (_TooLong, RecursionError):
            pass
    first, second = ([(node.kind, tuple(node.content)) for node in _nodes(root)] for root in (one, two))
    return float(Levenshtein.distance(first, second)), True


def _written(root: _Node) -> list[Any]:
    """Equal for equal trees: nodes in reading order with the number of their children say all."""
    return [(node.kind, len(node.children), tuple(node.content)) for node in _nodes(root)]


class _TooLong(Exception):
    pass


def _tree_distance(one: _Node, two: _Node) -> float:
    """Removing or adding a node costs 1, changing a tag or span 1, a cell's text the share of it that is edited."""
    try:
        from apted import APTED, Config
    except ImportError:
        raise ValueError("tables are compared by apted, which is not installed; run: pip install 'qvl[eval]'") from None
    costs: dict[tuple[_Node, _Node], float] = {}
    calls = edits = 0

    class Costs(Config):
        def rename(self, node1: _Node, node2: _Node) -> Any:
            nonlocal calls, edits
            calls += 1
            if calls > MAX_RENAMES:
                raise _TooLong
            if node1.kind != node2.kind:
                return 1.0
            if node1.content == node2.content:
                return 0.0
            pair = (node1, node2)
            if pair not in costs:
                lengths = len(node1.content), len(node2.content)
                edits += sum(lengths) + lengths[0] * lengths[1] // 64
                if edits > MAX_EDITS:
                    raise _TooLong
                costs[pair] = Levenshtein.distance(node1.content, node2.content) / max(lengths)
            return costs[pair]

    return float(APTED(one, two, Costs()).compute_edit_distance())


# ---- sections -----------------------------------------------------------------------------------------------------

_SECTIONS = ("thead", "tbody", "tfoot")


def _has_sections(table: _Node) -> bool:
    return any(child.tag in _SECTIONS for child in table.children) or not table.children


def _add_section(table: _Node) -> None:
    """A browser puts rows that stand in no section into a tbody."""
    rows = [child for child in table.children if child.tag == "tr"]
    if not _has_sections(table) and rows:
        at = table.children.index(rows[0])
        table.children = [child for child in table.children if child.tag != "tr"]
        table.children.insert(at, _Node("tbody", children=rows))


# ---- reading ------------------------------------------------------------------------------------------------------


def _table(text: str, other: _Node | None) -> _Node | None:
    """The first table of the text; of Markdown, with a head if `other` has one."""
    text = text[:MAX_CHARACTERS]
    if "<table" not in text.lower():
        has_head = other is not None and any(child.tag == "thead" for child in other.children)
        text = _from_markdown(text, has_head=has_head)
        if not text:
            return None
    try:
        from lxml.etree import ParserError, XMLSyntaxError  # pyright: ignore[reportAttributeAccessIssue]
        from lxml.html import HTMLParser, document_fromstring
    except ImportError:
        raise ValueError("tables are read by lxml, which is not installed; run: pip install 'qvl[eval]'") from None
    source = text[text.lower().index("<table") :].replace("\0", "").encode("utf-8", "replace")
    try:
        page = document_fromstring(source, HTMLParser(encoding="utf-8", remove_comments=True, remove_pis=True))
    except (ParserError, XMLSyntaxError):
        return None
    table = page.find(".//table")
    return None if table is None else _tree(table)


def _tree(element: Any) -> _Node:
    """Without recursion: answers nest as deep as they like."""
    root = _Node("table")
    waiting = [(element, root)]
    while waiting:
        parent, node = waiting.pop()
        for child in parent:
            made = _cell(child) if child.tag in ("td", "th") else _Node(str(child.tag))
            node.children.append(made)
            if made.spans is None:
                waiting.append((child, made))
    return root


def _cell(element: Any) -> _Node:
    spans = (_span(element.get("colspan")), _span(element.get("rowspan")))
    size = sum(1 for _ in element.iter())
    return _Node("td", spans, _trimmed(_tokens(element)), size)


def _span(value: str | None) -> int:
    """As HTML reads it: the digits at the front, 1 where there are none."""
    digits = re.match(r"\s*\+?(\d{1,9})", value or "")
    return min(int(digits[1]), MAX_SPAN) if digits else 1


def _tokens(cell: Any) -> list[str]:
    """Characters and tags in order, without the cell's own."""
    tokens: list[str] = list(cell.text or "")
    waiting: list[Any] = list(reversed(cell))
    while waiting:
        item = waiting.pop()
        if isinstance(item, list):
            tokens += item
            continue
        tokens += [f"<{item.tag}>", *(item.text or "")]
        # PubTabNet drops the text behind a cell that stands in a cell
        waiting.append([f"</{item.tag}>", *((item.tail or "") if item.tag != "td" else "")])
        waiting += reversed(item)
    return tokens


def _trimmed(tokens: list[str]) -> list[str]:
    """Without line breaks of the source: none at the edges, a space within. Spaces that were meant are the cell's text, as in PubTabNet."""
    if "\n" not in tokens and "\r" not in tokens:
        return tokens
    start, end = 0, len(tokens)
    while start < end and tokens[start].isspace():
        start += 1
    while end > start and tokens[end - 1].isspace():
        end -= 1
    kept: list[str] = []
    at = start
    while at < end:
        run = at
        while run < end and tokens[run].isspace():
            run += 1
        if run == at:
            kept.append(tokens[at])
            at += 1
            continue
        kept += [" "] if any(mark in "\r\n" for mark in tokens[at:run]) else tokens[at:run]
        at = run
    return kept


_RULE = re.compile(r"[ \t]*\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*")
_PIPE = re.compile(r"(?<!\\)\|")
_INLINE = re.compile(r"&lt;(/?(?:br|b|i|u|em|strong|sup|sub)\s?/?)&gt;", re.IGNORECASE)


def _from_markdown(text: str, *, has_head: bool) -> str:
    """The first Markdown table as HTML; empty where there is none. Rows are cut and filled to the width of the first."""
    lines = text.splitlines()
    for i in range(1, len(lines)):
        width = len(_fields(lines[i - 1]))
        if "|" not in lines[i - 1] or "-" not in lines[i] or not _RULE.fullmatch(lines[i][:10_000]):
            continue
        if len(_fields(lines[i])) != width:
            continue
        rows = [_fields(lines[i - 1])]
        for line in lines[i + 1 :]:
            if "|" not in line:
                break
            rows.append((_fields(line) + [""] * width)[:width])
        written = ["<tr>" + "".join(f"<td>{_escaped(cell)}</td>" for cell in row) + "</tr>" for row in rows]
        if has_head:
            body = f"<tbody>{''.join(written[1:])}</tbody>" if rows[1:] else ""
            return f"<table><thead>{written[0]}</thead>{body}</table>"
        return f"<table>{''.join(written)}</table>"
    return ""


def _fields(line: str) -> list[str]:
    line = line.strip()
    fields = _PIPE.split(line)
    if line.startswith("|"):
        fields = fields[1:]
    if fields and not fields[-1].strip() and line.endswith("|") and not line.endswith("\\|"):
        fields = fields[:-1]
    return [field.strip().replace("\\|", "|") for field in fields]


def _escaped(cell: str) -> str:
    return _INLINE.sub(r"<\1>", html.escape(html.unescape(cell), quote=False))
