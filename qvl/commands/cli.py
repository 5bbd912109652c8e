"""`qvl COMMAND ...`: finds the commands, reads flags and YAML into their dataclasses, turns bad input into one sentence.

A command is a file beside this one. Its caption is its line in `qvl --help`. It holds a frozen keyword-only dataclass named as the
file in CamelCase and `run(args) -> int | None`. It may also hold `parse(argv, read) -> args` where flags need more than tyro knows:
`read(argv)` reads the rest into the dataclass, with the defaults a --config file gave; see `take_in_order`.
"""

import ast
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import qvl
from qvl.core import config, log
from qvl.data.yaml_file import read_yaml, yaml_text

GROUPS: dict[str, tuple[str, ...]] = {
    "use": ("generate", "chat", "serve"),
    "learn": ("train", "ablate", "plan"),
    "data": tuple(f"data_{name}" for name in ("import", "index", "preview", "stats", "verify")),
    "measure": ("score",),
    "inside": ("init", "convert", "inspect", "parity", "logits", "doctor"),
}
FAMILIES = ("data",)
"""Commands of two words: data_import.py is typed `qvl data import`."""
EVERYWHERE = """Every command also takes
  --config FILE.yaml   defaults from a file; flags win over it
  --print-config       print what would run as YAML, and stop
  --traceback          show where in the code bad input was found"""
C = TypeVar("C")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. 0 for done, 2 for input it cannot take, 130 for Ctrl-C; an error nobody foresaw keeps its traceback."""
    argv = list(sys.argv[1:] if argv is None else argv)
    traceback = "--traceback" in argv
    argv = [a for a in argv if a != "--traceback"]
    try:
        return _run(argv) or 0
    except BrokenPipeError:  # the reader went away: qvl ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, RuntimeError) as error:
        # By its name, because this module does without torch.
        if isinstance(error, RuntimeError) and type(error).__name__ != "OutOfMemoryError":
            raise
        if traceback:
            raise
        print(f"qvl: {_sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("qvl: stopped", file=sys.stderr)
        return 130


def _run(argv: list[str]) -> int | None:
    if not argv or argv[0] in ("--help", "-h", "help"):
        _print_help()
        return 0
    if argv[0] == "--version":
        print(f"qvl {qvl.__version__}")
        return 0
    captions = commands()
    if argv[0] in FAMILIES and (len(argv) == 1 or argv[1] in ("--help", "-h")):
        _print_help(argv[0])
        return 0
    words = 2 if argv[0] in FAMILIES else 1
    typed, argv = " ".join(argv[:words]), argv[words:]
    name = typed.replace(" ", "_").replace("-", "_")
    if name not in captions:
        known = [spoken(n) for n in captions]
        raise ValueError(f"there is no command {typed!r}{config.near_miss(typed, known)}; qvl --help lists them")
    log.set_up()
    module = importlib.import_module(f"qvl.commands.{name}")
    cls = getattr(module, "".join(part.capitalize() for part in name.split("_")))
    about = "\n\n".join((captions[name], inspect.cleandoc(cls.__doc__ or ""), EVERYWHERE))
    args, only_print = _read(spoken(name), about, cls, argv, getattr(module, "parse", None))
    if only_print:
        print(dump_yaml(args), end="")
        return 0
    return module.run(args)


def commands() -> dict[str, str]:
    """Name -> caption of every command, in the order of the groups, read from the files without importing them."""
    files = {p.stem: p for p in Path(__file__).parent.glob("*.py") if p.stem not in ("__init__", "cli")}
    order = [name for names in GROUPS.values() for name in names]
    names = sorted(files, key=lambda name: (order.index(name) if name in order else len(order), name))
    return {name: caption(files[name]).removeprefix(f"qvl {spoken(name)}: ") for name in names}


def spoken(name: str) -> str:
    """How a person types a command: say_it is say-it, data_import is `data import`."""
    family, _, rest = name.partition("_")
    return f"{family} {rest.replace('_', '-')}" if family in FAMILIES and rest else name.replace("_", "-")


def caption(file: Path) -> str:
    """The first line of a file's docstring."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def take_in_order(argv: Sequence[str], names: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Takes `--image A --video B --image C` out of argv, keeping their order: ([("image", "A"), ...], what is left)."""
    taken: list[tuple[str, str]] = []
    left: list[str] = []
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag.removeprefix("--") not in names or not flag.startswith("--"):
            left.append(word)
            continue
        if not equals:
            value = next(words, "--")
            if value.startswith("--"):
                raise ValueError(f"{flag} stands without a value; write {flag} VALUE")
        taken.append((flag.removeprefix("--"), value))
    return taken, left


def _read(name: str, about: str, cls: type[C], argv: list[str], parse: Callable[..., C] | None) -> tuple[C, bool]:
    """The command's arguments, and whether only to print them."""
    if clash := {"config", "print_config", "traceback", "help"} & {*config.keys_of(cls)}:
        raise TypeError(f"{cls.__name__} has a field {', '.join(clash)}, which every command has already")
    only_print = "--print-config" in argv
    files, argv = take_in_order([a for a in argv if a != "--print-config"], ("config",))
    if len(files) > 1:
        raise ValueError(f"--config is given {len(files)} times; give one file")
    default = load_yaml(cls, Path(files[0][1]), missing=tyro.MISSING_NONPROP) if files else tyro.MISSING_NONPROP

    def read(rest: Sequence[str]) -> C:
        # Of a flag of one value the last one counts, as everywhere; of a flag of several the first ones would be lost without a word.
        flags = [word.partition("=")[0].replace("_", "-") for word in rest]
        several = ["--" + f.name.replace("_", "-") for f in config.fields_of(cls) if "tuple[" in str(f.type)]
        if twice := next((flag for flag in several if flags.count(flag) > 1), None):
            raise ValueError(f"{twice} is given twice; give it once, with all its values behind it")
        return tyro.cli(cls, prog=f"qvl {name}", description=about, args=list(rest), default=default)

    return (parse(argv, read) if parse else read(argv)), only_print


def load_yaml(cls: type[C], path: Path, *, missing: Any = config.REQUIRED) -> C:
    """A config from a YAML file; `missing` as in config.from_dict."""
    data = read_yaml(path)
    return config.from_dict(cls, {} if data is None else data, where=str(path), missing=missing)


def dump_yaml(args: Any) -> str:
    """A config as YAML that `load_yaml` reads back to an equal one."""
    return yaml_text(config.to_dict(args))


def _print_help(family: str | None = None) -> None:
    """All commands, or those of one family."""
    console = Console(highlight=False)
    console.print(f"[bold]qvl[/] {qvl.__version__}: the whole Qwen3-VL system in one readable package\n")
    console.print("usage: qvl COMMAND [FLAGS]      qvl COMMAND --help explains its flags\n", markup=False)
    captions = {n: c for n, c in commands().items() if family is None or n.startswith(f"{family}_")}
    grouped = {name for names in GROUPS.values() for name in names}
    for group, names in {**GROUPS, "more": tuple(n for n in captions if n not in grouped)}.items():
        table = Table.grid(padding=(0, 2))
        table.add_column(min_width=10, style="cyan", no_wrap=True)
        for name in names:
            if name in captions:
                table.add_row("  " + spoken(name), escape(captions[name]))
        if table.row_count:
            console.print(group, style="bold")
            console.print(table)
    console.print(f"\n{EVERYWHERE}", markup=False)


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        names = " -> ".join(str(n) for n in (error.filename, error.filename2) if n is not None)
        return f"{names}: {error.strerror.lower()}" if names else error.strerror
    return str(error) or type(error).__name__
