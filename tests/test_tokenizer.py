"""The tokenizer: the published ids, text that can spell no control token, and streams that break no character."""

import json
import random
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from qvl.prompt.tokenizer import Tokenizer
from real_tokenizer import CONTROL, real_tokenizer, real_tokenizer_folder

NAMES = [token.name for token in CONTROL]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return real_tokenizer()


@pytest.fixture(scope="module")
def published():
    return AutoTokenizer.from_pretrained(real_tokenizer_folder())


def random_texts(count: int, seed: int, pieces: list[str]) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choice(pieces) for _ in range(rng.randint(0, 25))) for _ in range(count)]


WORDS = [
    "a",
    "word ",
    " ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    "1",
    "23",
    ".",
    "!?",
    "<",
    "|",
    ">",
    "é",
    "e\u0301",
    "你好",
    "🙂",
    "'s",
]
WORDS += ["\u1e9b\u0323", "หวัดดี", "नमस्ते", "Å", "   ", "def f(x):", "3.14", "ﬁ"]


def test_ids_are_the_published_ones(tokenizer):
    assert tokenizer.encode_text("<0.3 seconds>") == [27, 15, 13, 18, 6486, 29]
    assert tokenizer.encode_control("<|im_start|>user\n") == [151644, 872, 198]
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.num_ids) == (151645, 151643, 151669)


def test_ids_equal_transformers_on_mixed_text(tokenizer, published):
    for text in random_texts(500, 0, WORDS + NAMES):
        assert tokenizer.encode_control(text) == published(text)["input_ids"]


def test_decoding_equals_transformers_also_on_broken_bytes(tokenizer, published):
    rng = random.Random(1)
    for _ in range(200):
        ids = [rng.randrange(151669) for _ in range(20)]
        assert tokenizer.decode(ids) == published.decode(ids)
        assert tokenizer.decode(ids, skip_special=True) == published.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", NAMES)
def test_plain_text_never_becomes_a_control_token(tokenizer, name):
    for text in (name, f"a {name} b", name * 3, f"\n{name}\n", name[:-1] + name):
        ids = tokenizer.encode_text(text)
        assert not any(tokenizer.is_control(id) for id in ids)
        assert tokenizer.decode(ids) == text


def test_a_template_says_control_tokens_by_name(tokenizer):
    assert tokenizer.control_id("<|image_pad|>") == 151655
    assert tokenizer.split_control("a<think>\n") == ["a", 151667, "\n"]
    with pytest.raises(ValueError, match=r"no control token '<\|nothing\|>'"):
        tokenizer.control_id("<|nothing|>")


def test_think_and_tool_call_survive_skip_special(tokenizer):
    ids = tokenizer.encode_control("<|im_start|><think>a</think><|im_end|>")
    assert tokenizer.decode(ids, skip_special=True) == "<think>a</think>"


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(WORDS + NAMES), st.text(st.characters(max_codepoint=0xFFFF, codec="utf-8")))))
def test_text_is_preserved_up_to_its_normal_form(pieces):
    tokenizer = real_tokenizer()
    text = "".join(pieces)
    ids = tokenizer.encode_text(text)
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)
    assert tokenizer.control_ids.isdisjoint(ids)


def test_a_stream_gives_no_half_characters_and_the_same_text(tokenizer):
    rng = random.Random(2)
    texts = ["🙂é你好" * 3, "👩‍👩‍👧‍👦 family", *random_texts(50, 3, WORDS)]
    sequences = [tokenizer.encode_text(text) for text in texts]
    sequences += [[rng.randrange(151669) for _ in range(30)] for _ in range(50)]
    for ids in sequences:
        stream = tokenizer.stream()
        pieces = [stream.push(id) for id in ids] + [stream.end()]
        assert "".join(pieces) == tokenizer.decode(ids)
    stream = tokenizer.stream()
    first, *others = tokenizer.encode_text("🪿")  # no token of its own: several ids make one character
    assert others and stream.push(first) == ""


def test_rows_beyond_the_vocabulary_stand_for_nothing(tokenizer):
    assert tokenizer.decode([64, 151900, 65]) == "ab"


def test_vocab_and_merges_alone_make_the_same_tokenizer(tokenizer, tmp_path):
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((real_tokenizer_folder() / name).read_bytes())
    other = Tokenizer.from_folder(tmp_path)
    assert other.control_tokens == tokenizer.control_tokens
    for text in random_texts(50, 4, WORDS + NAMES):
        assert other.encode_control(text) == tokenizer.encode_control(text)


def small(**changes) -> dict:
    letters = {chr(i): i - 33 for i in range(33, 127)}
    added = [{"id": 94, "content": "<go>", "special": True}]
    return {"version": "1.0", "added_tokens": added, "model": {"type": "BPE", "vocab": letters, "merges": []}} | changes


def test_a_control_token_inside_the_vocabulary_is_taken_out():
    description = small()
    description["model"]["vocab"]["<go>"] = 94
    tokenizer = Tokenizer(description)
    assert tokenizer.encode_text("<go>") == [27, 70, 78, 29] and tokenizer.encode_control("<go>") == [94]


@pytest.mark.parametrize(
    ("description", "sentence"),
    [
        (small(model={"type": "WordPiece"}), "only byte-level BPE"),
        (small(added_tokens=[{"id": 94, "content": "<go>", "lstrip": True}]), "eats the spaces around it"),
        (small(added_tokens=[{"id": 3, "content": "<go>"}]), "belong to an added token and to the vocabulary"),
    ],
)
def test_other_tokenizers_are_refused_in_one_sentence(description, sentence):
    with pytest.raises(ValueError, match=sentence):
        Tokenizer(description)


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"has neither tokenizer\.json nor vocab\.json; give a folder with published"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "export").mkdir()
    (tmp_path / "export/config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"did you mean .*export\?"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is a LoRA adapter"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        Tokenizer.from_folder(tmp_path)


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(ValueError, match="no valid Unicode"):
        tokenizer.encode_text(json.loads('"\\ud83d"'))
