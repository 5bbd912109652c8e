"""Training beside transformers: optimizer steps over samples of mixed lengths, padded and packed; memory of the loss."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from bench.network import same_in_transformers
from bench.rows import Row, matmul_rate, measured
from qvl.core.batch import Batch, Sample
from qvl.model.config import ModelConfig, preset
from qvl.model.flops import forward_flops
from qvl.model.pack import pack
from qvl.model.qwen3vl import Qwen3VL, new_model
from qvl.model.vision import normalise
from qvl.parallel.data_parallel import World, total_norm
from qvl.train.blocks import compiled_blocks
from qvl.train.loss import linear_cross_entropy
from qvl.train.objective import NextToken
from qvl.train.optimizer import Optimizer, OptimizerConfig
from qvl.train.row_loss import CHUNK_BYTES

PACK_TOKENS, LONGEST, SAMPLES, ROWS_PADDED = 4096, 1024, 10, 4
VOCABULARY, WIDTH = 151_936, 128
LR = 1e-6


def rows(rounds: int = 7, device: str = "cpu", size: str = "0.2B") -> Iterator[Row]:
    """Memory first: its rows count what they add to a process that is still small. A step on a CPU is most of a minute, so there are at
    most three rounds of them."""
    yield from loss_memory_rows()
    yield from speed_rows(preset(size), min(rounds, 3), device, size)


# ---- speed


def speed_rows(
    config: ModelConfig, rounds: int, device: str, size: str, pack_tokens: int = PACK_TOKENS
) -> Iterator[Row]:
    """One optimizer step over the same samples, in turn with three peers: padded, our packs, our packs and trained rows of logits alone.

    transformers trains bf16 weights with no fp32 copy, its fastest way on a CPU; ours updates fp32 masters and writes bf16 back.
    """
    ours = new_model(config, dtype=torch.bfloat16, device=device)
    theirs = same_in_transformers(ours)
    theirs.to(torch.device(device)).train()  # type: ignore[arg-type]
    samples = mixed_samples(config, SAMPLES, pack_tokens * LONGEST // PACK_TOKENS)
    packs = [Pack(pack(part, config)) for part in packed(samples, pack_tokens)]
    step_ours = OurStep(ours, packs)
    tokens, targets = sum(s.num_tokens for s in samples), sum(int(_marks(s).sum()) for s in samples)
    padded = [padded_inputs(samples[i : i + ROWS_PADDED], config) for i in range(0, len(samples), ROWS_PADDED)]
    whole = [packed_inputs(p.batch, config) for p in packs]
    few = [keep_targets(inputs) for inputs in whole]
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=LR, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    make = partial(_their_step, theirs, optimizer, targets=targets, device=device)
    fill = tokens / sum(inputs["input_ids"].numel() for inputs in padded)
    peers = {
        f"padded, {ROWS_PADDED} rows a batch ({fill:.0%} of them tokens)": make(padded),
        "our packs": make(whole),
        "our packs, logits of trained rows alone": make(few),
    }
    check_same_work(step_ours, peers)
    flops = sum(
        forward_flops(config, p.batch.lengths, p.batch.frame_lengths, num_logits=int(p.marks.sum())).training
        for p in packs
    )
    rate = matmul_rate(torch.bfloat16, device)
    row = partial(
        measured,
        suite="train",
        limit=(flops / rate, f"{flops / 1e12:.1f} TFLOP at {rate / 1e9:.0f} GFLOP/s"),
        shape=f"{size}, bf16, {len(packs)} packs of {pack_tokens:,} ({tokens / len(packs) / pack_tokens:.0%} full), "
        f"{SAMPLES} samples of {min(s.num_tokens for s in samples)}-{max(s.num_tokens for s in samples)} tokens, {targets:,} trained",
        rounds=rounds,
        device=device,
        warm=False,  # the check was the first call
    )
    what = f"optimizer step over {tokens:,} mixed tokens"
    for name, step in peers.items():
        yield row(
            step_ours,
            step,
            metric=f"{what}, beside {name.partition(' (')[0]}",
            peer=f"transformers {transformers.__version__}, sdpa, bf16, fused AdamW; {name}",
        )
    del theirs, optimizer, peers, make
    compiled = OurStep(new_model(config, dtype=torch.bfloat16, device=device), packs)
    with compiled_blocks(compiled.objective.model):
        yield row(compiled, step_ours, metric=f"{what}, blocks compiled", peer="qvl, as it is", warm=True)


@dataclass(frozen=True)
class Pack:
    batch: Batch

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(map(str, range(len(self.batch.lengths))))

    @property
    def categories(self) -> tuple[str, ...]:
        return ("x",) * len(self.batch.lengths)

    @property
    def marks(self) -> Tensor:
        assert self.batch.is_target_T is not None
        return self.batch.is_target_T


class OurStep:
    """What the loop does between two log lines."""

    def __init__(self, model: Qwen3VL, packs: Sequence[Pack]) -> None:
        # Every token weighs the same, as in transformers, so that the losses can be compared.
        self.objective, self.packs = NextToken(model, power=0.0), packs
        self.world = World(0, 1, model.device)
        self.optimizer = Optimizer(self.objective, OptimizerConfig(lr=LR), self.world)

    def __call__(self) -> float:
        prepared = [self.objective.prepare(pack) for pack in self.packs]
        denominator = sum(one.denominator for one in prepared)
        loss = 0.0
        for one in prepared:
            outcome = self.objective(one, denominator, self.world)
            outcome.loss.backward()
            self.optimizer.gather()
            loss += float(outcome.loss.detach())
        gradients = self.optimizer.gradients()
        norm = float(total_norm(gradients))
        for gradient in gradients if norm > 1 else ():
            gradient.mul_(1 / norm)
        self.optimizer.step(1.0)
        return loss


def _their_step(
    model: transformers.PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[dict[str, Tensor]],
    *,
    targets: int,
    device: str,
) -> Callable[[], float]:
    """The same step as its Trainer takes it: the loss from the model, over the tokens of the whole step."""

    def step() -> float:
        total = 0.0
        for batch in batches:
            inputs = {name: value.to(device) for name, value in batch.items()}
            loss = model(**inputs, use_cache=False, num_items_in_batch=targets).loss
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


def check_same_work(ours: Callable[[], float], peers: dict[str, Callable[[], float]]) -> None:
    """All compute one loss from the same weights, but for bf16; the rate is so low that a step moves it less than that."""
    expected = ours()
    for name, step in peers.items():
        found = step()
        assert abs(found - expected) < 5e-3 * expected, f"{name} computes a loss of {found}, we {expected}"


# ---- samples


def mixed_samples(config: ModelConfig, count: int, longest: int, seed: int = 4) -> list[Sample]:
    """45 % questions on a picture, 30 % text, 20 % pages with several pictures, 5 % clips; answers are trained, questions are not.

    Log-normal lengths, a third of those usual in pretraining, because four padded rows of more than 1,024 tokens make logits that
    do not fit beside the models in 23 GB. With this seed ten samples fill one pack, as a loader fills all of its packs.
    """
    draw = random.Random(seed)
    scale = longest / LONGEST
    kinds = ["question"] * round(count * 0.45) + ["text"] * round(count * 0.3) + ["page"] * round(count * 0.2)
    kinds += ["clip"] * (count - len(kinds))
    draw.shuffle(kinds)
    return [_sample(kind, config, draw, scale, longest) for kind in kinds]


def _sample(kind: str, config: ModelConfig, draw: random.Random, scale: float, longest: int) -> Sample:
    sides = {"question": (16, 20, 24, 28, 32), "page": (16, 24), "clip": (16,), "text": (16,)}[kind]
    number = {"question": 1, "page": draw.randint(1, 4), "clip": draw.randint(4, 8), "text": 0}[kind]
    mean, deviation = {"question": (4.8, 0.7), "text": (5.8, 1.0), "page": (5.6, 0.8), "clip": (5.0, 0.6)}[kind]
    grids = [(1, side, side) for side in (max(2, int(draw.choice(sides) * scale**0.5) // 2 * 2) for _ in range(number))]
    pad, start, end = config.image_token_id, config.vision_start_token_id, config.vision_end_token_id
    assert pad is not None and start is not None and end is not None
    ids: list[int] = []
    for _, height, width in grids:
        ids += [start, *[pad] * (height * width // 4), end]
    highest = min(pad, start, end, config.text.vocab_size, 150_000)
    words = max(8, min(longest - len(ids), int(scale * draw.lognormvariate(mean, deviation))))
    ids += [draw.randrange(highest) for _ in range(words)]
    trained = words - 1 if kind in ("text", "page") else words // 2
    is_target_T = torch.arange(len(ids)) >= len(ids) - trained
    if not grids:
        return Sample(token_T=torch.tensor(ids), is_target_T=is_target_T)
    patches = sum(height * width for _, height, width in grids)
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    assert config.vision is not None
    patch_PX = torch.randint(0, 256, (patches, config.vision.patch_numbers), generator=generator, dtype=torch.uint8)
    return Sample(token_T=torch.tensor(ids), patch_PX=patch_PX, grid_I3=torch.tensor(grids), is_target_T=is_target_T)


def packed(samples: Sequence[Sample], pack_tokens: int) -> list[list[Sample]]:
    """Longest first, each into the first pack that has room."""
    packs: list[list[Sample]] = []
    for sample in sorted(samples, key=lambda s: -s.num_tokens):
        room = (p for p in packs if sum(s.num_tokens for s in p) + sample.num_tokens <= pack_tokens)
        home = next(room, None)
        if home is None:
            packs.append([sample])
        else:
            home.append(sample)
    return packs


def _marks(sample: Sample) -> Tensor:
    assert sample.is_target_T is not None
    return sample.is_target_T


def padded_inputs(samples: Sequence[Sample], config: ModelConfig) -> dict[str, Tensor]:
    """Rows padded on the right to the longest, as a collator makes them."""
    length = max(s.num_tokens for s in samples)
    ids = torch.zeros(len(samples), length, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, sample in enumerate(samples):
        ids[row, : sample.num_tokens] = sample.token_T
        mask[row, : sample.num_tokens] = 1
        labels[row, : sample.num_tokens] = torch.where(_marks(sample), sample.token_T, -100)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    pixels = [s.patch_PX for s in samples if s.patch_PX is not None]
    if pixels:
        grids = torch.cat([s.grid_I3 for s in samples if s.grid_I3 is not None])
        inputs |= {"pixel_values": normalise(torch.cat(pixels)).bfloat16(), "image_grid_thw": grids}
        inputs["mm_token_type_ids"] = (ids == config.image_token_id).int()
    return inputs


def packed_inputs(batch: Batch, config: ModelConfig) -> dict[str, Tensor]:
    """A pack as one row: text positions that begin anew tell transformers where samples end, and it makes a block-diagonal mask."""
    assert batch.is_target_T is not None
    text_T = torch.cat([torch.arange(n) for n in batch.lengths])
    ids = batch.token_T[None]
    inputs = {
        "input_ids": ids,
        "position_ids": torch.cat((text_T[None], batch.position_3T))[:, None],
        "labels": torch.where(batch.is_target_T, batch.token_T, -100)[None],
        "mm_token_type_ids": (ids == config.image_token_id).int(),
    }
    if batch.patch_PX is not None and batch.grid_I3 is not None:
        inputs |= {"pixel_values": normalise(batch.patch_PX).bfloat16(), "image_grid_thw": batch.grid_I3}
    return inputs


def keep_targets(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the public `logits_to_keep`: the rows before targets, and their labels shifted by hand."""
    place = torch.where(inputs["labels"][0] != -100)[0]
    labels = inputs["labels"][:, place]
    return inputs | {"logits_to_keep": place - 1, "labels": labels, "shift_labels": labels}


# ---- memory


def loss_memory_rows(
    counts: Sequence[int] = (2048, 8192, 32_768, 262_144), vocabulary: int = VOCABULARY, width: int = WIDTH
) -> Iterator[Row]:
    """Highest memory of loss and backward, less what is there before and the gradients that come out. Linux only."""
    return (_memory_row(count, vocabulary, width) for count in counts)


def _memory_row(count: int, vocabulary: int, width: int) -> Row:
    ours = extra_bytes(chunked, count, vocabulary, width)
    logits = 4 * count * vocabulary
    # bf16 logits, and fp32 copy, log-softmax and gradient: what the plain way holds at its worst.
    need = int(3.5 * logits)
    fits = need < 0.8 * available_bytes()
    theirs = extra_bytes(plain, count, vocabulary, width) if fits else need
    return Row(
        suite="train",
        metric=f"extra memory of the loss, {count:,} tokens",
        value=ours / 1e9,
        unit="GB",
        peer="F.cross_entropy(logits.float())" + ("" if fits else ", by counting: it does not fit here"),
        peer_value=theirs / 1e9,
        ratio=theirs / ours,
        limit=min(CHUNK_BYTES, 2 * count * vocabulary) / 1e9,
        limit_is="one chunk of logits",
        shape=f"width {width}, vocabulary {vocabulary:,}, bf16",
        threads=torch.get_num_threads(),
        rounds=1,
        command="python -m bench train",
    )


def chunked(hidden: Tensor, head: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, head, label, weight)[0]


def plain(hidden: Tensor, head: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    return (F.cross_entropy((hidden @ head.T).float(), label, reduction="none") * weight).sum()


def extra_bytes(
    loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], count: int, vocabulary: int, width: int
) -> int:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(count, width, generator=g).bfloat16().requires_grad_()
    head = (torch.randn(vocabulary, width, generator=g) * 0.02).bfloat16().requires_grad_()
    label, weight = torch.randint(0, vocabulary, (count,), generator=g), torch.full((count,), 1 / count)
    # torch's own buffers (threads, matmul scratch) are made before counting begins.
    loss(hidden[:8], head, label[:8], weight[:8]).backward()
    hidden.grad = head.grad = None
    before = reset_peak()
    loss(hidden, head, label, weight).backward()
    assert hidden.grad is not None and head.grad is not None
    return max(1, peak_bytes() - before - hidden.grad.nbytes - head.grad.nbytes)


def reset_peak() -> int:
    """Forget the highest memory so far; what is held now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024


def available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("MemAvailable"))) * 1024
