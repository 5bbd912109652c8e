"""Importing: the common formats become records, and what cannot be used is listed with its line and reason."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from data_files import clip, picture
from media_files import encoded, gradient
from qvl.data.ingest import ImportReport, import_data
from qvl.data.record import Record
from qvl.data.shard import INDEX_SUFFIX, extents, read_entry


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def imported(report: ImportReport) -> list[Record]:
    found = []
    for path in report.shards:
        with path.open("rb") as stream:
            for place in extents(stream, str(path)):
                found.append(read_entry(path.read_bytes()[place.offset : place.offset + place.size], "s").record)
    return found


def rejects(report: ImportReport) -> list[tuple[int, str]]:
    assert report.rejects is not None
    rows = [json.loads(line) for line in report.rejects.read_text().splitlines()]
    return [(row["line"], row["reason"]) for row in rows]


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "a.png").write_bytes(picture(1))
    (tmp_path / "img" / "turned.jpg").write_bytes(turned())
    (tmp_path / "b.mp4").write_bytes(clip())
    return tmp_path


def turned() -> bytes:
    """40 high and 80 wide as stored, with a note to turn it by a quarter."""
    from PIL import Image

    image = Image.fromarray(gradient(40, 80))
    exif = image.getexif()
    exif[0x0112] = 6
    return encoded(image, "JPEG", exif=exif.tobytes())


def content(record: Record) -> list[list[dict[str, Any]]]:
    return [list(message["content"]) for message in record.messages]


# ---- formats


def test_openai_messages_with_pictures_clips_thoughts_and_calls(folder) -> None:
    uri = "data:image/png;base64," + base64.b64encode(picture(2, 32, 64)).decode()
    row = {
        "id": "x1",
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "img/a.png"}},
                    {"type": "image_url", "image_url": {"url": uri, "detail": "low"}},
                    {"type": "video", "video": "b.mp4", "fps": 2.0},
                    {"type": "text", "text": "same?"},
                ],
            },
            {"role": "assistant", "content": "no", "reasoning_content": "look", "weight": 0},
            {"role": "user", "content": "sure?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "zoom", "arguments": '{"x": 1}'}}],
            },
        ],
        "tools": [{"type": "function", "function": {"name": "zoom"}}],
    }
    report = import_data(lines(folder / "d.jsonl", row), folder / "out", license="MIT", category="vqa")
    [record] = imported(report)
    assert (record.id, record.kind, record.license, record.category, record.source) == ("x1", "sft", "MIT", "vqa", "d")
    assert content(record)[0] == [
        {"type": "image", "image": "0.png"},
        {"type": "image", "image": "1.png"},
        {"type": "video", "video": "2.mp4", "fps": 2.0},
        {"type": "text", "text": "same?"},
    ]
    assert (record.media["1.png"].w, record.media["1.png"].h) == (64, 32)
    film = record.media["2.mp4"]
    assert (film.w, film.h, film.num_frames, film.fps, film.duration) == (96, 64, 8, 4.0, 2.0)
    assert record.messages[1]["thinking"] == "look" and record.messages[1]["weight"] == 0
    assert record.messages[3]["tool_calls"][0]["function"] == {"name": "zoom", "arguments": '{"x": 1}'}
    assert record.tools[0]["function"]["name"] == "zoom"


def test_ms_swift_rows_with_boxes(folder) -> None:
    row = {
        "messages": [
            {"role": "user", "content": "<image>find <ref-object>"},
            {"role": "assistant", "content": "<think>\nlook\n</think>\n\nat <bbox>"},
        ],
        "images": ["img/a.png"],
        "objects": {"ref": ["the cat"], "bbox": [[0.25, 0.5, 1, 1]], "bbox_type": "norm1"},
    }
    [record] = imported(import_data(lines(folder / "d.jsonl", row), folder / "out"))
    place = {"image": "0.png", "items": [{"bbox_abs": [24.0, 32.0, 96, 64]}]}
    assert content(record) == [
        [{"type": "image", "image": "0.png"}, {"type": "text", "text": "find "}, {"type": "text", "text": "the cat"}],
        [{"type": "text", "text": "at "}, {"type": "boxes", "form": "list", **place}],
    ]
    assert record.messages[1]["thinking"] == "look"


def test_ms_swift_query_and_response_with_history_and_a_call(folder) -> None:
    old = {"system": "s", "history": [["a", "b"]], "query": "c", "response": "d", "images": ["img/a.png"]}
    calls = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "tool_call", "content": '{"name": "f", "arguments": {}}'},
            {"role": "tool_response", "content": "3"},
            {"role": "assistant", "content": "three"},
        ]
    }
    first, second = imported(import_data(lines(folder / "d.jsonl", old, calls), folder / "out"))
    assert [m["role"] for m in first.messages] == ["system", "user", "assistant", "user", "assistant"]
    # No mark says where the picture stands: it comes before the first question.
    assert content(first)[1] == [{"type": "image", "image": "0.png"}, {"type": "text", "text": "a"}]
    assert [m["role"] for m in second.messages] == ["user", "assistant", "tool", "assistant"]
    assert second.messages[1]["tool_calls"][0]["function"]["name"] == "f"


def test_llava_and_sharegpt_conversations(folder) -> None:
    row = {
        "id": 7,
        "image": "img/turned.jpg",
        "conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a ramp"}],
    }
    (folder / "d.json").write_text(json.dumps([row]))
    [record] = imported(import_data(folder / "d.json", folder / "out"))
    assert record.id == "7"
    assert content(record)[0] == [{"type": "image", "image": "0.jpg"}, {"type": "text", "text": "\nwhat?"}]
    # Facts are those of the picture turned upright, which boxes and tokens refer to.
    assert (record.media["0.jpg"].w, record.media["0.jpg"].h) == (40, 80)


def test_plain_text_becomes_pretraining_documents(tmp_path) -> None:
    rows = lines(tmp_path / "d.jsonl", {"text": "one"}, {"text": "two", "license": "CC-BY-4.0"})
    one, two = imported(import_data(rows, tmp_path / "out"))
    assert one.kind == "pretrain" and one.messages[0]["role"] == "document" and one.messages[0]["content"] == "one"
    assert two.license == "CC-BY-4.0"


def test_our_own_records_with_media_beside_them(folder) -> None:
    row = {
        "id": "r",
        "kind": "pretrain",
        "media": {"cat": {"path": "img/a.png"}},
        "messages": [
            {"role": "document", "content": [{"type": "image", "image": "cat"}, {"type": "text", "text": "cat"}]}
        ],
        "objects": [{"image": "cat", "label": "cat", "bbox_abs": [1, 2, 3, 4]}],
    }
    [record] = imported(import_data(lines(folder / "d.jsonl", row), folder / "out"))
    assert content(record)[0] == [{"type": "image", "image": "0.png"}, {"type": "text", "text": "cat"}]
    assert record.objects[0]["image"] == "0.png"


# ---- tables


def test_parquet_with_pictures_inside(tmp_path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    talk = [{"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "this"}]
    rows = [{"id": f"r{i}", "messages": talk, "images": [{"bytes": picture(i), "path": None}]} for i in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    records = imported(import_data(tmp_path / "d.parquet", tmp_path / "out"))
    assert [r.id for r in records] == ["r0", "r1", "r2"] and records[0].media["0.png"].w == 96


def test_a_folder_that_hugging_face_saved_to_disk(tmp_path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    part = [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "this"}]},
    ]
    part[0]["content"][0]["image"] = {"bytes": picture(0), "path": "x.png"}
    table = pyarrow.Table.from_pylist([{"messages": part}])
    (tmp_path / "set").mkdir()
    file = str(tmp_path / "set" / "data-00000-of-00001.arrow")
    with pyarrow.OSFile(file, "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    for name in ("dataset_info.json", "state.json"):
        (tmp_path / "set" / name).write_text("{}")
    [record] = imported(import_data(tmp_path / "set", tmp_path / "out"))
    assert content(record)[0] == [{"type": "image", "image": "0.png"}, {"type": "text", "text": "what?"}]


# ---- what is left out


def test_bad_lines_are_listed_with_their_reason_and_the_rest_is_written(folder) -> None:
    good = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}

    def asked(*images: str, text: str = "<image>q") -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": text}, good["messages"][1]], "images": list(images)}

    (folder / "no.png").write_bytes(b"not a picture")
    rows = [
        good,
        "{broken",
        "[1]",
        {"question": "q"},
        asked("img/a.png", "img/a.png"),
        asked("../secret.png"),
        asked("img/none.png"),
        asked("https://example.org/a.png"),
        asked("no.png"),
        {"messages": [{"role": "user", "content": "q"}]},
        {"messages": [{"role": "user", "content": "<think>"}, {"role": "assistant", "content": "<think>a"}]},
        good,
    ]
    report = import_data(lines(folder / "d.jsonl", *rows), folder / "out")
    assert (report.written, report.rejected) == (2, 10)
    expected = [
        (2, "no JSON: Expecting property name"),
        (3, "a list; expected an object"),
        (4, "a row has the keys question; messages, conversations, query and response, or text was expected"),
        (5, "the text has 1 <image> and the row 2 files for them; make them equal"),
        (6, "the medium ../secret.png lies outside the media folder"),
        (7, "the medium img/none.png is not in"),
        (8, "the medium https://example.org/a.png is an address; download it and give the file"),
        (9, "a picture is no JPEG, PNG, WebP, GIF or BMP"),
        (10, "the conversation has no assistant's message"),
        (11, "an assistant's message begins with <think> and has no </think>"),
    ]
    found = rejects(report)
    assert [line for line, _ in found] == [line for line, _ in expected]
    for (_, reason), (_, start) in zip(found, expected, strict=True):
        assert reason.startswith(start)


def test_typed_blocks_beside_the_rows_own_images_keep_their_words(folder) -> None:
    """The form of TRL and of most vision sets on the hub."""
    talk = [
        {"role": "user", "content": [{"type": "text", "text": "What is it?"}, {"type": "image", "text": None}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A gradient."}]},
    ]
    [record] = imported(
        import_data(lines(folder / "d.jsonl", {"messages": talk, "images": ["img/a.png"]}), folder / "out")
    )
    assert content(record) == [
        [{"type": "text", "text": "What is it?"}, {"type": "image", "image": "0.png"}],
        [{"type": "text", "text": "A gradient."}],
    ]


def test_what_would_be_lost_is_refused(folder) -> None:
    answer = {"role": "assistant", "content": "a"}
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    named = [{"type": "image", "image": "img/a.png"}, {"type": "text", "text": "q"}]
    rows = [
        {"messages": [{"role": "user", "content": "<image>q"}, call], "images": ["img/a.png"]},
        {"messages": [{"role": "user", "content": named}, answer], "images": ["img/a.png"]},
        {"text": "a cat", "image": "img/a.png"},
    ]
    report = import_data(lines(folder / "d.jsonl", *rows), folder / "out")
    assert report.written == 0
    starts = ("a message has 'tool_calls' in a row with images", "a message holds a block", "a row of text has 'image'")
    for (_, reason), start in zip(rejects(report), starts, strict=True):
        assert reason.startswith(start)


def test_odd_rows_are_listed_and_end_nothing(folder) -> None:
    good = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    odd: list[Any] = [
        {"messages": 5},
        {"messages": [None], "images": ["img/a.png"]},
        {"conversations": ["hi"]},
        {"query": "q", "response": "a", "history": [None]},
        {**good, "images": ["img/a.png"], "objects": [{"bbox": [1, 2, 3, 4]}]},
        {**good, "images": [base64.b64encode(picture(1)).decode() * 20]},
        {**good, "id": "half \ud83d", "images": ["no.png"]},
        {"messages": [{"role": "user", "content": {"a": 1}}, good["messages"][1]], "images": ["img/a.png"]},
    ]
    report = import_data(lines(folder / "d.jsonl", *odd, good), folder / "out")
    assert (report.written, report.rejected) == (1, len(odd))
    assert all(reason and len(reason) < 400 for _, reason in rejects(report))


def test_a_phones_picture_of_two_pictures_is_a_jpeg(folder) -> None:
    from PIL import Image

    first, second = Image.fromarray(gradient(40, 80)), Image.fromarray(gradient(40, 80))
    first.save(folder / "img" / "phone.jpg", format="MPO", save_all=True, append_images=[second])
    talk = [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": "a"}]
    [record] = imported(
        import_data(lines(folder / "d.jsonl", {"messages": talk, "images": ["img/phone.jpg"]}), folder / "out")
    )
    assert list(record.media) == ["0.jpg"] and record.media["0.jpg"].w == 80


def test_an_older_index_does_not_hide_what_a_new_shard_of_its_name_holds(tmp_path) -> None:
    rows = lines(tmp_path / "d.jsonl", {"text": "one"})
    [shard] = import_data(rows, tmp_path / "out").shards
    index = shard.with_name(shard.name + INDEX_SUFFIX)
    index.write_bytes(b"of the older one")
    shard.unlink()
    import_data(rows, tmp_path / "out")
    assert shard.exists() and not index.exists()


def test_shards_are_not_mixed_with_older_ones(tmp_path) -> None:
    rows = lines(tmp_path / "d.jsonl", {"text": "one"})
    import_data(rows, tmp_path / "out")
    with pytest.raises(ValueError, match=r"out holds shard-000000\.tar already; write to another folder"):
        import_data(rows, tmp_path / "out")


def test_a_source_that_is_not_there_or_of_another_kind_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"none\.jsonl does not exist; give a file or a folder of \.jsonl"):
        import_data(tmp_path / "none.jsonl", tmp_path / "out")
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(ValueError, match=r"a\.csv ends in \.csv; expected one of \.jsonl"):
        import_data(tmp_path / "a.csv", tmp_path / "out")


# ---- nothing is dropped or misread in silence


def chat(question: str, answer: str = "a", **keys: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **keys}


def test_a_column_that_holds_media_is_read_or_its_row_is_rejected(folder) -> None:
    rows = [
        chat("q", id="image", image="img/a.png"),
        chat("<image>q", id="mark", image="img/a.png"),
        chat("<video>q", id="video", video="b.mp4"),
        chat("q", imgs=["img/a.png"]),
        chat("<audio>q", audios=["x.wav"]),
        chat("q", shown="img/a.png"),
        chat("q", image="img/a.png", images=["img/a.png"]),
    ]
    report = import_data(lines(folder / "d.jsonl", *rows), folder / "out")
    assert [(record.id, list(record.media)) for record in imported(report)] == [
        ("image", ["0.png"]),
        ("mark", ["0.png"]),
        ("video", ["0.mp4"]),
    ]
    assert all(content(record)[0][-1] == {"type": "text", "text": "q"} for record in imported(report))
    assert [reason.partition(" holds")[0] for _, reason in rejects(report)] == [
        "the row's key 'imgs'",
        "the row's key 'audios'",
        "the row's key 'shown'",
        "the row has 'image' and 'images'; give all of them in one.",
    ]


def test_a_file_name_beside_media_that_are_read_is_a_note_and_unread_keys_are_counted(folder) -> None:
    rows = [chat("q", images=["img/a.png"], origin="coco/000.jpg", score=1), chat("q", score=2)]
    report = import_data(lines(folder / "d.jsonl", *rows), folder / "out")
    assert report.written == 2 and report.unread == {"origin": 1, "score": 2}


def test_openai_rows_by_name_do_not_drop_a_column_of_media(folder) -> None:
    report = import_data(lines(folder / "d.jsonl", chat("q", image="img/a.png")), folder / "out", format="openai")
    [(_, reason)] = rejects(report)
    assert reason.startswith("the row's key 'image' holds media and is not read; name it in the messages")


def test_a_folder_is_read_whole_and_its_rejects_are_no_data(folder) -> None:
    (folder / "b.json").write_text(json.dumps([chat("json")]))
    lines(folder / "a.jsonl", chat("jsonl"), "no row")
    first = import_data(folder, folder / "out")
    assert sorted(content(record)[0][0]["text"] for record in imported(first)) == ["json", "jsonl"]
    assert first.rejects is not None and first.rejects.is_relative_to(folder)
    again = import_data(folder, folder / "again")
    assert [file.name for file in again.files] == ["a.jsonl", "b.json"] and again.written == 2


def test_a_folder_with_json_that_is_no_list_of_rows_is_refused(folder) -> None:
    lines(folder / "a.jsonl", chat("q"))
    (folder / "settings.json").write_text("{}")
    with pytest.raises(ValueError, match=r"settings\.json holds a dict; expected a list of rows\. If it is no data"):
        import_data(folder, folder / "out")


def test_ids_differ_whatever_the_files_are_called(folder) -> None:
    for part, said in (("x", "one"), ("y", "two")):
        (folder / part).mkdir()
        lines(folder / part / "train.jsonl", chat(said), chat(said, id="same"))
    report = import_data(folder, folder / "out")
    ids = [record.id for record in imported(report)]
    assert len(set(ids)) == 4 and "same" in ids and report.repeated == 1
    elsewhere = import_data(folder / "x" / "train.jsonl", folder / "other")
    assert imported(elsewhere)[0].id not in ids, "another import of a file of that name"


def test_calls_and_responses_spelled_in_text_become_what_they_mean(folder) -> None:
    call = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    turns = [
        ("system", "s"),
        ("human", "q"),
        ("gpt", f"I look.\n{call}\n{call}"),
        ("tool", "<tool_response>\nok\n</tool_response>"),
        ("gpt", "<think>\nhm\n</think>\n\ndone"),
    ]
    row = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    [record] = imported(import_data(lines(folder / "d.jsonl", row), folder / "out"))
    _, _, asked, told, done = record.messages
    assert [c["function"] for c in asked["tool_calls"]] == [{"name": "f", "arguments": '{"a": 1}'}] * 2
    assert asked["content"] == [{"type": "text", "text": "I look."}]
    assert (told["role"], told["content"]) == ("tool", [{"type": "text", "text": "ok"}])
    assert (done["thinking"], done["content"]) == ("hm", [{"type": "text", "text": "done"}])


def test_native_marks_of_media_are_places_of_media(folder) -> None:
    row = chat("<|vision_start|><|image_pad|><|vision_end|>q", images=["img/a.png"])
    [record] = imported(import_data(lines(folder / "d.jsonl", row), folder / "out"))
    assert content(record)[0] == [{"type": "image", "image": "0.png"}, {"type": "text", "text": "q"}]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (chat("q", "<|box_start|>(1,2),(3,4)<|box_end|>"), "<|box_start|>, which would be letters; give places"),
        (chat("q", "a<|im_end|>"), "the assistant's text spells the control token <|im_end|>"),
        (chat("q", "so <think>hm</think> 4"), "control token <think>, which would be letters; a thought stands once"),
        (chat("q", '<tool_call>{"name": "f"'), "an assistant's turn has words behind a <tool_call>"),
        (chat("q", "<tool_call>f(1)</tool_call>"), "spells a <tool_call> that cannot be read: A tool call is no JSON"),
        (chat("<|vision_start|><|image_pad|><|vision_end|>q"), "the user's text spells the control token <|vision_st"),
        (chat("x <|vision_start|>", images=["img/a.png"]), "the user's text spells the control token <|vision_start|>"),
    ],
)
def test_marks_that_would_be_learned_as_letters_are_rejected(folder, row, reason) -> None:
    report = import_data(lines(folder / "d.jsonl", row), folder / "out")
    assert report.written == 0 and reason in rejects(report)[0][1]


def test_a_persons_own_words_may_hold_marks(folder) -> None:
    [record] = imported(import_data(lines(folder / "d.jsonl", chat("what does <|im_end|> mean?")), folder / "out"))
    assert content(record)[0] == [{"type": "text", "text": "what does <|im_end|> mean?"}]


def test_a_box_whose_corners_are_turned_round_is_rejected(folder) -> None:
    row = chat("<image>find <ref-object>", "<bbox>", images=["img/a.png"])
    row["objects"] = {"ref": ["x"], "bbox": [[90, 60, 10, 10]]}
    report = import_data(lines(folder / "d.jsonl", row), folder / "out")
    [(_, reason)] = rejects(report)
    assert reason.endswith("whose x2 < x1 or y2 < y1; is it x, y, width, height? Corners are expected.")
