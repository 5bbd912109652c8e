"""Three arms of the loss: tokens count alike (p = 0), samples count alike (p = 1), or the square root between (Qwen3-VL)."""

from collections.abc import Mapping

import torch

from qvl.recipes.ablate.ablation import Ablation, Material, Probe, Trained, answers_right, surprise
from qvl.recipes.ablate.arm import Arm, maker_of
from qvl.recipes.ablate.toy import toy_processor
from qvl.recipes.made_stream import Maker, of_text
from qvl.recipes.quickstart.corpus import documents, split
from qvl.train.language import bits_per_byte
from qvl.worlds import shapes

WINDOW = 192
"""Targets of a sample of prose; an answer about a picture has three or four."""
NAME = shapes.name(64)


def prepare() -> Material:
    texts = documents(("sklearn",))
    learned, held_out = split(texts)
    train = "\n\n".join(learned)
    processor = toy_processor([NAME], [train[:400_000]], size=512)
    # So much that no run reads a byte twice, and no more, because a tokenizer's minute is a minute too.
    prose_T = torch.tensor(processor.tokenizer.encode_text(train[:1_500_000]))
    return Material(processor=processor, prose_T=prose_T, held_out="\n\n".join(held_out)[:20_000])


def learn(material: Material, arm: Arm, seed: int) -> Mapping[str, tuple[Maker, float]]:
    assert material.prose_T is not None
    return {
        "name": (maker_of(NAME, material.processor, arm, seed=seed), 3.0),
        "prose": (of_text(material.prose_T, WINDOW, seed=seed), 1.0),
    }


def prose(run: Trained) -> float:
    return bits_per_byte(run.model, run.material.processor.tokenizer, run.material.held_out)


LOSS = Ablation(
    name="loss",
    question="What does the weight n^-p of a sample's n targets give to short answers about pictures and take from long text?",
    expectation=(
        "Report 3: the square root balances text and multimodal data. Where prose has 192 targets and an answer 4, p = 0 gives prose "
        "nearly all of the gradient and p = 1 a quarter: vision should rise with p and bits a byte with it."
    ),
    arms={"p=0.5": Arm(), "p=0": Arm(power=0.0), "p=1": Arm(power=1.0)},
    prepare=prepare,
    learn=learn,
    probes={
        "held-out prose, bits a byte": Probe(measure=prose, unit="bits a byte", is_less_better=True),
        "colour and shape, nats": surprise(NAME, 192),
        "colour and shape, right": answers_right(NAME, 192),
    },
    steps=300,
    samples=32,
    notes=("Three samples of four are pictures.",),
)
