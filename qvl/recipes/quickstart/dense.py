"""Dense labels for a vision tower: every patch and every visual token says what it shows and where, through heads that are thrown away."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qvl.core.batch import Batch
from qvl.model.layers import PLAIN_BLOCKS, Blocks, RunBlock, run_plainly
from qvl.model.qwen3vl import Qwen3VL
from qvl.parallel.data_parallel import World
from qvl.train.objective import Micro, Outcome, Prepared

BINS = 100
"""Stretches of the picture. A box edge is told as the two neighbours it lies between, with the share of each (distribution focal loss,
arXiv 2006.04388): one stretch alone would teach nothing finer than itself."""


@dataclass(frozen=True, kw_only=True)
class DenseLabels:
    """What the P patches of a pack show, in the pack's order (merge blocks)."""

    thing_P: Tensor
    written_P: Tensor
    centre_P: Tensor
    """bool, all three: a shape is here, a digit, an object's middle."""
    colour_P: Tensor
    shape_P: Tensor
    """Of the shape, where one is."""
    digit_P: Tensor
    """Of the digit, where one is."""
    box_P4: Tensor
    """fp32 x1, y1, x2, y2 as parts of the frame, where an object is."""
    edge_P4: Tensor
    """bool: whether the object ends here. A patch tells the edges it sees; what lies elsewhere is asked of the patches there."""
    mask_P44: Tensor
    """bool: which of 4 x 4 cells an object covers."""


@dataclass(frozen=True, kw_only=True)
class DensePack:
    """Pictures and their labels; a Micro without tokens."""

    batch: Batch
    ids: tuple[str, ...]
    categories: tuple[str, ...]
    labels: DenseLabels


class Dense(nn.Module):
    """Cross-entropies of kind, colour, shape, digit, box edges, middle and mask at every patch of the tower's last block; and of kind,
    colour, shape, digit, and the hundreds and tens of box edges at every visual token that the merger makes of four patches.

    Ours: the published towers start from SigLIP-2, which has seen 40 billion examples (arXiv 2502.14786); a tiny tower that begins at
    random learns no shapes from captions alone in a minute (dev/LOG.md). Colour and shape have heads of their own: no pair is named here.

    Tokens are read through fixed directions: a head that learns makes up for features too faint for the language to find, and the tens
    of a box, which need most of the tower, were never said (dev/LOG.md). A class that the language has a word for lies where that word's
    embedding does (`words`), so that a visual token says "red" as text would; the others are drawn at random.
    """

    weights: Mapping[str, float] = MappingProxyType({"box": 3.0, "centre": 0.6, "token tens": 2.0})
    """Of the heads; the others weigh 1."""
    directions: Tensor
    """One row of norm 2 for each class of a token."""

    def __init__(
        self,
        model: Qwen3VL,
        *,
        colours: int,
        shapes: int,
        digits: int = 10,
        words: Mapping[str, Sequence[int]] = MappingProxyType({}),
        seed: int = 0,
    ) -> None:
        """`words`: token ids for colour, shape or digit, one for each class in its order. Raises ValueError for a count that differs."""
        super().__init__()
        vision = model.config.vision
        if vision is None:
            raise ValueError("this model is text-only; the vision pre-stage trains a vision tower.")
        self.model = model
        classes = {"kind": 3, "colour": colours, "shape": shapes, "digit": digits}
        self.sizes = classes | {"box": 4 * BINS, "centre": 1, "mask": 16}
        self.token_sizes = {f"token {name}": size for name, size in (classes | {"hundreds": 40, "tens": 40}).items()}
        # A lesson of language alone may have frozen it.
        self.merger = deepcopy(model.visual.merger).requires_grad_(True)
        self.head = nn.Linear(vision.hidden_size, sum(self.sizes.values()))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.head.weight.normal_(0, 0.02, generator=generator)
            self.head.bias.zero_()
        drawn = torch.randn(sum(self.token_sizes.values()), vision.out_hidden_size, generator=generator)
        rows = dict(zip(self.token_sizes, drawn.split(list(self.token_sizes.values())), strict=True))
        for name, ids in words.items():
            if len(set(ids)) != classes[name]:
                raise ValueError(
                    f"{len(set(ids))} words came for {name}, which has {classes[name]} classes; give each one of its own."
                )
            rows[f"token {name}"] = model.language_model.embed_tokens.weight.detach()[list(ids)].float()
        directions = 2 * F.normalize(torch.cat(list(rows.values())), dim=-1)
        self.register_buffer("directions", directions, persistent=False)

    helpers: tuple[str, ...] = ()

    def prepare(self, micro: Micro) -> Prepared:
        return Prepared(micro, float(len(_labelled(micro).labels.thing_P)))

    def forward(self, prepared: Prepared, denominator: float, world: World, blocks: Blocks = PLAIN_BLOCKS) -> Outcome:
        pack = _labelled(prepared.micro)
        said = self.read(pack.batch, run_block=blocks.vision)
        losses = patch_losses(said, pack.labels) | token_losses(said, pack.labels)
        # Each head's mean over the patches that have its label; packs of a step and ranks weigh by their patches.
        mean = sum((self.weights.get(name, 1.0) * loss_R.mean() for name, loss_R in losses.items()), torch.zeros(()))
        sums: dict[str, tuple[Tensor | float, float]] = {
            f"loss/{name}": (loss_R.detach().sum(), float(len(loss_R))) for name, loss_R in losses.items()
        }
        sums |= {f"right/{name}": pair for name, pair in _hits(said, pack.labels).items()}
        sums["loss"] = (mean.detach(), 1.0)
        return Outcome(mean * (prepared.denominator / denominator), sums)

    def read(self, batch: Batch, *, run_block: RunBlock = run_plainly) -> dict[str, Tensor]:
        """Each head's logits, fp32: for every patch, or for every visual token, which is four of them."""
        batch = batch.to(self.head.weight.device)
        assert batch.patch_PX is not None and batch.grid_I3 is not None
        x_PC = self.model.visual.patch_states(batch.patch_PX, batch.grid_I3, batch.frame_lengths, run_block=run_block)
        patches = self.head(self.merger.norm(x_PC)).float().split(list(self.sizes.values()), dim=-1)
        # As the decoder's first norm hands tokens on, so that only their direction counts.
        merged_MD = F.rms_norm(self.merger(x_PC).float(), [self.directions.shape[1]])
        tokens = (merged_MD @ self.directions.T).split(list(self.token_sizes.values()), dim=-1)
        return dict(zip((*self.sizes, *self.token_sizes), (*patches, *tokens), strict=True))

    @torch.no_grad()
    def hand_over(self) -> None:
        """Write the trained merger back into the model. Call when V0 is done."""
        self.model.visual.merger.load_state_dict(self.merger.state_dict())  # type: ignore[union-attr]


def patch_losses(said: Mapping[str, Tensor], labels: DenseLabels) -> dict[str, Tensor]:
    """Each head's losses, one for each patch that has its label; heads without any patch are left out."""
    thing_P, written_P = labels.thing_P, labels.written_P
    edges = labels.box_P4[labels.edge_P4]
    yes_no = partial(F.binary_cross_entropy_with_logits, reduction="none")
    losses = {
        "kind": _nll(said["kind"], thing_P.long() + 2 * written_P.long()),
        "colour": _nll(said["colour"][thing_P], labels.colour_P[thing_P]),
        "shape": _nll(said["shape"][thing_P], labels.shape_P[thing_P]),
        "digit": _nll(said["digit"][written_P], labels.digit_P[written_P]),
        "box": _between(said["box"].unflatten(-1, (4, BINS))[labels.edge_P4], edges * BINS - 0.5),
        "centre": yes_no(said["centre"][:, 0], labels.centre_P.float()),
        "mask": yes_no(said["mask"], labels.mask_P44.flatten(1).float()).mean(dim=-1),
    }
    return {name: loss for name, loss in losses.items() if len(loss)}


def token_losses(said: Mapping[str, Tensor], labels: DenseLabels) -> dict[str, Tensor]:
    """Each head's losses, one for each visual token that has the label. A token's label is that of the first of its patches with one."""
    thing_P, written_P = labels.thing_P, labels.written_P
    is_thing, is_written = (of_P.view(-1, 4).any(dim=1) for of_P in (thing_P, written_P))
    losses = {"token kind": _nll(said["token kind"], torch.where(is_written, 2, is_thing.long()))}
    places = {
        "colour": (thing_P, labels.colour_P),
        "shape": (thing_P, labels.shape_P),
        "digit": (written_P, labels.digit_P),
    }
    for name, (has_P, label_P) in places.items():
        has_M, label_M = _first(has_P, label_P)
        losses[f"token {name}"] = _nll(said[f"token {name}"][has_M], label_M[has_M])
    # As answers write an edge, in thousandths; the far edge of the picture is 999 here.
    thousandths = (labels.box_P4 * 1000).round().long().clamp(max=999)
    firsts = [_first(labels.edge_P4[:, edge], thousandths[:, edge]) for edge in range(4)]
    has_M4, edge_M4 = (torch.stack(of_edges, dim=1) for of_edges in zip(*firsts, strict=True))
    for name, unit in (("hundreds", 100), ("tens", 10)):
        by_edge = said[f"token {name}"].unflatten(-1, (4, 10))
        losses[f"token {name}"] = _nll(by_edge[has_M4], edge_M4[has_M4] // unit % 10)
    return {name: loss for name, loss in losses.items() if len(loss)}


def _first(has_P: Tensor, value_P: Tensor) -> tuple[Tensor, Tensor]:
    """(whether any of a token's four patches has the label, that of the first which has)."""
    has_M4 = has_P.view(-1, 4)
    return has_M4.any(dim=1), value_P.view(-1, 4).gather(1, has_M4.float().argmax(dim=1, keepdim=True))[:, 0]


@torch.no_grad()
def accuracy(objective: Dense, packs: Iterable[DensePack]) -> dict[str, float]:
    """Share of patches whose colour, shape and digit are named right, over all packs."""
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for pack in packs:
        for name, (hits, count) in _hits(objective.read(pack.batch), pack.labels).items():
            right[name] += int(hits)
            total[name] += int(count)
    return {name: right[name] / total[name] for name in total}


def join(parts: Sequence[DenseLabels]) -> DenseLabels:
    """Labels of several pictures, end to end."""
    return DenseLabels(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(DenseLabels)})


def _hits(said: Mapping[str, Tensor], labels: DenseLabels) -> dict[str, tuple[Tensor, float]]:
    """(patches named right, patches with that label) of each head that names."""
    places = {"colour": labels.thing_P, "shape": labels.thing_P, "digit": labels.written_P}
    truths = {"colour": labels.colour_P, "shape": labels.shape_P, "digit": labels.digit_P}
    return {
        name: ((said[name][at].argmax(dim=-1) == truths[name][at]).sum(), float(at.sum()))
        for name, at in places.items()
        if bool(at.any())
    }


def _nll(logits: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(logits, label, reduction="none")


def _between(logits: Tensor, at: Tensor) -> Tensor:
    """Cross-entropy with the two bins whose middles lie around `at`, each by its nearness."""
    at = at.clamp(0, logits.shape[-1] - 1)
    low = at.long().clamp(max=logits.shape[-1] - 2)
    part, said = at - low, logits.log_softmax(dim=-1)
    below, above = (said.gather(-1, (low + step)[:, None])[:, 0] for step in (0, 1))
    return -(below * (1 - part) + above * part)


def _labelled(micro: Micro) -> DensePack:
    if not isinstance(micro, DensePack):
        raise ValueError(f"a {type(micro).__name__} came; dense labels learn from DensePack.")
    return micro
