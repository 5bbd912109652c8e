"""qvl data import, index, preview, stats, verify: from a file of rows to a page, as a person runs them."""

import json
import re
from pathlib import Path

import pytest

from data_files import chat, clip, film, picture, processor, write_shards
from qvl.commands import cli
from qvl.data.draft import draft
from qvl.data.preview import marked_text, preview_page
from qvl.data.record import record_from_dict
from qvl.data.shard import Entry
from qvl.outside.workers import InProcess


@pytest.fixture
def model(tmp_path) -> Path:
    processor(tmp_path / "bare").save(tmp_path / "model")
    return tmp_path / "model"


def call(capsys, *argv: object) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


def rows(path: Path, count: int = 4) -> Path:
    (path.parent / "a.png").write_bytes(picture(1))
    talk = [{"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "that"}]
    data = [{"id": f"r{i}", "messages": talk, "images": ["a.png"], "license": "MIT"} for i in range(count)]
    path.write_text("\n".join(map(json.dumps, data)) + "\nbroken\n")
    return path


def test_a_folder_of_several_files_is_read_whole_and_says_which(tmp_path, capsys) -> None:
    for name in ("train", "test"):
        (tmp_path / "set" / name).mkdir(parents=True)
        rows(tmp_path / "set" / name / "data.jsonl")
    given = ("--out", tmp_path / "shards", "--media-root", tmp_path / "set" / "test")
    code, out, _ = call(capsys, "data", "import", tmp_path / "set", *given)
    assert code == 0 and "read 2 files, each as training data: test/data.jsonl, train/data.jsonl" in out


def test_from_rows_to_shards_to_an_index_to_counts_and_a_page(tmp_path, model, capsys) -> None:
    source, out = rows(tmp_path / "talk.jsonl"), tmp_path / "shards"
    assert call(capsys, "data", "import", source, "--out", out, "--category", "vqa")[:2] == (
        0,
        f"wrote 4 records in 1 shards to {out}\nleft out 1 rows; their reasons are in {out / 'rejects.jsonl'}, for instance:\n"
        "  talk.jsonl, line 5: no JSON: Expecting value: line 1 column 1 (char 0).\n",
    )
    # 6 visual tokens; two role lines, marks, words and ends are 32 more, 5 of them learned
    said = "4 records, 152 tokens; 0 records cannot be read and will not be used\n"
    assert call(capsys, "data", "index", out, "--model", model) == (0, said, "")
    assert call(capsys, "data", "index", out, "--model", model) == (0, said, "")

    code, text, _ = call(capsys, "data", "stats", out, "--json")
    stats = json.loads(text)
    assert code == 0
    assert stats["by_category"] == {"vqa": {"records": 4, "text": 128, "visual": 24, "targets": 20}}
    assert stats["by_source"]["talk"]["records"] == 4
    assert stats["by_license"] == {"MIT": 4} and stats["lengths"] == {"0": 4} and stats["longest"] == 38
    assert stats["twice"] == 3 and stats["bad"] == 0

    code, text, _ = call(capsys, "data", "stats", out)
    assert code == 0 and "vqa" in text and "MIT" in text

    assert call(capsys, "data", "verify", out, "--model", model)[:2] == (0, "4 of 4 records are whole\n")

    page = tmp_path / "p.html"
    code, text, _ = call(capsys, "data", "preview", out, "--model", model, "--out", page, "--count", 2)
    assert (code, text) == (0, f"wrote 2 records to {page}\n")
    assert page.read_text().count('<section class="record">') == 2
    call(capsys, "data", "preview", out, "--model", model, "--out", page, "--ids", "r3")
    assert "<h2>r3</h2>" in page.read_text() and "<h2>r0</h2>" not in page.read_text()


def test_verify_names_each_record_that_is_damaged_or_has_a_second_of_its_name(tmp_path, model, capsys) -> None:
    small = processor(tmp_path / "again")
    entries = [(chat(f"c{min(i, 3)}", "q", "a" * (i + 1)), {"0.png": picture(i)}) for i in range(5)]
    [shard] = write_shards(tmp_path / "data", entries, small)
    content = bytearray(shard.read_bytes())
    place = content.index(b"IDAT") + 6
    content[place] ^= 0xFF
    shard.write_bytes(content)
    code, out, _ = call(capsys, "data", "verify", tmp_path / "data", "--model", model)
    *faults, last = out.splitlines()
    found = {json.loads(line)["id"]: json.loads(line)["reason"] for line in faults}
    assert code == 1 and last == "3 of 5 records are whole"
    assert "0.png has another SHA-256 than the record says" in found["c0"]
    assert "the id 'c3' stands in" in found["c3"]


@pytest.mark.parametrize("command", ["index", "stats", "verify", "preview"])
def test_data_must_be_named(command: str, tmp_path, model, capsys) -> None:
    more = {"preview": ("--out", tmp_path / "page.html")}.get(command, ())
    if command != "stats":
        more = (*more, "--model", model)
    code, out, err = call(capsys, "data", command, *more)
    assert code != 0 and not out and "no data was named" in err


def test_an_index_of_another_model_is_built_anew(tmp_path, model, capsys) -> None:
    from qvl.prompt.budget import ImageBudget

    other = processor(tmp_path / "other", image_budget=ImageBudget(min_tokens=4, max_tokens=4))
    write_shards(tmp_path / "data", [(chat("c", "q", "a"), {"0.png": picture(0)})], other)
    code, _, err = call(capsys, "data", "verify", tmp_path / "data", "--model", model)
    assert code == 2 and "built with another tokenizer, template or visual budget" in err
    assert call(capsys, "data", "index", tmp_path / "data", "--model", model)[0] == 0
    assert call(capsys, "data", "verify", tmp_path / "data", "--model", model)[0] == 0


def test_the_data_commands_are_two_words(capsys) -> None:
    assert cli.spoken("data_import") == "data import" and cli.spoken("say_it") == "say-it"
    code, out, _ = call(capsys, "data")
    assert code == 0 and re.search(r"^  data import +turn JSONL", out, re.MULTILINE) and "doctor" not in out
    code, _, err = call(capsys, "data", "improt", "x")
    assert code == 2 and "there is no command 'data improt'; did you mean 'data import'" in err


def test_the_page_shows_what_is_learned_and_where_the_boxes_are(tmp_path) -> None:
    small = processor(tmp_path)
    record = record_from_dict(
        {
            "id": "cats <b>",
            "kind": "sft",
            "media": {"0.png": {"w": 96, "h": 64}},
            "objects": [{"image": "0.png", "label": "cat", "bbox_abs": [10, 10, 50, 50]}],
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": "0.png"}, {"type": "text", "text": "<|im_end|>?"}],
                },
                {"role": "assistant", "content": "größe"},
            ],
        }
    )
    text = marked_text(draft(record, small), small)
    assert '<span class="pads">[6 visual tokens]</span>' in text
    assert '<span class="learned">größe</span><span class="learned control">&lt;|im_end|&gt;</span>' in text
    # What a person spelled in letters is shown as letters.
    assert '</span>&lt;|im_end|&gt;?<span class="control">&lt;|im_end|&gt;</span>' in text
    entries = [Entry(record=record, media={"0.png": picture(0)}), Entry(record=film("clip"), media={"0.mp4": clip()})]
    page = preview_page(entries, small, InProcess(), title="t")
    assert "<h2>cats &lt;b&gt;</h2>" in page and page.count("<figure") == 2
    assert "0.png: 96x64 seen at 96x64, 6 tokens" in page and "2 slices" in page


def test_a_record_that_cannot_be_shown_says_why_on_the_page(tmp_path) -> None:
    entry = Entry(record=chat("broken", "q", "a"), media={"0.png": b"no picture"})
    page = preview_page([entry], processor(tmp_path), InProcess(), title="t")
    assert "This record cannot be shown: the file is not a whole JPEG" in page
