"""The command line: what is listed, how flags and YAML meet, and how mistakes are answered."""

import dataclasses
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qvl.commands import cli, doctor
from qvl.core import device

SAY = '''
"""Says a word."""
from dataclasses import dataclass
from pathlib import Path

@dataclass(frozen=True, kw_only=True)
class Inner:
    depth: int = 1

@dataclass(frozen=True, kw_only=True)
class SayIt:
    """Says a word several times."""
    word: str
    """What to say."""
    max_times: int = 1
    """How often."""
    inner: Inner = Inner()
    files: tuple[Path, ...] = ()

    def __post_init__(self):
        if self.max_times > 9:
            raise ValueError(f"max_times is {self.max_times}; expected at most 9")

def run(args):
    if args.word == "oops":
        raise KeyError("nobody foresaw this")
    if args.word == "stop":
        raise KeyboardInterrupt
    if args.word == "file":
        open("absent.txt")
    print(args)
    return 3 if args.word == "three" else None
'''
SHOW = '''
"""Shows media in order."""
from dataclasses import dataclass, replace
from qvl.commands.cli import take_in_order

@dataclass(frozen=True, kw_only=True)
class Show:
    """Shows media."""
    media: tuple[str, ...] = ()
    size: int = 1

def parse(argv, read):
    media, rest = take_in_order(argv, ("image", "video"))
    return replace(read(rest), media=tuple(f"{kind}={file}" for kind, file in media))

def run(args):
    print(args)
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A commands folder that holds two made-up commands."""
    import qvl.commands

    for name, text in {"say_it": SAY, "show": SHOW}.items():
        (tmp_path / f"{name}.py").write_text(text.lstrip())
        monkeypatch.delitem(sys.modules, f"qvl.commands.{name}", raising=False)
    monkeypatch.setattr(qvl.commands, "__path__", [str(tmp_path), *qvl.commands.__path__])
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "cli.py"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def qvl_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*argv: str) -> tuple[int, str, str]:
        try:
            code = cli.main(argv)
        except SystemExit as stop:  # tyro's own way out
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


Says = Callable[..., tuple[int, str, str]]


def test_help_lists_every_command_with_its_caption(qvl_says: Says) -> None:
    code, out, _ = qvl_says("--help")
    assert code == 0
    assert [line.split(maxsplit=1)[1].strip() for line in out.splitlines() if line.startswith("  say-it")] == [
        "Says a word."
    ]
    assert qvl_says()[1] == out


def test_flags_fill_the_dataclass(qvl_says: Says) -> None:
    out = "SayIt(word='hi', max_times=2, inner=Inner(depth=7), files=(PosixPath('a'), PosixPath('b')))\n"
    assert qvl_says("say-it", "--word", "hi", "--max-times", "2", "--inner.depth", "7", "--files", "a", "b") == (
        0,
        out,
        "",
    )


def test_what_run_returns_is_the_exit_code(qvl_says: Says) -> None:
    assert qvl_says("say-it", "--word", "three")[0] == 3


def test_flags_win_over_the_config_file(qvl_says: Says, folder: Path) -> None:
    (folder / "run.yaml").write_text("max_times: 5\ninner: {depth: 2}\n")
    _, out, _ = qvl_says("say-it", "--config", "run.yaml", "--word", "hi", "--max-times", "3")
    assert out == "SayIt(word='hi', max_times=3, inner=Inner(depth=2), files=())\n"
    assert qvl_says("say-it", "--word", "hi", "--config=run.yaml")[1].startswith("SayIt(word='hi', max_times=5")


def test_a_required_value_may_stand_in_the_file_or_on_the_line_but_must_stand(qvl_says: Says, folder: Path) -> None:
    (folder / "run.yaml").write_text("word: from file\n")
    assert qvl_says("say-it", "--config", "run.yaml")[1].startswith("SayIt(word='from file'")
    (folder / "empty.yaml").write_text("")
    code, _, err = qvl_says("say-it", "--config", "empty.yaml")
    assert code == 2
    assert "--word" in err


def test_a_printed_config_reads_back_to_the_same_run(qvl_says: Says, folder: Path) -> None:
    given = ("--word", "no", "--max-times", "4", "--files", "x")
    code, text, _ = qvl_says("say-it", *given, "--print-config")
    assert (code, text) == (0, "word: no\nmax_times: 4\ninner:\n  depth: 1\nfiles:\n- x\n")
    (folder / "run.yaml").write_text(text)
    assert qvl_says("say-it", "--config", "run.yaml") == qvl_says("say-it", *given)


def test_order_is_kept_across_different_flags(qvl_says: Says, folder: Path) -> None:
    _, out, _ = qvl_says("show", "--image", "A", "--video=B", "--size", "2", "--image", "C")
    assert out == "Show(media=('image=A', 'video=B', 'image=C'), size=2)\n"
    (folder / "run.yaml").write_text("size: 8\n")
    assert qvl_says("show", "--config", "run.yaml", "--image", "A")[1] == "Show(media=('image=A',), size=8)\n"
    assert qvl_says("show", "--image")[2] == "qvl: --image stands without a value; write --image VALUE\n"


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["sayit"], "there is no command 'sayit'; did you mean 'say-it'?; qvl --help lists them"),
        (["say-it", "--word", "file"], "absent.txt: no such file or directory"),
        (
            ["say-it", "--files", "a", "--files=b"],
            "--files is given twice; give it once, with all its values behind it",
        ),
        (["say-it", "--config", "absent.yaml"], "absent.yaml: no such file or directory"),
        (["say-it", "--config", "a", "--config", "b"], "--config is given 2 times; give one file"),
        (["say-it", "--config", "bad.yaml"], "unknown key 'wrod' in bad.yaml; did you mean 'word'?"),
        (["say-it", "--config", "broken.yaml"], "broken.yaml is not YAML: "),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    qvl_says: Says, folder: Path, argv: list[str], sentence: str
) -> None:
    (folder / "bad.yaml").write_text("wrod: x\n")
    (folder / "broken.yaml").write_text("a: [1,\n")
    code, out, err = qvl_says(*argv)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"qvl: {sentence}")


def test_a_value_the_dataclass_refuses_is_answered_with_its_sentence(qvl_says: Says, folder: Path) -> None:
    code, out, err = qvl_says("say-it", "--word", "hi", "--max-times", "10")
    assert (code, out) == (2, "")
    assert "max_times is 10; expected at most 9" in err
    (folder / "run.yaml").write_text("max_times: 10\n")
    assert qvl_says("say-it", "--word", "hi", "--config", "run.yaml")[0] == 2
    assert qvl_says("say-it", "--word", "hi", "--config", "run.yaml", "--max-times", "9")[0] == 0


def test_a_misspelt_flag_is_answered_with_the_near_one(qvl_says: Says) -> None:
    code, _, err = qvl_says("say-it", "--word", "x", "--max-time", "2")
    assert code == 2
    assert "--max-times" in err


def test_bad_input_shows_its_place_in_the_code_when_asked(qvl_says: Says) -> None:
    with pytest.raises(ValueError, match="there is no command"):
        qvl_says("--traceback", "sayit")


def test_an_error_nobody_foresaw_keeps_its_traceback(qvl_says: Says) -> None:
    with pytest.raises(KeyError, match="nobody foresaw this"):
        qvl_says("say-it", "--word", "oops")


def test_ctrl_c_is_exit_code_130(qvl_says: Says) -> None:
    assert qvl_says("say-it", "--word", "stop") == (130, "", "qvl: stopped\n")


def test_help_of_a_command_teaches_its_flags(qvl_says: Says) -> None:
    code, out, _ = qvl_says("say-it", "--help")
    assert code == 0
    for part in ("Says a word several times.", "--max-times", "How often.", "--config FILE.yaml", "--print-config"):
        assert part in out


@pytest.mark.parametrize("name", cli.commands())
def test_every_command_has_its_dataclass_its_run_and_its_group(name: str) -> None:
    module = importlib.import_module(f"qvl.commands.{name}")
    cls = getattr(module, "".join(part.capitalize() for part in name.split("_")))
    assert cls.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(cls))
    assert callable(module.run)
    assert any(name in names for names in cli.GROUPS.values())


def test_help_does_not_wait_for_torch() -> None:
    """`qvl --help` and `qvl --version` must answer at once: the commands' modules are not imported for them."""
    script = "import sys; from qvl.commands.cli import main; main(['--help']); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "False"
    version = subprocess.run(
        [sys.executable, "-m", "qvl", "--version"], capture_output=True, text=True, check=True
    ).stdout
    assert version == "qvl 0.1.0\n"


def test_a_reader_that_goes_away_is_no_error() -> None:
    ended = subprocess.run(
        f"{sys.executable} -m qvl --help | true", shell=True, capture_output=True, text=True, check=True
    )
    assert ended.stderr == ""


def test_doctor_reports_what_this_machine_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"qvl", "machine", "choice", "kernels", "missing"}
    assert report["machine"]["num_cores"] >= 1
    assert any(case.startswith("attention, ") for case in report["kernels"]["cpu"])
    assert cli.main(["doctor"]) == 0
    table = capsys.readouterr().out
    assert report["machine"]["torch_version"] in table
    assert "Missing" in table


def test_doctor_says_how_to_get_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor, "facts", lambda: dataclasses.replace(device.facts(), compiler=None))
    doctor.run(doctor.Doctor())
    table = " ".join(capsys.readouterr().out.split())
    for sentence in (
        "pip install 'qvl[hub]'",
        "pip install 'qvl[serve]'",
        "install g++ or clang",
    ):
        assert sentence in table
