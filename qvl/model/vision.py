"""The vision tower: native-resolution patches of all images and frames in one packed call."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qvl.core.device import ask_for_large_pages
from qvl.model.attention import Layout, Packed
from qvl.model.config import VisionConfig
from qvl.model.layers import Linear, RunBlock, run_plainly
from qvl.model.merger import Merger
from qvl.model.rope import rotate


@dataclass(frozen=True)
class VisualFeatures:
    merged_MD: Tensor
    """What takes the placeholders' place."""
    deepstack: tuple[Tensor, ...]
    """One (M, D) tensor for each DeepStack level."""

    def part(self, low: int, high: int) -> "VisualFeatures":
        """Those of the visual tokens [low, high)."""
        return VisualFeatures(self.merged_MD[low:high], tuple(level[low:high] for level in self.deepstack))


def joined(pieces: Sequence[VisualFeatures]) -> VisualFeatures:
    if len(pieces) == 1:
        return pieces[0]
    levels = zip(*(f.deepstack for f in pieces), strict=True)
    return VisualFeatures(torch.cat([f.merged_MD for f in pieces]), tuple(torch.cat(level) for level in levels))


@dataclass(frozen=True)
class PatchPlaces:
    """Where each patch stands inside its frame. Frames of a video share places: time is not encoded here (report 2)."""

    row_P: Tensor
    column_P: Tensor
    height_P: Tensor
    """Patch rows of the frame that the patch belongs to."""
    width_P: Tensor


class PatchEmbed(nn.Module):
    """A linear map of the raw patch: the checkpoint's Conv3d, whose stride is its kernel, by reshape (Conv3d itself is far slower)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.proj = Linear(config.patch_numbers, config.hidden_size)

    def forward(self, patch_PX: Tensor) -> Tensor:
        return self.proj(normalise(patch_PX).to(self.proj.weight.dtype))


def normalise(patch_PX: Tensor) -> Tensor:
    """Bytes 0..255 to float32 -1..1 (mean and deviation 0.5); subtraction and division in this order give transformers' floats to the
    bit. Floats pass: they are normalised already."""
    if patch_PX.dtype != torch.uint8:
        return patch_PX
    if patch_PX.device.type != "cpu":
        return patch_PX.to(torch.float32).sub_(127.5).div_(127.5)
    # An image of 1920 x 1080 is 50 MB of floats, whose 12,241 page faults of small pages cost more than the arithmetic.
    value_PX = torch.empty(patch_PX.shape, dtype=torch.float32)
    ask_for_large_pages([value_PX])
    # In parts that stay in cache, so that each float goes to memory once.
    for raw, value in zip(patch_PX.split(256), value_PX.split(256), strict=True):
        value.copy_(raw).sub_(127.5).div_(127.5)
    return value_PX


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x_PC: Tensor, cos_PH: Tensor, sin_PH: Tensor, layout: Layout) -> Tensor:
        heads = self.qkv(x_PC).unflatten(-1, (3 * self.num_heads, -1))
        both, v_PNH = heads.split((2 * self.num_heads, self.num_heads), dim=1)
        # One turn for queries and keys, in fp32 whatever the tower's dtype (the decoder casts cos and sin instead).
        q_PNH, k_PNH = rotate(both.float(), cos_PH, sin_PH).to(x_PC.dtype).chunk(2, dim=1)
        return self.proj(self.attend(q_PNH, k_PNH, v_PNH, layout).flatten(-2))

    def attend(self, q_PNH: Tensor, k_PNH: Tensor, v_PNH: Tensor, layout: Layout) -> Tensor:
        """Apart, because a compiler must stop here: the frames' lengths change with every pack."""
        return layout.attend(q_PNH, k_PNH, v_PNH, layer=0)


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.linear_fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.linear_fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_PC: Tensor) -> Tensor:
        return self.linear_fc2(F.gelu(self.linear_fc1(x_PC), approximate="tanh"))


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.attn = VisionAttention(config)
        self.mlp = VisionMLP(config)

    def forward(self, x_PC: Tensor, cos_PH: Tensor, sin_PH: Tensor, layout: Layout) -> Tensor:
        x_PC = x_PC + self.attn(self.norm1(x_PC), cos_PH, sin_PH, layout)
        return x_PC + self.mlp(self.norm2(x_PC))


class Vision(nn.Module):
    """Patch embedding + interpolated position table, blocks with 2D-RoPE and full attention inside each frame, mergers."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = nn.Embedding(config.num_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = Merger(config, is_post_shuffle=False)
        self.deepstack_merger_list = nn.ModuleList(
            Merger(config, is_post_shuffle=True) for _ in config.deepstack_visual_indexes
        )

    def forward(
        self,
        patch_PX: Tensor,
        grid_I3: Tensor,
        frame_lengths: tuple[int, ...],
        *,
        max_patches: int | None = None,
        run_block: RunBlock = run_plainly,
    ) -> VisualFeatures:
        """`max_patches` runs whole frames in chunks of at most that many patches (a larger frame alone), to bound memory.
        `run_block` runs each block.

        Frames do not see each other, so chunking changes nothing but the memory.
        """
        places = self._places(patch_PX, grid_I3, frame_lengths)
        chunks = [frame_lengths] if max_patches is None else frame_chunks(frame_lengths, max_patches)
        features, start = [], 0
        for chunk in chunks:
            rows = slice(start, start + sum(chunk))
            local = PatchPlaces(places.row_P[rows], places.column_P[rows], places.height_P[rows], places.width_P[rows])
            features.append(self._encode(patch_PX[rows], local, Packed(chunk, is_causal=False), run_block))
            start = rows.stop
        return joined(features)

    def patch_states(
        self, patch_PX: Tensor, grid_I3: Tensor, frame_lengths: tuple[int, ...], *, run_block: RunBlock = run_plainly
    ) -> Tensor:
        """Patches after the last block, before any merger (P, C): what the vision pre-stage trains."""
        places = self._places(patch_PX, grid_I3, frame_lengths)
        return self._states(patch_PX, places, Packed(frame_lengths, is_causal=False), run_block)

    def _places(self, patch_PX: Tensor, grid_I3: Tensor, frame_lengths: tuple[int, ...]) -> PatchPlaces:
        if sum(frame_lengths) != patch_PX.shape[0]:
            raise ValueError(f"{patch_PX.shape[0]} patches came, but the grids say {sum(frame_lengths)}.")
        return patch_places(grid_I3, frame_lengths, self.config.spatial_merge_size)

    def _encode(self, patch_PX: Tensor, places: PatchPlaces, layout: Layout, run_block: RunBlock) -> VisualFeatures:
        deepstack: list[Tensor] = []
        x_PC = self._states(patch_PX, places, layout, run_block, deepstack_out=deepstack)
        return VisualFeatures(self.merger(x_PC), tuple(deepstack))

    def _states(
        self,
        patch_PX: Tensor,
        places: PatchPlaces,
        layout: Layout,
        run_block: RunBlock,
        *,
        deepstack_out: list[Tensor] | None = None,
    ) -> Tensor:
        x_PC = self.patch_embed(patch_PX)
        x_PC = x_PC + interpolate_table(self.pos_embed.weight, places).to(x_PC.dtype)
        cos_PH, sin_PH = rotary_2d(places, self.config.head_dim)
        for index, block in enumerate(self.blocks):
            x_PC = run_block(block, x_PC, cos_PH, sin_PH, layout)
            if deepstack_out is not None and index in self.config.deepstack_visual_indexes:
                level = self.config.deepstack_visual_indexes.index(index)
                deepstack_out.append(self.deepstack_merger_list[level](x_PC))
        return x_PC


def patch_places(grid_I3: Tensor, frame_lengths: tuple[int, ...], merge: int) -> PatchPlaces:
    """Row, column and frame size of every patch, in merge-block order (h/m, w/m, m, m), without a loop over images."""
    num_frames, num_patches = len(frame_lengths), sum(frame_lengths)
    # output_size tells repeat_interleave the answer's length, so the device is never asked for it
    frame_hw = torch.repeat_interleave(grid_I3[:, 1:], grid_I3[:, 0], dim=0, output_size=num_frames)
    area = frame_hw.prod(1)
    first = area.cumsum(0) - area
    frame_P = torch.repeat_interleave(torch.arange(num_frames, device=grid_I3.device), area, output_size=num_patches)
    height_P, width_P = frame_hw[frame_P].unbind(1)
    index_P = torch.arange(num_patches, device=grid_I3.device) - first[frame_P]
    block_P, inside_P = index_P // merge**2, index_P % merge**2
    blocks_across_P = width_P // merge
    row_P = block_P // blocks_across_P * merge + inside_P // merge
    column_P = block_P % blocks_across_P * merge + inside_P % merge
    return PatchPlaces(row_P, column_P, height_P, width_P)


def interpolate_table(table: Tensor, places: PatchPlaces) -> Tensor:
    """The square position table read bilinearly with aligned corners: four taps a patch, fp32 weights and sum (P, C)."""
    side = round(table.shape[0] ** 0.5)
    low_row_P, high_row_P, row_part_P = _taps(places.row_P, places.height_P, side)
    low_column_P, high_column_P, column_part_P = _taps(places.column_P, places.width_P, side)
    out_PC = torch.zeros((), device=table.device)
    for row_P, row_weight_P in ((low_row_P, 1 - row_part_P), (high_row_P, row_part_P)):
        for column_P, column_weight_P in ((low_column_P, 1 - column_part_P), (high_column_P, column_part_P)):
            out_PC = out_PC + table[row_P * side + column_P] * (row_weight_P * column_weight_P)[:, None]
    return out_PC


def _taps(place_P: Tensor, count_P: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """A patch at `place` of `count` lies at place * (side-1) / (count-1) on the table: the two neighbours, and how far along it is."""
    at_P = place_P * (side - 1) / (count_P - 1).clamp(min=1)
    low_P = at_P.long()
    return low_P, (low_P + 1).clamp(max=side - 1), at_P - low_P


def rotary_2d(places: PatchPlaces, head_dim: int) -> tuple[Tensor, Tensor]:
    """fp32 (cos_PH, sin_PH): the first quarter of the frequencies turns with the row, the second with the column, then both again."""
    quarter = torch.arange(0, head_dim // 2, 2, dtype=torch.float32, device=places.row_P.device)
    inverse = 1.0 / (10000.0 ** (quarter / (head_dim // 2)))
    angle_PH = torch.cat((places.row_P[:, None] * inverse, places.column_P[:, None] * inverse), dim=-1)
    angle_PH = torch.cat((angle_PH, angle_PH), dim=-1)
    return angle_PH.cos(), angle_PH.sin()


def frame_chunks(frame_lengths: tuple[int, ...], max_patches: int) -> list[tuple[int, ...]]:
    """Neighbouring frames grouped so that no group but a lone large frame exceeds max_patches."""
    groups: list[list[int]] = []
    for length in frame_lengths:
        if groups and sum(groups[-1]) + length <= max_patches:
            groups[-1].append(length)
        else:
            groups.append([length])
    return [tuple(group) for group in groups]


def sincos_table(side: int, width: int) -> Tensor:
    """A fixed 2-D sine-cosine table at content scale (ViT from scratch, arXiv 2205.01580), (side * side, C)."""
    if width % 4:
        raise ValueError(f"a sine-cosine position table needs a width divisible by 4, got {width}.")
    frequency = 1.0 / (10000.0 ** (torch.arange(width // 4, dtype=torch.float32) / (width // 4)))
    angle = torch.arange(side, dtype=torch.float32)[:, None] * frequency
    one_axis = torch.cat((angle.sin(), angle.cos()), dim=-1)
    rows = one_axis[:, None].expand(side, side, -1)
    columns = one_axis[None, :].expand(side, side, -1)
    return torch.cat((rows, columns), dim=-1).reshape(side * side, width)
