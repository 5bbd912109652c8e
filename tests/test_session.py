"""qvl.load: a model that answers in three lines; alone, in company and as it comes, with images and without."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import qvl
from media_files import encoded, gradient
from qvl.engine.prepare import prepare
from qvl.model.lora import LoraConfig, add_adapter, save_adapter
from qvl.model.weights import load as load_weights
from qvl.prompt.message import Image, user
from qvl.prompt.processor import Processor
from qvl.session import Session
from test_tune import README
from tiny_checkpoint import tiny_checkpoint

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


def test_n_answers_share_one_reading_of_the_image(model: Session, image: Path) -> None:
    encoded: list[int] = []
    hook = model.model.visual.register_forward_pre_hook(lambda module, inputs: encoded.append(len(inputs[0])))
    block = model.model.visual.blocks[0].register_forward_pre_hook(lambda module, inputs: encoded.append(1))
    talk = model.processor([user(Image(image), "What is this?")]).sample
    sampling = replace(model.sampling, temperature=1.0, max_tokens=5, seed=40)
    fresh = replace(model, reuse=False)
    made = fresh.generate([talk], sampling, n=3)
    passes = len(encoded)
    for i in range(3):
        (alone,) = fresh.generate([talk], replace(sampling, seed=40 + i))
        assert alone.tokens == made[i].tokens
    assert passes > 0 and len(encoded) == 4 * passes, "three answers looked once, and each alone once more"
    hook.remove()
    block.remove()
    assert len({answer.tokens for answer in made}) > 1


def test_a_conversation_that_goes_on_is_not_read_again(model: Session, image: Path) -> None:
    long = "Look well at it, take your time, and then tell me in a few words of your own what there is to be seen. " * 3
    talk = [user(Image(image), long)]
    first = model.chat(talk, **GREEDY)
    before = model.engine.engine.stats()  # type: ignore[union-attr]
    more = [*talk, first.message, user("And now?")]
    reply = model.chat(more, **GREEDY)
    after = model.engine.engine.stats()  # type: ignore[union-attr]
    assert after.prefix_tokens_found - before.prefix_tokens_found >= 64
    alone = replace(model, reuse=False).chat(more, **GREEDY)
    assert reply.tokens == alone.tokens and reply.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


@pytest.mark.parametrize("dtype, weights", [("float32", "plain"), ("bfloat16", "plain"), ("bfloat16", "int8")])
def test_after_an_update_nothing_of_the_old_weights_is_left(
    tiny_folder: Path, image: Path, dtype: Any, weights: Any
) -> None:
    """The prompt was read before; its prefix and its image lie in the caches, and packed or rounded weights beside the plain ones."""
    model = qvl.load(tiny_folder, dtype=dtype, device="cpu", weights=weights)
    trained = load_weights(tiny_folder, dtype=model.model.dtype)
    talk = [user(Image(image), "What is to be seen here? " * 20)]
    old = model.chat(talk, **GREEDY)
    with torch.no_grad():
        for number, parameter in enumerate(trained.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.02)
    model.sync_weights(trained)
    new = model.chat(talk, **GREEDY)
    prepare(trained, weights=weights)
    fresh = replace(model, model=trained).chat(talk, **GREEDY)
    assert (new.tokens, new.logprobs) == (fresh.tokens, fresh.logprobs)
    assert new.logprobs != old.logprobs


def test_a_model_that_was_trained_in_place_is_read_anew(tiny_folder: Path) -> None:
    trained = load_weights(tiny_folder)
    processor = Processor.from_folder(tiny_folder)
    session = replace(Session.greedy(trained, processor, max_tokens=4), reuse=True)
    talk = processor([user("What is to be seen here? " * 20)]).sample
    session.generate([talk])
    with torch.no_grad():
        trained.language_model.embed_tokens.weight.mul_(1.5)
    (stale,) = session.generate([talk])
    session.reset_caches()
    (new,) = session.generate([talk])
    (fresh,) = replace(session).generate([talk])
    assert new.logprobs == fresh.logprobs != stale.logprobs, "the caches hold what the old weights computed"


def test_weights_of_another_model_are_refused_whole(model: Session, tiny_folder: Path) -> None:
    other = load_weights(tiny_folder)
    add_adapter(other, LoraConfig(r=2, alpha=4))
    with pytest.raises(ValueError, match="expected the same model, with an adapter merged first"):
        model.sync_weights(other)
    other = load_weights(tiny_folder)
    other.language_model.norm.weight = torch.nn.Parameter(torch.ones(3))
    with torch.no_grad():
        other.language_model.embed_tokens.weight.zero_()
    with pytest.raises(ValueError, match=r"norm\.weight came with shape \(3,\)"):
        model.sync_weights(other)
    assert bool(model.model.language_model.embed_tokens.weight.any())


def test_weights_do_not_change_under_an_answer(model: Session, tiny_folder: Path) -> None:
    stream = model.stream("Name a colour.", **GREEDY)
    next(stream)
    with pytest.raises(ValueError, match="1 requests are under way"):
        model.sync_weights(load_weights(tiny_folder))
    stream.close()
    model.sync_weights(load_weights(tiny_folder))


def test_two_streams_are_read_in_turns_and_one_is_left(model: Session) -> None:
    whole = [model.chat(words, **GREEDY).text for words in ("Name a colour.", "Why?")]
    one, other = model.stream("Name a colour.", **GREEDY), model.stream("Why?", **GREEDY)
    pieces = ["", ""]
    for _ in range(6):
        pieces[0] += next(one, "")
        pieces[1] += next(other, "")
    assert pieces == whole
    left = model.stream("Why?", **GREEDY)
    next(left)
    left.close()
    engine = model.engine.engine
    assert engine is not None and model.chat("Why?", **GREEDY).text == whole[1]
    assert engine.stats().running == 0 and engine.stats().blocks_free == engine.stats().blocks_total


def test_after_ctrl_c_in_a_step_the_next_answer_is_whole(model: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = model.chat("Name a colour.", **GREEDY).tokens
    stream = model.stream("Name a colour.", **GREEDY)
    next(stream)
    monkeypatch.setattr(model.engine.engine.runner, "run", _interrupted)  # type: ignore[union-attr]
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    monkeypatch.undo()
    assert model.chat("Name a colour.", **GREEDY).tokens == whole


def _interrupted(*arguments: Any) -> None:
    raise KeyboardInterrupt


def test_memory_bounds_the_cache_and_answers_wait_for_room(tiny_folder: Path) -> None:
    small = qvl.load(tiny_folder, dtype="float32", device="cpu", memory=0.0005)
    talks = ["Name a colour."] * 40
    assert len({reply.tokens for reply in small.chat_many(talks, **GREEDY)}) == 1
    assert small.engine.engine.describe().gib <= 0.0005  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="all of the cache holds"):
        small.chat("word " * 5000, **GREEDY)
    with pytest.raises(ValueError, match="less than one block"):
        replace(small, memory=1e-9).chat("q", **GREEDY)


def test_a_thought_closed_by_force_is_marked(tmp_path: Path) -> None:
    model = qvl.load(tiny_checkpoint(tmp_path / "thinking", "thinking"), dtype="float32", device="cpu")
    (reply,) = model.chat_many(["Why?"], thinking_budget=3, temperature=0.0, max_tokens=8)
    close = model.processor.tokenizer.control_id("</think>")
    at = reply.tokens.index(close)
    assert at == 3 and reply.is_forced == tuple(i == at for i in range(len(reply.tokens)))
    assert not any(model.chat("Why?", **GREEDY).is_forced)


def test_mistakes_are_one_sentence(model: Session, image: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no sampling setting 'temprature'.*temperature"):
        model.chat("q", temprature=0)
    with pytest.raises(ValueError, match="The conversation is empty"):
        model.chat([])
    with pytest.raises(ValueError, match="images and videos came beside messages"):
        model.chat([{"role": "user", "content": "q"}], images=[image])
    with pytest.raises(ValueError, match="has no chat template; choose"):
        qvl.load(image.parent)
