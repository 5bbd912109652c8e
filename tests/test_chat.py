"""qvl chat: driven through stdin as a pipe would, with a tiny model or a scripted one."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as Pillow

from media_files import encoded, gradient, numbered_frame, pdf, write_video
from qvl.commands import chat, cli
from qvl.core.batch import Sample
from qvl.engine.generate import Event
from qvl.engine.sampling import Draw
from qvl.prompt.message import Thinking
from qvl.prompt.openai import messages_from_dicts
from qvl.session import Session
from qvl.show.draw import PALETTE
from real_tokenizer import real_tokenizer
from tiny_checkpoint import read_tokenizer_once, tiny_checkpoint

Talk = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {style: str(tiny_checkpoint(folder / style, style)) for style in ("instruct", "thinking")}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with media in it."""
    (tmp_path / "a picture.png").write_bytes(encoded(gradient(200, 300), "PNG"))
    (tmp_path / "two.pdf").write_bytes(pdf([(100, 100), (100, 200)]))
    write_video(tmp_path / "clip.mp4", [numbered_frame(i) for i in range(8)], fps="4")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def talk(
    models: dict[str, str], files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Talk:
    read_tokenizer_once(monkeypatch)

    def run(*lines: str, style: str = "instruct", flags: tuple[str, ...] = ()) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        common = ["--model", models[style], "--dtype", "float32", "--device", "cpu", "--max-tokens", "4"]
        status = cli.main(["chat", *common, "--temperature", "0", *flags])
        shown = capsys.readouterr()
        return status, shown.out, shown.err

    return run


class Script:
    """Stands in for the model: says the texts in turn, keeps what it was asked."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    def __call__(self, session: Session, sample: Sample, say: Callable[[str], None]) -> Iterator[Event]:
        tokenizer = real_tokenizer()
        self.asked.append(tokenizer.decode(sample.token_T.tolist()))
        words, stop = answer if isinstance(answer := self.answers.pop(0), tuple) else (answer, None)
        ids = [*tokenizer.encode_control(words), 151645]
        for place, id in enumerate(ids):
            if stop is not None and place == stop:
                raise KeyboardInterrupt
            is_end = place == len(ids) - 1
            text = "" if is_end else tokenizer.decode([id])
            yield Event(request=0, draw=Draw(id, -1.0, ()), text=text, finish="stop" if is_end else None)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Script]:
    def make(*answers: Any) -> Script:
        made = Script(*answers)
        monkeypatch.setattr(Session, "answer", lambda self, sample, say: made(self, sample, say))
        return made

    return make


def test_a_real_model_answers_lines_from_a_pipe_until_they_end(talk: Talk) -> None:
    status, out, err = talk("Hello", "And again")
    assert status == 0 and len([line for line in out.splitlines() if line]) >= 1
    assert err.count("cut off") == 2


def test_files_wait_for_the_next_words_and_go_with_them_in_order(talk: Talk, script: Callable[..., Script]) -> None:
    heard = script("One.", "Two.")
    _, out, _ = talk("/image a picture.png", "/video clip.mp4", "What is this?", "And now?")
    assert "One." in out and "Two." in out
    first, second = heard.asked
    assert first.count("<|image_pad|>") > 10 and first.index("<|image_pad|>") < first.index("<|video_pad|>")
    assert first.index("<|video_pad|>") < first.index("What is this?") and "<0.2 seconds>" in first
    assert second.startswith(first + "One.<|im_end|>") and second.endswith(
        "And now?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert second.count("<|image_pad|>") == first.count("<|image_pad|>"), "a file goes once"
    assert "a picture.png: " in out and "tokens" in out and "slices of two frames" in out


def test_a_medium_is_decoded_once_however_long_the_talk(
    talk: Talk, script: Callable[..., Script], monkeypatch: pytest.MonkeyPatch
) -> None:
    script("a", "b", "c")
    loads = []
    load = chat.MediaLoader.load
    monkeypatch.setattr(chat.MediaLoader, "load", lambda self, part: loads.append(part) or load(self, part))
    talk("/pdf two.pdf", "x", "y", "z")
    assert len(loads) == 1


def test_names_may_be_quoted_or_escaped_as_terminals_paste_them() -> None:
    for written in ("a picture.png", "'a picture.png'", '"a picture.png"', "a\\ picture.png"):
        assert chat.file_name("image", written) == "a picture.png"
    assert chat.file_name("image", "it's.png") == "it's.png"
    with pytest.raises(ValueError, match="write /image FILE"):
        chat.file_name("image", "")


def test_a_line_that_ends_in_a_backslash_goes_on(talk: Talk, script: Callable[..., Script]) -> None:
    heard = script("ok")
    talk("one\\", "two")
    assert "<|im_start|>user\none\ntwo<|im_end|>" in heard.asked[0]


def test_boxes_of_an_answer_are_drawn_on_the_picture_at_its_own_size(
    talk: Talk, script: Callable[..., Script], files: Path
) -> None:
    answer = (
        '```json\n[{"bbox_2d": [250, 250, 750, 750], "label": "cat"}, {"point_2d": [100, 900], "label": "dog"}]\n```'
    )
    script(answer)
    _, out, _ = talk("/image a picture.png", "Where?", "/boxes")
    assert "2 drawn: boxes-001.png" in out and "2 drawn: boxes-002.png" in out
    assert "75, 50, 225, 150" in " ".join(out.split()) and "cat" in out
    drawn = Pillow.open(files / "boxes-001.png")
    # 300 pixels wide is small: drawn at twice that
    assert drawn.size == (600, 400)
    assert drawn.getpixel((150, 200)) == tuple(int(PALETTE[0][i : i + 2], 16) for i in (1, 3, 5))


def test_boxes_on_a_page_of_a_pdf_go_to_the_folder_that_was_named(
    talk: Talk, script: Callable[..., Script], files: Path
) -> None:
    script('[{"bbox_2d": [0, 0, 500, 500]}]')
    _, out, _ = talk("/pdf two.pdf", "Where?", flags=("--pictures", "drawn"))
    assert "1 drawn: drawn/boxes-001.png" in out and (files / "drawn" / "boxes-001.png").is_file()


def test_boxes_without_a_picture_or_no_boxes_are_said(talk: Talk, script: Callable[..., Script]) -> None:
    script('[{"bbox_2d": [0, 0, 500, 500]}]', "none")
    _, out, _ = talk("Where?", "Else?", "/boxes")
    assert "no picture to draw them on" in out and "the last answer has no boxes or points" in out


def test_a_saved_talk_reads_back_with_files_by_name(talk: Talk, script: Callable[..., Script], files: Path) -> None:
    script("Hm.\n</think>\n\nA cat.")
    talk("/image a picture.png", "What?", "/save talk.json", style="thinking", flags=("--system", "Be short."))
    messages = messages_from_dicts(json.loads((files / "talk.json").read_text()))
    assert [message.role for message in messages] == ["system", "user", "assistant"]
    assert messages[1].content[0].source == "a picture.png"  # type: ignore[union-attr]
    assert messages[2].parts[0] == Thinking("Hm.") and messages[2].text == "A cat."
    assert not list(files.glob("*.partial"))


def test_the_thought_is_aside_and_the_answer_is_not(talk: Talk, script: Callable[..., Script]) -> None:
    script("Let me see.\n</think>\n\nA cat.")
    _, out, err = talk("What?", style="thinking")
    assert out.strip() == "A cat." and "Let me see." in err
    script("Let me see.\n</think>\n\nA cat.")
    _, out, err = talk("What?", style="thinking", flags=("--hide-thinking",))
    assert out.strip() == "A cat." and "Let me see." not in err and "(thought: " in err


def test_reset_forgets_all_but_the_system_message(talk: Talk, script: Callable[..., Script]) -> None:
    heard = script("One.", "Two.")
    talk("first", "/image a picture.png", "/reset", "second", flags=("--system", "Be short."))
    assert "first" not in heard.asked[1] and "image_pad" not in heard.asked[1] and "Be short." in heard.asked[1]


def test_ctrl_c_stops_the_answer_and_the_talk_goes_on(talk: Talk, script: Callable[..., Script]) -> None:
    heard = script(("one two three four five", 2), "Two.")
    status, out, _ = talk("count", "go on")
    assert status == 0 and "one two" in out and "three" not in out and "stopped; what was said so far stays" in out
    assert "<|im_start|>assistant\none two<|im_end|>" in heard.asked[1] and "Two." in out


def test_ctrl_c_before_the_first_token_takes_the_question_back(talk: Talk, script: Callable[..., Script]) -> None:
    heard = script(("one", 0), "Two.")
    _, out, _ = talk("/image a picture.png", "slow", "quick")
    assert "stopped" in out and "slow" not in heard.asked[1]
    assert "<|image_pad|>" in heard.asked[1], "the picture still waits"


def test_mistakes_are_answered_in_one_sentence_and_the_talk_goes_on(talk: Talk, script: Callable[..., Script]) -> None:
    script("fine")
    status, out, _ = talk("/image absent.png", "/iamge x", "/save", "/video", "hello")
    assert status == 0 and "absent.png" in out and "there is no command /iamge" in out
    assert "write /save FILE." in out and "write /video FILE." in out and "fine" in out


def test_quit_ends_and_help_lists_every_command(talk: Talk, script: Callable[..., Script]) -> None:
    heard = script()
    status, out, _ = talk("/help", "/quit", "never said")
    assert status == 0 and heard.asked == []
    assert all(command.split()[0] in out for command, _ in chat.HELP)


def test_a_template_without_thoughts_gets_none_back(talk: Talk, script: Callable[..., Script]) -> None:
    heard = script("<think>secret</think>open", "ok")
    talk("a", "b")
    assert "secret" not in heard.asked[1] and "assistant\nopen<|im_end|>" in heard.asked[1]
