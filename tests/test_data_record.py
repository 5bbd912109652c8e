"""Records: what is accepted, how it is written and read back, and which ids and targets it becomes."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_files import VIDEOS, chat, clip, document, film, model_config, picture, processor
from media_files import pdf
from qvl.core.batch import Sample
from qvl.data import draft as draft_module
from qvl.data.draft import draft, fit
from qvl.data.record import read_record, record_from_dict, record_to_json
from qvl.data.sample import materialise
from qvl.data.shard import ShardWriter, extents, read_entry
from qvl.model.pack import pack
from qvl.prompt.message import Image, Video, assistant, user
from qvl.prompt.processor import Encoded, Processor
from qvl.prompt.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Processor:
    return processor(tmp_path_factory.mktemp("model"))


def shown(with_processor: Processor, made: Any) -> str:
    """The ids as text, placeholders counted, targets in brackets."""
    tokenizer = with_processor.tokenizer
    out, is_open, run = "", False, 0
    pads = {tokenizer.control_id(f"<|{kind}_pad|>") for kind in ("image", "video")}
    for id, is_target in zip(made.sample.token_T.tolist(), made.sample.is_target_T.tolist(), strict=True):
        run += id in pads
        if id not in pads and run:
            out, run = out + f"({run})", 0
        if is_target != is_open:
            out, is_open = out + ("[" if is_target else "]"), is_target
        out += "" if id in pads else tokenizer.decode([id])
    return out + ("]" if is_open else "")


BOXES = {
    "id": "cats",
    "kind": "sft",
    "media": {"0.png": {"w": 200, "h": 100}},
    "messages": [
        {"role": "user", "content": [{"type": "image", "image": "0.png"}, {"type": "text", "text": "cats?"}]},
        {
            "role": "assistant",
            "content": [
                {
                    "type": "boxes",
                    "image": "0.png",
                    "items": [
                        {"bbox_abs": [20, 10, 100, 50], "label": "cat"},
                        {"point_abs": [200, 100], "label": "nose"},
                    ],
                },
                {"type": "text", "text": " at "},
                {"type": "boxes", "image": "0.png", "form": "list", "items": [{"bbox_abs": [0, 0, 1, 1]}]},
            ],
        },
    ],
}


# ---- what a record becomes


def test_boxes_stand_in_pixels_on_disk_and_in_thousandths_in_the_prompt(small) -> None:
    text = shown(small, draft(record_from_dict(BOXES), small))
    assert text == (
        "<|im_start|>user\n<|vision_start|>(18)<|vision_end|>cats?<|im_end|>\n<|im_start|>assistant\n"
        '[[{"bbox_2d": [100, 100, 500, 500], "label": "cat"}, {"point_2d": [1000, 1000], "label": "nose"}]'
        " at [0, 0, 5, 10]<|im_end|>]\n"
    )


def test_a_document_learns_all_its_text_and_no_picture(small) -> None:
    content = [
        {"type": "text", "text": "see "},
        {"type": "image", "image": "0.png"},
        {"type": "text", "text": " there"},
    ]
    data = {"id": "page", "kind": "pretrain", "media": {"0.png": {"w": 64, "h": 64}}}
    record = record_from_dict({**data, "messages": [{"role": "document", "content": content}]})
    # The first token has nothing before it that could predict it.
    assert shown(small, draft(record, small)) == "s[ee ]<|vision_start|>(4)<|vision_end|>[ there<|endoftext|>]"


def test_times_of_a_video_in_a_document_are_not_learned(small) -> None:
    film_record = film("clip")
    media = {name: {"w": 96, "h": 64, "num_frames": 8, "fps": 4.0} for name in film_record.media}
    content = [
        {"type": "text", "text": "a clip: "},
        {"type": "video", "video": "0.mp4"},
        {"type": "text", "text": "end"},
    ]
    data = {"id": "v", "kind": "pretrain", "media": media, "messages": [{"role": "document", "content": content}]}
    for style, first, second in (("seconds", "<0.2 seconds>", "<1.5 seconds>"), ("hms", "<0:00:00.2>", "<0:00:01.5>")):
        text = shown(small, draft(record_from_dict({**data, "time_style": style}), small))
        assert text == (
            f"a[ clip: ]{first}<|vision_start|>(6)<|vision_end|>{second}<|vision_start|>(6)<|vision_end|>[end<|endoftext|>]"
        )


def test_an_answer_of_weight_0_is_not_learned(small) -> None:
    messages = [
        {"role": "user", "content": "<|im_start|>assistant\n"},
        {"role": "assistant", "content": "no", "weight": 0},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "yes", "weight": 1},
    ]
    text = shown(small, draft(record_from_dict({"id": "w", "kind": "sft", "messages": messages}), small))
    assert text.endswith(
        "assistant\nno<|im_end|>\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n[yes<|im_end|>]\n"
    )


def test_a_thought_is_kept_apart_and_written_by_the_thinking_template(tmp_path) -> None:
    thinking = processor(tmp_path, template="thinking")
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "thinking": "add", "content": "4"}]
    text = shown(thinking, draft(record_from_dict({"id": "t", "kind": "sft", "messages": messages}), thinking))
    assert text.endswith("<|im_start|>assistant\n<think>\n[add\n</think>\n\n4<|im_end|>]\n")


@pytest.mark.parametrize(
    ("record", "media"),
    [
        (chat("picture", "what?", "that", height=70, width=130), {"0.png": picture(1, 70, 130)}),
        (film("file"), {"0.mp4": clip()}),
        (film("odd", frames=9, num_frames=5), {"0.mp4": clip(9)}),
        (film("small", max_tokens=6), {"0.mp4": clip()}),
    ],
    ids=lambda value: getattr(value, "id", ""),
)
def test_lengths_known_from_facts_are_those_of_the_decoded_sample(small, record, media) -> None:
    planned = draft(record, small)
    sample = materialise(planned, media, small)
    assert sample.patch_PX is not None and sample.grid_I3 is not None
    assert sample.patch_PX.shape[0] == planned.num_patches == int(sample.grid_I3.prod(1).sum())


def test_the_sample_is_that_of_the_processor(small) -> None:
    data = picture(3)
    sample = materialise(draft(chat("a", "what?", "that"), small), {"0.png": data}, small)
    theirs = small([user(Image(data), "what?"), assistant("that")], add_generation_prompt=False, targets="all").sample
    assert torch.equal(sample.token_T, theirs.token_T) and torch.equal(sample.is_target_T, theirs.is_target_T)
    assert torch.equal(sample.patch_PX, theirs.patch_PX) and torch.equal(sample.grid_I3, theirs.grid_I3)


def test_frames_of_a_video_may_be_pictures_with_the_places_they_were_taken_from(small) -> None:
    media = {f"{i}.png": {"w": 64, "h": 64} for i in range(4)}
    video = {"type": "video", "video": list(media), "meta": {"fps": 25.0, "frame_indices": [0, 25, 50, 75]}}
    messages = [{"role": "user", "content": [video]}, {"role": "assistant", "content": "x"}]
    record = record_from_dict({"id": "f", "kind": "sft", "media": media, "messages": messages})
    planned = draft(record, small)
    assert "<0.5 seconds>" in shown(small, planned) and "<2.5 seconds>" in shown(small, planned)
    sample = materialise(planned, {name: picture(i, 64, 64) for i, name in enumerate(media)}, small)
    assert sample.grid_I3.tolist() == [[1, 4, 4], [1, 4, 4]]


def test_pages_of_a_pdf_are_pictures(small) -> None:
    sizes = [(60, 40), (40, 60), (50, 50)]
    block = {"type": "document", "document": "0.pdf", "pages": "2-3"}
    messages = [{"role": "user", "content": [block]}, {"role": "assistant", "content": "x"}]
    media = {"0.pdf": {"page_sizes": sizes}}
    planned = draft(record_from_dict({"id": "p", "kind": "sft", "media": media, "messages": messages}), small)
    sample = materialise(planned, {"0.pdf": pdf(sizes)}, small)
    assert sample.grid_I3.tolist() == planned.sample.grid_I3.tolist() and len(sample.grid_I3) == 2


# ---- too long


def test_a_long_text_comes_in_pieces_that_join_to_the_whole(small) -> None:
    record = document("long", "".join(chr(97 + i % 26) for i in range(250)))
    pieces = [fit(record, small, 100, 400, piece) for piece in range(3)]
    assert torch.cat([p.sample.token_T for p in pieces]).tolist() == draft(record, small).sample.token_T.tolist()
    assert [p.fate for p in pieces] == ["piece"] * 3
    assert [int(p.sample.is_target_T.sum()) for p in pieces] == [99, 99, 50]


def test_a_long_video_gets_fewer_frames_and_keeps_its_answer(small) -> None:
    record = film("film", frames=40)
    made = fit(record, small, 120, 400)
    assert made.fate == "rebudgeted" and made.sample.num_tokens <= 120 < draft(record, small).sample.num_tokens
    assert shown(small, made).endswith("[bars<|im_end|>]\n")
    sample = materialise(made, {"0.mp4": clip(40)}, small)
    assert sample.patch_PX.shape[0] == made.num_patches <= 400


def test_too_many_patches_shrink_the_pictures_of_a_chat(small) -> None:
    made = fit(chat("big", "q", "a", height=320, width=320), small, 1000, 100)
    assert made.fate == "rebudgeted" and made.num_patches <= 100


@pytest.mark.parametrize(("kind", "budget"), [("image", (1000, 100)), ("video", (60, 400))])
def test_the_text_is_tokenized_once_however_often_media_shrink(small, monkeypatch, kind: str, budget: Any) -> None:
    image, video = chat("big", "what is it?", "a square", height=320, width=320), film("film", frames=40)
    texts: list[str] = []
    tries: list[int] = []
    plain, build = Tokenizer._encode, draft_module.build_sample

    def counted(tokenizer: Tokenizer, text: str) -> Any:
        texts.append(text)
        return plain(tokenizer, text)

    def built(ids: list[int], *rest: Any) -> Any:
        tries.append(len(ids))
        return build(ids, *rest)

    monkeypatch.setattr(Tokenizer, "_encode", counted)
    monkeypatch.setattr(draft_module, "build_sample", built)
    made = fit(image if kind == "image" else video, small, *budget)
    assert made.fate == "rebudgeted" and len(tries) > 3 and tries[-1] == min(tries)
    # A video's times change with its frames; all other text is met once.
    assert len(texts) == len(set(texts))
    said = [text for text in texts if "seconds>" not in text]
    assert len(said) < len(tries) if kind == "video" else said == texts


@pytest.mark.parametrize("seed", range(8))
def test_a_record_that_was_made_to_fit_is_what_the_processor_gives_for_the_smaller_media(small, seed: int) -> None:
    random = np.random.default_rng(seed)
    media, facts, content = {}, {}, []
    for number in range(int(random.integers(1, 4))):
        height, width = (int(side) * 16 for side in random.integers(6, 20, 2))
        media[f"{number}.png"] = picture(number, height, width)
        facts[f"{number}.png"] = {"w": width, "h": height}
        content += [{"type": "text", "text": "look " * number}, {"type": "image", "image": f"{number}.png"}]
    if seed % 2:
        media["film.mp4"], facts["film.mp4"] = clip(24), {"w": 96, "h": 64, "num_frames": 24, "fps": 4.0}
        content.insert(int(random.integers(0, len(content))), {"type": "video", "video": "film.mp4"})
    messages = [
        {"role": "user", "content": [*content, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "that <|im_end|> and more"},
    ]
    record = record_from_dict({"id": "r", "kind": "sft", "media": facts, "messages": messages})
    budget = int(draft(record, small).sample.num_tokens * random.uniform(0.6, 0.95))
    theirs = shrunk_by_the_processor(small, content, media, budget)
    made = fit(record, small, budget, 10**6)
    sample = materialise(made, media, small)
    assert made.fate == "rebudgeted" and sample.num_tokens <= budget
    for name in ("token_T", "is_target_T", "grid_I3", "patch_PX"):
        assert torch.equal(getattr(sample, name), getattr(theirs, name)), name
    config = model_config(small)
    assert torch.equal(pack([sample], config).position_3T, pack([theirs], config).position_3T)


def shrunk_by_the_processor(small: Processor, content: list[Any], media: dict[str, bytes], budget: int) -> Sample:
    """Renders and tokenizes the whole conversation anew at each try: videos shrink first, then images, each from its own size."""

    def encoded(limits: dict[str, dict[str, int]]) -> Encoded:
        parts = [
            block["text"]
            if block["type"] == "text"
            else (Image if block["type"] == "image" else Video)(
                media[name := block[block["type"]]], **limits.get(name, {})
            )
            for block in content
        ]
        turns = [user(*parts, "what?"), assistant("that <|im_end|> and more")]
        return small(turns, add_generation_prompt=False, targets="all")

    names = [block[block["type"]] for block in content if block["type"] != "text"]
    whole = dict(zip(names, encoded({}).visuals, strict=True))
    limits: dict[str, dict[str, int]] = {}
    for suffix in (".mp4", ".png"):
        ratio, before = 1.0, None
        while limits != before and any(name.endswith(suffix) for name in names):
            ratio, before = ratio * 0.8, dict(limits)
            for name in (name for name in names if name.endswith(suffix)):
                limits[name] = {"max_tokens": max(4, int(whole[name].num_tokens * ratio))}
                if suffix == ".mp4":
                    limits[name]["num_frames"] = max(2, 2 * int(whole[name].grid_I3.shape[0] * ratio**0.5))
            sample = encoded(limits).sample
            if sample.num_tokens <= budget:
                return sample
    raise AssertionError("the budget is too small for this test")


@pytest.mark.parametrize(("max_tokens", "max_patches"), [(28, 1000), (1000, 40)])
def test_a_long_document_is_cut_between_its_media(small, max_tokens: int, max_patches: int) -> None:
    media = {f"{i}.png": {"w": 64, "h": 64} for i in range(5)}
    content = [
        block for name in media for block in ({"type": "text", "text": "word"}, {"type": "image", "image": name})
    ]
    data = {"id": "d", "kind": "pretrain", "media": media, "messages": [{"role": "document", "content": content}]}
    made = fit(record_from_dict(data), small, max_tokens, max_patches)
    assert made.fate == "cut" and len(made.parts) == 2
    assert shown(small, made).startswith(
        "w[ord]<|vision_start|>(4)<|vision_end|>[word]<|vision_start|>(4)<|vision_end|>[word"
    )
    sample = materialise(made, {name: picture(0, 64, 64) for name in list(media)[:2]}, small)
    assert sample.patch_PX.shape[0] == 32


# ---- on disk


def test_a_record_comes_back_from_a_shard_as_it_went_in(tmp_path) -> None:
    entries = [(chat(f"c{i}", "q", "a" * i), {"0.png": picture(i)}) for i in range(5)]
    with ShardWriter(tmp_path, max_records=2) as writer:
        for record, media in entries:
            writer.write(record, media)
    assert [path.name for path in writer.paths] == [f"shard-00000{i}.tar" for i in range(3)]
    found = []
    for path in writer.paths:
        with path.open("rb") as stream:
            for place in extents(stream, str(path)):
                found.append(read_entry(path.read_bytes()[place.offset : place.offset + place.size], str(path)))
    assert [entry.record.id for entry in found] == [f"c{i}" for i in range(5)]
    assert [entry.media["0.png"] for entry in found] == [media["0.png"] for _, media in entries]
    assert found[0].record.media["0.png"].sha256 is not None
    assert found[3].record.messages == entries[3][0].messages


def test_any_webdataset_reader_sees_json_and_media_side_by_side(tmp_path) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.write(chat("c", "q", "a"), {"0.png": picture(0)})
    with tarfile.open(writer.paths[0]) as tar:
        assert tar.getnames() == ["000000000.json", "000000000.0.png"]


def test_equal_records_make_equal_shards(tmp_path) -> None:
    for name in ("a", "b"):
        with ShardWriter(tmp_path / name) as writer:
            writer.write(chat("c", "q", "a"), {"0.png": picture(0)})
    assert (tmp_path / "a/shard-000000.tar").read_bytes() == (tmp_path / "b/shard-000000.tar").read_bytes()


def test_a_writer_that_fails_leaves_no_shard(tmp_path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path) as writer:
        writer.write(chat("c", "q", "a"), {"0.png": picture(0)})
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_removed_by_the_next_and_another_prefix_stays(tmp_path) -> None:
    for name in ("rank-1-000000", "rank-10-000000", "rank-1-000003"):
        (tmp_path / f".{name}.tar.01234567.partial").mkdir()
        (tmp_path / f".{name}.tar.01234567.partial" / "new").write_bytes(b"half")
    with ShardWriter(tmp_path, prefix="rank-1") as writer:
        writer.write(document("d", "text"), {})
        assert list(tmp_path.glob("*.tar")) == [], "it has no name before it is whole"
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"rank-1-000000.tar", ".rank-10-000000.tar.01234567.partial"}


def test_a_damaged_header_is_an_error_and_not_the_end(tmp_path) -> None:
    with ShardWriter(tmp_path) as writer:
        for i in range(3):
            writer.write(document(f"d{i}", "text"), {})
    content = bytearray(writer.paths[0].read_bytes())
    content[1024 + 150] ^= 0xFF
    with pytest.raises(ValueError, match=r"shard is not a whole tar file \(the header at byte 1024 is damaged\)"):
        list(extents(io.BytesIO(content), "shard"))


texts = st.text(st.characters(codec="utf-8"), max_size=20)


@given(text=texts, answer=texts, extra=st.dictionaries(st.text("abc", min_size=1), st.integers()))
def test_a_record_survives_json(text: str, answer: str, extra: dict[str, int]) -> None:
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    data = {"id": "x", "kind": "sft", "messages": messages, "extra": extra, "objects": [], "reward": {"type": "exact"}}
    record = record_from_dict(data)
    assert read_record(record_to_json(record)) == record


# ---- what is refused


def broken(change: dict[str, Any]) -> dict[str, Any]:
    return {**json.loads(json.dumps(BOXES)), **change}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"kind": "chat"}, "record 'cats' has kind 'chat'; expected one of pretrain, sft, rl, pref"),
        ({"licens": "MIT"}, "unknown key 'licens'; did you mean 'license'"),
        ({"id": 3}, "record has id 3; expected text"),
        ({"messages": []}, "has no messages"),
        ({"kind": "pretrain"}, "has the role 'user'; a pretrain record holds one document"),
        ({"media": {}}, "shows '0.png', which is not among the record's media"),
        ({"media": {"0.png": {"w": 5}}}, "shows '0.png', whose facts lack h"),
        ({"media": {"0.png": {"w": 0, "h": 5}}}, "media '0.png' has w 0; expected a whole number above 0"),
        ({"media": {"0.png": {"w": 90, "h": 100}}}, r"has bbox_abs \[20, 10, 100, 50\], outside the picture of 90x100"),
        (
            {"messages": [{"role": "user", "content": [{"type": "img"}]}]},
            "has the type 'img'; expected one of text, image",
        ),
        ({"messages": [{"role": "assistant", "content": "x", "weight": 0.5}]}, "has weight 0.5; 1 trains the message"),
    ],
)
def test_what_is_wrong_with_a_record_is_said_in_a_sentence(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        record_from_dict(broken(change))


def test_a_video_needs_facts_and_a_list_of_frames_needs_times() -> None:
    with pytest.raises(ValueError, match=r"shows '0\.mp4', whose facts lack num_frames, fps"):
        record_from_dict(
            {
                "id": "v",
                "kind": "sft",
                "media": {"0.mp4": {"w": 9, "h": 9}},
                "messages": [{"role": "user", "content": [{"type": "video", "video": "0.mp4"}]}],
            }
        )
    with pytest.raises(ValueError, match="is a list of frames; give one of fps, timestamps or meta"):
        record_from_dict(
            {
                "id": "v",
                "kind": "sft",
                "media": {"0.png": {"w": 9, "h": 9}},
                "messages": [{"role": "user", "content": [{"type": "video", "video": ["0.png"]}]}],
            }
        )


def test_times_that_only_decoding_gives_cannot_be_planned(tmp_path) -> None:
    from dataclasses import replace

    real = processor(tmp_path, video_sampling=replace(VIDEOS, times="real"))
    with pytest.raises(ValueError, match="times 'real' are known only after decoding"):
        draft(film("v"), real)


def test_media_that_do_not_match_the_record_are_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer, pytest.raises(ValueError, match=r"names the media \['0.png'\] and \[\] came"):
        writer.write(chat("c", "q", "a"), {})
