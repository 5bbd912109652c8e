"""Video files of any length and rate, from the file to the answer: ids, grid, patches and greedy tokens are transformers'."""

from pathlib import Path

import pytest

import oracle_video
from media_files import numbered_frame, write_video
from oracle_processor import digest
from oracle_video import Clip, Said
from qvl.engine.generate import generate
from qvl.engine.sampling import Sampling
from qvl.model.qwen3vl import Qwen3VL
from qvl.model.weights import load
from qvl.prompt.message import Video, user
from qvl.prompt.processor import Processor
from tiny_checkpoint import tiny_checkpoint

NEW_TOKENS = 8
FILM = "24000/1001"
"""23.976 frames a second."""

# frames in the file, its frames a second, frames asked for (None: 2 a second), slices of two frames that follow
SHORT: list[tuple[int, str, int | None, int]] = [
    (1, "25", None, 1),
    (2, "25", None, 1),
    (3, "25", None, 2),
    (7, "25", None, 2),
    (7, "25", 7, 4),
    (7, FILM, 7, 4),
    (120, FILM, None, 5),
    (600, "25", None, 24),
]
LONG: list[tuple[int, str, int | None, int]] = [
    (2000, "30", None, 67),
    (2000, FILM, None, 83),
    (600, "25", 600, 300),
    (600, FILM, 599, 300),
    (2000, FILM, 2000, 1000),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def processor(folder: Path) -> Processor:
    return Processor.from_folder(folder, form="transformers5")


@pytest.fixture(scope="module")
def model(folder: Path) -> Qwen3VL:
    return load(folder)


@pytest.fixture(scope="module")
def short(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Clip, Said]]:
    return said(folder, SHORT, tmp_path_factory.mktemp("short"))


@pytest.fixture(scope="module")
def long(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Clip, Said]]:
    return said(folder, LONG, tmp_path_factory.mktemp("long"))


def said(folder: Path, cases: list[tuple[int, str, int | None, int]], scratch: Path) -> list[tuple[Clip, Said]]:
    """Each case as a file of 64 x 32 pixels, and what transformers makes of it."""
    clips = []
    for frames, fps, taken, _ in cases:
        path = scratch / f"{frames}-{fps.replace('/', '-')}.mp4"
        if not path.exists():
            write_video(path, (numbered_frame(i, 32, 64) for i in range(frames)), fps=fps)
        clips.append(Clip(path=str(path), num_frames=taken))
    return list(zip(clips, oracle_video.answers(folder, clips, NEW_TOKENS), strict=True))


def check(clip: Clip, expected: Said, slices: int, processor: Processor, model: Qwen3VL) -> None:
    encoded = processor([user(Video(clip.path, num_frames=clip.num_frames), oracle_video.QUESTION)])
    [visual] = encoded.visuals
    assert expected.grid == [slices, 2, 4]
    assert visual.grid_I3.tolist() == [[1, 2, 4]] * slices
    assert encoded.sample.token_T.tolist() == expected.ids  # the times before the slices are among them
    assert digest(visual.values_PX.numpy()) == expected.patches
    assert expected.margin > 1e-3  # no step is so close that rounding may decide it
    [found] = generate(model, [encoded.sample], Sampling(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True))
    assert list(found.tokens) == expected.tokens


def name(case: tuple[int, str, int | None, int]) -> str:
    frames, fps, taken, _ = case
    return f"{frames} frames at {'23.976' if fps == FILM else fps}, {taken or '2 a second'} taken"


@pytest.mark.oracle
@pytest.mark.parametrize("number", range(len(SHORT)), ids=map(name, SHORT))
def test_a_video_file_is_answered_as_transformers_answers_it(
    number: int, short: list[tuple[Clip, Said]], processor: Processor, model: Qwen3VL
) -> None:
    check(*short[number], SHORT[number][3], processor, model)


@pytest.mark.slow
@pytest.mark.oracle
@pytest.mark.parametrize("number", range(len(LONG)), ids=map(name, LONG))
def test_a_long_video_with_every_frame_taken_is_answered_as_transformers_answers_it(
    number: int, long: list[tuple[Clip, Said]], processor: Processor, model: Qwen3VL
) -> None:
    check(*long[number], LONG[number][3], processor, model)
