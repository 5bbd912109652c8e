"""The door to Hugging Face's padded tensors: in they are laid end to end, out they are padded again."""

import torch
from torch import Tensor

from qvl.core.batch import Batch, Sample
from qvl.model.config import ModelConfig
from qvl.model.pack import pack
from qvl.model.positions import check_runs, placeholder_runs

KEYS = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


def batch_from_padded(tensors: dict[str, Tensor], config: ModelConfig) -> Batch:
    """Hugging Face's inputs (see KEYS; only input_ids is required) as a Batch, one sequence a row, padding dropped.

    Images and videos come in separate tensors there, each in order over the flattened batch; here they stand in the order of their
    placeholders, a video as one row for each temporal slice.
    """
    unknown = sorted(set(tensors) - set(KEYS) - {"mm_token_type_ids"})
    if unknown:
        raise ValueError(
            f"inputs hold {', '.join(unknown)}; expected some of {', '.join(KEYS)} (positions follow from these)."
        )
    if "input_ids" not in tensors or tensors["input_ids"].ndim != 2:
        raise ValueError("inputs need input_ids of shape (rows, tokens).")
    ids = tensors["input_ids"].long()
    mask = tensors.get("attention_mask", torch.ones_like(ids)).bool()
    if mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(ids.shape)}; they must agree."
        )
    if not bool(mask.any(1).all()):
        raise ValueError("a row of input_ids is all padding; drop it.")
    if int(ids.min()) < 0 or int(ids.max()) >= config.text.vocab_size:
        raise ValueError(
            f"input_ids run from {int(ids.min())} to {int(ids.max())}; the vocabulary has {config.text.vocab_size}."
        )
    if "mm_token_type_ids" in tensors:
        kinds = (
            (ids == config.image_token_id) + 2 * (ids == config.video_token_id)
            if config.vision
            else torch.zeros_like(ids)
        )
        if not torch.equal(tensors["mm_token_type_ids"].long(), kinds.long()):
            raise ValueError(
                "mm_token_type_ids disagree with the placeholders in input_ids; leave them out, they follow from these."
            )
    lengths = tuple(mask.sum(1).tolist())
    token_T = ids[mask]
    patch_PX, grid_I3 = _in_order(tensors, token_T, lengths, config)
    merged = Sample(token_T=token_T, patch_PX=patch_PX, grid_I3=grid_I3)
    return pack(split(merged, lengths, config), config)


def to_padded(x: Tensor, mask: Tensor) -> Tensor:
    """(T, ...) back to (rows, tokens, ...), zeros at the padding."""
    out = x.new_zeros(*mask.shape, *x.shape[1:])
    out[mask.bool()] = x
    return out


def split(sample: Sample, lengths: tuple[int, ...], config: ModelConfig) -> list[Sample]:
    """One sample cut into sequences of the given lengths, its pictures going with their placeholders."""
    tokens = sample.token_T.split(list(lengths))
    if sample.grid_I3 is None or sample.patch_PX is None:
        return [Sample(token_T=t) for t in tokens]
    runs = placeholder_runs(sample.token_T, lengths, config)
    check_runs(runs, sample.grid_I3, config)
    sequence_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    runs_per_sequence = torch.bincount(sequence_T[runs.start_I], minlength=len(lengths)).tolist()
    grids = sample.grid_I3.split(runs_per_sequence)
    patches = sample.patch_PX.split([int(g.prod(1).sum()) for g in grids])
    return [
        Sample(token_T=t, patch_PX=p if len(g) else None, grid_I3=g if len(g) else None)
        for t, p, g in zip(tokens, patches, grids, strict=True)
    ]


def _in_order(
    tensors: dict[str, Tensor], token_T: Tensor, lengths: tuple[int, ...], config: ModelConfig
) -> tuple[Tensor | None, Tensor | None]:
    """Patches and grids of both modalities in the order in which their runs stand in the tokens."""
    images = _modality(tensors, "pixel_values", "image_grid_thw")
    videos = _modality(tensors, "pixel_values_videos", "video_grid_thw")
    if images is None and videos is None:
        return None, None
    if config.vision is None:
        raise ValueError("pixel values came and the model is text only; leave them out.")
    is_video = placeholder_runs(token_T, lengths, config).is_video_I.tolist()
    rows = {False: images or [], True: videos or []}
    for kind, name in ((False, "image"), (True, "video")):
        if is_video.count(kind) != len(rows[kind]):
            raise ValueError(
                f"the tokens hold {is_video.count(kind)} runs of {name} placeholders, but {len(rows[kind])} {name} grids came (a video "
                "counts once for each temporal slice). Two pictures that touch count as one run."
            )
    queues = {kind: iter(found) for kind, found in rows.items()}
    ordered = [next(queues[kind]) for kind in is_video]
    return torch.cat([p for p, _ in ordered]), torch.stack([g for _, g in ordered])


def _modality(tensors: dict[str, Tensor], pixels: str, grids: str) -> list[tuple[Tensor, Tensor]] | None:
    """(patches, (1, h, w)) for each image or temporal slice."""
    if (pixels in tensors) != (grids in tensors):
        raise ValueError(f"{pixels} and {grids} must come together.")
    if grids not in tensors:
        return None
    thw = tensors[grids].long()
    if thw.ndim != 2 or thw.shape[1] != 3:
        raise ValueError(f"{grids} must have shape (count, 3), got {tuple(thw.shape)}.")
    slice_I3 = torch.repeat_interleave(thw, thw[:, 0], dim=0)
    slice_I3[:, 0] = 1
    sizes = slice_I3.prod(1).tolist()
    if sum(sizes) != tensors[pixels].shape[0]:
        raise ValueError(f"{pixels} has {tensors[pixels].shape[0]} patches, but {grids} says {sum(sizes)}.")
    return list(zip(tensors[pixels].split(sizes), slice_I3, strict=True))
