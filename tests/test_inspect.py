"""qvl inspect: the numbers the network gets, and attention weights equal to an eager model's."""

import hashlib
import json
import re
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image as Pillow
from transformers import Qwen3VLForConditionalGeneration

from media_files import encoded, gradient, numbered_frame, pdf, write_video
from qvl.commands import cli, inspect
from qvl.model.attention import Packed, reference
from qvl.model.look import Looking, layers_named, look, weights_of
from qvl.model.pack import pack
from qvl.model.vision import normalise
from qvl.model.weights import load
from qvl.prompt.message import Image, user
from qvl.prompt.processor import Processor
from qvl.show.inspection import Token
from tiny_checkpoint import read_tokenizer_once, tiny_checkpoint

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_checkpoint(tmp_path_factory.mktemp("models") / "instruct"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "wide.png").write_bytes(encoded(gradient(64, 96), "PNG"))
    (folder / "two.pdf").write_bytes(pdf([(100, 100), (100, 200)]))
    write_video(folder / "clip.mp4", [numbered_frame(i) for i in range(20)], fps="10")
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    read_tokenizer_once(monkeypatch)

    def call(*flags: object) -> tuple[int, str, str]:
        status = cli.main(["inspect", *map(str, flags)])
        shown = capsys.readouterr()
        return status, shown.out, shown.err

    return call


# ---- numbers


def test_a_conversation_is_shown_as_the_numbers_the_network_gets(run: Run, model: str, files: Path) -> None:
    status, out, _ = run("--model", model, "--image", files / "wide.png", "--prompt", "hi", "--json")
    found = json.loads(out)
    assert (
        status == 0
        and found["grid_thw"] == [[1, 4, 6]]
        and found["num_tokens"] == [6]
        and found["timestamps"] == [None]
    )
    pads = [151655] * 6
    expected = [151644, 872, 198, 151652, *pads, 151653, 6023, 151645, 198, 151644, 77091, 198]
    assert found["input_ids"] == expected and found["num_input_tokens"] == 17
    assert found["prompt"].startswith("<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>hi<|im_end|>")
    # the picture stands at 4: two rows, three columns; the words go on at 4 + 3
    assert [axis[4:11] for axis in found["position_ids"]] == [
        [4, 4, 4, 4, 4, 4, 7],
        [4, 4, 4, 5, 5, 5, 7],
        [4, 5, 6, 4, 5, 6, 7],
    ]


def test_media_alone_need_no_model_and_meet_the_published_budgets(run: Run, files: Path) -> None:
    _, out, _ = run("--image", files / "wide.png", "--pdf", files / "two.pdf", "--video", files / "clip.mp4", "--json")
    found = json.loads(out)
    # 64 tokens at least: 96 x 64 pixels grow
    assert [medium["kind"] for medium in found["media"]] == ["image", "pdf", "pdf", "video"]
    assert found["num_tokens"][0] >= 64 and found["grid_thw"][0][0] == 1
    assert found["grid_thw"][3] == [2, 4, 6] and found["timestamps"][3] == pytest.approx([0.3, 1.6])
    assert found["input_ids"] is None
    status, words, _ = run("--video", files / "clip.mp4")
    assert status == 0 and "2x4x6" in words and "seconds of" in words and ": 0.3 1.6" in words


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--image", "{files}/wide.png", "--prompt", "x"], "words need a tokenizer; give --model DIR"),
        ([], "nothing to inspect"),
        (["--model", "{model}", "--prompt", "x", "--answer", "y"], "give --image, --video or --pdf too"),
        (["--model", "{model}", "--image", "{files}/wide.png", "--answer", "y", "--generate", "2"], "not both"),
        (["--model", "{model}", "--image", "{files}/wide.png", "--answer", ""], "the answer is empty"),
        (
            ["--model", "{model}", "--image", "{files}/wide.png", "--answer", "y", "--layers", "9"],
            "layers is '9'; write all, or numbers from 0 to 3",
        ),
        (["--image", "absent.png"], "absent.png"),
        (["--image", "{files}/wide.png", "--out", "{files}/absent/page.html"], "absent/page.html"),
    ],
)
def test_a_mistake_is_one_sentence(run: Run, model: str, files: Path, flags: list[str], sentence: str) -> None:
    status, out, err = run(*(flag.replace("{files}", str(files)).replace("{model}", model) for flag in flags))
    assert status == 2 and out == "" and sentence in err and err.count("\n") == 1


def test_tokens_of_one_character_stay_together_and_placeholders_are_counted(model: str) -> None:
    processor = Processor.from_folder(model)
    sample = processor([user(Image(torch.zeros(3, 64, 96, dtype=torch.uint8)), "\U0001f9ec!")]).sample
    config = load(model).config
    tokens = inspect.tokens_of(sample.token_T.tolist(), 0, processor.tokenizer, config)
    assert Token(text="<|image_pad|>", kind="visual", count=6) in tokens
    assert "\U0001f9ec" in [token.text for token in tokens] and "\ufffd" not in "".join(token.text for token in tokens)
    assert sum(token.count for token in tokens if token.kind == "visual") == 6
    assert next(token.text for token in tokens if token.kind == "control") == "<|im_start|>"


def test_frames_of_a_long_video_are_shown_evenly() -> None:
    assert inspect.spread(5, 24) == [0, 1, 2, 3, 4]
    chosen = inspect.spread(400, 24)
    assert len(chosen) == len(set(chosen)) == 24 and chosen[0] == 0 and chosen[-1] == 399


# ---- attention


def test_weights_are_those_of_an_eager_transformers_model(model: str) -> None:
    processor = Processor.from_folder(model)
    sample = processor([user(Image(torch.from_numpy(gradient(64, 96)).permute(2, 0, 1).contiguous()), "Where?")]).sample
    ours = load(model)
    queries = [5, sample.num_tokens - 2, sample.num_tokens - 1]
    weights = look(ours, pack([sample], ours.config), queries, [0, 2, 3])
    eager = Qwen3VLForConditionalGeneration.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    ids = sample.token_T[None]
    with torch.inference_mode():
        seen = eager(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == 151655).long(),
            pixel_values=normalise(sample.patch_PX),
            image_grid_thw=sample.grid_I3,
            output_attentions=True,
        ).attentions
    theirs = torch.stack([seen[layer][0].mean(dim=0)[queries] for layer in (0, 2, 3)])
    assert weights.shape == (3, 3, sample.num_tokens)
    torch.testing.assert_close(weights, theirs, atol=1e-5, rtol=1e-4)
    assert (weights[:, 0, 6:] == 0).all(), "nobody sees what comes later"


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 1)])
def test_blocks_of_queries_change_nothing(heads: tuple[int, int]) -> None:
    draw = torch.Generator().manual_seed(0)
    q_TNH = torch.randn(50, heads[0], 50, generator=draw)
    k_TKH = torch.randn(50, heads[1], 50, generator=draw)
    queries = (49, 0, 7, 7, 30)
    at_once = weights_of(q_TNH, k_TKH, queries)
    in_blocks = weights_of(q_TNH, k_TKH, queries, max_numbers=1)
    assert torch.equal(at_once, in_blocks) and torch.allclose(at_once.sum(dim=1), torch.ones(5))
    # values that say which token they belong to turn the reference's output into its weights
    v_TKH = torch.eye(50)[:, None].expand(50, heads[1], 50)
    expected = reference(q_TNH, k_TKH, v_TKH, Packed((50,), is_causal=True)).mean(dim=1)[list(queries)]
    torch.testing.assert_close(at_once, expected)


def test_looking_does_not_change_what_is_computed() -> None:
    draw = torch.Generator().manual_seed(0)
    q_TNH, k_TKH, v_TKH = (torch.randn(20, 4, 16, generator=draw) for _ in range(3))
    inner = Packed((20,), is_causal=True)
    looking = Looking(inner, (3,), frozenset({1}))
    for layer in (0, 1):
        out_TNH = looking.attend(q_TNH, k_TKH, v_TKH, layer=layer)
        assert torch.equal(out_TNH, inner.attend(q_TNH, k_TKH, v_TKH, layer=layer))
    assert list(looking.seen) == [1]


def test_layers_are_named_by_numbers_and_ranges() -> None:
    assert layers_named(None, 36) == tuple(range(9, 27)) and layers_named(None, 1) == (0,)
    assert layers_named("all", 3) == (0, 1, 2) and layers_named("8,12-14,8", 36) == (8, 12, 13, 14)
    for wrong in ("36", "3-1", "-1", "a", "", "1-", "1-40"):
        with pytest.raises(ValueError, match="numbers from 0 to 35"):
            layers_named(wrong, 36)


def test_tokens_and_layers_that_are_not_there_are_refused(model: str) -> None:
    ours = load(model)
    batch = pack([Processor.from_folder(model)([user("hi")]).sample], ours.config)
    with pytest.raises(ValueError, match="layer 4 was asked for; the model has layers 0 to 3"):
        look(ours, batch, [0], [4])
    with pytest.raises(ValueError, match="token 99 was asked for"):
        look(ours, batch, [99], [0])
    with pytest.raises(ValueError, match="at least one token"):
        look(ours, batch, [], [0])


def test_an_answers_attention_falls_on_each_medium_in_part(run: Run, model: str, files: Path) -> None:
    flags = ("--model", model, "--dtype", "float32", "--image", files / "wide.png", "--video", files / "clip.mp4")
    _, out, _ = run(*flags, "--prompt", "Where?", "--answer", "on the left", "--layers", "1-2", "--json")
    answer = json.loads(out)["answer"]
    assert answer["text"] == "on the left" and answer["layers"] == [1, 2]
    assert len(answer["attention_on_media"]) == len(answer["tokens"]) == 3
    assert all(len(row) == 2 and 0 < sum(row) < 1 for row in answer["attention_on_media"])
    _, generated, _ = run(*flags, "--prompt", "Where?", "--generate", 2, "--device", "cpu", "--json")
    assert len(json.loads(generated)["answer"]["tokens"]) == 2


def test_a_tokens_attention_is_that_of_the_step_that_chose_it(model: str, files: Path) -> None:
    args = inspect.Inspect(
        model=model, dtype="float32", answer="on the left", ask=(f"image={files / 'wide.png'}", "prompt=Where?")
    )
    seen = inspect.see(args, Processor.from_folder(model), lambda words: None)
    assert seen.sample is not None and seen.weights is not None
    first = seen.sample.num_tokens - 3
    assert [int((row > 0).nonzero().max()) for row in seen.weights] == [first - 1, first, first + 1]
    torch.testing.assert_close(seen.weights.sum(dim=1), torch.ones(3))


def test_a_picture_gets_the_weights_of_its_own_tokens(model: str, files: Path) -> None:
    """The spans of pictures and slices are the places of their placeholders, whatever stands between."""
    args = inspect.Inspect(
        model=model,
        dtype="float32",
        answer="x",
        ask=(f"video={files / 'clip.mp4'}", "prompt=<|image_pad|>", f"image={files / 'wide.png'}"),
    )
    seen = inspect.see(args, Processor.from_folder(model), lambda words: None)
    assert seen.sample is not None
    spans = inspect.visual_spans(seen)
    assert [span.caption.split(",")[0] for span in spans] == ["clip.mp4", "clip.mp4", "wide.png"]
    assert spans[0].caption == "clip.mp4, 0.3 seconds"
    ids = [set(seen.sample.token_T[span.places].tolist()) for span in spans]
    assert ids == [{151656}, {151656}, {151655}]
    around = [seen.sample.token_T[[span.places.start - 1, span.places.stop]].tolist() for span in spans]
    assert around == [[151652, 151653]] * 3


# ---- pages


def test_the_page_holds_everything_and_asks_nobody(run: Run, model: str, files: Path, tmp_path: Path) -> None:
    status, out, _ = run(
        *("--model", model, "--image", files / "wide.png", "--video", files / "clip.mp4", "--num-frames", 4),
        *("--prompt", "<script>alert(1)</script> where?", "--answer", "on <b>the</b> left"),
        *("--out", tmp_path / "page.html", "--png", tmp_path / "page.png"),
    )
    assert status == 0 and f"wrote {tmp_path / 'page.html'}" in out and f"wrote {tmp_path / 'page.png'}" in out
    text = (tmp_path / "page.html").read_text()
    prompt = re.sub(r"<[^>]*>", "", re.findall(r'<pre class="prompt">(.*?)</pre>', text, re.DOTALL)[0])
    assert "&lt;script&gt;alert(1)&lt;/script&gt; where?" in prompt and "<script>alert" not in text
    assert re.findall(r'(?:src|href)="(?!data:image/)', text) == []
    [script] = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert f"sha256-{b64encode(hashlib.sha256(script.encode()).digest()).decode()}" in text
    for heading in ("wide.png", "clip.mp4", "Prompt", "Positions", "Where the answer looks"):
        assert re.search(f"<h2>[^<]*{heading}</h2>", text)
    assert text.count("<figcaption>&lt;") == 4 and "&lt;0.3 seconds&gt;, frame 0" in text
    heats = json.loads(re.findall(r"const heats = (.*?);\n", script)[0])
    buttons = text.count("<button")
    # the mean and each token, on one picture and two slices
    assert len(heats) == buttons and {len(each) for each in heats} == {3}
    picture = Pillow.open(tmp_path / "page.png")
    assert picture.width == 1200 and picture.height > 1000
    assert sorted(file.name for file in tmp_path.iterdir()) == ["page.html", "page.png"]


def test_a_page_of_media_alone_has_no_script(run: Run, files: Path, tmp_path: Path) -> None:
    run("--pdf", files / "two.pdf", "--out", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "<script" not in text and "two.pdf (2 of 2)</h2>" in text and "Positions" not in text


def test_a_films_rule_is_shown_without_a_model_too(run: Run, files: Path) -> None:
    rules = [(), ("--video-preset", "report", "--fps", "1")]
    tokens = [json.loads(run("--video", files / "clip.mp4", *more, "--json")[1])["grid_thw"] for more in rules]
    assert tokens[0] != tokens[1]
