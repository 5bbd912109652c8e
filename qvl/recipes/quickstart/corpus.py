"""Real text that every machine already has: the prose inside the docstrings of pinned scientific packages."""

import ast
import hashlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("sklearn", "skimage", "scipy")
"""Installed by the test extra at the versions in constraints.txt, so the text is the same everywhere."""

LINE = 40
"""Letters of a line that tells texts apart."""


def documents(packages: tuple[str, ...] = PACKAGES) -> list[str]:
    """One document a module: its docstrings in order, longest modules first, duplicates dropped."""
    seen: set[str] = set()
    found: list[str] = []
    for package in packages:
        for path in sorted(package_folder(package).rglob("*.py")):
            if "tests" in path.parts:
                continue
            text = "\n\n".join(docstrings(path))
            digest = hashlib.sha256(text.encode()).hexdigest()
            if len(text) > 500 and digest not in seen:
                seen.add(digest)
                found.append(text)
    return found


def split(texts: list[str]) -> tuple[list[str], list[str]]:
    """(to learn from, held out): every twentieth document is held out, without the paragraphs of which a line of LINE letters stands in a
    text to learn from, as descriptions of parameters do."""
    learned = [text for i, text in enumerate(texts) if i % 20]
    known = {line for text in learned for line in _lines(text)}
    held_out = ["\n\n".join(p for p in text.split("\n\n") if known.isdisjoint(_lines(p))) for text in texts[::20]]
    return learned, held_out


def _lines(text: str) -> list[str]:
    lines = (" ".join(line.split()) for line in text.splitlines())
    return [line for line in lines if len(line) >= LINE]


def package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"the quickstart reads real text from the package {name}, which is missing; run: make setup")
    return Path(spec.submodule_search_locations[0])


def docstrings(path: Path) -> Iterator[str]:
    """Docstrings of the module, its classes and functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text
