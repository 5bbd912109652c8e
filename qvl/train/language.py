"""What a language model knows of a text: bits for each of its bytes, whatever the tokenizer."""

import math
from collections.abc import Callable

import torch

from qvl.core.batch import Batch, Sample
from qvl.model.pack import pack
from qvl.model.qwen3vl import Qwen3VL
from qvl.prompt.tokenizer import Tokenizer
from qvl.train.loss import linear_cross_entropy, targets

Nats = Callable[[Batch], float]
"""A batch -> the summed negative log-likelihood of its targets."""


def bits_per_byte(
    model: Qwen3VL, tokenizer: Tokenizer, text: str, *, window: int = 256, nats: Nats | None = None
) -> float:
    """Mean bits of each byte, read in windows; a window's first token, which nothing predicts, is charged as a uniform draw.

    `nats` is asked in the model's place where its weights can only be reached through something around it (sharded training).
    """
    ids = tokenizer.encode_text(text)
    if not ids:
        raise ValueError("the text to judge a language model on is empty.")
    ask = nats or nats_of(model)
    pieces = [torch.tensor(ids[i : i + window]) for i in range(0, len(ids), window)]
    total = math.log(tokenizer.num_ids) * len(pieces)
    for low in range(0, len(pieces), 16):
        samples = [Sample(token_T=p, is_target_T=torch.ones(len(p), dtype=torch.bool)) for p in pieces[low : low + 16]]
        total += ask(pack(samples, model.config))
    return total / math.log(2) / len(text.encode())


def nats_of(model: Qwen3VL) -> Nats:
    """How much a batch surprises the model: the sum over its targets, all of weight 1, of -ln p. Computed on the model's device, without
    gradient and without full logits; the model stays in its mode."""

    @torch.no_grad()
    def ask(batch: Batch) -> float:
        aim = targets(batch, power=0.0).to(model.device)
        hidden_TD = model(batch.to(model.device))
        loss, _ = linear_cross_entropy(hidden_TD[aim.row_R], model.head_weight, aim.label_R, aim.weight_R)
        return float(loss)

    return ask
