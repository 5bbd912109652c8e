"""Model names: folders are themselves, hub names are fetched without anything that could run code, the rest is one sentence."""

import errno
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from qvl.outside.hub import resolve


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path


def test_a_hub_name_is_fetched_without_pickles_or_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("org/name", revision="v1") == tmp_path
    assert (asked["name"], asked["revision"]) == ("org/name", "v1")
    files = [
        "model.safetensors",
        "config.json",
        "chat_template.jinja",
        "merges.txt",
        "pytorch_model.bin",
        "x.pt",
        "modeling.py",
        "a.pkl",
    ]
    fetched = list(huggingface_hub.utils.filter_repo_objects(files, allow_patterns=asked["allow_patterns"]))
    assert fetched == ["model.safetensors", "config.json", "chat_template.jinja", "merges.txt"]


@pytest.mark.parametrize("name", ["./absent", "/absent/folder", "absent", "a/b/c", "../x/y", "org/", "org/na me"])
def test_what_is_neither_folder_nor_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"there is no folder .*, and it is no hub name"):
        resolve(name)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="is a file; expected a model folder or a hub name"):
        resolve(tmp_path / "model.safetensors")


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no revision 'v1'; leave the revision out"):
        resolve(tmp_path, revision="v1")


def test_without_the_extra_the_answer_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"install the extra: pip install 'qvl\[hub\]'"):
        resolve("org/name")


def test_a_disk_that_takes_no_more_is_no_fault_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, **options: Any) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", "/cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ValueError, match=r"org/name cannot be kept here \(.*/cache.*\); free space, or let HF_HOME"):
        resolve("org/name")


def test_without_a_network_the_answer_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, **options: Any) -> str:
        raise errors.LocalEntryNotFoundError("a long story") from ConnectionError("down")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(
        ValueError, match=r"cannot reach the hub for org/name \(ConnectionError\) and no copy is kept here"
    ):
        resolve("org/name")
