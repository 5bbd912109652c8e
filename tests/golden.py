"""Tiny checkpoints and their answers, computed by transformers while the tests run: the yardstick of the network."""

import atexit
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

VOCAB, BOS, EOS, VISION_START, VISION_END, IMAGE, VIDEO = 512, 500, 501, 502, 503, 505, 506
CASES = ("text", "image", "image_tall", "multi_image", "video", "two_videos_image", "batch_left", "batch_right")
MODELS = ("dense_tied", "dense_untied", "moe", "moe_mixed")
LAYOUTS = ("hub", "v5")
AUX_WEIGHT = 1.0
"""What the goldens multiply the router's load-balancing loss by. At the published 0.001 its gradient would drown in the tolerance."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What transformers says about one case. Names, not suffixes: these tensors are padded."""

    inputs: dict[str, Tensor]
    labels: Tensor
    logits: Tensor
    loss: float
    gradients: dict[str, Tensor]
    """By checkpoint key; parameters the loss does not reach are absent."""
    positions: Tensor | None
    aux_loss: float | None = None
    gradients_with_aux: dict[str, Tensor] | None = None


@cache
def folder(name: str, layout: str = "v5") -> Path:
    """A checkpoint as transformers 5 writes it ("v5") or as the published repositories hold it ("hub"): same weights."""
    path = _scratch() / f"{name}-{layout}"
    if layout == "v5":
        _fresh(name).save_pretrained(path)
        return path
    shutil.copytree(folder(name, "v5"), path)
    to_hub_layout(path)
    return path


@cache
def reference(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model with plain attention. Loaded at its dtype, because `.to(bfloat16)` would round its rotary buffers."""
    hf_class = Qwen3VLMoeForConditionalGeneration if name.startswith("moe") else Qwen3VLForConditionalGeneration
    return hf_class.from_pretrained(folder(name), attn_implementation="eager", dtype=dtype).eval()


@cache
def answer(name: str, case: str) -> Answer:
    """Logits, loss and every gradient of one case."""
    model, inputs = reference(name), case_inputs(case)
    labels = labels_of(inputs)
    loss, logits, _, gradients = _run(model, inputs, labels, aux=False)
    result: dict[str, Any] = {}
    if name.startswith("moe"):
        total, _, aux_loss, with_aux = _run(model, inputs, labels, aux=True)
        assert abs(total - loss - AUX_WEIGHT * aux_loss) < 1e-4
        result = dict(aux_loss=aux_loss, gradients_with_aux=with_aux)
    positions = None
    if "image_grid_thw" in inputs or "video_grid_thw" in inputs:
        positions, _ = model.model.get_rope_index(
            inputs["input_ids"],
            inputs["mm_token_type_ids"],
            inputs.get("image_grid_thw"),
            inputs.get("video_grid_thw"),
            inputs["attention_mask"],
        )
    return Answer(
        inputs=inputs, labels=labels, logits=logits, loss=loss, gradients=gradients, positions=positions, **result
    )


def case_inputs(case: str) -> dict[str, Tensor]:
    """The padded tensors of one case, drawn from a fixed seed: rows of token ids, patches and grids."""
    draw = torch.Generator().manual_seed(4242 if case.startswith("batch") else 1000 + sum(map(ord, case)))
    rows: list[list[int]]
    images: list[tuple[int, int, int]] = []
    videos: list[tuple[int, int, int]] = []

    def words(n: int) -> list[int]:
        return torch.randint(1, 480, (n,), generator=draw).tolist()

    def image(h: int, w: int) -> list[int]:
        images.append((1, h, w))
        return [VISION_START] + [IMAGE] * (h * w // 4) + [VISION_END]

    def video(t: int, h: int, w: int) -> list[int]:
        videos.append((t, h, w))  # each slice stands behind its timestamp text
        frames = (words(5) + [VISION_START] + [VIDEO] * (h * w // 4) + [VISION_END] for _ in range(t))
        return [token for frame in frames for token in frame]

    match case:
        case "text":
            rows = [words(17)]
        case "image":
            rows = [words(4) + image(8, 12) + words(6)]
        case "image_tall":  # longer than the learned table on one axis
            rows = [words(3) + image(26, 4) + words(5)]
        case "multi_image":  # two of the three stand side by side
            rows = [words(3) + image(4, 6) + words(2) + image(10, 4) + image(2, 2) + words(5)]
        case "video":
            rows = [words(4) + video(3, 4, 8) + words(6)]
        case "two_videos_image":
            rows = [words(2) + video(2, 4, 6) + words(3) + image(4, 4) + words(2) + video(3, 6, 4) + words(4)]
        case "batch_left" | "batch_right":  # the same three rows, padded on either side
            rows = [
                words(3) + image(4, 6) + words(4),
                words(2) + video(2, 4, 4) + words(3) + image(6, 8) + words(2),
                words(9),
            ]
        case "long":  # 256 tokens: four times the original length of the yarn model
            rows = [words(60) + image(4, 6) + words(100) + image(6, 4) + words(80)]
        case _:
            raise ValueError(f"no golden case is called {case!r}; there are {', '.join(CASES)} and long.")
    inputs = pad_rows(rows, left=case == "batch_left")
    for key, grids in (("image", images), ("video", videos)):
        if grids:
            patches = [torch.randn(t * h * w, 1536, generator=draw) * 0.6 for t, h, w in grids]
            inputs["pixel_values" if key == "image" else "pixel_values_videos"] = torch.cat(patches)
            inputs[f"{key}_grid_thw"] = torch.tensor(grids)
    return inputs


def pad_rows(rows: list[list[int]], left: bool = False) -> dict[str, Tensor]:
    """Rows of token ids as transformers wants them: ids, mask and token types, padded with 0 to the longest."""
    width = max(map(len, rows))

    def pad(row: list[int]) -> list[int]:
        gap = [0] * (width - len(row))
        return gap + row if left else row + gap

    kinds = [[1 if token == IMAGE else 2 if token == VIDEO else 0 for token in row] for row in rows]
    return dict(
        input_ids=torch.tensor([pad(row) for row in rows]),
        attention_mask=torch.tensor([pad([1] * len(row)) for row in rows]),
        mm_token_type_ids=torch.tensor([pad(kind) for kind in kinds], dtype=torch.int32),
    )


def labels_of(inputs: dict[str, Tensor]) -> Tensor:
    """Targets: every real text token but the first three of a row (with left padding a pad would predict the first)."""
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    labels = tokens.masked_fill((mask == 0) | (tokens == IMAGE) | (tokens == VIDEO), -100)
    return labels.masked_fill(mask.cumsum(1) <= 3, -100)


def shifted_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the next token over padded logits, as transformers takes it."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def to_hub_layout(path: Path) -> None:
    """Rewrite a one-file v5 folder the way the published repositories are: expert matrices the other way round, old config keys."""
    weights = load_file(path / "model.safetensors")
    for key, value in weights.items():
        if ".mlp.experts." in key:
            weights[key] = value.transpose(1, 2).contiguous()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    text = config.get("text_config", config)
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = rope
    if "num_local_experts" in text:
        text["num_experts"] = text.pop("num_local_experts")
    if "vision_config" in config:
        config["vision_config"].pop("rope_parameters")
        config["vision_config"]["model_type"] = config["model_type"]
    (path / "config.json").write_text(json.dumps(config, indent=2))


def redraw(model: Any, seed: int) -> None:
    """New weights, larger than an initialisation, so that every bias, norm, table and router changes the answer."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            value = torch.randn(weight.shape, generator=draw)
            if "norm" in name and name.endswith("weight"):
                value = 1 + 0.2 * value
            elif weight.ndim == 1:
                value = 0.2 * value
            elif "embed" in name and weight.ndim == 2:
                value = 0.7 * value
            elif "lm_head" in name or name.endswith("mlp.gate.weight"):
                value = 0.5 * value
            else:
                fan_in = weight.shape[-1] if weight.ndim == 3 else weight[0].numel()
                value = value * 1.2 / fan_in**0.5
            weight.copy_(value)
    model.tie_weights()


def vision_config(*, hidden: int, inter: int, out: int, table: int, deepstack: list[int]) -> dict[str, Any]:
    return dict(
        depth=6,
        hidden_size=hidden,
        num_heads=4,
        intermediate_size=inter,
        in_channels=3,
        patch_size=16,
        spatial_merge_size=2,
        temporal_patch_size=2,
        out_hidden_size=out,
        num_position_embeddings=table,
        deepstack_visual_indexes=deepstack,
        hidden_act="gelu_pytorch_tanh",
    )


def text_config(**changes: Any) -> dict[str, Any]:
    """A tiny decoder whose head width is not hidden / heads and whose time axis has a long tail, as the published ones."""
    plain: dict[str, Any] = dict(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        bos_token_id=BOS,
        eos_token_id=EOS,
        rope_parameters=rope([8, 4, 4]),
    )
    return plain | changes


def rope(section: list[int], **changes: Any) -> dict[str, Any]:
    plain: dict[str, Any] = dict(rope_type="default", rope_theta=5e6, mrope_section=section, mrope_interleaved=True)
    return plain | changes


_IDS: dict[str, Any] = dict(
    image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=VISION_START, vision_end_token_id=VISION_END
)
_EXPERTS: dict[str, Any] = dict(moe_intermediate_size=24, num_experts=8, norm_topk_prob=True, decoder_sparse_step=1)


def _dense(text: dict[str, Any], vision: dict[str, Any], tied: bool) -> Any:
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **_IDS)
    return Qwen3VLForConditionalGeneration(config)


def _moe(active: int, dense_layers: list[int]) -> Any:
    text = text_config(**_EXPERTS, num_experts_per_tok=active, mlp_only_layers=dense_layers, tie_word_embeddings=False)
    vision = vision_config(hidden=48, inter=80, out=64, table=144, deepstack=[1, 3, 5])
    config = Qwen3VLMoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **_IDS)
    return Qwen3VLMoeForConditionalGeneration(config)


_WIDE: dict[str, Any] = dict(hidden_size=96, num_hidden_layers=5, tie_word_embeddings=False)
_BUILD: dict[str, Callable[[], Any]] = {
    "dense_tied": lambda: _dense(  # as 2B and 4B
        text_config(tie_word_embeddings=True),
        vision_config(hidden=48, inter=80, out=64, table=144, deepstack=[1, 3, 5]),
        tied=True,
    ),
    "dense_untied": lambda: _dense(  # as 8B and 32B
        text_config(**_WIDE, rope_parameters=rope([6, 5, 5])),
        vision_config(hidden=64, inter=112, out=96, table=64, deepstack=[0, 2, 3]),
        tied=False,
    ),
    "moe": lambda: _moe(active=2, dense_layers=[]),  # as 30B-A3B and 235B-A22B
    "moe_mixed": lambda: _moe(active=3, dense_layers=[1]),  # one plain MLP among the experts
    "yarn": lambda: _dense(
        text_config(
            **_WIDE,
            max_position_embeddings=256,
            rope_parameters=rope([6, 5, 5], rope_type="yarn", factor=4.0, original_max_position_embeddings=64),
        ),
        vision_config(hidden=64, inter=112, out=96, table=64, deepstack=[0, 2, 3]),
        tied=False,
    ),
}


def _fresh(name: str) -> Any:
    model = _BUILD[name]().float().eval()
    redraw(model, seed=sum(map(ord, name)))
    return model


def _run(
    model: Any, inputs: dict[str, Tensor], labels: Tensor, aux: bool
) -> tuple[float, Tensor, float, dict[str, Tensor]]:
    model.zero_grad()
    model.model.rope_deltas = None
    model.config.text_config.router_aux_loss_coef = AUX_WEIGHT
    extra: dict[str, Any] = dict(output_router_logits=True) if aux else {}
    out = model(**inputs, labels=labels, use_cache=False, **extra)
    out.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    aux_loss = out.aux_loss.item() if aux else 0.0
    model.zero_grad()
    return out.loss.item(), out.logits.detach(), aux_loss, gradients


@cache
def _scratch() -> Path:
    path = Path(tempfile.mkdtemp(prefix="qvl-golden-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path
