"""The network beside transformers: encode, prefill, training step, and what DeepStack costs."""

from dataclasses import replace
from functools import partial

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from bench.rows import Row, matmul_rate, measured
from qvl.core.batch import Batch
from qvl.model.config import ModelConfig, config_to_hf, preset
from qvl.model.flops import forward_flops, vision_flops
from qvl.model.padded import batch_from_padded
from qvl.model.qwen3vl import Qwen3VL, new_model
from qvl.model.weights import to_checkpoint_name


def rows(rounds: int = 7, device: str = "cpu", size: str = "0.2B") -> list[Row]:
    config = preset(size)
    dtype = torch.bfloat16
    ours = new_model(config, dtype=dtype, device=device)
    theirs = same_in_transformers(ours)
    theirs.to(torch.device(device))  # type: ignore[arg-type]
    make = partial(_row, rounds=rounds, device=device, size=size, rate=matmul_rate(dtype, device))
    return [
        *(encode_row(ours, theirs, name, grid, make) for name, grid in ENCODE.items()),
        *(prefill_row(ours, theirs, tokens, make) for tokens in (512, 2048)),
        *(train_row(ours, theirs, tokens, grid, make) for tokens, grid in ((512, None), (1024, (1, 32, 32)))),
        deepstack_row(ours, make),
    ]


ENCODE = {"512x512 image": (1, 32, 32), "1024x1024 image": (1, 64, 64), "8 slices of 448x448 video": (8, 28, 28)}


def encode_row(ours: Qwen3VL, theirs: transformers.PreTrainedModel, name: str, grid: tuple[int, int, int], make) -> Row:
    inputs = visual_inputs(ours.config, grid, 0, ours.device)
    batch = to_batch(ours, inputs)
    pixels, thw = inputs["pixel_values"].to(torch.bfloat16), inputs["image_grid_thw"]

    def run_ours() -> None:
        with torch.inference_mode():
            ours.encode(batch)

    def run_theirs() -> None:
        with torch.inference_mode():
            theirs.model.get_image_features(pixels, thw)

    return make(f"encode {name}", run_ours, run_theirs, flops=vision_flops(ours.config, batch.frame_lengths))


def prefill_row(ours: Qwen3VL, theirs: transformers.PreTrainedModel, tokens: int, make) -> Row:
    """Text prompt in, logits of the last token out."""
    inputs = text_inputs(tokens, ours.device)
    batch = to_batch(ours, inputs)

    def run_ours() -> None:
        with torch.inference_mode():
            ours.logits(ours(batch)[-1:])

    def run_theirs() -> None:
        with torch.inference_mode():
            theirs(**inputs, logits_to_keep=1, use_cache=False)

    flops = forward_flops(ours.config, batch.lengths, num_logits=1).forward
    return make(f"prefill {tokens} tokens", run_ours, run_theirs, flops=flops)


def train_row(
    ours: Qwen3VL, theirs: transformers.PreTrainedModel, tokens: int, grid: tuple[int, int, int] | None, make
) -> Row:
    """Forward, cross-entropy over all tokens, backward; one sequence, so that packing gives us nothing."""
    device = ours.device
    inputs = text_inputs(tokens, device) if grid is None else visual_inputs(ours.config, grid, tokens, device)
    batch = to_batch(ours, inputs)
    target_T = inputs["input_ids"][0, 1:]

    def step(model: torch.nn.Module, logits: Tensor) -> None:
        F.cross_entropy(logits[:-1].float(), target_T).backward()
        model.zero_grad(set_to_none=True)

    def run_ours() -> None:
        step(ours, ours.logits(ours(batch)))

    def run_theirs() -> None:
        extra = {"mm_token_type_ids": (inputs["input_ids"] == ours.config.image_token_id).int()} if grid else {}
        step(theirs, theirs(**inputs, **extra, use_cache=False).logits[0])

    flops = forward_flops(ours.config, batch.lengths, batch.frame_lengths).training
    what = f"{tokens} tokens" + (f" with a {grid[1] * 16}x{grid[2] * 16} image" if grid else "")
    return make(f"training step, {what}", run_ours, run_theirs, flops=flops)


def deepstack_row(ours: Qwen3VL, make) -> Row:
    """The whole forward with and without the three extra mergers and adds; the "peer" is the same model without them."""
    config = ours.config
    assert config.vision is not None
    plain_config = replace(config, vision=replace(config.vision, deepstack_visual_indexes=()))
    plain = new_model(plain_config, dtype=torch.bfloat16, device=ours.device)
    inputs = visual_inputs(config, (1, 32, 32), 512, ours.device)
    batch = to_batch(ours, inputs)

    def run(model: Qwen3VL) -> None:
        with torch.inference_mode():
            model.logits(model(batch)[-1:])

    flops = forward_flops(config, batch.lengths, batch.frame_lengths, num_logits=1).forward
    row = make(
        "forward with DeepStack, 512x512 image in 512 tokens", partial(run, ours), partial(run, plain), flops=flops
    )
    return replace(row, peer="qvl, same model without DeepStack")


def _row(metric: str, ours, theirs, *, flops: int, rounds: int, device: str, size: str, rate: float) -> Row:
    return measured(
        ours,
        theirs,
        suite="network",
        metric=metric,
        peer=f"transformers {transformers.__version__}, sdpa, bf16",
        limit=(flops / rate, f"{flops / 1e9:.1f} GFLOP at {rate / 1e9:.0f} GFLOP/s"),
        shape=f"{size}, bf16",
        rounds=rounds,
        device=device,
    )


def same_in_transformers(ours: Qwen3VL) -> transformers.PreTrainedModel:
    """transformers' model with our weights, in its default attention (sdpa)."""
    raw = config_to_hf(ours.config, layout="v5")
    config = transformers.AutoConfig.for_model(**raw)
    config._attn_implementation = "sdpa"
    theirs = transformers.AutoModelForImageTextToText.from_config(config).eval()
    state = {to_checkpoint_name(n, ours.config): p.detach().cpu() for n, p in ours.named_parameters()}
    kernel = theirs.model.visual.patch_embed.proj.weight.shape
    state["model.visual.patch_embed.proj.weight"] = state["model.visual.patch_embed.proj.weight"].view(kernel)
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    # Only parameters: casting the buffers would round transformers' rotary frequencies.
    for parameter in theirs.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return theirs


def text_inputs(tokens: int, device: torch.device) -> dict[str, Tensor]:
    ids = torch.randint(0, 150_000, (1, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def visual_inputs(
    config: ModelConfig, grid: tuple[int, int, int], tokens: int, device: torch.device
) -> dict[str, Tensor]:
    """Images of one grid (t > 1: t images of that size) in at least `tokens` tokens."""
    assert config.vision is not None
    count, height, width = grid
    g = torch.Generator().manual_seed(0)
    pads = [config.image_token_id] * (height * width // config.vision.merge_area)
    image = [config.vision_start_token_id, *pads, config.vision_end_token_id]
    ids = image * count
    ids += torch.randint(0, 150_000, (max(1, tokens - len(ids)),), generator=g).tolist()
    token = torch.tensor([ids], device=device)
    return {
        "input_ids": token,
        "attention_mask": torch.ones_like(token),
        "pixel_values": torch.randn(count * height * width, config.vision.patch_numbers, generator=g).to(device),
        "image_grid_thw": torch.tensor([(1, height, width)] * count, device=device),
    }


def to_batch(ours: Qwen3VL, inputs: dict[str, Tensor]) -> Batch:
    batch = batch_from_padded({k: v.cpu() for k, v in inputs.items()}, ours.config)
    return batch.to(ours.device)
