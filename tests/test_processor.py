"""The processor: ids and patches equal to transformers', files that transformers loads, answers read back."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

import oracle_prompt
from media_files import encoded, gradient, pdf
from oracle_processor import digest, noise
from qvl.prompt.answer import parse_answer, read_call
from qvl.prompt.budget import ImageBudget
from qvl.prompt.folder import Folder, write_folder
from qvl.prompt.message import Image, Message, Text, Thinking, ToolCall, Video, assistant, system, tool, user
from qvl.prompt.placeholder import Pads, encode, expand, truncate
from qvl.prompt.processor import Processor
from qvl.prompt.sampling import VideoSampling
from qvl.prompt.template import PlainText, Written, jinja_template, render
from qvl.prompt.tokenizer import Tokenizer
from qvl.prompt.visual import Visual
from real_tokenizer import real_tokenizer, real_tokenizer_folder, write_small_tokenizer

SMALL = ImageBudget(min_tokens=4, max_tokens=64)


def pixels(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(noise(height, width, seed=seed).transpose(2, 0, 1).copy())


@pytest.fixture(scope="module")
def bare_folder(tmp_path_factory) -> Path:
    """The tokenizer's files alone."""
    return Path(shutil.copytree(real_tokenizer_folder(), tmp_path_factory.mktemp("bare") / "model"))


@pytest.fixture(scope="module")
def folders(bare_folder, tmp_path_factory) -> dict[str, Path]:
    """Complete folders of both styles, written by `save`."""
    made = {}
    for style in ("instruct", "thinking"):
        made[style] = tmp_path_factory.mktemp("saved") / style
        Processor.from_folder(bare_folder, template=style, image_budget=SMALL).save(made[style])
    return made


@pytest.fixture
def bare_small(tmp_path) -> Path:
    return write_small_tokenizer(tmp_path / "bare_small")


@pytest.fixture
def small(bare_small, tmp_path) -> Path:
    """A complete folder with the small tokenizer."""
    Processor.from_folder(bare_small, template="instruct", image_budget=SMALL).save(tmp_path / "small")
    return tmp_path / "small"


@pytest.fixture(scope="module")
def instruct(folders) -> Processor:
    return Processor.from_folder(folders["instruct"])


@pytest.fixture(scope="module")
def thinking(folders) -> Processor:
    return Processor.from_folder(folders["thinking"])


# ---- prompts


def test_an_image_is_its_pads_between_two_marks(instruct):
    encoded_ = instruct([user(Image(pixels(64, 96)), "hi")])
    assert encoded_.text == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>hi<|im_end|>\n<|im_start|>assistant\n"
    )
    pads = [151655] * 6
    expected = [151644, 872, 198, 151652, *pads, 151653, 6023, 151645, 198, 151644, 77091, 198]
    assert encoded_.sample.token_T.tolist() == expected
    assert encoded_.sample.grid_I3.tolist() == [[1, 4, 6]] and encoded_.sample.patch_PX.shape == (24, 1536)
    assert encoded_.sample.is_target_T is None


def test_a_video_has_a_time_before_each_slice_and_no_outer_marks(instruct):
    clip = Video((pixels(32, 32), pixels(32, 32), pixels(32, 32)), frame_fps=1.0)
    encoded_ = instruct([user(clip)])
    slices = "".join(f"<{t} seconds><|vision_start|><|video_pad|><|vision_end|>" for t in ("0.5", "2.0"))
    shown = f"<|im_start|>user\n{slices}<|im_end|>\n<|im_start|>assistant\n"
    assert instruct.tokenizer.decode(encoded_.sample.token_T.tolist()) == shown
    assert encoded_.sample.grid_I3.tolist() == [[1, 2, 2], [1, 2, 2]]


def test_the_outer_marks_of_later_transformers_are_an_option():
    visual = clip_visual(1)
    plain = [segment.text for segment in expand(visual)]
    assert plain == ["<0.0 seconds>", "<|vision_start|>", "<|video_pad|>", "<|vision_end|>"]
    outer = [segment.text for segment in expand(visual, form="transformers5")]
    assert outer == ["<|vision_start|>", *plain, "<|vision_end|>"]
    assert expand(visual, label_style="hms")[0].text == "<0:00:00.0>"
    with pytest.raises(ValueError, match="must be one of release, transformers5"):
        expand(visual, form="vllm")  # type: ignore[arg-type]


def clip_visual(slices: int) -> Visual:
    return Visual(
        kind="video",
        patch_PX=torch.zeros(4 * slices, 1536),
        grid_I3=torch.tensor([[1, 2, 2]] * slices),
        seconds=tuple(float(i) for i in range(slices)),
        height=32,
        width=32,
        source_height=32,
        source_width=32,
    )


@pytest.mark.oracle
def test_ids_and_patches_equal_transformers_on_conversations_with_media(folders, instruct):
    processors = {form: replace(instruct, form=form) for form in ("release", "transformers5")}
    talks = oracle_prompt.all_talks()
    answers = oracle_prompt.answers(folders["instruct"])
    assert len(talks) == len(answers) == 46
    for talk, answer in zip(talks, answers, strict=True):
        messages = [Message(role, _parts(role, parts)) for role, parts in talk]
        ours = {form: processor(messages) for form, processor in processors.items()}
        assert ours["release"].text == answer["text"]
        assert ours["transformers5"].sample.token_T.tolist() == answer["ids"]
        assert ours["release"].sample.token_T.tolist() == answer["release_ids"]
        for kind in ("image", "video"):
            patches = [visual.values_PX for visual in ours["release"].visuals if visual.kind == kind]
            assert (digest(torch.cat(patches).numpy()) if patches else None) == answer[f"{kind}s"]


def _parts(role: str, parts: list) -> tuple:
    def part(data):
        if isinstance(data, str):
            return Text(data)
        if len(data) == 3:
            return Image(pixels(*data))
        frames = tuple(torch.from_numpy(frame.transpose(2, 0, 1).copy()) for frame in oracle_prompt.frames_of(data))
        return Video(frames, frame_fps=data[3])

    content = [part(data) for data in parts]
    return tool(*content).parts if role == "tool" else tuple(content)


def test_dictionaries_files_and_limits_of_one_picture(instruct, tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(gradient(640, 640), "PNG"))
    part = {"type": "image", "image": str(tmp_path / "a.png")}
    question = instruct([{"role": "user", "content": [part, part | {"max_tokens": 16}]}])
    assert [visual.num_tokens for visual in question.visuals] == [64, 16]
    opened = instruct([user(Image("memory"))], opener=lambda name: {"memory": encoded(gradient(32, 32), "PNG")}[name])
    assert opened.visuals[0].num_tokens == 4


def test_a_document_becomes_an_image_a_page_in_its_place(instruct):
    part = {"type": "document", "document": pdf([(100, 100), (100, 200), (100, 100)]), "pages": "2-3"}
    question = instruct([{"role": "user", "content": ["Read", part, "now"]}])
    mark = "<|vision_start|><|image_pad|><|vision_end|>"
    assert question.text.startswith(f"<|im_start|>user\nRead{mark}{mark}now<|im_end|>")
    assert [visual.height > visual.width for visual in question.visuals] == [True, False]


def test_a_picture_without_its_patches_is_refused():
    with pytest.raises(ValueError, match="has no patches yet"):
        encode(render([user(Image("a"))], style="instruct"), real_tokenizer())


def test_media_keep_their_order_in_mixed_messages(instruct):
    a, b = pixels(64, 64, 1), pixels(64, 128, 2)
    clip = Video((pixels(64, 32, 3),) * 2, frame_fps=2.0)
    sample = instruct([user(clip, Image(b), "x", Image(a)), tool(clip)]).sample
    rows = [[1, 4, 2], [1, 4, 8], [1, 4, 4], [1, 4, 2]]
    assert sample.grid_I3.tolist() == rows
    ids = sample.token_T.tolist()
    assert [id for id in ids if id in (151655, 151656)] == [151656] * 2 + [151655] * (8 + 4) + [151656] * 2


def test_a_literal_pad_in_text_is_no_placeholder(instruct):
    sample = instruct([user("<|vision_start|><|image_pad|><|vision_end|>", Image(pixels(64, 64)))]).sample
    assert sample.token_T.tolist().count(151655) == 4


# ---- training samples


def test_a_training_sample_marks_the_answer(thinking):
    talk = [user("q"), assistant("a", thinking="t")]
    sample = thinking(talk, add_generation_prompt=False, targets="all").sample
    assert thinking.tokenizer.decode(sample.token_T[sample.is_target_T].tolist()) == "t\n</think>\n\na<|im_end|>"


def test_a_cut_never_goes_through_a_picture(instruct):
    clip = Video(tuple(pixels(64, 64, i) for i in range(4)), frame_fps=1.0)
    talk = [user("Look", Image(pixels(64, 96)), "and", clip), assistant("one two three")]
    whole = instruct(talk, add_generation_prompt=False, targets="all").sample
    start, pads = 151652, (151655, 151656)
    for length in range(5, whole.num_tokens + 1):
        cut = truncate(whole, length, instruct.tokenizer)
        ids = cut.token_T.tolist()
        assert len(ids) <= length and ids == whole.token_T.tolist()[: len(ids)]
        assert ids[-1] != start and ids[-1] not in pads
        rows = [] if cut.grid_I3 is None else cut.grid_I3.tolist()
        assert rows == whole.grid_I3.tolist()[: len(rows)]
        assert sum(id in pads for id in ids) == sum(t * h * w // 4 for t, h, w in rows)
        patches = 0 if cut.patch_PX is None else len(cut.patch_PX)
        assert patches == sum(t * h * w for t, h, w in rows)
        assert len(cut.is_target_T) == len(ids)
    same = instruct(talk, add_generation_prompt=False, targets="all", max_tokens=7).sample
    assert same.num_tokens == 4 and same.grid_I3 is None


def test_a_cut_that_leaves_nothing_is_refused(instruct):
    sample = instruct([user(Image(pixels(64, 64)))]).sample
    without_opening = type(sample)(token_T=sample.token_T[3:], patch_PX=sample.patch_PX, grid_I3=sample.grid_I3)
    with pytest.raises(ValueError, match="its first picture is larger"):
        truncate(without_opening, 3, instruct.tokenizer)


def test_adjacent_texts_are_tokenized_as_one_run():
    ids, _ = encode([Written("<|im_start|>us"), PlainText("er\n"), Pads("<|image_pad|>", 2)], real_tokenizer())
    assert ids == [151644, 872, 198, 151655, 151655]


# ---- answers


def test_a_thinking_answer_starts_inside_the_thought(thinking):
    answer = thinking.parse_answer("I add.\n</think>\n\nIt is 2.<|im_end|>\n")
    assert answer.message == assistant("It is 2.", thinking="I add.") and answer.is_thought_closed
    cut = thinking.parse_answer("I add and")
    assert cut.message == Message("assistant", (Thinking("I add and"),)) and not cut.is_thought_closed
    assert thinking.parse_answer("<think>\nI add.\n</think>\n\n2").message == assistant("2", thinking="I add.")


def test_the_folders_own_template_tells_whether_it_opens_a_thought(bare_small, tmp_path):
    for style in ("thinking", "instruct"):
        folder = Path(shutil.copytree(bare_small, tmp_path / style))
        (folder / "chat_template.jinja").write_text(jinja_template(style))
        processor = Processor.from_folder(folder, template="folder")
        assert processor.style is None and processor.starts_in_thought == (style == "thinking")
    answer = Processor.from_folder(tmp_path / "thinking", template="folder").parse_answer("I add.\n</think>\n\n2")
    assert answer.message == assistant("2", thinking="I add.")


def test_an_instruct_answer_is_words_unless_it_opens_a_thought(instruct):
    assert instruct.parse_answer("It is 2.").message == assistant("It is 2.")
    assert instruct.parse_answer("<think>\nt\n</think>\n\na").message == assistant("a", thinking="t")
    assert instruct.parse_answer("").message == assistant()


def test_tool_calls_are_read_and_render_back_to_the_same_ids(thinking):
    said = (
        'I call.\n</think>\n\nTwo calls:\n<tool_call>\n{"name": "f", "arguments": {"a":  [1,2]}}\n</tool_call>\n'
        '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
    )
    question = user("q")
    answer = thinking.parse_answer(said)
    assert answer.message.tool_calls == (ToolCall("f", '{"a":  [1,2]}'), ToolCall("g", "{}")) and not answer.problems
    prompt = thinking([question]).sample.token_T.tolist()
    ids = prompt + thinking.tokenizer.encode_control(said + "<|im_end|>")
    again = thinking([question, answer.message], add_generation_prompt=False).sample.token_T.tolist()
    assert again[:-1] == ids
    assert thinking.parse_answer(ids[len(prompt) :]) == answer


def test_a_malformed_call_stays_among_the_words(instruct):
    said = 'Ok\n<tool_call>\n{"name": "f", "arguments": {\n</tool_call>\n<tool_call>\n{"name": "g"}\n</tool_call>'
    answer = instruct.parse_answer(said)
    assert answer.message == assistant(
        'Ok\n<tool_call>\n{"name": "f", "arguments": {\n</tool_call>', calls=[ToolCall("g", "{}")]
    )
    assert len(answer.problems) == 1 and answer.problems[0].startswith("A tool call is no JSON")
    open_end = instruct.parse_answer('<tool_call>\n{"name": "g"}')
    assert open_end.message.text == '<tool_call>\n{"name": "g"}'
    assert open_end.problems == ("The answer ends inside a tool call.",)


@pytest.mark.parametrize(
    ("body", "call"),
    [
        ('{"arguments": {"a": 1}, "name": "f"}', ToolCall("f", '{"a": 1}')),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', ToolCall("f", '{"a": 1}')),
        ('{"name": "f", "arguments": [1]}', "A tool call's arguments are no object."),
        ('{"name": "f", "arguments": "x"}', "A tool call's arguments are no object."),
        ('{"name": 3}', "A tool call has no name."),
        ("[]", "A tool call has no name."),
    ],
)
def test_the_body_of_a_call(body, call):
    assert read_call(body) == call


def test_marks_spelled_in_letters_end_nothing_when_ids_are_read():
    tokenizer = real_tokenizer()
    body = tokenizer.encode_text('\n{"name": "f", "arguments": {"a": "</tool_call>"}}\n')
    ids = [tokenizer.control_id("<tool_call>"), *body, tokenizer.control_id("</tool_call>"), tokenizer.eos_id]
    answer = parse_answer(ids, tokenizer=tokenizer)
    assert answer.message == assistant(calls=[ToolCall("f", '{"a": "</tool_call>"}')])
    with pytest.raises(ValueError, match="without a tokenizer"):
        parse_answer(ids)


# ---- folders


def test_a_saved_folder_is_complete_and_transformers_reads_it(folders):
    assert sorted(file.name for file in folders["instruct"].iterdir()) == [
        "chat_template.jinja",
        "generation_config.json",
        "merges.txt",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "video_preprocessor_config.json",
        "vocab.json",
    ]
    published = AutoTokenizer.from_pretrained(folders["thinking"])
    prompt = published.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n"
    generation = GenerationConfig.from_pretrained(folders["thinking"])
    assert (generation.temperature, generation.top_k, generation.eos_token_id) == (1.0, 20, [151645, 151643])


def test_a_processor_saved_and_loaded_is_the_same(small, tmp_path):
    Processor.from_folder(small).save(tmp_path / "again")
    for file in small.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    again = Processor.from_folder(tmp_path / "again")
    assert (again.style, again.image_budget, again.video_sampling) == ("instruct", SMALL, VideoSampling())


def test_the_one_file_of_transformers_5_is_read_and_before_older_ones(small, tmp_path):
    folder = Path(shutil.copytree(small, tmp_path / "model"))
    image, video = (json.loads((folder / f"{name}preprocessor_config.json").read_text()) for name in ("", "video_"))
    image["size"] = {"longest_edge": 2048, "shortest_edge": 1024}
    whole = {"image_processor": image, "video_processor": video, "processor_class": "Qwen3VLProcessor"}
    (folder / "processor_config.json").write_text(json.dumps(whole))
    assert Processor.from_folder(folder).image_budget == ImageBudget(min_tokens=1, max_tokens=2)
    for name in ("", "video_"):
        (folder / f"{name}preprocessor_config.json").unlink()
    assert Processor.from_folder(folder).image_budget == ImageBudget(min_tokens=1, max_tokens=2)
    Processor.from_folder(folder).save(tmp_path / "out")
    assert Processor.from_folder(tmp_path / "out").image_budget == ImageBudget(min_tokens=1, max_tokens=2)


def test_a_number_of_frames_that_holds_no_more_is_not_saved(small, tmp_path):
    folder = Path(shutil.copytree(small, tmp_path / "model"))
    config = json.loads((folder / "video_preprocessor_config.json").read_text())
    (folder / "video_preprocessor_config.json").write_text(json.dumps(config | {"num_frames": 16, "fps": None}))
    Processor.from_folder(folder, video_sampling=VideoSampling(fps=2.0)).save(tmp_path / "out")
    assert Processor.from_folder(tmp_path / "out").video_sampling == VideoSampling(fps=2.0)


def test_older_names_of_a_picture_budget_that_holds_no_more_are_not_saved(small, tmp_path):
    folder = Path(shutil.copytree(small, tmp_path / "model"))
    config = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(config | {"min_pixels": 3136, "max_pixels": 1003520}))
    changed = ImageBudget(min_tokens=4, max_tokens=256)
    Processor.from_folder(folder, image_budget=changed).save(tmp_path / "out")
    assert Processor.from_folder(tmp_path / "out").image_budget == changed


def test_a_tokenizer_made_in_memory_can_be_written(bare_small, tmp_path):
    tokenizer = Tokenizer.from_folder(bare_small)
    nowhere = Folder(path=tmp_path / "nowhere", template=None, image_config=None, video_config=None)
    write_folder(nowhere, tmp_path / "out", tokenizer, "instruct", SMALL, VideoSampling())
    again = Processor.from_folder(tmp_path / "out")
    assert again.tokenizer.control_tokens == tokenizer.control_tokens and again.style == "instruct"
    assert again.tokenizer.eos_id == tokenizer.eos_id
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("hi<|im_end|>")["input_ids"] == [*b"hi", 258]


def test_changed_budgets_are_written_and_other_fields_stay(small, tmp_path):
    folder = Path(shutil.copytree(small, tmp_path / "model"))
    config = json.loads((folder / "preprocessor_config.json").read_text()) | {"note": "kept"}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    Processor.from_folder(folder, image_budget=ImageBudget(min_tokens=1, max_tokens=2)).save(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert written == config | {"size": {"longest_edge": 2048, "shortest_edge": 1024}}


def test_a_folders_own_template_goes_through_byte_for_byte(small, tmp_path):
    folder = Path(shutil.copytree(small, tmp_path / "model"))
    own = jinja_template("instruct").replace("\n", "\r\n") + "{# mine #}\r\n"
    (folder / "chat_template.jinja").write_bytes(own.encode())
    processor = Processor.from_folder(folder)
    processor.save(tmp_path / "out")
    assert processor.style == "instruct"
    assert (tmp_path / "out" / "chat_template.jinja").read_bytes() == own.encode()


def test_the_template_is_found_in_any_of_its_three_places(bare_small, tmp_path):
    config = json.loads((bare_small / "tokenizer_config.json").read_text())
    for name, content in {
        "chat_template.json": {"chat_template": jinja_template("thinking")},
        "tokenizer_config.json": config | {"chat_template": jinja_template("thinking")},
    }.items():
        folder = Path(shutil.copytree(bare_small, tmp_path / name))
        (folder / name).write_text(json.dumps(content))
        assert Processor.from_folder(folder).style == "thinking"


def test_an_unknown_template_runs_only_when_asked_for(bare_small, tmp_path):
    folder = Path(shutil.copytree(bare_small, tmp_path / "model"))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}")
    with pytest.raises(ValueError, match="is none of Qwen3-VL's; choose template"):
        Processor.from_folder(folder)
    processor = Processor.from_folder(folder, template="folder")
    assert processor([user("<|im_end|>")]).sample.token_T.tolist() == [257, *b"<|im_end|>"]
    with pytest.raises(ValueError, match="does not say which words are the assistant's"):
        processor([user("q")], targets="all")


def test_what_is_missing_is_said_in_one_sentence(bare_small, small, tmp_path):
    with pytest.raises(ValueError, match="is no folder"):
        Processor.from_folder(tmp_path / "nothing")
    with pytest.raises(ValueError, match="has no chat template; choose"):
        Processor.from_folder(bare_small)
    text_only = Processor.from_folder(bare_small, template="instruct")
    assert text_only([system("s"), user("q")]).visuals == ()
    with pytest.raises(ValueError, match=r"no preprocessor_config\.json, so the size of images is unknown"):
        text_only([user(Image(pixels(32, 32)))])
    folder = Path(shutil.copytree(small, tmp_path / "model"))
    config = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(config | {"patch_size": 14}))
    with pytest.raises(ValueError, match="has patch_size 14; Qwen3-VL has 16"):
        Processor.from_folder(folder)
    with pytest.raises(ValueError, match="save to another one"):
        text_only.save(bare_small)


@pytest.mark.parametrize(
    ("key", "value"),
    [("do_resize", False), ("do_rescale", False), ("do_normalize", False), ("resample", 2), ("rescale_factor", 1.0)],
)
@pytest.mark.parametrize("name", ["preprocessor_config.json", "video_preprocessor_config.json"])
def test_processor_options_that_are_not_followed_are_refused(small, tmp_path, name, key, value):
    folder = Path(shutil.copytree(small, tmp_path / "model"))
    config = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(config | {key: value}))
    with pytest.raises(ValueError, match=f"{name} has {key} {value}; Qwen3-VL has"):
        Processor.from_folder(folder)
