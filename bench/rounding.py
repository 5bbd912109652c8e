"""What int8 weights cost: bits for each byte of held-out prose, plain and rounded. python -m bench.rounding [FOLDER]"""

import sys
from pathlib import Path

import torch

from qvl.engine.prepare import rounded
from qvl.model.layers import Linear
from qvl.model.qwen3vl import Qwen3VL
from qvl.model.weights import load
from qvl.prompt.processor import Processor
from qvl.recipes.quickstart.corpus import documents
from qvl.train.language import bits_per_byte

QUICKSTART = Path("runs/quickstart/checkpoint")


def main(folder: Path) -> None:
    texts = [text for i, text in enumerate(documents(("sklearn",))) if i % 20 == 0]  # what the quickstart holds out
    text, tokenizer = "\n\n".join(texts)[:60_000], Processor.from_folder(folder).tokenizer
    model = load(folder, dtype=torch.bfloat16).requires_grad_(False)
    before = bits_per_byte(model, tokenizer, text)
    round_in_place(model)
    after = bits_per_byte(model, tokenizer, text)
    print(
        f"{len(text):,} characters: {before:.4f} bits a byte in bf16, {after:.4f} with int8 weights ({after / before - 1:+.2%})"
    )


def round_in_place(model: Qwen3VL) -> None:
    """The numbers that prepare(weights="int8") computes with, as bf16."""
    linears = [module for module in model.language_model.modules() if isinstance(module, Linear)]
    for module in linears:
        found = rounded(module.weight)
        module.weight.copy_(found.value * found.scale[:, None])
    found = rounded(model.head_weight)
    model.head_weight.copy_(found.value * found.scale[:, None])


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else QUICKSTART)
