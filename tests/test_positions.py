"""Rotary ids equal transformers' get_rope_index on thousands of random layouts, for Qwen3-VL and its two ancestors."""

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen2_5_VLModel, Qwen2VLModel, Qwen3VLModel

from qvl.model.config import ModelConfig, RopeScheme, read_config
from qvl.model.padded import batch_from_padded
from qvl.model.positions import positions
from tests.golden import IMAGE, VIDEO, VISION_END, VISION_START, folder, pad_rows

Grid = tuple[int, int, int]


def config_of(scheme: RopeScheme = "interleaved") -> ModelConfig:
    config = read_config(folder("dense_tied"))
    return replace(config, text=replace(config.text, rope=replace(config.text.rope, scheme=scheme)))


def random_row(draw: random.Random, *, is_split: bool) -> tuple[list[int], list[tuple[int, Grid]]]:
    """Tokens of one row and its (placeholder, grid) runs: text of 0 to 9 tokens, images and videos in any order.

    `is_split` puts every slice of a video behind its own timestamp, as Qwen3-VL does; its ancestors keep the slices together.
    """
    row, runs = [1], []
    for _ in range(draw.randrange(7)):
        kind = draw.choice(["text", "image", "video"])
        # Pictures of two kinds may touch; two of one kind would be one run, so something stands between them.
        before, after = ([VISION_START], [VISION_END]) if draw.random() < 0.7 else ([], [])
        h, w = 2 * draw.randint(1, 6), 2 * draw.randint(1, 6)
        t = draw.randint(1, max(h, w) // 2)
        if kind == "text":
            row += [draw.randint(1, 400) for _ in range(draw.randrange(10))]
        elif kind == "image":
            row += before or ([3] if row[-1] == IMAGE else [])
            row += [IMAGE] * (h * w // 4) + after
            runs.append((IMAGE, (1, h, w)))
        elif is_split:
            for _ in range(t):
                row += [7, 8] + before + [VIDEO] * (h * w // 4) + after
            runs.append((VIDEO, (t, h, w)))
        else:
            row += before or ([3] if row[-1] == VIDEO else [])
            row += [VIDEO] * (t * h * w // 4) + after
            runs.append((VIDEO, (t, h, w)))
    return row, runs


def theirs(model_class: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """get_rope_index needs nothing of a model but these numbers, so none is built."""
    vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=2)
    stand_in = SimpleNamespace(config=SimpleNamespace(vision_config=vision))
    stand_in.get_vision_position_ids = model_class.get_vision_position_ids.__get__(stand_in)
    found, _ = model_class.get_rope_index(stand_in, **inputs)
    return torch.stack([axis[inputs["attention_mask"].bool()] for axis in found])


def grid_tensor(runs: list[tuple[int, Grid]], kind: int) -> torch.Tensor | None:
    grids = [grid for placeholder, grid in runs if placeholder == kind]
    return torch.tensor(grids) if grids else None


@pytest.mark.no_shape_hook
def test_qwen3_vl_ids_equal_transformers_on_5000_random_layouts() -> None:
    draw, config = random.Random(11), config_of()
    for _ in range(5000):
        found = [random_row(draw, is_split=True) for _ in range(draw.randint(1, 3))]
        rows, runs = [row for row, _ in found], [run for _, row_runs in found for run in row_runs]
        inputs: dict[str, Any] = pad_rows(rows, left=draw.random() < 0.5)
        inputs["image_grid_thw"], inputs["video_grid_thw"] = grid_tensor(runs, IMAGE), grid_tensor(runs, VIDEO)
        slices = [(1, h, w) for _, (t, h, w) in runs for _ in range(t)]

        ours_3T = positions(
            torch.tensor([token for row in rows for token in row]),
            tuple(map(len, rows)),
            torch.tensor(slices) if slices else None,
            config,
        )

        assert torch.equal(ours_3T, theirs(Qwen3VLModel, inputs))


@pytest.mark.parametrize(
    ("scheme", "model_class"), [("chunked", Qwen2VLModel), ("absolute_time", Qwen2_5_VLModel)], ids=["qwen2", "qwen2.5"]
)
def test_the_ancestors_ids_equal_transformers_on_1000_random_layouts(scheme: RopeScheme, model_class: Any) -> None:
    draw, config = random.Random(12), config_of(scheme)
    for _ in range(1000):
        found = [random_row(draw, is_split=False) for _ in range(draw.randint(1, 3))]
        rows, runs = [row for row, _ in found], [run for _, row_runs in found for run in row_runs]
        # Seconds small enough that time never outgrows the picture; what follows a longer video is a test of its own.
        seconds = [draw.choice([0.1, 0.25, 0.4]) for _ in runs]
        inputs: dict[str, Any] = pad_rows(rows)
        inputs["image_grid_thw"], inputs["video_grid_thw"] = grid_tensor(runs, IMAGE), grid_tensor(runs, VIDEO)
        if scheme == "absolute_time":
            of_videos = [s for s, (kind, _) in zip(seconds, runs, strict=True) if kind == VIDEO]
            inputs["second_per_grid_ts"] = torch.tensor(of_videos)

        ours_3T = positions(
            torch.tensor([token for row in rows for token in row]),
            tuple(map(len, rows)),
            torch.tensor([grid for _, grid in runs]) if runs else None,
            config,
            second_I=torch.tensor(seconds) if runs else None,
        )

        assert torch.equal(ours_3T, theirs(model_class, inputs))


def ids(tokens: list[int], grids: list[Grid], scheme: RopeScheme = "interleaved", **extra: Any) -> list[list[int]]:
    return positions(torch.tensor(tokens), (len(tokens),), torch.tensor(grids), config_of(scheme), **extra).tolist()


def test_a_picture_spreads_over_rows_and_columns_and_the_text_goes_on_after_its_longer_side() -> None:
    tokens = [1, VISION_START, *[IMAGE] * 6, VISION_END, 2]
    assert ids(tokens, [(1, 4, 6)]) == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]


def test_every_sequence_of_a_pack_counts_from_zero() -> None:
    assert positions(torch.tensor([5, 6, 7, 8, 9]), (3, 2), None, config_of()).tolist() == [[0, 1, 2, 0, 1]] * 3


def test_after_a_video_longer_than_wide_the_text_goes_on_after_the_last_time_id() -> None:
    """Qwen2-VL was trained with largest id + 1 (its paper, 2.1); transformers 5 counts height and width alone, so that ids repeat."""
    tokens = [1, *[VIDEO] * 4, 2]
    time, height, width = ids(tokens, [(4, 2, 2)], scheme="chunked")
    assert time == [0, 1, 2, 3, 4, 5]
    assert height == width == [0, 1, 1, 1, 1, 5]


def test_absolute_time_counts_seconds_at_two_ids_each() -> None:
    tokens = [1, *[VIDEO] * 3, 2]
    time, height, _ = ids(tokens, [(3, 2, 2)], scheme="absolute_time", second_I=torch.tensor([1.5]))
    assert time == [0, 1, 4, 7, 8]
    assert height == [0, 1, 1, 1, 8]


def test_plain_ids_are_the_token_index_whatever_the_pictures() -> None:
    assert ids([1, *[IMAGE] * 4, 2], [(1, 4, 4)], scheme="plain") == [[0, 1, 2, 3, 4, 5]] * 3


@pytest.mark.parametrize(
    ("tokens", "grids", "sentence"),
    [
        ([1, *[IMAGE] * 5, 2], [(1, 4, 4)], "5 tokens, but its grid"),
        ([1, *[IMAGE] * 8, 2], [(1, 4, 4), (1, 4, 4)], "two pictures that touch count as one run"),
        ([1, 2], [(1, 4, 4)], "0 runs of image or video placeholders, but 1 grids came"),
        ([1, *[IMAGE] * 3, 2], [(1, 3, 4)], "sides divisible by 2"),
    ],
)
def test_placeholders_that_do_not_fit_their_grids_are_refused(
    tokens: list[int], grids: list[Grid], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        ids(tokens, grids)


def test_padded_videos_that_lack_a_slice_are_refused() -> None:
    inputs = pad_rows([[1, VISION_START, *[VIDEO] * 4, VISION_END, 2]])
    inputs |= dict(pixel_values_videos=torch.zeros(32, 1536), video_grid_thw=torch.tensor([[2, 4, 4]]))
    with pytest.raises(ValueError, match="1 runs of video placeholders, but 2 video grids came"):
        batch_from_padded(inputs, config_of())
