"""The engine beside transformers: decoding, prefill, a picture, loading and memory, each with its floor in bytes or FLOPs."""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers

from bench.answer import step_bytes
from bench.network import same_in_transformers, text_inputs, visual_inputs
from bench.rows import Row, matmul_rate, measured, seconds
from qvl.core.batch import Sample
from qvl.engine.encoder import visuals_of
from qvl.engine.engine import Engine, EngineSettings
from qvl.engine.prepare import prepare
from qvl.engine.request import Request
from qvl.engine.sampling import Sampling
from qvl.model.config import preset
from qvl.model.flops import forward_flops, vision_flops
from qvl.model.qwen3vl import Qwen3VL, new_model
from qvl.model.weights import load, save

CONTEXT, STEPS = 256, 4
"""Decoding is timed at contexts around 256, four steps a round."""
PEER = f"transformers {transformers.__version__}, sdpa, bf16"


def rows(rounds: int = 7, device: str = "cpu", size: str = "0.6B") -> Iterator[Row]:
    """Random weights. Rounds of prefill and pictures take half a minute each on one core, so there are at most three."""
    with tempfile.TemporaryDirectory() as folder:
        save(new_model(preset(size), dtype=torch.bfloat16), folder)
        ours = load(folder, dtype=torch.bfloat16, device=device).requires_grad_(False)
        theirs = same_in_transformers(ours)
        theirs.to(torch.device(device))  # type: ignore[arg-type]
        prepare(ours, free=True)
        for batch in (1, 8, 16):
            yield decode_row(ours, theirs, batch, rounds, device, size)
        for tokens in (512, 4096):
            yield prefill_row(ours, theirs, tokens, min(rounds, 3), device, size)
        yield image_row(ours, theirs, min(rounds, 3), device, size)
        yield load_row(Path(folder), ours, min(rounds, 3), size)
        yield memory_row(Path(folder), ours, size)


def read_rate(device: str = "cpu") -> float:
    """Bytes a second of reading memory that no cache holds, best of six: what bounds decoding."""
    source = torch.ones(2**27, dtype=torch.float32, device=device)
    return 4 * source.numel() / min(seconds(source.max, device) for _ in range(6))


# ---- decoding


def decode_row(
    ours: Qwen3VL, theirs: transformers.PreTrainedModel, batch: int, rounds: int, device: str, size: str
) -> Row:
    """One step: every running answer's next token. The floor is the larger of its bytes and its FLOPs."""
    steps = STEPS * (rounds + 1)
    run_ours = Answers(ours, batch, CONTEXT - steps // 2, steps).run
    run_theirs = TheirAnswers(theirs, batch, CONTEXT - steps // 2).run
    num_bytes, flops = step_bytes(ours.config, batch, CONTEXT), batch * _step_flops(ours)
    rate, peak = read_rate(device), matmul_rate(torch.bfloat16, device)
    row = measured(
        run_ours,
        run_theirs,
        suite="engine",
        metric=f"decode step, batch {batch}",
        peer=PEER,
        limit=max(
            (num_bytes / rate, f"{num_bytes / 1e6:.0f} MB at {rate / 1e9:.0f} GB/s"),
            (flops / peak, f"{flops / 1e9:.1f} GFLOP at {peak / 1e9:.0f} GFLOP/s"),
        ),
        shape=f"{size}, bf16, context {CONTEXT}",
        rounds=rounds,
        device=device,
    )
    return replace(row, value=row.value / STEPS, peer_value=row.peer_value / STEPS)


def _step_flops(model: Qwen3VL) -> int:
    """Of one token that sees CONTEXT others."""
    whole, rest = (forward_flops(model.config, (n,), num_logits=1) for n in (CONTEXT, CONTEXT - 1))
    return whole.decoder - rest.decoder + whole.head


class Answers:
    """An engine whose prompts are read and whose answers do not end while they are timed."""

    def __init__(self, model: Qwen3VL, batch: int, prompt: int, steps: int) -> None:
        settings = EngineSettings(
            max_running=batch, prefix_cache=False, num_blocks=batch * (2 + (prompt + steps) // 64)
        )
        self.engine = Engine(model, settings)
        for number in range(batch):
            greedy = Sampling(temperature=0, max_tokens=steps + 2, ignore_eos=True)
            self.engine.submit(Request(id=str(number), sample=words(prompt, number), sampling=greedy))
        while self.engine.stats().tokens_prefilled < batch * prompt:
            self.engine.step()

    def run(self) -> None:
        for _ in range(STEPS):
            assert self.engine.step()


class TheirAnswers:
    """The same with transformers' own cache."""

    def __init__(self, model: transformers.PreTrainedModel, batch: int, prompt: int) -> None:
        self.model, self.cache = model, transformers.DynamicCache()
        self.token = torch.cat([words(prompt, number).token_T[None] for number in range(batch)]).to(model.device)
        self._step()

    def run(self) -> None:
        for _ in range(STEPS):
            self._step()

    @torch.inference_mode()
    def _step(self) -> None:
        out = self.model(input_ids=self.token, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.token = out.logits.argmax(-1)


def words(count: int, seed: int = 0) -> Sample:
    draw = torch.Generator().manual_seed(seed)
    return Sample(token_T=torch.randint(0, 150_000, (count,), generator=draw))


# ---- prefill and pictures


def prefill_row(
    ours: Qwen3VL, theirs: transformers.PreTrainedModel, tokens: int, rounds: int, device: str, size: str
) -> Row:
    """A prompt in, its first token out, as the engine does it: in chunks, keys and values into the cache."""
    engine = Engine(ours, EngineSettings(prefix_cache=False, num_blocks=2 + tokens // 64))
    first = Sampling(temperature=0, max_tokens=1, ignore_eos=True)
    inputs = text_inputs(tokens, ours.device)

    def run_ours() -> None:
        engine.submit(Request(id="prompt", sample=words(tokens), sampling=first))
        while engine.has_work:
            engine.step()

    def run_theirs() -> None:
        with torch.inference_mode():
            theirs(**inputs, logits_to_keep=1, use_cache=True)

    flops = forward_flops(ours.config, (tokens,), num_logits=1).forward
    return _flops_row(f"prefill {tokens} tokens", run_ours, run_theirs, flops, rounds, device, size)


def image_row(ours: Qwen3VL, theirs: transformers.PreTrainedModel, rounds: int, device: str, size: str) -> Row:
    """A picture of 1024 x 1024 through the engine's encoder, its cache empty."""
    engine = Engine(ours, EngineSettings(num_blocks=1, encoder_cache_gib=0))
    inputs = visual_inputs(ours.config, (1, 64, 64), 0, ours.device)
    pixels, grid = inputs["pixel_values"].to(torch.bfloat16), inputs["image_grid_thw"]
    sample = Sample(token_T=torch.zeros(0, dtype=torch.int64), patch_PX=pixels.cpu(), grid_I3=grid.cpu())

    def run_ours() -> None:
        with torch.inference_mode():
            engine.encoder.features(visuals_of(sample, ours.config), 0, 1024)

    def run_theirs() -> None:
        with torch.inference_mode():
            theirs.model.get_image_features(pixels, grid)

    flops = vision_flops(ours.config, (4096,))
    return _flops_row("encode 1024x1024 image", run_ours, run_theirs, flops, rounds, device, size)


def _flops_row(
    metric: str,
    ours: Callable[[], None],
    theirs: Callable[[], None],
    flops: int,
    rounds: int,
    device: str,
    size: str,
) -> Row:
    peak = matmul_rate(torch.bfloat16, device)
    return measured(
        ours,
        theirs,
        suite="engine",
        metric=metric,
        peer=PEER,
        limit=(flops / peak, f"{flops / 1e9:.0f} GFLOP at {peak / 1e9:.0f} GFLOP/s"),
        shape=f"{size}, bf16",
        rounds=rounds,
        device=device,
    )


# ---- loading and memory


def load_row(folder: Path, model: Qwen3VL, rounds: int, size: str) -> Row:
    """From a folder to an engine that could answer. The files were read before, so no disk is timed; the floor reads them once more."""
    files = list(folder.glob("*.safetensors"))
    num_bytes = sum(file.stat().st_size for file in files)
    reading = min(seconds(partial(_read, files)) for _ in range(3))
    row = measured(
        partial(ready, folder),
        partial(their_model, folder),
        suite="engine",
        metric="load",
        peer=PEER,
        limit=(reading, f"{num_bytes / 1e6:.0f} MB of files read once"),
        shape=f"{size}, bf16",
        rounds=rounds,
    )
    return row


def _read(files: list[Path]) -> None:
    """As a program reads a file that it wants to keep: into memory of its own."""
    for file in files:
        np.fromfile(file, dtype=np.uint8)


def ready(folder: Path) -> Engine:
    model = load(folder, dtype=torch.bfloat16).requires_grad_(False)
    prepare(model, free=True)
    return Engine(model, EngineSettings(num_blocks=8))


def their_model(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)


def memory_row(folder: Path, model: Qwen3VL, size: str) -> Row:
    """Peak resident GiB of a process that loads the folder and answers a prompt of 512 tokens. Each side in a process of its own."""
    weights = sum(p.numel() for p in model.parameters()) * 2
    cache = 2 * 2 * model.config.text.num_hidden_layers * 8 * 64 * model.config.text.num_key_value_heads
    floor = weights + cache * model.config.text.head_dim
    ours, theirs = (_peak(which, folder) for which in ("ours", "theirs"))
    return Row(
        suite="engine",
        metric="peak memory",
        value=ours / 2**30,
        unit="GiB",
        peer=PEER,
        peer_value=theirs / 2**30,
        ratio=theirs / ours,
        limit=floor / 2**30,
        limit_is="weights and a cache of 512 tokens",
        shape=f"{size}, bf16, libraries not counted",
        threads=torch.get_num_threads(),
        rounds=1,
        command="python -m bench engine",
    )


def _peak(which: str, folder: Path) -> int:
    command = [sys.executable, "-m", "bench.engine", which, str(folder), str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    return int(done.stdout.split()[-1])


def _answer_and_say_peak(which: str, folder: Path) -> None:
    before = _highest()
    if which == "ours":
        engine = ready(folder)
        engine.submit(Request(id="prompt", sample=words(500), sampling=Sampling(temperature=0, max_tokens=8)))
        while engine.has_work:
            engine.step()
    else:
        ids = words(500).token_T[None]
        their_model(folder).generate(input_ids=ids, max_new_tokens=8, do_sample=False)  # type: ignore[operator]
    print(_highest() - before)


def _highest() -> int:
    """The most memory this process has held, files that are mapped included."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    _answer_and_say_peak(sys.argv[1], Path(sys.argv[2]))
