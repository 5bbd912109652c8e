"""The tokenizer: text to ids in which no control token can be spelled, and ids back to text."""

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from qvl.core.config import read_json

LONG_TEXT = 16_384
"""Letters from which on a text is encoded without holding up the other threads."""
# Qwen2's split: contractions, words, single digits, punctuation, line breaks, spaces.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, kw_only=True)
class ControlToken:
    """A token beside the byte-pair vocabulary: the templates write it, nobody's text spells it."""

    id: int
    name: str
    is_special: bool
    """Left out by `decode(..., skip_special=True)`; <think> and <tool_call> are control tokens and not special."""


class Tokenizer:
    """Text to ids and back, over the `tokenizers` library.

    The backend is given the byte-pair vocabulary alone: the added tokens are taken out of it, so no text whatever comes
    out as one of their ids. They enter a prompt only through `split_control`, which the templates use on the words they
    write themselves.
    """

    def __init__(self, description: Mapping[str, Any], *, eos: str | None = None, pad: str | None = None) -> None:
        """`description` is the content of a tokenizer.json."""
        self.description = description
        added = _added_tokens(description)
        self.control_tokens: tuple[ControlToken, ...] = tuple(sorted(added, key=lambda token: token.id))
        self._id_of = {token.name: token.id for token in added}
        self._control_of = {token.id: token for token in added}
        self._backend = tokenizers.Tokenizer.from_str(json.dumps(_without_control(description, self._id_of)))
        self._bytes_of = _token_bytes(self._backend.get_vocab(with_added_tokens=False), added)
        # The longest name wins, as in the tokenizers library.
        names = sorted((re.escape(token.name) for token in added), key=len, reverse=True)
        self._control_pattern = re.compile("|".join(names)) if names else None
        self.eos_id = None if eos is None else self.control_id(eos)
        self.pad_id = None if pad is None else self.control_id(pad)

    # ---- text to ids

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text; control tokens spelled in it stay letters: `decode(encode_text(x)) == NFC(x)`."""
        return self._encode(text).ids

    def encode_text_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of plain text and, for each, the characters [start, end) of `text` it stands for."""
        encoding = self._encode(text)
        return encoding.ids, encoding.offsets

    def _encode(self, text: str) -> tokenizers.Encoding:
        try:
            if len(text) > LONG_TEXT:
                # `encode` lets no other thread of Python run meanwhile, nearly a second for a million letters; this does.
                return self._backend.encode_batch([text], add_special_tokens=False)[0]
            return self._backend.encode(text, add_special_tokens=False)
        except (UnicodeEncodeError, TypeError) as error:
            raise ValueError(
                "The text holds half a surrogate pair and is no valid Unicode; decode it again."
            ) from error

    def split_control(self, text: str) -> list[str | int]:
        """A template's own words as plain text and control ids in turn. Never call it on what a person wrote."""
        if self._control_pattern is None:
            return [text] if text else []
        pieces: list[str | int] = []
        end = 0
        for match in self._control_pattern.finditer(text):
            if match.start() > end:
                pieces.append(text[end : match.start()])
            pieces.append(self._id_of[match.group()])
            end = match.end()
        if end < len(text):
            pieces.append(text[end:])
        return pieces

    def encode_control(self, text: str) -> list[int]:
        """Ids of a template's own words, in which control tokens count. Never call it on what a person wrote."""
        ids: list[int] = []
        for piece in self.split_control(text):
            if isinstance(piece, int):
                ids.append(piece)
            else:
                ids.extend(self.encode_text(piece))
        return ids

    def control_id(self, name: str) -> int:
        """The id of a control token such as "<|im_end|>"; ValueError when this tokenizer has none of that name."""
        if name not in self._id_of:
            raise ValueError(f"The tokenizer has no control token {name!r}; it has {', '.join(self._id_of) or 'none'}.")
        return self._id_of[name]

    def has_control(self, name: str) -> bool:
        return name in self._id_of

    def is_control(self, id: int) -> bool:
        return id in self._control_of

    # ---- ids to text

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of ids; broken UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids, skip_special=skip_special).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = False) -> bytes:
        return b"".join(self.token_bytes(int(id), skip_special=skip_special) for id in ids)

    def token_bytes(self, id: int, *, skip_special: bool = False) -> bytes:
        """The bytes one id stands for. Rows of the embedding beyond the vocabulary stand for nothing."""
        if skip_special and (token := self._control_of.get(id)) is not None and token.is_special:
            return b""
        if id < 0:
            raise ValueError(f"The token id is {id}; ids start at 0.")
        return self._bytes_of[id] if id < len(self._bytes_of) else b""

    def stream(self, *, skip_special: bool = False) -> "TextStream":
        return TextStream(self, skip_special=skip_special)

    # ---- facts

    @property
    def num_ids(self) -> int:
        """One more than the highest id; the embedding may have more rows."""
        return len(self._bytes_of)

    @property
    def control_ids(self) -> frozenset[int]:
        return frozenset(self._control_of)

    # ---- files

    @classmethod
    def from_folder(cls, folder: Path | str) -> "Tokenizer":
        """Reads tokenizer.json, or else vocab.json and merges.txt; tokenizer_config.json names eos and pad."""
        folder = Path(folder)
        config = _tokenizer_config(folder)
        description = read_description(folder)
        names = {token["content"] for token in description.get("added_tokens", ())}
        eos, pad = (_name_of(config.get(f"{role}_token")) for role in ("eos", "pad"))
        eos = eos or ("<|im_end|>" if "<|im_end|>" in names else None)
        pad = pad or ("<|endoftext|>" if "<|endoftext|>" in names else None)
        return cls(description, eos=eos, pad=pad)


class TextStream:
    """Turns ids into text as they come, and never gives out half a character.

    The pieces, with what `end` returns, joined are `decode` of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        return self._decoder.decode(self._tokenizer.token_bytes(id, skip_special=self._skip_special))

    def end(self) -> str:
        """What was held back: a character cut off at the end becomes U+FFFD."""
        return self._decoder.decode(b"", final=True)


def _added_tokens(description: Mapping[str, Any]) -> list[ControlToken]:
    if (description.get("model") or {}).get("type") != "BPE":
        raise ValueError("tokenizer.json holds no byte-pair model; only byte-level BPE tokenizers are read.")
    added = []
    for token in description.get("added_tokens") or ():
        if token.get("lstrip") or token.get("rstrip"):
            raise ValueError(
                f"The added token {token['content']!r} eats the spaces around it; such tokens are not read."
            )
        added.append(ControlToken(id=token["id"], name=token["content"], is_special=bool(token.get("special"))))
    return added


def _without_control(description: Mapping[str, Any], id_of: Mapping[str, int]) -> dict[str, Any]:
    """The same tokenizer without added tokens: also not in the vocabulary, where trainers like to put them."""
    model = dict(description["model"])
    model["vocab"] = {token: id for token, id in model["vocab"].items() if token not in id_of}
    clash = set(model["vocab"].values()) & set(id_of.values())
    if clash:
        raise ValueError(f"The ids {sorted(clash)[:5]} belong to an added token and to the vocabulary.")
    return dict(description) | {
        "model": model,
        "added_tokens": [],
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }


def byte_letters() -> dict[str, int]:
    """The letters in which byte-level BPE writes bytes: printable Latin-1 is itself, the rest starts at U+0100."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _token_bytes(vocab: Mapping[str, int], added: Sequence[ControlToken]) -> list[bytes]:
    # One C call a token: letters to Latin-1, and what is no byte letter to a sign that Latin-1 lacks.
    table = dict.fromkeys(range(256), "\uffff") | {ord(letter): chr(byte) for letter, byte in byte_letters().items()}
    highest = max([*vocab.values(), *(token.id for token in added)], default=-1)
    bytes_of = [b""] * (highest + 1)
    for token, id in vocab.items():
        try:
            bytes_of[id] = token.translate(table).encode("latin-1")
        except UnicodeEncodeError:
            raise ValueError(f"The token {token!r} is not in byte letters; only byte-level BPE is read.") from None
    for token in added:
        bytes_of[token.id] = token.name.encode()
    return bytes_of


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    return read_json(file) if file.exists() else {}


def _name_of(token: Any) -> str | None:
    """tokenizer_config.json writes a token as a string or as {"content": ...}."""
    return token.get("content") if isinstance(token, Mapping) else token


def read_description(folder: Path) -> dict[str, Any]:
    """The content of tokenizer.json, or the same made from vocab.json and merges.txt with Qwen2's pipeline."""
    if (folder / "tokenizer.json").exists():
        return read_json(folder / "tokenizer.json")
    if not (folder / "vocab.json").exists():
        raise ValueError(_no_tokenizer(folder))
    vocab = read_json(folder / "vocab.json")
    merges_file = folder / "merges.txt"
    if not merges_file.exists():
        raise ValueError(f"{folder} has neither tokenizer.json nor merges.txt; copy the tokenizer's files there.")
    lines = merges_file.read_text(encoding="utf-8").split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    return describe(vocab, [(left, right) for left, right in merges], _added_from_config(folder))


def _no_tokenizer(folder: Path) -> str:
    if (folder / "adapter_config.json").exists():
        return f"{folder} is a LoRA adapter; give the model it was trained on as --model, and this folder as --adapter."
    inside = next((name for name in ("export", "checkpoint") if (folder / name / "config.json").exists()), None)
    hint = f"did you mean {folder / inside}?" if inside else "give a folder with published or exported weights."
    return f"{folder} is no model folder: it has neither tokenizer.json nor vocab.json; {hint}"


def _added_from_config(folder: Path) -> list[ControlToken]:
    config = _tokenizer_config(folder)
    if config.get("added_tokens_decoder"):
        return [
            ControlToken(id=int(id), name=token["content"], is_special=bool(token.get("special")))
            for id, token in config["added_tokens_decoder"].items()
        ]
    if (folder / "added_tokens.json").exists():
        # The file has no "special" flags; the published vocabulary writes special tokens as <|...|>.
        tokens = read_json(folder / "added_tokens.json")
        return [ControlToken(id=id, name=name, is_special=name.startswith("<|")) for name, id in tokens.items()]
    raise ValueError(
        f"{folder} has no tokenizer.json, and no tokenizer_config.json or added_tokens.json lists the control tokens."
    )


def describe(
    vocab: Mapping[str, int], merges: Iterable[tuple[str, str]], added: Iterable[ControlToken]
) -> dict[str, Any]:
    """A tokenizer.json's content with Qwen2's pipeline: NFC, the split with single digits, bytes, BPE."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token.id,
                "content": token.name,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": token.is_special,
            }
            for token in sorted(added, key=lambda token: token.id)
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
            ],
        },
        "post_processor": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": dict(vocab),
            "merges": [list(merge) for merge in merges],
        },
    }
