"""The story so far: a tokenizer from real text, a tiny network that equals transformers', an answer to a photograph and a film."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console

from qvl.engine.generate import stream
from qvl.engine.sampling import Sampling
from qvl.eval.parity import compare
from qvl.model.weights import load
from qvl.prompt.message import Image, Message, Text, Video
from qvl.prompt.processor import Processor
from qvl.recipes.quickstart.checkpoint import write_checkpoint
from qvl.recipes.quickstart.corpus import documents
from qvl.recipes.quickstart.media import film, photograph
from qvl.recipes.quickstart.vocabulary import train_tokenizer

console = Console()


def main(work: Path = Path("runs/quickstart")) -> int:
    """Returns 1 when a promise is broken."""
    work.mkdir(parents=True, exist_ok=True)
    folder = work / "checkpoint"
    with chapter("A tokenizer from real text"):
        texts = documents(("sklearn",))
        tokenizer = train_tokenizer(texts)
        num_bytes = len("".join(texts[:20]).encode())
        num_tokens = sum(len(tokenizer.encode_text(text)) for text in texts[:20])
        console.print(f"{len(texts)} documents, {tokenizer.num_ids} ids, {num_bytes / num_tokens:.2f} bytes a token")

    with chapter("A tiny network, saved as Hugging Face saves it"):
        write_checkpoint(folder, tokenizer)
        model = load(folder)
        console.print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {folder}")

    with chapter("Is it the same network as transformers' Qwen3-VL? (text, pictures, video, a padded batch)"):
        rows = compare(folder)
        for row in rows:
            errors = f"logits {row.logit_error:.0e}  gradients {row.gradient_error:.0e}  bf16 {row.bf16_ratio:.2f}"
            console.print(f"{row.case:8} {errors}  {'same' if row.passed else 'DIFFERENT'}")

    processor = Processor.from_folder(folder)
    with chapter("A photograph and a film in, an answer out (random weights: the words mean nothing yet)"):
        for part in (Image(str(photograph())), Video(str(film(work)))):
            answer(model, processor, part)
    console.print(f"\nTry it: .venv/bin/qvl generate --model {folder} --image {photograph()} --prompt 'What is this?'")
    return 0 if all(row.passed for row in rows) else 1


def answer(model: torch.nn.Module, processor: Processor, part: Image | Video) -> None:
    """Prints what went in and the first tokens of what came out."""
    encoded = processor([Message("user", (part, Text("What is this?")))])
    (visual,) = encoded.visuals
    slices = f"{len(visual.seconds)} time steps, " if visual.seconds else ""
    console.print(
        f"{Path(str(part.source)).name}: {visual.source_width}x{visual.source_height} -> {visual.width}x{visual.height}, {slices}"
        f"{visual.num_tokens} visual tokens in a prompt of {encoded.sample.num_tokens}"
    )
    ends = frozenset({processor.tokenizer.control_id("<|im_end|>")})
    words = [
        event.text
        for event in stream(
            model,  # type: ignore[arg-type]
            [encoded.sample],
            Sampling(temperature=0, max_tokens=12),
            end_tokens=ends,
            text_stream=lambda: processor.tokenizer.stream(skip_special=True),
        )
    ]
    console.print("  ->", repr("".join(words)), markup=False)


@contextmanager
def chapter(title: str) -> Iterator[None]:
    start = time.perf_counter()
    console.print(f"\n[bold]{title}[/bold]")
    yield
    console.print(f"[dim]{time.perf_counter() - start:.1f} s[/dim]")


if __name__ == "__main__":
    sys.exit(main())
