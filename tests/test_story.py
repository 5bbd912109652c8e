"""The story's rooms: patch labels, the dense objective, made streams, promises and the page."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from qvl.model.config import preset
from qvl.model.qwen3vl import new_model
from qvl.parallel.data_parallel import World as Ranks
from qvl.parallel.data_parallel import join_world, leave_world
from qvl.parallel.launch import run_ranks
from qvl.prompt.example import Example
from qvl.prompt.processor import Processor
from qvl.recipes.made_stream import MadeStream, of_repeats, of_text, of_world
from qvl.recipes.quickstart import run
from qvl.recipes.quickstart.checkpoint import write_checkpoint
from qvl.recipes.quickstart.corpus import split
from qvl.recipes.quickstart.dense import BINS, Dense, DenseLabels, accuracy, patch_losses, token_losses
from qvl.recipes.quickstart.language import small_model
from qvl.recipes.quickstart.page import write_page
from qvl.recipes.quickstart.pictures import worlds
from qvl.recipes.quickstart.run import Options, broken_floors, start
from qvl.recipes.quickstart.story import LINES, QUICK, Lesson, Pupil, Skill, Story
from qvl.recipes.quickstart.vision import labelled, labelled_pack, merge_order, words
from qvl.recipes.quickstart.vocabulary import spoken, train_tokenizer
from qvl.train.contrastive import V0_RATES
from qvl.train.loop import StepReport
from qvl.train.parameters import Rates, freeze, groups
from qvl.worlds import clips, digits, needle, shapes
from qvl.worlds.labels import patch_labels
from qvl.worlds.paint import SHAPES
from qvl.worlds.shapes import NAMES, Thing

ALONE = Ranks(0, 1, torch.device("cpu"))
SQUARE = Thing(colour="blue", shape="square", texture="filled", x=250, y=500, side=500)


@pytest.fixture(scope="module")
def pupil(tmp_path_factory: pytest.TempPathFactory) -> Pupil:
    folder = tmp_path_factory.mktemp("story") / "checkpoint"
    prose = [f"Chapter {n}. The number {n} stands here, and {n + 1} comes next." for n in range(400)]
    tokenizer = train_tokenizer([*prose, *spoken()[:500]], size=700)
    model = small_model(tokenizer)
    write_checkpoint(folder, model, tokenizer)
    return Pupil(model=model, processor=Processor.from_folder(folder), prose=prose, held_out=prose[:2])


# ---- labels -------------------------------------------------------------------------------------------------------


def test_a_square_in_the_lower_middle_labels_the_four_patches_it_fills() -> None:
    labels = patch_labels((SQUARE,), 4)
    fills = np.zeros((4, 4), dtype=bool)
    fills[2:4, 1:3] = True
    assert (labels.thing_P.reshape(4, 4) == fills).all()
    assert not labels.written_P.any()
    assert (labels.mask_P44 == fills.reshape(-1, 1, 1)).all()
    assert set(labels.colour_P[labels.thing_P]) == {NAMES.index("blue")}
    assert set(labels.shape_P[labels.thing_P]) == {SHAPES.index("square")}
    assert labels.box_P4[9].tolist() == [0.25, 0.5, 0.75, 1.0]
    # left, top, right and bottom edge of the patches 9, 10, 13 and 14
    expected = [
        [True, True, False, False],
        [False, True, True, False],
        [True, False, False, True],
        [False, False, True, True],
    ]
    assert labels.edge_P4[labels.thing_P].tolist() == expected
    assert labels.edge_P4.sum() == 8
    assert np.flatnonzero(labels.centre_P).tolist() == [14]


def test_the_smallest_object_still_has_a_patch() -> None:
    speck = Thing(colour="red", shape="cross", texture="filled", x=500, y=500, side=20)
    assert patch_labels((speck,), 4).thing_P.sum() == 1


def test_a_clips_labels_follow_what_each_slice_shows() -> None:
    clip = clips.Clip(tenths=(0, 2, 6, 8), things=(SQUARE,), first=(2,), last=(4,))
    labels = patch_labels(clip, 4)
    assert labels.thing_P.reshape(2, 16).sum(axis=1).tolist() == [0, 4]


def test_a_digit_is_labelled_where_its_scan_lies() -> None:
    written = digits.digit().planned(0, 3).facts
    labels = patch_labels(written, 4)
    assert set(labels.digit_P[labels.written_P]) == {written.digit}
    assert labels.box_P4[labels.written_P][0].tolist() == pytest.approx(
        [written.x / 1000, written.y / 1000, (written.x + written.side) / 1000, (written.y + written.side) / 1000]
    )


def test_facts_of_other_worlds_have_no_labels() -> None:
    with pytest.raises(
        ValueError, match="a str has no patch labels; give the facts of a shapes, digits or clips world"
    ):
        patch_labels("told", 4)


def test_patches_come_in_the_order_of_merge_blocks() -> None:
    assert merge_order(4, 1).tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert merge_order(2, 2).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_labels_lie_on_the_patches_they_describe(pupil: Pupil) -> None:
    """Paint of a plain blue square, read back from the patches that its labels name."""
    make = labelled(shapes.name(64), pupil.processor, seed=0)
    for index in range(20):
        _, (patch_PX, _, labels) = make(index)
        inside_P = labels.mask_P44.flatten(1).all(dim=1)
        if not inside_P.any():
            continue
        colour = NAMES[int(labels.colour_P[inside_P][0])]
        pixel = patch_PX.view(len(patch_PX), 3, -1).float().mean(-1)[inside_P].mean(0)
        strongest = {"red": 0, "green": 1, "blue": 2}.get(colour)
        if strongest is not None:
            assert int(pixel.argmax()) == strongest


# ---- dense objective ----------------------------------------------------------------------------------------------


def dense_pack(pupil: Pupil, world, count: int = 4):
    make = labelled(world, pupil.processor, seed=1)
    made = [make(i) for i in range(count)]
    return labelled_pack([m for _, m in made], tuple(i for i, _ in made), (world.name,) * count, pupil.model.config)


def test_dense_labels_train_the_tower_and_nothing_behind_it(pupil: Pupil) -> None:
    model = small_model(pupil.processor.tokenizer)
    freeze(model, Rates(vision=0, mergers=0))  # as the language lesson leaves it
    objective = Dense(model, colours=len(NAMES), shapes=len(SHAPES))
    freeze(model, V0_RATES)
    pack = dense_pack(pupil, shapes.count(64))
    prepared = objective.prepare(pack)
    outcome = objective(prepared, prepared.denominator, ALONE)
    outcome.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.visual.blocks.parameters())
    assert all(p.grad is not None and p.grad.any() for p in objective.merger.parameters())
    assert {"merger.linear_fc1.weight", "merger.norm.bias"} < {
        name for group in groups(objective) for name in group.names
    }
    assert all(p.grad is None for p in (*model.visual.merger.parameters(), *model.language_model.parameters()))
    heads = {"kind", "colour", "shape", "box", "mask", "token kind", "token colour", "token hundreds", "token tens"}
    assert {f"loss/{name}" for name in heads} < outcome.sums.keys()
    assert not {"loss/digit", "loss/token digit"} & outcome.sums.keys()
    with torch.no_grad():
        objective.merger.linear_fc2.weight.fill_(3.0)
    objective.hand_over()
    assert model.visual.merger.linear_fc2.weight.eq(3.0).all()


def test_patches_that_say_the_truth_lose_nothing(pupil: Pupil) -> None:
    objective = Dense(pupil.model, colours=len(NAMES), shapes=len(SHAPES))
    labels = dense_pack(pupil, shapes.name(64)).labels
    said = {name: torch.zeros(len(labels.thing_P), size) for name, size in objective.sizes.items()}
    said["shape"][torch.arange(len(labels.shape_P)), labels.shape_P] = 50.0
    said["colour"][torch.arange(len(labels.colour_P)), (labels.colour_P + 1) % len(NAMES)] = 50.0
    losses = patch_losses(said, labels)
    assert losses["shape"].max() < 1e-6
    assert losses["colour"].min() > 49
    assert losses["mask"].mean().item() == pytest.approx(np.log(2))


def labels_of_the_square() -> DenseLabels:
    return DenseLabels(**{name: torch.from_numpy(value) for name, value in vars(patch_labels((SQUARE,), 4)).items()})


def test_an_edge_between_the_middles_of_two_bins_is_told_by_both(pupil: Pupil) -> None:
    """x1 = 0.25 lies halfway between the middles of bins 24 and 25 of 100; the best answer gives each of them half."""
    objective = Dense(pupil.model, colours=len(NAMES), shapes=len(SHAPES))
    labels = labels_of_the_square()
    said = {name: torch.zeros(16, size) for name, size in objective.sizes.items()}
    boxes = said["box"].view(16, 4, BINS)
    boxes[:, 0, [24, 25]], boxes[:, 1, [49, 50]], boxes[:, 2, [74, 75]], boxes[:, 3, 99] = 50.0, 50.0, 50.0, 50.0
    losses = patch_losses(said, labels)["box"].tolist()
    assert len(losses) == 8  # two patches see each edge
    # Nothing lies behind the last middle, so the lower edge is told by one bin.
    assert sorted(losses) == pytest.approx([0.0] * 2 + [np.log(2)] * 6, abs=1e-6)
    boxes[:, 0, 25] = 0.0
    assert sum(loss > 20 for loss in patch_losses(said, labels)["box"].tolist()) == 2


def test_patches_inside_an_object_say_nothing_of_its_edges(pupil: Pupil) -> None:
    objective = Dense(pupil.model, colours=len(NAMES), shapes=len(SHAPES))
    labels = labels_of_the_square()
    said = {name: torch.zeros(16, size) for name, size in objective.sizes.items()}
    before = patch_losses(said, labels)["box"].sum()
    said["box"].view(16, 4, BINS)[~labels.edge_P4] = torch.randn(56, BINS)
    assert patch_losses(said, labels)["box"].sum() == before


def test_a_token_has_the_labels_of_the_first_of_its_patches_that_has_them(pupil: Pupil) -> None:
    """Four tokens of four patches, in the order of merge blocks; the square fills two patches of each of the lower two."""
    objective = Dense(pupil.model, colours=len(NAMES), shapes=len(SHAPES))
    order = torch.from_numpy(merge_order(4, 1))
    of_rows = labels_of_the_square()
    labels = DenseLabels(**{name: value[order] for name, value in vars(of_rows).items()})
    said = {name: torch.zeros(4, size) for name, size in objective.token_sizes.items()}
    for edge, (hundreds, tens) in enumerate(((2, 5), (5, 0), (7, 5), (9, 9))):  # of 250, 500, 750, and 999 for 1000
        said["token hundreds"].view(4, 4, 10)[:, edge, hundreds] = 50.0
        said["token tens"].view(4, 4, 10)[:, edge, tens] = 50.0
    said["token kind"][2:, 1] = 50.0  # the lower two
    said["token kind"][:2, 0] = 50.0
    said["token colour"][2:, NAMES.index("blue")] = 50.0
    losses = token_losses(said, labels)
    assert {name: len(loss) for name, loss in losses.items()} == {
        "token kind": 4,
        "token colour": 2,
        "token shape": 2,
        "token hundreds": 6,
        "token tens": 6,
    }
    assert max(losses[name].max() for name in losses if name != "token shape") < 1e-6
    assert losses["token shape"].tolist() == pytest.approx([np.log(len(SHAPES))] * 2)


def test_only_the_direction_of_a_token_is_read(pupil: Pupil) -> None:
    """So that what it says is as loud as the rest of it."""
    objective = Dense(small_model(pupil.processor.tokenizer), colours=len(NAMES), shapes=len(SHAPES))
    pack = dense_pack(pupil, shapes.name(64))
    before = objective.read(pack.batch)["token tens"]
    with torch.no_grad():
        objective.merger.linear_fc2.weight.mul_(5)
        objective.merger.linear_fc2.bias.mul_(5)
    torch.testing.assert_close(objective.read(pack.batch)["token tens"], before, atol=1e-4, rtol=1e-4)


def test_accuracy_counts_patches_over_all_packs(pupil: Pupil) -> None:
    objective = Dense(pupil.model, colours=len(NAMES), shapes=len(SHAPES))
    with torch.no_grad():
        objective.head.weight.zero_()
        objective.head.bias[3 + NAMES.index("green")] = 9.0
    packs = [dense_pack(pupil, shapes.name(64), 12), dense_pack(pupil, shapes.count(64), 3)]
    is_green = torch.cat([p.labels.colour_P[p.labels.thing_P] == NAMES.index("green") for p in packs])
    assert accuracy(objective, packs)["colour"] == pytest.approx(is_green.float().mean().item())


def test_a_token_is_read_where_its_word_lies(pupil: Pupil) -> None:
    assert {name: len(ids) for name, ids in words(pupil.processor.tokenizer).items()} == {
        "colour": 6,
        "shape": 4,
        "digit": 10,
    }
    said = {"colour": [300, 301, 302, 303, 304, 305], "shape": [9, 8, 7, 6], "digit": list(range(40, 50))}
    objective, by_chance = (Dense(pupil.model, colours=6, shapes=4, words=known) for known in (said, {}))
    rows = pupil.model.language_model.embed_tokens.weight.detach()
    start = 0
    for name, size in objective.token_sizes.items():
        found, drawn = (o.directions[start : start + size] for o in (objective, by_chance))
        start += size
        ids = said.get(name.removeprefix("token "))
        expected = drawn if ids is None else 2 * torch.nn.functional.normalize(rows[ids], dim=-1)
        torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="2 words came for shape, which has 4 classes"):
        Dense(pupil.model, colours=6, shapes=4, words={"shape": [1, 2, 2, 1]})


def test_a_text_pack_is_no_dense_pack(pupil: Pupil) -> None:
    objective = Dense(pupil.model, colours=6, shapes=4)
    stream = MadeStream({"p": (of_text(pupil.prose_T, 16, seed=0), 1.0)}, pupil.model.config, samples=2, seed=0)
    with pytest.raises(ValueError, match="a MicroBatch came; dense labels learn from DensePack"):
        objective.prepare(stream.next_step()[0])
    stream.close()


def test_a_text_only_model_has_no_tower_to_teach(pupil: Pupil) -> None:
    from dataclasses import replace

    with pytest.raises(ValueError, match="text-only"):
        Dense(new_model(replace(preset("nano"), vision=None)), colours=6, shapes=4)


# ---- made streams -------------------------------------------------------------------------------------------------


def ids_of(stream: MadeStream) -> tuple[str, ...]:
    (pack,) = stream.next_step()
    return pack.ids


def test_a_stream_goes_on_where_its_state_says(pupil: Pupil) -> None:
    makers = {
        "prose": (of_text(pupil.prose_T, 16, seed=0), 1.0),
        "count": (of_world(shapes.count(64), pupil.processor, seed=0), 1.0),
    }
    first, second = (MadeStream(makers, pupil.model.config, samples=3, seed=5) for _ in range(2))
    steps = [ids_of(first) for _ in range(4)]
    second.restore({"step": 2, "seed": 5})
    assert [ids_of(second), ids_of(second)] == steps[2:]
    assert len({id for step in steps for id in step}) > 6
    with pytest.raises(ValueError, match="seed 6, this one 5"):
        second.restore({"step": 2, "seed": 6})
    first.close()
    second.close()


def test_ranks_share_a_step_evenly_and_leave_nothing_out(pupil: Pupil) -> None:
    makers = {
        "short": (of_text(pupil.prose_T, 8, seed=0), 1.0),
        "long": (of_text(pupil.prose_T, 64, seed=0), 0.3),
    }

    def stream(ranks: Ranks) -> MadeStream:
        return MadeStream(makers, pupil.model.config, samples=12, seed=3, ranks=ranks)

    alone, *parts = (stream(Ranks(rank, size, torch.device("cpu"))) for rank, size in ((0, 1), (0, 2), (1, 2)))
    for _ in range(6):
        (whole,) = alone.next_step()
        mine = [part.next_step()[0] for part in parts]
        assert sorted(id for pack in mine for id in pack.ids) == sorted(whole.ids)
        first, second = (pack.batch.token_T.numel() for pack in mine)
        assert abs(first - second) <= 64  # never more than one sample apart
    for each in (alone, *parts):
        each.close()


def test_repeats_say_the_same_twice_and_train_the_second_half(pupil: Pupil) -> None:
    id, sample = of_repeats(pupil.prose_T, 12, seed=0)(4)
    assert id == "repeats/4"
    assert sample.token_T[:6].tolist() == sample.token_T[6:].tolist()
    assert sample.is_target_T is not None and sample.is_target_T.tolist() == [False] * 6 + [True] * 6
    assert set(sample.token_T.tolist()) <= set(pupil.prose_T.tolist())


def test_later_turns_ask_for_the_other_tags() -> None:
    example: Example = needle.tagged(64, ask_all=True)(0, 0)
    asked = [m.text for m in example.messages if m.role == "user"]
    answers = [m.text for m in example.messages if m.role == "assistant"]
    assert len(asked) == len(answers) == len(needle.KEYS)
    assert sorted(a.split()[0] for a in answers) == sorted(needle.KEYS)
    assert all(f"Tag {answer}." in asked[0] for answer in answers)
    assert needle.tagged(64)(0, 0).messages == example.messages[:2]


# ---- promises and page --------------------------------------------------------------------------------------------


def skill(got: float, *, less: bool = False) -> Skill:
    floor, promise = (2.0, 1.0) if less else (0.5, 0.9)
    return Skill(chapter="S1", skill="seeing", floor=floor, promise=promise, got=got, seconds=1.0, is_less_better=less)


def test_a_promise_is_kept_missed_or_broken() -> None:
    assert [skill(got).verdict for got in (0.95, 0.7, 0.4)] == ["kept", "above the floor", "BROKEN"]
    assert [skill(got, less=True).verdict for got in (0.9, 1.5, 2.5)] == ["kept", "above the floor", "BROKEN"]


def test_the_page_shows_pictures_before_and_answers_after(tmp_path: Path, pupil: Pupil) -> None:
    story = Story(tmp_path, size=QUICK)
    pictures = {"shapes.box": worlds()["shapes.box"], "clips.appear": clips.appear()}
    before = write_page(story, pictures).read_text()
    assert before.count("<img") == 8 and "Locate the" in before and 'class="wrong"' not in before
    story.note(skill(0.95))
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(json.dumps({"step": i, "loss/seeing": 1 / i}) for i in range(1, 60)) + "\n")
    story.curves["S1"] = log
    after = write_page(story, pictures, pupil).read_text()
    assert after.count("<img") == 8 and 'class="wrong"' in after and "<svg" in after and "seeing" in after
    assert json.loads(story.write_report().read_text())["chapters"][0]["verdict"] == "kept"


def test_what_is_held_out_shares_no_line_with_what_is_read() -> None:
    shared = "copy_X : bool, default=True, whether X may be written over"
    texts = [f"{shared}\n\nOnly here, in document {i}: {'word ' * 10}\n\nParameters\n----------" for i in range(40)]
    learned, held_out = split(texts)
    assert (len(learned), len(held_out)) == (38, 2)
    assert all(shared in text for text in learned)
    for number, text in zip((0, 20), held_out, strict=True):
        assert shared not in text and f"in document {number}:" in text and "Parameters" in text


def test_a_folder_that_no_story_wrote_is_not_emptied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert start(Options(out=tmp_path)) == 2
    error = capsys.readouterr().err
    assert "holds other things and would be emptied; give --out a new folder" in error and "Traceback" not in error
    assert (tmp_path / "thesis.tex").exists()


def test_a_request_that_cannot_be_met_empties_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.json").write_text("{}")  # a story's own folder, which a run would empty
    assert start(Options(out=tmp_path, ranks=0)) == 2
    assert capsys.readouterr().err == "ranks is 0; expected at least 1.\n"
    assert (tmp_path / "report.json").exists()


def test_a_fault_of_a_lone_rank_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(options: Options) -> int:
        raise ValueError("a fault of ours")

    monkeypatch.setattr(run, "main", broken)
    monkeypatch.setattr(run, "_prepare", lambda folder: None)
    with pytest.raises(ValueError, match="a fault of ours"):
        start(Options(out=tmp_path, ranks=1))


def test_a_broken_floor_is_one_sentence() -> None:
    skills = [
        Skill(chapter="S1", skill="box", floor=0.6, promise=0.76, got=0.5, seconds=1.0),
        Skill(chapter="S1", skill="count", floor=0.7, promise=0.8, got=0.7, seconds=1.0),
        Skill(chapter="S3", skill="text kept", floor=1.05, promise=1.03, got=1.1, seconds=1.0, is_less_better=True),
    ]
    assert broken_floors(skills) == [
        "S1: box is 0.500, below its floor 0.6",
        "S3: text kept is 1.100, above its floor 1.05",
    ]


def exits(folder: Path) -> int:
    """Each rank leaves a mark; the second one ends with 3."""
    ranks = join_world(torch.device("cpu"), replicates=True)
    (folder / str(ranks.rank)).write_text(str(ranks.sum(1.0)))
    leave_world(3 * ranks.rank)
    return 0


def test_ranks_end_in_an_exit_code_and_no_traceback(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_ranks(exits, 2, tmp_path) == 3
    assert [(tmp_path / name).read_text() for name in ("0", "1")] == ["2.0", "2.0"]
    assert "Traceback" not in capfd.readouterr().err


def test_the_ranks_of_the_story_can_import_what_they_run() -> None:
    """A child of multiprocessing never imports a package's __main__."""
    assert run.main.__module__ == run.start.__module__ == "qvl.recipes.quickstart.run"


def test_progress_is_a_few_lines_where_no_bar_can_be_drawn(tmp_path: Path) -> None:
    out = io.StringIO()
    story = Story(tmp_path, console=Console(file=out, force_terminal=False))
    with story._progress(Lesson(name="S1", steps=400, samples=8, lr=1e-3)) as callback:
        for step in range(1, 401):
            callback(
                StepReport(step=step, steps=400, values={"loss": 1.0, "loss/a": 1.0, "seconds": 0.1}, skipped=None)
            )
    assert len(out.getvalue().splitlines()) == LINES and "400/400" in out.getvalue().splitlines()[-1]


def test_progress_is_a_bar_with_the_time_left_on_a_terminal(tmp_path: Path) -> None:
    out = io.StringIO()
    story = Story(tmp_path, console=Console(file=out, force_terminal=True, width=100))
    with story._progress(Lesson(name="S1", steps=4, samples=8, lr=1e-3)) as callback:
        for step in range(1, 5):
            callback(StepReport(step=step, steps=4, values={"loss": 1.0, "seconds": 0.1}, skipped=None))
    assert "4/4" in out.getvalue() and "0:00:00" in out.getvalue()
