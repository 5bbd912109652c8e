"""V0, the vision pre-stage: pictures of any size meet their captions under a sigmoid loss."""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from qvl.core.batch import Batch
from qvl.model.config import ModelConfig
from qvl.model.flops import pool_flops, text_tower_flops, vision_flops
from qvl.model.layers import PLAIN_BLOCKS, Blocks, RunBlock, run_plainly
from qvl.model.pack import frame_lengths
from qvl.model.pool import AttentionPool, load_pool, new_pool
from qvl.model.qwen3vl import Qwen3VL
from qvl.model.siglip import Tower
from qvl.model.siglip_text import TextTower, TextTowerConfig, load_text_tower, new_text_tower
from qvl.parallel.data_parallel import World
from qvl.train.objective import Micro, Outcome, Prepared, by_category
from qvl.train.parameters import Rates

V0_RATES = Rates(mergers=0.0, language=0.0)
"""What V0 trains: the vision tower, and the helpers beside the model. Mergers and language are not even run."""


@dataclass(frozen=True, kw_only=True)
class CaptionPack:
    """Pictures and their captions, one each, in the same order."""

    batch: Batch
    """Its patches and grids are read, its tokens are not (`picture_batch` makes one without)."""
    ids: tuple[str, ...]
    categories: tuple[str, ...]
    caption_ST: Tensor
    """int64 token rows of fixed length (qvl.model.siglip_text.fixed_length)."""
    caption_id_S: Tensor
    """int64, equal where the captions are equal, on all ranks (`caption_id`)."""

    def __post_init__(self) -> None:
        batch, captions = self.batch, len(self.caption_ST)
        rows = 0 if batch.grid_I3 is None else len(batch.grid_I3)
        if not rows == len(batch.frame_lengths) == captions or not captions:
            raise ValueError(
                f"{captions} captions came for {rows} visual items of {len(batch.frame_lengths)} frames in all; a pack needs one caption "
                "for each of one or more still pictures."
            )
        if not captions == len(self.caption_id_S) == len(self.ids) == len(self.categories):
            raise ValueError(
                f"{captions} captions came with {len(self.caption_id_S)} caption ids, {len(self.ids)} sample ids and "
                f"{len(self.categories)} categories; give one of each a caption."
            )


class Contrastive(nn.Module):
    """SigLIP's pairwise sigmoid loss (arXiv 2303.15343) between the vision tower and a text tower that is thrown away afterwards.

    The report continues SigLIP-2's training at dynamic resolution in a CLIP-style stage and gives neither objective nor data (1.2, 13);
    this is the sigmoid part of SigLIP-2's objective (not its captioning decoder nor its self-distillation) on packed pictures of any size:

        loss = -1/N sum_i sum_j log sigmoid(z_ij (t x_i.y_j + b)),  z_ij = 1 where caption j is picture i's, else -1

    over the N pictures of the global batch: every rank computes its pictures' rows against the captions of all ranks. Captions of equal id
    are all right answers (z = 1): the plain loss calls each other's captions wrong, which in a world of 40 captions is a false negative
    in almost every batch.

    Pairs across packs of one step are not seen: gradient accumulation adds up the losses of smaller batches, it does not make a larger
    one. To see more negatives give larger packs or more ranks, not more packs. All ranks need the same number of packs a step.
    """

    def __init__(
        self, model: Qwen3VL, text: TextTower, pool: AttentionPool, *, scale: float = 10.0, bias: float = -10.0
    ) -> None:
        """`scale` (t) and `bias` (b) as SigLIP starts them: with one right answer in N, all pairs are first held for wrong."""
        super().__init__()
        vision = model.config.vision
        if vision is None:
            raise ValueError("this model is text-only; the vision pre-stage trains a vision tower.")
        if text.config.projection_size != vision.hidden_size or len(pool.probe) != vision.hidden_size:
            raise ValueError(
                f"the text tower ends in {text.config.projection_size} numbers and the pool in {len(pool.probe)}; both must have the "
                f"vision tower's width, {vision.hidden_size}."
            )
        # One dtype throughout, because sharding wants that; the optimizer's masters are fp32 in any case.
        place = {"device": model.visual.pos_embed.weight.device, "dtype": model.visual.pos_embed.weight.dtype}
        self.model, self.text, self.pool = model, text.to(**place), pool.to(**place)
        # SigLIP ends in a LayerNorm; a Qwen3-VL that starts from SigLIP keeps it as its merger's first (model/siglip.py).
        self.post_norm = nn.LayerNorm(vision.hidden_size, eps=1e-6, **place)
        self.post_norm.load_state_dict(model.visual.merger.norm.state_dict())  # type: ignore[union-attr]
        # One number each, but with an axis: sharding takes no scalars.
        self.log_scale = nn.Parameter(torch.tensor([math.log(scale)], **place))
        self.bias = nn.Parameter(torch.tensor([bias], **place))

    helpers: tuple[str, ...] = ()

    def prepare(self, micro: Micro) -> Prepared:
        return Prepared(micro, float(len(_captioned(micro).caption_ST)))

    def forward(self, prepared: Prepared, denominator: float, world: World, blocks: Blocks = PLAIN_BLOCKS) -> Outcome:
        pack = _captioned(prepared.micro)
        image_IC = self.embed_pictures(pack.batch, run_block=blocks.vision)
        device = image_IC.device
        caption_id_I = pack.caption_id_S.to(device)
        text_SC = gather_rows(self.embed_captions(pack.caption_ST), world)
        caption_id_S = gather_rows(caption_id_I, world)
        score_IS = image_IC @ text_SC.T
        is_right_IS = caption_id_I[:, None] == caption_id_S[None, :]
        nll_I = pair_losses(score_IS * self.log_scale.float().exp() + self.bias.float(), is_right_IS)
        hit_I = is_right_IS.gather(1, score_IS.argmax(1, keepdim=True))[:, 0]
        sums = by_category(nll_I, torch.arange(len(nll_I)), pack.categories)
        sums["retrieval"] = (hit_I.sum(), float(len(hit_I)))
        sums["scale"] = (self.log_scale.detach().exp()[0], 1.0)
        sums["bias"] = (self.bias.detach()[0].clone(), 1.0)  # sharded, the parameter is freed before it is read
        flops = pre_stage_flops(self.model.config, self.text.config, pack.batch.frame_lengths, len(pack.caption_ST))
        return Outcome(nll_I.sum() / denominator, sums, flops)

    def embed_pictures(self, batch: Batch, *, run_block: RunBlock = run_plainly) -> Tensor:
        """fp32 unit vectors, one a picture (I, C)."""
        visual = self.model.visual
        batch = batch.to(self.log_scale.device)
        assert batch.patch_PX is not None and batch.grid_I3 is not None
        x_PC = visual.patch_states(batch.patch_PX, batch.grid_I3, batch.frame_lengths, run_block=run_block)
        return F.normalize(self.pool(self.post_norm(x_PC), batch.frame_lengths).float(), dim=-1)

    def embed_captions(self, caption_ST: Tensor) -> Tensor:
        """fp32 unit vectors, one a caption (S, C)."""
        return F.normalize(self.text(caption_ST.to(self.log_scale.device)).float(), dim=-1)

    @torch.no_grad()
    def hand_over(self) -> None:
        """Write the trained last LayerNorm back into the model's merger, which begins with it. Call when V0 is done."""
        self.model.visual.merger.norm.load_state_dict(self.post_norm.state_dict())  # type: ignore[union-attr]


def pair_losses(logit_IS: Tensor, is_right_IS: Tensor) -> Tensor:
    """-sum_j log sigmoid(z_ij logit_ij) of each picture (I,), z = 1 for right pairs and -1 for the others."""
    return -F.logsigmoid(torch.where(is_right_IS, logit_IS, -logit_IS)).sum(dim=1)


def new_contrastive(model: Qwen3VL, config: TextTowerConfig, *, seed: int = 0) -> Contrastive:
    """Helpers freshly drawn: for towers trained from scratch."""
    vision = model.config.vision
    if vision is None:
        raise ValueError("this model is text-only; the vision pre-stage trains a vision tower.")
    pool = new_pool(vision.hidden_size, vision.intermediate_size, vision.num_heads, seed=seed)
    return Contrastive(model, new_text_tower(config, seed=seed + 1), pool)


def load_contrastive(model: Qwen3VL, folder: Path | str) -> Contrastive:
    """Helpers of the SigLIP or SigLIP-2 folder that the model's tower started from (model/start.py): where SigLIP's training stopped."""
    tower = Tower.open(folder)
    source = tower.source
    if missing := [name for name in ("logit_scale", "logit_bias") if name not in source.home]:
        raise ValueError(f"{folder} lacks {missing[0]}; expected a whole SigLIP or SigLIP-2 with both its halves.")
    objective = Contrastive(
        model,
        load_text_tower(folder),
        load_pool(folder),
        scale=math.exp(float(source.get("logit_scale"))),
        bias=float(source.get("logit_bias")),
    )
    with torch.no_grad():
        for name, parameter in objective.post_norm.named_parameters():
            parameter.copy_(tower.get(f"post_layernorm.{name}"))
    return objective


def picture_batch(pictures: Sequence[tuple[Tensor, Tensor]]) -> Batch:
    """Pictures without any text: (patches (P, X), grid (1, 3)) of each, as a Sample has them, end to end."""
    if not pictures:
        raise ValueError("picture_batch needs at least one picture.")
    grid_I3 = torch.cat([grid for _, grid in pictures])
    return Batch(
        token_T=torch.empty(0, dtype=torch.int64),
        position_3T=torch.empty(3, 0, dtype=torch.int64),
        lengths=(),
        patch_PX=torch.cat([patches for patches, _ in pictures]),
        grid_I3=grid_I3,
        frame_lengths=frame_lengths(grid_I3),
    )


def caption_id(caption: str) -> int:
    """63 bits of a checksum, the same on every rank and in every run."""
    return int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=8).digest(), "big") >> 1


def gather_rows(x: Tensor, world: World) -> Tensor:
    """All ranks' rows in rank order, with gradient; ranks may hold different numbers of rows. A lone rank gets its own back."""
    return x if world.size == 1 else _GatherRows.apply(x, world)  # type: ignore[return-value]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, world):
        count = torch.tensor([len(x)], device=x.device)
        counts = [torch.empty_like(count) for _ in range(world.size)]
        dist.all_gather(counts, count)
        sizes = [int(c) for c in counts]
        # The collective wants equal shapes: each rank pads to the longest, and the padding is cut off.
        padded = x.new_zeros(max(sizes), *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        ctx.rows = slice(sum(sizes[: world.rank]), sum(sizes[: world.rank + 1]))
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx, *grads):
        # A caption's gradient comes from the pictures of all ranks.
        grad = grads[0].contiguous().clone()
        dist.all_reduce(grad)
        return grad[ctx.rows], None


@torch.inference_mode()
def zero_shot(
    objective: Contrastive, class_caption_ST: Tensor, class_id_S: Tensor, packs: Iterable[CaptionPack]
) -> float:
    """Share of pictures whose nearest class is their own `caption_id_S` (report 13, Table 11, scores the tower so).

    Several captions may share a class id ("a photo of a cat", "a cat"): their vectors are averaged. The tower takes any resolution, so
    score the same pictures at half, full and double size by giving the packs of each in turn. Not for sharded weights: run it on one
    rank, from a checkpoint.
    """
    if isinstance(objective.log_scale, DTensor):
        raise ValueError("the weights are sharded over ranks; score a checkpoint on one rank.")
    text_SC = objective.embed_captions(class_caption_ST)
    class_id, which_S = class_id_S.to(text_SC.device).unique(return_inverse=True)
    mean = text_SC.new_zeros(len(class_id), text_SC.shape[1]).index_add_(0, which_S, text_SC)
    classes = F.normalize(mean, dim=-1)
    right, total = 0, 0
    for pack in packs:
        image_IC = objective.embed_pictures(pack.batch)
        nearest = class_id[(image_IC @ classes.T).argmax(dim=1)]
        right += int((nearest.cpu() == pack.caption_id_S.cpu()).sum())
        total += len(nearest)
    if not total:
        raise ValueError("no packs came; zero_shot needs at least one.")
    return right / total


def _captioned(micro: Micro) -> CaptionPack:
    if not isinstance(micro, CaptionPack):
        raise ValueError(f"a {type(micro).__name__} came; the vision pre-stage learns from CaptionPack.")
    return micro


def pre_stage_flops(config: ModelConfig, text: TextTowerConfig, frames: tuple[int, ...], captions: int) -> int:
    """Of V0 on so many captions and frames of so many patches, forward and backward, without the scores of the pairs: vision encoder, pool
    and text tower. The mergers and the language model are not run."""
    vision = config.vision
    assert vision is not None
    forward = vision_flops(config, frames, with_mergers=False) + text_tower_flops(text, captions)
    return 3 * (forward + pool_flops(vision.hidden_size, vision.intermediate_size, frames))
