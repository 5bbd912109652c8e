"""Is it the same network? Logits, gradients and bf16 error against transformers on one checkpoint folder."""

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qvl.model.config import ModelConfig, read_config
from qvl.model.moe import RouterStats, load_balancing_loss
from qvl.model.padded import batch_from_padded, to_padded
from qvl.model.weights import Source, load, to_checkpoint_name
from qvl.prompt.processor import Encoded

LOGIT_LIMIT = 1e-4
GRADIENT_LIMIT = 1e-4
BF16_LIMIT = 1.2
"""Over the logits of all cases together."""
BF16_CASE_LIMIT = 1.5
"""Of one case, whose few dozen tokens share most of their rounding: the same weights give .8 to 1.25 by the draw of the inputs."""


@dataclass(frozen=True, kw_only=True)
class ParityRow:
    """One kind of input. Errors are over all unpadded tokens."""

    case: str
    logit_error: float
    """max |logit - transformers' logit| in fp32."""
    gradient_error: float | None
    """Largest over parameters of max|g - g'| / max|g'|; None when gradients were not asked for."""
    worst_parameter: str | None
    bf16_ratio: float | None
    """RMS error of our bf16 logits to fp32, over transformers' own; None where bf16 routing makes it meaningless (MoE)."""
    bf16_together: float | None
    """The same over the logits of all cases."""

    @property
    def passed(self) -> bool:
        return (
            self.logit_error <= LOGIT_LIMIT
            and (self.gradient_error is None or self.gradient_error <= GRADIENT_LIMIT)
            and (self.bf16_ratio is None or self.bf16_ratio <= BF16_CASE_LIMIT)
            and (self.bf16_together is None or self.bf16_together <= BF16_LIMIT)
        )


def compare(folder: Path, *, with_gradients: bool = True, seed: int = 0) -> list[ParityRow]:
    """Run both networks on the same random inputs. transformers runs first and is freed, so the peak is one model and its gradients."""
    config = read_config(folder)
    Source(folder)  # refuses what is no checkpoint, in one sentence, before the long way round
    cases = random_cases(config, seed=seed)
    theirs = _outcomes(_theirs, folder, config, cases, with_gradients=with_gradients)
    gc.collect()
    ours = _outcomes(_ours, folder, config, cases, with_gradients=with_gradients)
    is_moe = config.text.moe is not None
    rounding = [torch.cat([(o.bf16 - o.logits).flatten() for o in each.values()]) for each in (ours, theirs)]
    together = None if is_moe else _rms(rounding[0]) / _rms(rounding[1])
    rows = []
    for case in cases:
        a, b = ours[case], theirs[case]
        errors = {n: _relative(a.gradients.get(n), b.gradients.get(n)) for n in a.gradients | b.gradients}
        worst = max(errors, key=lambda n: errors[n], default=None)
        rows.append(
            ParityRow(
                case=case,
                logit_error=float((a.logits - b.logits).abs().max()),
                gradient_error=errors[worst] if worst is not None else None,
                worst_parameter=worst,
                bf16_ratio=None if is_moe else _rms(a.bf16 - a.logits) / _rms(b.bf16 - b.logits),
                bf16_together=together,
            )
        )
    return rows


@torch.no_grad()
def their_answers(folder: Path, prompts: Sequence[Encoded], max_tokens: int) -> list[list[int]]:
    """Greedy ids of transformers' own network, loaded from the folder in fp32, for prompts that our processor made."""
    model = _load_theirs(folder, torch.float32)
    answers = []
    for encoded in prompts:
        ids = encoded.sample.token_T[None]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for visual in encoded.visuals:
            values, grid = "pixel_values", visual.grid_I3
            if visual.kind == "video":
                values, grid = "pixel_values_videos", torch.tensor([[len(grid), *grid[0, 1:].tolist()]])
            inputs |= {values: visual.values_PX, f"{visual.kind}_grid_thw": grid}
        own = model.config
        inputs["mm_token_type_ids"] = (ids == own.image_token_id).int() + 2 * (ids == own.video_token_id).int()
        out = model.generate(**inputs, do_sample=False, max_new_tokens=max_tokens)
        answers.append(out[0, ids.shape[1] :].tolist())
    return answers


def random_cases(config: ModelConfig, *, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """Inputs in the Hugging Face convention: text, pictures, video, and a padded batch of all three."""
    g = torch.Generator().manual_seed(seed)
    special = [i for i in (config.image_token_id, config.video_token_id, config.vision_start_token_id) if i is not None]
    top = min(special, default=config.text.vocab_size)

    def text(count: int) -> list[int]:
        return torch.randint(0, min(top, 1000), (count,), generator=g).tolist()

    if config.vision is None:
        return {"text": _padded([text(24)]), "batch": _padded([text(7), text(19)])}
    start, end = config.vision_start_token_id, config.vision_end_token_id
    merge = config.vision.merge_area
    images: list[tuple[int, int, int]] = []
    videos: list[tuple[int, int, int]] = []

    def image(h: int, w: int) -> list[Any]:
        images.append((1, h, w))
        return [start, *[config.image_token_id] * (h * w // merge), end]

    def video(t: int, h: int, w: int) -> list[Any]:
        videos.append((t, h, w))
        frame = [start, *[config.video_token_id] * (h * w // merge), end]
        return [token for _ in range(t) for token in (*text(4), *frame)]

    def patches(grids: list[tuple[int, int, int]]) -> Tensor:
        assert config.vision is not None
        return torch.randn(sum(t * h * w for t, h, w in grids), config.vision.patch_numbers, generator=g) * 0.5

    def case(*rows: list[int]) -> dict[str, Tensor]:
        out = _padded(list(rows))
        if images:
            out |= {"pixel_values": patches(images), "image_grid_thw": torch.tensor(images)}
        if videos:
            out |= {"pixel_values_videos": patches(videos), "video_grid_thw": torch.tensor(videos)}
        images.clear()
        videos.clear()
        return out

    return {
        "text": case(text(24)),
        "image": case(text(3) + image(8, 12) + text(6)),
        "images": case(text(2) + image(6, 4) + image(4, 10) + text(3) + image(20, 2) + text(4)),
        "video": case(text(2) + video(3, 4, 6) + text(6)),
        "batch": case(
            text(2) + image(6, 4) + text(3) + video(2, 4, 4) + text(2), text(9), text(3) + image(4, 4) + text(2)
        ),
    }


def _padded(rows: list[list[int]]) -> dict[str, Tensor]:
    longest = max(map(len, rows))
    ids = [row + [0] * (longest - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@dataclass(frozen=True)
class _Outcome:
    logits: Tensor
    """fp32, all unpadded tokens."""
    gradients: dict[str, Tensor]
    """By the checkpoint's names, in transformers 5's orientation."""
    bf16: Tensor


@dataclass(frozen=True)
class _Network:
    """One of the two networks behind one face."""

    forward: Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]]
    """inputs -> (padded logits, loss)."""
    named_parameters: Callable[[], Iterator[tuple[str, Tensor]]]
    """By the checkpoint's names, in transformers 5's orientation."""


def _ours(folder: Path, config: ModelConfig, dtype: torch.dtype) -> _Network:
    model = load(folder, dtype=dtype)

    def forward(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        router: list[RouterStats] = []
        padded = to_padded(
            model.logits(model(batch_from_padded(inputs, config), router_out=router)), inputs["attention_mask"]
        )
        loss = shifted_loss(padded, inputs)
        if config.text.moe is not None:
            loss = loss + config.text.moe.router_aux_loss_coef * load_balancing_loss(router)
        return padded, loss

    return _Network(forward, lambda: ((to_checkpoint_name(n, config), p) for n, p in model.named_parameters()))


def _load_theirs(folder: Path, dtype: torch.dtype) -> Any:
    try:
        import transformers
    except ImportError:
        raise ValueError("parity needs transformers to compare with; pip install 'qvl[test]'.") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    is_text = read_config(folder).vision is None
    auto = transformers.AutoModelForCausalLM if is_text else transformers.AutoModelForImageTextToText
    # Loaded in the asked dtype rather than cast: `.to(bfloat16)` would round transformers' rotary frequencies.
    return auto.from_pretrained(str(folder), dtype=dtype).eval()


def _theirs(folder: Path, config: ModelConfig, dtype: torch.dtype) -> _Network:
    model = _load_theirs(folder, dtype)

    def forward(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        extra: dict[str, Any] = {"use_cache": False}
        if config.vision is not None:
            ids = inputs["input_ids"]
            extra["mm_token_type_ids"] = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
        if config.text.moe is not None:
            extra["output_router_logits"] = True
        out = model(**inputs, **extra)
        loss = shifted_loss(out.logits, inputs)
        if config.text.moe is not None:
            loss = loss + config.text.moe.router_aux_loss_coef * out.aux_loss
        return out.logits, loss

    return _Network(forward, lambda: iter(model.named_parameters()))


def _outcomes(
    network: Callable[[Path, ModelConfig, torch.dtype], _Network],
    folder: Path,
    config: ModelConfig,
    cases: dict[str, dict[str, Tensor]],
    *,
    with_gradients: bool,
) -> dict[str, _Outcome]:
    """fp32 first, then bf16; one network in memory at a time."""
    logits: dict[str, Tensor] = {}
    gradients: dict[str, dict[str, Tensor]] = {}
    fp32 = network(folder, config, torch.float32)
    for case, inputs in cases.items():
        with torch.set_grad_enabled(with_gradients):
            padded, loss = fp32.forward(inputs)
        logits[case] = padded.detach()[inputs["attention_mask"].bool()]
        gradients[case] = {}
        if not with_gradients:
            continue
        loss.backward()
        for name, parameter in fp32.named_parameters():
            if parameter.grad is not None:
                gradients[case][name] = parameter.grad.flatten(1) if parameter.ndim == 5 else parameter.grad
                parameter.grad = None
    del fp32
    gc.collect()
    bf16 = network(folder, config, torch.bfloat16)
    with torch.no_grad():
        rounded = {c: bf16.forward(i)[0].float()[i["attention_mask"].bool()] for c, i in cases.items()}
    return {case: _Outcome(logits[case], gradients[case], rounded[case]) for case in cases}


def shifted_loss(logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy of each unpadded token given those before it in its row."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    is_target = mask[:, 1:] & mask[:, :-1]
    return F.cross_entropy(logits[:, :-1][is_target].float(), ids[:, 1:][is_target])


def _relative(ours: Tensor | None, theirs: Tensor | None) -> float:
    """max|g - g'| / max|g'|; a gradient that is not there (no picture in the input) counts as zero, one that is not finite as infinity."""
    if ours is None or theirs is None:
        present = theirs if ours is None else ours
        return 0.0 if present is None or not bool(present.any()) else float("inf")
    top = float(theirs.abs().max())
    error = float((ours - theirs).abs().max())
    # max() over parameters would pass over a nan.
    return float("inf") if not math.isfinite(error) else error / top if top else error


def _rms(x: Tensor) -> float:
    return float(x.pow(2).mean().sqrt())
