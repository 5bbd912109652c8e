"""qvl generate: media in the order given, one JSON object or a stream, mistakes in one sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

from adapters import adapter_parameters
from media_files import encoded, gradient, numbered_frame, pdf, write_video
from qvl.commands import cli
from qvl.commands.generate import Watched
from qvl.model.lora import LoraConfig, add_adapter, save_adapter
from qvl.model.vision import normalise
from qvl.model.weights import load
from qvl.outside.workers import InProcess
from qvl.prompt.message import Image, user
from qvl.prompt.processor import Processor
from tiny_checkpoint import read_tokenizer_once, tiny_checkpoint

Ask = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {style: str(tiny_checkpoint(folder / style, style)) for style in ("instruct", "thinking")}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "wide.png").write_bytes(encoded(gradient(64, 96), "PNG"))
    (folder / "tall.jpg").write_bytes(encoded(gradient(128, 64), "JPEG"))
    (folder / "two.pdf").write_bytes(pdf([(100, 100), (100, 200)]))
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing more")
    write_video(folder / "clip.mp4", [numbered_frame(i) for i in range(20)], fps="10")
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    read_tokenizer_once(monkeypatch)


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str], models: dict[str, str]) -> Ask:
    """Runs `qvl generate` in fp32; returns the exit status, stdout and stderr."""

    def run(*flags: str, style: str = "instruct", tokens: int = 5) -> tuple[int, str, str]:
        common = ["--model", models[style], "--dtype", "float32", "--device", "cpu", "--max-tokens", str(tokens)]
        status = cli.main(["generate", *common, *map(str, flags)])
        shown = capsys.readouterr()
        return status, shown.out, shown.err

    return run


def test_json_has_the_answer_and_all_that_led_to_it(ask: Ask, files: Path) -> None:
    status, out, _ = ask("--image", files / "wide.png", "--prompt", "What?", "--temperature", 0, "--json")
    assert status == 0 and out.count("\n") == 1
    answer = json.loads(out)
    assert len(answer["tokens"]) == len(answer["logprobs"]) == 5 and answer["finish"] == "length"
    assert answer["thinking"] is None and isinstance(answer["text"], str) and answer["text"]
    assert answer["num_input_tokens"] == 18 and all(logprob < 0 for logprob in answer["logprobs"])
    assert answer["sampling"]["temperature"] == 0 and answer["sampling"]["max_tokens"] == 5
    assert answer["dtype"] == "float32" and "top_logprobs" not in answer
    [medium] = answer["media"]
    assert medium["kind"] == "image" and medium["name"] == str(files / "wide.png")
    assert medium["grid_thw"] == [1, 4, 6] and medium["num_tokens"] == 6 and medium["timestamps"] is None
    assert medium["size"] == [96, 64] and medium["source_size"] == [96, 64]


def test_greedy_answers_are_those_of_transformers(ask: Ask, files: Path, models: dict[str, str]) -> None:
    _, out, _ = ask("--image", files / "wide.png", "--prompt", "What?", "--temperature", 0, "--json", tokens=8)
    sample = Processor.from_folder(models["instruct"])([user(Image(str(files / "wide.png")), "What?")]).sample
    reference = Qwen3VLForConditionalGeneration.from_pretrained(models["instruct"], dtype=torch.float32).eval()
    ids = sample.token_T[None]
    with torch.inference_mode():
        whole = reference.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == 151655).long(),
            pixel_values=normalise(sample.patch_PX),
            image_grid_thw=sample.grid_I3,
            do_sample=False,
            max_new_tokens=8,
        )
    assert json.loads(out)["tokens"] == whole[0, ids.shape[1] :].tolist()


def test_media_and_words_keep_the_order_of_the_command_line(ask: Ask, files: Path) -> None:
    flags = ("--prompt", "first", "--image", files / "tall.jpg", "--pdf", files / "two.pdf", "--prompt=second")
    _, out, _ = ask(*flags, "--image", files / "wide.png", "--json")
    media = json.loads(out)["media"]
    assert [Path(medium["name"]).name for medium in media] == [
        "tall.jpg",
        "two.pdf (1 of 2)",
        "two.pdf (2 of 2)",
        "wide.png",
    ]
    status, printed, _ = ask(*flags, "--print-config")
    assert status == 0
    kinds = [line.split("=")[0].strip("- '") for line in printed.splitlines() if line.startswith("-")]
    assert kinds == ["prompt", "image", "pdf", "prompt"]


def test_the_printed_config_asks_the_same_again(ask: Ask, files: Path, tmp_path: Path) -> None:
    flags = ("--image", files / "wide.png", "--prompt", "What: - yes?\nNo", "--temperature", 0, "--json")
    _, first, _ = ask(*flags)
    _, printed, _ = ask(*flags, "--print-config")
    (tmp_path / "ask.yaml").write_text(printed)
    _, second, _ = ask("--config", tmp_path / "ask.yaml")
    assert json.loads(second) == json.loads(first)


def test_the_stream_and_the_whole_answer_have_the_same_words(ask: Ask) -> None:
    flags = ("--prompt", "Say something", "--seed", 7, "--temperature", 1.5)
    _, streamed, err = ask(*flags, tokens=40)
    _, at_once, _ = ask(*flags, "--no-stream", tokens=40)
    _, out, _ = ask(*flags, "--json", tokens=40)
    from_json = json.loads(out)
    expected = "".join(c if c in "\n\t" or c.isprintable() or ord(c) > 159 else "\ufffd" for c in from_json["text"])
    assert streamed == at_once
    assert streamed.rstrip("\n") == expected.replace("\r", "").rstrip("\n")
    assert ("cut off" in err) == (from_json["finish"] == "length")


def test_a_thought_goes_to_stderr_and_can_be_folded(ask: Ask) -> None:
    status, out, err = ask("--prompt", "Hm?", "--temperature", 0, style="thinking")
    _, answer, _ = ask("--prompt", "Hm?", "--temperature", 0, "--json", style="thinking")
    thinking = json.loads(answer)["thinking"]
    assert status == 0 and out == "\n" and json.loads(answer)["text"] == ""
    assert thinking and thinking.split()[0] in err
    _, out, err = ask("--prompt", "Hm?", "--temperature", 0, "--hide-thinking", style="thinking")
    assert out == "\n" and "(thought: 5 tokens)" in err and thinking.split()[0] not in err


def test_the_same_seed_draws_the_same_answer(ask: Ask) -> None:
    def draw(seed: int) -> list[int]:
        return json.loads(ask("--prompt", "x", "--temperature", 1.5, "--top-k", 0, "--seed", seed, "--json")[1])[
            "tokens"
        ]

    assert draw(1) == draw(1) != draw(2)


def test_sampling_comes_from_the_preset_and_single_values_win(ask: Ask) -> None:
    def applied(*flags: str) -> dict[str, float]:
        return json.loads(ask("--prompt", "x", "--json", *flags)[1])["sampling"]

    assert (applied()["temperature"], applied()["top_p"], applied()["top_k"]) == (0.7, 0.8, 20)
    report = applied("--sampling", "report", "--top-k", "7")
    assert (report["temperature"], report["top_k"], report["presence_penalty"]) == (1.0, 7, 2.0)
    official = applied("--sampling", "official", "--min-p", "0.1", "--repetition-penalty", "1.1")
    assert (official["seed"], official["min_p"], official["repetition_penalty"]) == (3407, 0.1, 1.1)


def test_an_answer_ends_before_a_stop_text(ask: Ask) -> None:
    whole = json.loads(ask("--prompt", "x", "--temperature", 0, "--json", "--stop", "\x00")[1])
    word = whole["text"][1:4]
    cut = json.loads(ask("--prompt", "x", "--temperature", 0, "--json", "--stop", word)[1])
    assert cut["finish"] == "stop" and cut["text"] == whole["text"][: whole["text"].index(word)]


def test_alternatives_come_with_each_token(ask: Ask) -> None:
    answer = json.loads(ask("--prompt", "x", "--temperature", 0, "--json", "--logprobs", 3)[1])
    for token, logprob, top in zip(answer["tokens"], answer["logprobs"], answer["top_logprobs"], strict=True):
        assert len(top) == 3 and top[0] == [token, logprob] and top[0][1] >= top[1][1] >= top[2][1]


def test_a_video_says_when_its_slices_are(ask: Ask, files: Path) -> None:
    [medium] = json.loads(ask("--video", files / "clip.mp4", "--prompt", "?", "--json", "--num-frames", 4)[1])["media"]
    assert medium["frame_indices"] == [0, 6, 13, 19] and medium["fps"] == 10
    assert medium["timestamps"] == pytest.approx([0.3, 1.6]) and medium["grid_thw"][0] == 2
    by_rate = json.loads(ask("--video", files / "clip.mp4", "--prompt", "?", "--json", "--fps", 5)[1])["media"][0]
    assert len(by_rate["frame_indices"]) == 10


def test_the_video_preset_decides_the_size_of_frames(ask: Ask, files: Path) -> None:
    def size(*flags: str) -> list[int]:
        return json.loads(ask("--video", files / "clip.mp4", "--prompt", "?", "--json", *flags)[1])["media"][0]["size"]

    assert size() == [96, 64]
    # at least 128 tokens a frame, where the default rule leaves small frames small
    width, height = size("--video-preset", "qwen-vl-utils")
    assert width * height >= 128 * 1024


def test_budgets_of_the_command_line_bound_pictures_and_pages(ask: Ask, files: Path) -> None:
    flags = ("--image", files / "wide.png", "--pdf", files / "two.pdf", "--pages", "2", "--prompt", "?", "--json")
    few = json.loads(ask(*flags, "--image-max-tokens", 4)[1])["media"]
    assert [medium["num_tokens"] <= 4 for medium in few] == [True, True] and len(few) == 2
    many = json.loads(ask(*flags, "--image-min-tokens", 40)[1])["media"]
    assert 40 <= many[0]["num_tokens"] <= 64


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--image", "absent.png", "--prompt", "x"], "absent.png"),
        (["--image", "{files}/broken.png", "--prompt", "x"], "{files}/broken.png: the file is not a whole JPEG"),
        (["--video", "{files}/two.pdf", "--prompt", "x"], "{files}/two.pdf: "),
        (["--pdf", "{files}/wide.png", "--prompt", "x"], "{files}/wide.png: "),
        (["--pdf", "{files}/two.pdf", "--pages", "3", "--prompt", "x"], "pages 1-2"),
        (["--image", "http://127.0.0.1/x.png", "--prompt", "x"], "http://127.0.0.1/x.png: "),
        (["--prompt", "x", "--temperature", "-1"], "temperature is -1.0; it must be 0 or above"),
        (["--image-min-tokens", "9", "--image-max-tokens", "4", "--image", "a", "--prompt", "x"], "above max_tokens"),
        (["--fps", "2", "--num-frames", "4", "--video", "a", "--prompt", "x"], "both fps and num_frames"),
        (["--device", "toaster", "--prompt", "x"], "device is 'toaster'"),
        ([], "nothing is asked; give --prompt TEXT"),
        (["--ask", "sound=a.mp3"], "sound=a.mp3; each entry begins with image="),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_status_2(ask: Ask, files: Path, flags: list[str], sentence: str) -> None:
    status, out, err = ask(*(flag.replace("{files}", str(files)) for flag in flags), "--json")
    assert status == 2 and out == "" and err.startswith("qvl: ") and err.count("\n") == 1
    assert sentence.replace("{files}", str(files)) in err


def test_a_wrong_file_is_noticed_before_the_weights_are_read(ask: Ask, models: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(models["instruct"], tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    assert "absent.png" in ask("--model", tmp_path / "model", "--image", "absent.png", "--prompt", "x")[2]
    assert "absent.png" not in ask("--model", tmp_path / "model", "--prompt", "x")[2]


def test_a_folder_without_the_size_of_pictures_takes_words_only(
    ask: Ask, models: dict[str, str], files: Path, tmp_path: Path
) -> None:
    shutil.copytree(models["instruct"], tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").unlink()
    status, _, err = ask("--model", tmp_path / "model", "--image", files / "wide.png", "--prompt", "x")
    assert status == 2 and "has no preprocessor_config.json" in err
    assert ask("--model", tmp_path / "model", "--prompt", "x")[0] == 0


def test_control_tokens_spelled_in_a_prompt_are_letters(ask: Ask) -> None:
    count = [json.loads(ask("--prompt", words, "--json")[1])["num_input_tokens"] for words in ("", "<|image_pad|>")]
    assert count[1] > count[0] + 1


def test_help_says_what_auto_means(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["generate", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "bfloat16 where the hardware multiplies it, else float32" in text and "keep their order" in text


def test_decoding_says_how_far_it_is(files: Path) -> None:
    said: list[str] = []
    with (files / "clip.mp4").open("rb") as stream:
        messages = list(Watched(InProcess(), said.append).run("video_frames", stream, wanted=[0, 5, 10], keys=None))
    assert said[-1] == "decoding frame 3 of 3" and said[0] == "decoding frame 1 of 3" and len(messages) >= 3
    assert all(np.asarray(buffer).size for header, buffer in messages if "height" in header)


def test_an_adapter_changes_the_answer_and_one_that_does_nothing_does_not(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def tokens(*extra: str) -> list[int]:
        flags = [
            "--model",
            models["instruct"],
            "--prompt",
            "hello",
            "--max-tokens",
            "4",
            "--temperature",
            "0",
            "--json",
        ]
        assert cli.main(["generate", *flags, *extra]) == 0
        return json.loads(capsys.readouterr().out)["tokens"]

    model = load(models["instruct"])
    add_adapter(model, LoraConfig(r=4))
    save_adapter(model, tmp_path / "idle")
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            if name.endswith("lora_up"):
                parameter.normal_(0, 1.0)
    save_adapter(model, tmp_path / "loud")
    assert tokens("--adapter", str(tmp_path / "idle")) == tokens()
    assert tokens("--adapter", str(tmp_path / "loud")) != tokens()


def test_a_question_without_its_flag_is_answered_with_the_flag(
    models: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", "--model", models["instruct"], "what is this?"]) == 2
    assert (
        capsys.readouterr().err.strip()
        == "qvl: 'what is this?' stands without a flag; ask with --prompt 'what is this?'."
    )
    assert cli.main(["generate", "--model", models["instruct"], "--promt", "what is this?"]) == 2
    assert capsys.readouterr().err.strip() == "qvl: there is no flag --promt; did you mean '--prompt'?"


def test_a_video_or_pdf_given_as_a_picture_is_called_what_it_is(
    models: dict[str, str], files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file, name in (("clip.mp4", "a video"), ("two.pdf", "a PDF")):
        assert cli.main(["generate", "--model", models["instruct"], "--image", str(files / file), "--prompt", "?"]) == 2
        assert f"the file is {name}, no picture" in capsys.readouterr().err
