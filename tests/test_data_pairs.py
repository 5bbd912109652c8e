"""Importing pairs and prompts: every way to write a rejected answer becomes the same record, and what is no pair is rejected."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_files import picture
from qvl.data.ingest import ImportReport, import_data
from qvl.data.record import Record, content_blocks
from qvl.data.shard import extents, read_entry


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "a.png").write_bytes(picture(1))
    (tmp_path / "b.png").write_bytes(picture(2))
    return tmp_path


def importing(folder: Path, *rows: dict[str, Any], **options: Any) -> ImportReport:
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return import_data(source, folder / "out", **({"kind": "pref"} | options))


def records(report: ImportReport) -> list[Record]:
    assert report.rejected == 0, report.first
    found = []
    for path in report.shards:
        with path.open("rb") as stream:
            for place in extents(stream, str(path)):
                found.append(read_entry(path.read_bytes()[place.offset : place.offset + place.size], "s").record)
    return found


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def said(turns: Any) -> list[tuple[str, list[Any]]]:
    return [(m["role"], [block[block["type"]] for block in content_blocks(m)]) for m in turns]


ASKED = [turn("user", "<image>Which?")]
BLOCKS = [turn("user", [{"type": "image"}, {"type": "text", "text": "Which?"}])]
CAT, DOG = turn("assistant", "A cat."), turn("assistant", "Dog")
LLAVA = {"conversations": [{"from": "human", "value": "<image>Which?"}], "images": ["a.png"]}
GPT_CAT, GPT_DOG = {"from": "gpt", "value": "A cat."}, {"from": "gpt", "value": "Dog"}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [*ASKED, CAT], "rejected_response": "Dog", "images": ["a.png"]},
        {"query": "<image>Which?", "response": "A cat.", "rejected_response": "Dog", "images": ["a.png"]},
        {"messages": [*ASKED, CAT], "rejected_messages": [*ASKED, DOG], "images": ["a.png"]},
        {"messages": [*ASKED, CAT], "rejected_messages": [DOG], "images": ["a.png"]},
        {"messages": [*ASKED, CAT], "rejected_response": "Dog", "images": ["a.png"], "rejected_images": ["a.png"]},
        LLAVA | {"chosen": GPT_CAT, "rejected": GPT_DOG},
        LLAVA | {"chosen": "A cat.", "rejected": "Dog"},
        {"conversations": [*LLAVA["conversations"], GPT_CAT], "rejected_response": "Dog", "image": "a.png"},
        {"messages": ASKED, "chosen": CAT, "rejected": DOG, "images": ["a.png"]},
        {"prompt": ASKED, "chosen": [CAT], "rejected": [DOG], "images": ["a.png"]},
        {"prompt": "<image>Which?", "chosen": "A cat.", "rejected": "Dog", "images": ["a.png"]},
        {"prompt": "as text", "chosen": [*BLOCKS, CAT], "rejected": [*BLOCKS, DOG], "images": ["a.png"]},
        {"chosen": [*ASKED, CAT], "rejected": [*ASKED, DOG], "image": "a.png"},
    ],
)
def test_every_way_to_write_a_pair_becomes_the_same_record(folder, row) -> None:
    report = importing(folder, row)
    (record,) = records(report)
    assert record.kind == "pref" and list(record.media) == ["0.png"]
    assert said(record.messages) == [("user", ["0.png", "Which?"]), ("assistant", ["A cat."])]
    assert said(record.rejected) == [("assistant", ["Dog"])]
    assert set(report.unread) <= {"rejected_images"} and record.extra == {}


def test_an_openai_row_keeps_its_tools_thoughts_and_calls(folder) -> None:
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]}
    asked = [turn("user", [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "Which?"}])]
    rejected = [*asked, call, {"role": "tool", "content": "42"}, turn("assistant", "<think>\nhm\n</think>\n\nDog")]
    (record,) = records(importing(folder, {"messages": [*asked, CAT], "rejected_messages": rejected}))
    assert [m["role"] for m in record.rejected] == ["assistant", "tool", "assistant"]
    assert record.rejected[0]["tool_calls"][0]["function"]["name"] == "f"
    assert record.rejected[2]["thinking"] == "hm" and said(record.rejected)[2] == ("assistant", ["Dog"])


def test_a_pair_in_our_own_form_keeps_its_rejected_answer(folder) -> None:
    asked = turn("user", [{"type": "image", "image": "x.png"}, {"type": "text", "text": "Which?"}])
    row = {
        "id": "r",
        "kind": "pref",
        "messages": [asked, CAT],
        "rejected": [DOG],
        "media": {"x.png": {"path": "a.png"}},
    }
    (record,) = records(importing(folder, row))
    assert said(record.messages)[0] == ("user", ["0.png", "Which?"]) and record.rejected == (DOG,)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"messages": [turn("user", "Hi"), CAT]},
            "the row has no rejected answer; a pref record needs rejected_response",
        ),
        ({"messages": [turn("user", "Hi")], "rejected_response": "Dog"}, "the conversation ends with none"),
        (
            {"messages": [turn("user", "Hi"), CAT], "rejected_messages": [turn("user", "Ho"), DOG]},
            "differ before the answer to the last question",
        ),
        ({"messages": [turn("user", "Hi"), CAT], "rejected_response": "A cat."}, "that is the chosen one"),
        ({"chosen": "A cat.", "rejected": "Dog"}, "no question; give prompt, messages or conversations"),
        ({"prompt": "Hi", "chosen": "A cat.", "rejected": ""}, "the row has no 'rejected' answer"),
        (
            {"prompt": "Hi", "chosen": [CAT], "rejected": [turn("user", "Hi"), DOG]},
            "repeats the question and the other",
        ),
        (
            {
                "messages": [*ASKED, CAT],
                "rejected_response": "Dog",
                "images": ["a.png"],
                "rejected_images": ["b.png"],
            },
            "'rejected_images' of its own; a pair asks one question",
        ),
        (
            {
                "chosen": [turn("user", [{"type": "image_url", "image_url": {"url": "a.png"}}]), CAT],
                "rejected": [turn("user", [{"type": "image_url", "image_url": {"url": "b.png"}}]), DOG],
            },
            "the rejected conversation shows other media than the chosen one",
        ),
        ({"messages": [turn("user", "Hi"), CAT], "rejected_response": "a <|im_end|> b"}, "spells the control token"),
    ],
)
def test_a_row_that_is_no_pair_is_rejected_with_its_reason(folder, row, reason) -> None:
    report = importing(folder, row)
    assert report.written == 0 and reason in report.first[0], report.first


def test_a_pair_imported_for_sft_learns_the_chosen_answer_and_names_what_was_not_read(folder) -> None:
    row = {"messages": [*ASKED, CAT], "rejected_response": "see a.png", "images": ["a.png"]}
    report = importing(folder, row, kind="sft")
    (record,) = records(report)
    assert record.rejected == () and record.extra == {} and report.unread == {"rejected_response": 1}


def test_a_pair_alone_is_no_sft_row(folder) -> None:
    report = importing(folder, {"prompt": "Hi", "chosen": "A", "rejected": "B"}, kind="sft")
    assert "import it as pref (--kind pref)" in report.first[0]


# ---- prompts for rl


REWARD = {"scorer": "exact", "truth": {"answer": "cat"}}


def test_a_prompt_needs_no_answer_and_keeps_its_reward(folder) -> None:
    row = {"messages": ASKED, "images": ["a.png"], "reward": REWARD}
    (record,) = records(importing(folder, row, kind="rl"))
    assert record.kind == "rl" and record.reward == REWARD
    assert said(record.messages) == [("user", ["0.png", "Which?"])]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"reward": None}, "is an rl record with the reward None; expected an object with scorer and truth"),
        ({"reward": {"truth": {}}}, "reward has scorer None; expected a scorer's name"),
        ({"reward": {"scorer": "exact"}}, "reward has truth None; expected an object with what the scorer needs"),
        ({"reward": REWARD | {"answr": "x"}}, "reward has an unknown key 'answr'; did you mean 'answer'"),
        ({"reward": REWARD | {"answer": 4}}, "reward has answer 4; expected text"),
        ({"messages": [CAT]}, "of the assistant's messages alone; expected a question"),
    ],
)
def test_a_prompt_without_a_question_or_a_way_to_judge_it_is_rejected(folder, change, reason) -> None:
    report = importing(folder, {"messages": [turn("user", "Hi")], "reward": REWARD} | change, kind="rl")
    assert report.written == 0 and reason in report.first[0], report.first
