"""Rotary ids of packed sequences: text counts up, a picture spreads over rows and columns, all without a loop."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qvl.model.config import ModelConfig


def positions(
    token_T: Tensor,
    lengths: tuple[int, ...],
    grid_I3: Tensor | None,
    config: ModelConfig,
    *,
    second_I: Tensor | None = None,
) -> Tensor:
    """(time, height, width) ids, int64 (3, T), each sequence from 0 (report 2; transformers' get_rope_index).

    A run of placeholders that starts at s takes time s (+ slice number where slices stand together), height s + row, width s + column over
    the merged grid, and the text after it goes on at the largest of these plus one: a picture of h x w tokens moves the count by max(h, w).
    `grid_I3` has one row for each run. Raises ValueError when runs and rows disagree.
    """
    place_T, _ = _places(token_T, lengths)
    if config.vision is None or config.text.rope.scheme == "plain":
        return place_T.expand(3, -1).clone()
    runs = placeholder_runs(token_T, lengths, config)
    if grid_I3 is None:
        grid_I3 = torch.zeros(0, 3, dtype=torch.int64)
    check_runs(runs, grid_I3, config)
    start_I, length_I = runs.start_I, runs.length_I
    if len(start_I) == 0:
        return place_T.expand(3, -1).clone()
    merge = config.vision.spatial_merge_size
    frames_I = grid_I3[:, 0]
    rows_I, columns_I = grid_I3[:, 1] // merge, grid_I3[:, 2] // merge

    # Index of each visual token inside its run, and from it slice, row and column.
    run_M = torch.repeat_interleave(torch.arange(len(length_I)), length_I)
    inside_M = torch.arange(len(run_M)) - (length_I.cumsum(0) - length_I)[run_M]
    area_I = rows_I * columns_I
    slice_M = inside_M // area_I[run_M]
    row_M = inside_M % area_I[run_M] // columns_I[run_M]
    column_M = inside_M % columns_I[run_M]

    # Time ids grow with the slice number, or with its seconds (Qwen2.5-VL; fp32 product, then cut, as there). Images stand still.
    time_M = slice_M
    if config.text.rope.scheme == "absolute_time":
        if second_I is None:
            raise ValueError(
                "the absolute_time rotary scheme needs the seconds between slices (Sample.second_I) of every run."
            )
        time_M = (slice_M * (second_I * config.text.rope.tokens_per_second)[run_M]).long()
    last_time_I = torch.zeros_like(frames_I).scatter_reduce(0, run_M, time_M, reduce="amax")
    extent_I = torch.stack((last_time_I + 1, rows_I, columns_I)).amax(0)

    # Every run saves length - extent ids; text and later runs of the same sequence move back by what was saved before them.
    saved_T = torch.zeros_like(token_T)
    last_I = start_I + length_I - 1
    saved_T[last_I] = length_I - extent_I
    saved_T = saved_T.cumsum(0) - saved_T
    first_T = torch.repeat_interleave(_first(lengths), torch.tensor(lengths))
    base_T = place_T - (saved_T - saved_T[first_T])
    position_3T = base_T.expand(3, -1).clone()
    token_M = start_I[run_M] + inside_M
    base_M = base_T[start_I][run_M]
    position_3T[:, token_M] = torch.stack((base_M + time_M, base_M + row_M, base_M + column_M))
    return position_3T


@dataclass(frozen=True)
class Runs:
    """Maximal stretches of one kind of placeholder inside one sequence, in order."""

    start_I: Tensor
    length_I: Tensor
    is_video_I: Tensor


def placeholder_runs(token_T: Tensor, lengths: tuple[int, ...], config: ModelConfig) -> Runs:
    """Every run of image or video placeholders, as the tokens have them (not yet checked against grids)."""
    _, sequence_T = _places(token_T, lengths)
    kind_T = (token_T == config.image_token_id).long() + 2 * (token_T == config.video_token_id).long()
    is_start_T = torch.ones_like(kind_T, dtype=torch.bool)
    is_start_T[1:] = (kind_T[1:] != kind_T[:-1]) | (sequence_T[1:] != sequence_T[:-1])
    is_start_T &= kind_T > 0
    start_I = torch.where(is_start_T)[0]
    run_T = is_start_T.cumsum(0) - 1
    length_I = torch.bincount(run_T[kind_T > 0], minlength=len(start_I))
    return Runs(start_I, length_I, kind_T[start_I] == 2)


def check_runs(runs: Runs, grid_I3: Tensor, config: ModelConfig) -> None:
    """Raise ValueError unless every run has the length its grid makes."""
    assert config.vision is not None
    if len(runs.start_I) != len(grid_I3):
        raise ValueError(
            f"the tokens hold {len(runs.start_I)} runs of image or video placeholders, but {len(grid_I3)} grids came. Give each run one "
            "grid; two pictures that touch count as one run, so put <|vision_end|><|vision_start|> between them."
        )
    merge = config.vision.spatial_merge_size
    if bool((grid_I3 < 1).any()) or bool((grid_I3[:, 1:] % merge != 0).any()):
        raise ValueError(f"grids must be positive with sides divisible by {merge}, got {grid_I3.tolist()}.")
    expected_I = grid_I3.prod(1) // merge**2
    wrong = torch.where(expected_I != runs.length_I)[0].tolist()
    if wrong:
        i = wrong[0]
        raise ValueError(
            f"run {i} of placeholders (from token {int(runs.start_I[i])}) has {int(runs.length_I[i])} tokens, but its grid "
            f"{tuple(grid_I3[i].tolist())} makes {int(expected_I[i])}. Expand each placeholder to t*h*w/{merge**2} tokens, and keep "
            "other tokens between pictures."
        )


def _places(token_T: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Index inside the sequence, and number of the sequence, of each token."""
    if sum(lengths) != token_T.numel():
        raise ValueError(f"the sequences' lengths sum to {sum(lengths)}, but {token_T.numel()} tokens came.")
    sequence_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
    return torch.arange(token_T.numel()) - _first(lengths)[sequence_T], sequence_T


def _first(lengths: tuple[int, ...]) -> Tensor:
    """Index of each sequence's first token."""
    length_S = torch.tensor(lengths, dtype=torch.int64)
    return length_S.cumsum(0) - length_S
