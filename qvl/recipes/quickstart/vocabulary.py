"""A small byte-level BPE tokenizer trained on real text, with Qwen3-VL's pipeline and its 26 control tokens."""

import json
from collections.abc import Sequence
from dataclasses import replace

from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from qvl.model.config import ModelConfig
from qvl.prompt.control import QWEN3_VL_CONTROL
from qvl.prompt.message import Text
from qvl.prompt.tokenizer import ControlToken, Tokenizer, byte_letters, describe
from qvl.worlds.catalogue import WORLDS, world

EACH = 300


def train_tokenizer(texts: Sequence[str], *, size: int = 1024) -> Tokenizer:
    """`size` ids in all: 256 bytes, merges, and the control tokens last, as in the published vocabulary."""
    num_control = len(QWEN3_VL_CONTROL)
    if size < 256 + num_control:
        raise ValueError(f"a vocabulary of {size} cannot hold 256 bytes and {num_control} control tokens; take more.")
    # The pipeline (NFC, split with single digits, bytes) comes from the same description that real folders have.
    backend = Backend.from_str(json.dumps(describe(dict(byte_letters()), [], ())))
    backend.model = BPE()
    trainer = BpeTrainer(vocab_size=size - num_control, initial_alphabet=list(byte_letters()), show_progress=False)
    backend.train_from_iterator(texts, trainer)
    trained = json.loads(backend.to_str())["model"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in trained["merges"]]
    first = len(trained["vocab"])
    added = [
        ControlToken(id=first + i, name=name, is_special=special)
        for i, (name, special) in enumerate(QWEN3_VL_CONTROL.items())
    ]
    return Tokenizer(describe(trained["vocab"], merges, added), eos="<|im_end|>", pad="<|endoftext|>")


def for_tokenizer(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The config with this tokenizer's ids, and rows for them all, rounded up to 64."""
    id_of = tokenizer.control_id
    text = replace(
        config.text,
        vocab_size=-(-tokenizer.num_ids // 64) * 64,
        bos_token_id=id_of("<|endoftext|>"),
        eos_token_id=id_of("<|im_end|>"),
    )
    return replace(
        config,
        text=text,
        image_token_id=id_of("<|image_pad|>"),
        video_token_id=id_of("<|video_pad|>"),
        vision_start_token_id=id_of("<|vision_start|>"),
        vision_end_token_id=id_of("<|vision_end|>"),
    )


def spoken() -> list[str]:
    """What is asked, answered and told in the worlds, so that their words become single tokens."""
    said: list[str] = []
    for name in WORLDS:
        made = world(name, length=64) if name == "needle" else world(name)
        for i in range(EACH):
            plan = made.planned(1, i)
            said.append(f"user\n{plan.question}\nassistant\n{plan.answer}\n")
            if made.category in ("text", "long_text"):
                said += [p.text for p in made(1, i).messages[0].parts if isinstance(p, Text)]
    return said
