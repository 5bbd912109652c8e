"""Rules of the house that a machine can hold: captions, doors, third parties, and docs that equal what the code says."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from dev import blocks
from qvl.commands import cli

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted((ROOT / "qvl").rglob("*.py"))
TEXT = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".json", ".jsonl", ".jinja", ".html", ".css", ".js", ".sh", ""}


def tracked() -> list[Path]:
    """Every text file of the project: all but what .gitignore names."""
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split()]
    found = [
        p for top in ROOT.iterdir() if not any(top.match(i) for i in [*ignored, ".git"]) for p in (top, *top.rglob("*"))
    ]
    return [p for p in found if p.is_file() and p.suffix in TEXT and not any(part in ignored for part in p.parts)]


def name(file: Path) -> str:
    return str(file.relative_to(ROOT))


def room(file: Path) -> str:
    return file.relative_to(ROOT / "qvl").parts[0]


def imports(file: Path) -> Iterator[tuple[str, bool]]:
    """(module, whether inside a function) of every absolute import."""

    def walk(node: ast.AST, inside: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{name(file)} imports relatively; write the whole name"
                yield child.module or "", inside
            yield from walk(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    yield from walk(ast.parse(file.read_text(encoding="utf-8")), False)


def test_every_file_says_in_its_first_line_what_it_is_for() -> None:
    captions = {name(file): cli.caption(file) for file in MODULES}
    assert [file for file, text in captions.items() if not text] == []
    texts = list(captions.values())
    assert [file for file, text in captions.items() if texts.count(text) > 1] == []


def test_core_holds_six_files_and_no_more() -> None:
    files = {file.name for file in (ROOT / "qvl" / "core").glob("*.py")}
    assert files == {"__init__.py", "batch.py", "config.py", "device.py", "files.py", "legend.py", "log.py"}


def test_the_floors_of_the_contract_and_of_the_readme_are_the_same() -> None:
    [floors] = [c for c in pyproject()["tool"]["importlinter"]["contracts"] if c["id"] == "floors"]
    assert [tuple(re.findall(r"\w+", layer)) for layer in floors["layers"]] == list(blocks.FLOORS)


def test_the_floors_that_learn_and_serve_stand_on_four_packages() -> None:
    allowed = {"qvl", "torch", "numpy", "safetensors", "tokenizers"} | sys.stdlib_module_names
    asked_for = {"liger_kernel"}  # by loss_kernel="liger", late
    strangers = {
        (name(file), module)
        for file in MODULES
        if room(file) in ("core", "model", "engine", "train")
        for module, late in imports(file)
        if module.partition(".")[0] not in (allowed | asked_for if late else allowed)
    }
    assert strangers == set()


def packages(requirements: list[str]) -> set[str]:
    """The import names of what pip is asked for."""
    names = {"pillow": "PIL", "pyyaml": "yaml", "scikit-learn": "sklearn", "scikit-image": "skimage"}
    names |= {"liger-kernel": "liger_kernel", "math-verify": "math_verify"}
    return {names.get(d, d) for d in (re.split(r"[\[<>=!~; ]", r)[0] for r in requirements)}


def test_every_package_that_is_imported_is_declared() -> None:
    """At the top of a file only what a plain `pip install qvl` brings; extras late, or where they are the room's whole business."""
    project = pyproject()["project"]
    always = packages(project["dependencies"]) | {"qvl"} | sys.stdlib_module_names
    extras = {
        package for requirements in project["optional-dependencies"].values() for package in packages(requirements)
    }
    serve = packages(project["optional-dependencies"]["serve"])
    undeclared = set()
    for file in MODULES:
        for module, late in imports(file):
            allowed = always | (extras if late else set()) | (serve if room(file) == "serve" else set())
            if module.partition(".")[0] not in allowed:
                undeclared.add((name(file), module, "late" if late else "at the top"))
    assert undeclared == set()


def test_every_package_that_is_declared_has_a_tested_version() -> None:
    project = pyproject()["project"]
    untested = {"ray", "liger-kernel"}  # their tests run only where someone installed them
    wanted = [*project["dependencies"], *(d for ds in project["optional-dependencies"].values() for d in ds)]
    declared = {re.split(r"[\[<>=!~; ]", w)[0].lower().replace("_", "-") for w in wanted} - untested - {"qvl"}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    assert declared - pinned == set()
    assert "torch==2.13.0" in lines


def test_no_import_of_ours_hides_in_a_function() -> None:
    bare = {"qvl/outside/worker_main.py"}  # starts as a script of its own, and must first put the project on its path
    hidden = [(name(f), m) for f in MODULES for m, inside in imports(f) if inside and m.partition(".")[0] == "qvl"]
    assert [(file, module) for file, module in hidden if file not in bare] == []


def test_an_optional_package_is_imported_late_in_one_file_only() -> None:
    late: dict[str, set[str]] = {}
    for file in MODULES:
        for module, inside in imports(file):
            package = module.partition(".")[0]
            if inside and package not in sys.stdlib_module_names:
                late.setdefault(package, set()).add(name(file))
    # torch's own corners (torch.distributed, ...) are no packages of their own
    assert {package: files for package, files in late.items() if len(files) > 1 and package != "torch"} == {}


def test_only_the_device_file_reads_the_environment() -> None:
    reads = re.compile(
        r"\bos\.(environb?|getenvb?|putenv|unsetenv|expandvars|path\.expandvars)\b|from os import .*(environ|getenv)"
    )
    assert {name(f) for f in MODULES if reads.search(f.read_text(encoding="utf-8"))} <= {"qvl/core/device.py"}


def test_nothing_opens_pickles_or_runs_remote_code() -> None:
    """Calls and imports, not words: a docstring may say that we never do it."""
    found = []
    for file in MODULES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            match node:
                case ast.Import(names=names) if {"pickle", "dill", "cloudpickle", "joblib"} & {a.name for a in names}:
                    found.append((name(file), node.lineno, "imports a pickle module"))
                case ast.ImportFrom(module="pickle" | "dill" | "cloudpickle" | "joblib"):
                    found.append((name(file), node.lineno, "imports a pickle module"))
                case ast.Attribute(value=ast.Name(id="torch"), attr="load" | "save"):
                    found.append((name(file), node.lineno, f"uses torch.{node.attr}"))
                case ast.keyword(arg="trust_remote_code", value=ast.Constant(value=True)):
                    found.append((name(file), node.value.lineno, "trusts remote code"))
                case ast.keyword(arg="allow_pickle", value=ast.Constant(value=True)):
                    found.append((name(file), node.value.lineno, "allows pickles"))
                case _:
                    pass
    assert found == []


def test_nothing_runs_on_one_instruction_set_alone() -> None:
    bound = {"intel_extension_for_pytorch", "oneccl_bindings_for_pytorch", "mkl", "sklearnex", "daal4py", "decord"}
    assert [(name(f), m) for f in MODULES for m, _ in imports(f) if m.partition(".")[0] in bound] == []


def test_no_text_names_a_place_on_one_machine() -> None:
    place = re.compile(
        r"(?<![\w.*-])/(wor" + r"k|root|opt|home|Users)/(?=\w)(?!someone)" + r"|(?<![\w./-])shar" + r"ed/(?=\w)"
    )
    found = [
        (name(f), m[0]) for f in tracked() if f.name != "LICENSE" for m in place.finditer(f.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_no_file_names_a_package_registry() -> None:
    host = re.compile(r"py" + r"pi\.org|--index" + r"-url|--extra-index" + r"-url|download\.py" + r"torch\.org")
    assert [(name(f), m[0]) for f in tracked() for m in host.finditer(f.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("page", blocks.documents(), ids=name)
def test_the_generated_parts_of_a_page_are_what_the_code_says(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text == blocks.filled(text), f"{name(page)} is out of date; run: make docs"


def test_a_bench_block_shows_the_newest_row_of_each_machine() -> None:
    old = {
        "date": "2030-01-01",
        "commit": "aaa",
        "machine": "box",
        "threads": 2,
        "suite": "media",
        "metric": "patches",
        "shape": "1024",
    }
    old |= {"value": 10.0, "unit": "ms", "peer": "other 1.0", "peer_value": 8.0, "ratio": 0.8}
    rows = [
        old,
        old | {"date": "2030-01-02", "commit": "bbb", "value": 5.4321, "ratio": 1.4727},
        old | {"suite": "network"},
    ]
    table = [
        "| what | shape | qvl | peer | peer / qvl | peer is | machine | threads | date | commit |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| patches | 1024 | 5.432 ms | 8 ms | 1.47 | other 1.0 | box | 2 | 2030-01-02 | bbb |",
    ]
    assert blocks.bench("media", rows).splitlines() == table
    assert blocks.bench("media/pat", rows).splitlines() == table
    assert blocks.bench("media/cat", rows) == "No rows of `media/cat` yet; `make bench` measures them."


def test_the_story_block_shows_mean_and_worst_and_the_long_story_beside_its_own_promise() -> None:
    needle = {
        "chapter": "S3",
        "skill": "tagged needle in 2,048 tokens, 8 depths",
        "floor": 0.75,
        "promise": 0.9,
        "got": 0.8,
    }
    kept = {
        "chapter": "S3",
        "skill": "text kept: bits",
        "floor": 1.05,
        "promise": 1.03,
        "got": 1.0,
        "is_less_better": True,
    }
    quick = {"size": "quickstart", "seed": 1, "seconds": 720, "chapters": [needle, kept]}
    other = quick | {"seed": 0, "seconds": 600, "chapters": [needle | {"got": 0.9}, kept | {"got": 1.02}]}
    long = quick | {"size": "story", "seconds": 7200, "chapters": [needle | {"promise": 0.95, "got": 1.0}, kept]}
    assert blocks.story([long, quick, other]).splitlines() == [
        "| chapter | skill | floor | promise | mean of 2 runs | worst | deviation | `make story` promises | and got, seed 1 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| S3 | tagged needle | 0.75 | 0.9 | 0.850 | 0.800 | 0.071 | 0.95 | 1.000 |",
        "| S3 | text kept | 1.05 | 1.03 | 1.010 | 1.020 | 0.014 | 1.03 | 1.000 |",
        "|  | minutes |  |  | 11 | 12 |  |  | 120 |",
    ]
    assert "make quickstart" in blocks.story([])


def test_a_wrong_number_in_a_block_is_noticed() -> None:
    page = "before\n<!-- bench:no/such -->\n| 42 |\n<!-- end -->\nafter\n"
    right = (
        "before\n<!-- bench:no/such -->\nNo rows of `no/such` yet; `make bench` measures them.\n<!-- end -->\nafter\n"
    )
    assert blocks.filled(page) == right
    assert blocks.filled(right) == right


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
