"""Assembles the published tokenizer from the byte ranks that the dashscope package carries."""

import base64
import json
import os
import tempfile
from functools import cache
from itertools import pairwise
from pathlib import Path

import dashscope

from qvl.prompt.control import QWEN3_VL_CONTROL
from qvl.prompt.tokenizer import ControlToken, Tokenizer, byte_letters, describe

CACHE = Path(__file__).parent.parent / ".cache" / "real_tokenizer"

CONTROL = tuple(
    ControlToken(id=151643 + i, name=name, is_special=special)
    for i, (name, special) in enumerate(QWEN3_VL_CONTROL.items())
)


@cache
def real_tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(real_tokenizer_folder())


def write_small_tokenizer(folder: Path) -> Path:
    """A tokenizer of bytes and the 26 control tokens, for tests that need a folder and not the real ids."""
    added = [
        ControlToken(id=256 + i, name=name, is_special=special)
        for i, (name, special) in enumerate(QWEN3_VL_CONTROL.items())
    ]
    description = describe(dict(byte_letters()), [], added)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(description), encoding="utf-8")
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def merges_from_ranks(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """For each token the last two pieces that byte-pair merging below the token's own rank leaves."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        pieces = [token[i : i + 1] for i in range(len(token))]
        while len(pieces) > 2:
            pairs = [ranks.get(left + right, rank) for left, right in pairwise(pieces)]
            at = min(range(len(pairs)), key=pairs.__getitem__)
            assert pairs[at] < rank, f"no merges lead to {token!r}"
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        if len(pieces) == 2:
            merges.append((pieces[0], pieces[1]))
    return merges


def real_tokenizer_folder() -> Path:
    """The folder with tokenizer.json, vocab.json, merges.txt and tokenizer_config.json; made once, then kept."""
    if not CACHE.exists():
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=CACHE.parent))
        _write(made)
        try:
            os.rename(made, CACHE)  # another process may have come first; its folder is as good
        except OSError:
            if not CACHE.exists():
                raise
    return CACHE


def _write(folder: Path) -> None:
    lines = (Path(dashscope.__file__).parent / "resources" / "qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    letter_of = {byte: letter for letter, byte in byte_letters().items()}

    def letters(token: bytes) -> str:
        return "".join(letter_of[byte] for byte in token)

    vocab = {letters(token): rank for token, rank in ranks.items()}
    merges = [(letters(left), letters(right)) for left, right in merges_from_ranks(ranks)]
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(token.id): {
                "content": token.name,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": token.is_special,
            }
            for token in CONTROL
        },
        "additional_special_tokens": [token.name for token in CONTROL[1:] if token.is_special],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 262144,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    texts = {
        "tokenizer.json": json.dumps(describe(vocab, merges, CONTROL), ensure_ascii=False),
        "vocab.json": json.dumps(vocab, ensure_ascii=False),
        "merges.txt": "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
