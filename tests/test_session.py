"""qvl.load: a model that answers in three lines; alone, in company and as it comes, with images and without."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qvl
from media_files import encoded, gradient
from qvl.model.lora import LoraConfig, add_adapter, save_adapter
from qvl.model.weights import load as load_weights
from qvl.prompt.message import user
from qvl.session import Session
from test_tune import README

GREEDY = {"temperature": 0.0, "max_tokens": 6}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "cat.png"
    path.write_bytes(encoded(gradient(64, 96), "PNG"))
    return path


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Session:
    return qvl.load(tiny_folder, dtype="float32", device="cpu")


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, qvl; assert 'torch' not in sys.modules, 'torch'; assert callable(qvl.load); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr


def test_the_readmes_lines_answer(
    tiny_folder: Path, image: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    snippet, *_ = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len([line for line in snippet.splitlines() if line.strip()]) == 3
    monkeypatch.chdir(image.parent)
    exec(snippet.replace('"DIR"', repr(str(tiny_folder))))
    assert capsys.readouterr().out.strip()


def test_an_image_changes_the_answer_and_the_reply_prints_as_its_words(model: Session, image: Path) -> None:
    seen, blind = model.chat("What is this?", images=[image], **GREEDY), model.chat("What is this?", **GREEDY)
    assert seen.tokens != blind.tokens
    assert len(seen.tokens) == len(seen.logprobs) == 6 and seen.finish == "length"
    assert str(seen) == seen.text == seen.message.text and seen.message.role == "assistant"


def test_many_are_answered_as_each_is_alone(model: Session, image: Path) -> None:
    talks = [
        "Name a colour.",
        [{"role": "user", "content": [{"type": "image", "image": str(image)}, {"type": "text", "text": "What?"}]}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
    ]
    together = model.chat_many(talks, **GREEDY)
    alone = [model.chat(talk, **GREEDY) for talk in talks]
    assert [reply.tokens for reply in together] == [reply.tokens for reply in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_what_comes_piece_by_piece_is_the_whole_answer(model: Session, image: Path) -> None:
    pieces = list(model.stream("What is this?", images=[image], **GREEDY))
    assert len(pieces) > 1 and "".join(pieces) == model.chat("What is this?", images=[image], **GREEDY).text


def test_a_stop_text_ends_the_answer_and_is_no_part_of_it(model: Session) -> None:
    whole = model.chat("Name a colour.", **GREEDY).text
    stop = whole[3:5]
    reply = model.chat("Name a colour.", **GREEDY, stop=(stop,))
    assert reply.text == whole[: whole.index(stop)] and reply.finish == "stop"


def test_a_reply_goes_behind_the_conversation_it_answers(model: Session) -> None:
    question = user("Name a colour.")
    reply = model.chat(question, **GREEDY)
    assert model.chat([question, reply.message, user("Another.")], **GREEDY).tokens


def test_an_adapter_is_merged(tiny_folder: Path, tmp_path: Path, model: Session) -> None:
    other = load_weights(tiny_folder)
    add_adapter(other, LoraConfig(r=2, alpha=4))
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora" in name:
                parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(len(name)))
    save_adapter(other, tmp_path)
    tuned = qvl.load(tiny_folder, adapter=tmp_path, dtype="float32", device="cpu")
    assert tuned.chat("Name a colour.", **GREEDY).tokens != model.chat("Name a colour.", **GREEDY).tokens


def test_mistakes_are_one_sentence(model: Session, image: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no sampling setting 'temprature'.*temperature"):
        model.chat("q", temprature=0)
    with pytest.raises(ValueError, match="The conversation is empty"):
        model.chat([])
    with pytest.raises(ValueError, match="images and videos came beside messages"):
        model.chat([{"role": "user", "content": "q"}], images=[image])
    with pytest.raises(ValueError, match="has no chat template; choose"):
        qvl.load(image.parent)
