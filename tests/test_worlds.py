"""Worlds: examples depend on their number alone, answers are exact, splits are apart, and the prior is what guessing earns."""

import math
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image as Raster
from scipy.stats import chisquare

from qvl.prompt.coordinates import Box, read_boxes
from qvl.prompt.example import Example
from qvl.prompt.message import Image, Text, Video
from qvl.prompt.video import frames_video
from qvl.scoring.registry import score
from qvl.worlds import clips, glyphs, needle, paint, shapes, text
from qvl.worlds.catalogue import WORLDS, world
from qvl.worlds.scans import _all_scans, scans
from qvl.worlds.world import Plan, Split, World, best_constant, blind, combinations, enlarged

SPLITS: tuple[Split, ...] = ("train", "calibration", "heldout", "novel")
ALL = {name: world(name) for name in WORLDS}
# A told world draws and asks what its pictured one does; the needle has a test of its own, on short texts.
CHEAP = [name for name in WORLDS if name not in ("needle", "text.name", "text.box", "text.count", "text.appear")]


def plans(of: World, number: int, split: Split = "train", seed: int = 0) -> list[Plan]:
    return [of.planned(seed, index, split) for index in range(number)]


def content(example: Example) -> list[object]:
    """Everything an example shows and asks, as comparable values."""
    found: list[object] = []
    for part in example.messages[0].parts:
        if isinstance(part, Text):
            found.append(part.text)
        elif isinstance(part, Image):
            found.append(part.source.tobytes())
        elif isinstance(part, Video):
            found.append((part.frame_seconds, [frame.tobytes() for frame in part.source]))
    return [*found, example.answer]


def picture_of(example: Example) -> np.ndarray:
    part = example.messages[0].parts[0]
    assert isinstance(part, Image)
    return np.asarray(part.source, dtype=np.float32)


def first_frame(example: Example) -> np.ndarray:
    source = example.messages[0].parts[0].source
    return np.asarray(source[0] if isinstance(source, tuple) else source, dtype=np.float32)


# ---- every world --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("split", SPLITS)
def test_an_example_is_the_same_whatever_was_drawn_before_it(name: str, split: Split) -> None:
    alone = world(name)(7, 5, split)
    after_others = [ALL[name](7, index, split) for index in (3, 0, 5)][-1]
    assert content(alone) == content(after_others)
    assert alone.truth == after_others.truth
    assert alone.id == f"{ALL[name].name}/{split}/7/5"
    assert ALL[name].planned(7, 5, split).answer == alone.answer


@pytest.mark.parametrize("name", WORLDS)
def test_examples_of_other_seeds_indices_and_splits_are_others(name: str) -> None:
    made = [ALL[name](seed, index, split) for seed in (0, 1) for index in (0, 1) for split in SPLITS]
    assert len({repr(content(example)[:-1]) for example in made}) == len(made)


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("split", SPLITS)
def test_the_answer_of_an_example_scores_one_under_its_scorer(name: str, split: Split) -> None:
    for plan in plans(ALL[name], 20, split):
        assert score(plan.scorer, plan.answer, plan.truth) == 1.0


@pytest.mark.parametrize("name", WORLDS)
def test_an_example_is_evidence_then_a_question_then_the_answer(name: str) -> None:
    example = ALL[name](0, 0)
    question, reply = example.messages
    assert question.role == "user" and reply.role == "assistant"
    assert reply.text == example.answer
    assert isinstance(question.parts[-1], Text) and len(question.parts) == 2


@pytest.mark.no_shape_hook
@pytest.mark.parametrize("name", CHEAP)
def test_the_prior_is_what_the_best_constant_answer_earns_on_train(name: str) -> None:
    """Brute force: the answers seen, or for a box and a time a grid of all sensible ones; the draws differ from those of the others."""
    prior = ALL[name].prior
    plan = ALL[name].planned(0, 0)
    if plan.scorer == "iou":
        candidates = [shapes.box_answer((a, a, 1000 - a, 1000 - a), "x") for a in range(100, 401, 10)]
        candidates += [
            shapes.box_answer((a, b, a + 500, b + 500), "x") for a in (150, 250, 350) for b in (150, 250, 350)
        ]
    elif plan.scorer == "temporal":
        candidates = [f"{t / 10:.1f} seconds" for t in range(0, 120, 2)]
    else:
        candidates = [answer for answer, _ in Counter(p.answer for p in plans(ALL[name], 1500)).most_common(60)]
    draws = 1500
    best, earned = best_constant(ALL[name], score, candidates, seed=1, draws=draws)
    _, stated = best_constant(ALL[name], score, [prior.answer], seed=1, draws=draws)
    error = 3.5 * math.sqrt(max(prior.score * (1 - prior.score), 0.01) / draws)
    assert stated == pytest.approx(prior.score, abs=error)
    # The best of many is luckier than its true worth, so its bound is wider by one deviation.
    assert earned <= prior.score + error * 4.5 / 3.5, best
    assert prior.score <= 0.25


def test_the_prior_of_pairs_kept_for_novel_knows_how_few_they_are() -> None:
    drawn = ALL["shapes.name"]
    answers = sorted({plan.answer for plan in plans(drawn, 200, "novel")})
    _, earned = best_constant(drawn, score, answers, draws=1500, split="novel")
    assert drawn.find_prior("novel").score == 1 / len(answers) == 0.25
    assert earned == pytest.approx(0.25, abs=0.05)


def test_a_needles_prior_is_what_the_best_constant_answer_earns() -> None:
    small = needle.tagged(64)
    best, earned = best_constant(small, score, needle.VALUES, draws=1500)
    assert small.prior.score == 0.2
    assert earned == pytest.approx(0.2, abs=0.04)
    assert best in ("green", "blue")  # colours that no tag lacks in train
    ten = needle.tagged(64, answers=10)
    assert ten.prior.score == pytest.approx(4 / 36)
    assert {plan.answer.split()[1] for plan in plans(ten, 200)} == set(needle.VALUES)


@pytest.mark.parametrize("name", ["shapes.name", "shapes.count", "digits", "clips.at_second", "text.digit"])
def test_the_stated_entropy_is_that_of_the_answers(name: str) -> None:
    counts = Counter(plan.answer for plan in plans(ALL[name], 4000))
    entropy = -sum(n / 4000 * math.log(n / 4000) for n in counts.values())
    assert ALL[name].prior.nats == pytest.approx(entropy, abs=0.02)


def test_the_entropy_of_a_box_is_that_of_a_side_and_two_places() -> None:
    # -log of the chance of each box drawn: one side of 401, one of 1001 - side places along each axis.
    found = [plan.truth["box"] for plan in plans(ALL["shapes.box"], 4000)]
    costs = [math.log(401) + 2 * math.log(1001 - (x2 - x1)) for x1, _, x2, _ in found]
    assert ALL["shapes.box"].prior.nats == pytest.approx(sum(costs) / len(costs), abs=0.02)


def test_the_entropy_of_a_moment_is_that_of_choosing_among_the_marks_one_reads() -> None:
    found = plans(ALL["clips.appear"], 3000)
    costs = [math.log(len(plan.truth["marks"]) - 1) for plan in found]
    assert ALL["clips.appear"].prior.nats == pytest.approx(sum(costs) / len(costs), abs=0.03)


def test_a_name_or_split_that_is_not_there_is_said() -> None:
    with pytest.raises(ValueError, match=r"there is no world 'shape'; choose one of shapes\.name"):
        world("shape")
    with pytest.raises(ValueError, match="the split is 'test'; it must be one of train, calibration, heldout, novel"):
        ALL["shapes.name"](0, 0, "test")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed is 0 and index is -1; both count from 0"):
        ALL["shapes.name"](0, -1)
    with pytest.raises(ValueError, match="the picture's side is 50; give a multiple of 32 from 32 up"):
        world("shapes.name", size=50)


# ---- splits -------------------------------------------------------------------------------------------------------


def pair_of(name: str, plan: Plan) -> set[tuple[str, str]]:
    """The combinations an example shows."""
    if name == "digits":
        return {(str(plan.truth["number"]), plan.truth["ink"])}
    if name == "glyphs":
        return set(pairwise(plan.answer))
    if name == "needle":
        return {(plan.truth["key"], plan.truth["answer"])}
    if isinstance(plan.facts, clips.Clip):
        return {(thing.colour, thing.shape) for thing in plan.facts.things}
    return {(thing.colour, thing.shape) for thing in plan.facts}


@pytest.mark.no_shape_hook
@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("shapes.name", 10_000),
        ("shapes.box", 10_000),
        ("shapes.count", 10_000),
        ("shapes.caption", 10_000),
        ("digits", 10_000),
        ("clips.appear", 10_000),
        ("glyphs", 10_000),
        ("clips.at_second", 1000),
        ("needle", 1000),
    ],
)
def test_combinations_kept_for_novel_never_appear_in_train(name: str, number: int) -> None:
    drawn = needle.tagged(32) if name == "needle" else ALL[name]
    train = set().union(*(pair_of(name, plan) for plan in plans(drawn, number)))
    novel = [pair_of(name, plan) for plan in plans(drawn, 300, "novel")]
    if name == "glyphs":  # one pair of the two is enough to make a word new
        kept = {(glyphs.LETTERS[a], glyphs.LETTERS[b]) for a, b in combinations(22, 22, "novel")}
        assert all(pairs & kept for pairs in novel)
        assert not train & kept
    else:
        assert not train & set().union(*novel)
    # Rows and columns are known: each half of a new combination was seen in others.
    for side in (0, 1):
        assert {pair[side] for pairs in novel for pair in pairs} <= {pair[side] for pair in train}


@pytest.mark.parametrize("name", ["shapes.name", "shapes.box", "shapes.count", "clips.appear", "glyphs", "text.digit"])
def test_no_scene_is_in_two_splits(name: str) -> None:
    scenes = {split: {repr(plan.facts) for plan in plans(ALL[name], 400, split)} for split in SPLITS}
    for i, one in enumerate(SPLITS):
        for two in SPLITS[i + 1 :]:
            assert not scenes[one] & scenes[two]


def test_a_scan_is_in_one_split_and_equal_scans_are_together() -> None:
    sets = {
        split: {scan.tobytes() for of in scans(split) for scan in of} for split in ("train", "calibration", "heldout")
    }
    numbers = {split: [len(of) for of in scans(split)] for split in ("train", "calibration", "heldout")}
    assert sum(map(sum, numbers.values())) == 1797
    assert min(numbers["heldout"]) >= 10 and min(numbers["calibration"]) >= 10
    assert not sets["train"] & sets["heldout"] and not sets["train"] & sets["calibration"]
    assert not sets["calibration"] & sets["heldout"]
    assert {scan.tobytes() for of in scans("novel") for scan in of} == sets["heldout"]


def test_prose_shown_in_train_is_shown_in_no_other_split() -> None:
    def sentences(split: Split) -> set[str]:
        told = [plan.facts for plan in plans(needle.tagged(256), 40, split)]
        hay = {s for one in told for s in one.split(". ")}
        return {s for s in hay if not any(colour in s for colour in needle.VALUES)}

    assert not sentences("train") & (sentences("heldout") | sentences("calibration"))


# ---- even draws ---------------------------------------------------------------------------------------------------


def assert_even(values: Sequence[float], low: float, high: float) -> None:
    counts, _ = np.histogram(values, bins=10, range=(low, high))
    assert counts.sum() == len(values)
    assert chisquare(counts).pvalue > 0.001, counts


@pytest.mark.parametrize("name", ["shapes.name", "shapes.box"])
def test_places_and_sides_are_even_over_all_that_fits(name: str) -> None:
    boxes = [plan.truth["objects"][0]["box"] for plan in plans(ALL[name], 3000)]
    sides = [x2 - x1 for x1, _, x2, _ in boxes]
    assert min(sides) >= 100 and max(sides) <= 500
    assert_even(sides, 99.5, 500.5)
    assert_even([(box[0] + 0.5) / (1001 - side) for box, side in zip(boxes, sides, strict=True)], 0, 1)
    assert_even([(box[1] + 0.5) / (1001 - side) for box, side in zip(boxes, sides, strict=True)], 0, 1)


@pytest.mark.parametrize(
    ("name", "number"), [("shapes.name", 20), ("shapes.count", 5), ("digits", 10), ("text.count", 5)]
)
def test_labels_are_even(name: str, number: int) -> None:
    counts = Counter(plan.answer for plan in plans(ALL[name], 3000))
    assert len(counts) == number
    assert chisquare(list(counts.values())).pvalue > 0.001, counts


def test_textures_inks_moments_and_depths_are_even() -> None:
    names = plans(ALL["shapes.name"], 2000)
    textures = Counter(plan.truth["objects"][0]["texture"] for plan in names)
    assert chisquare(list(textures.values())).pvalue > 0.001
    moments = [p for p in plans(ALL["clips.appear"], 3000) if len(p.truth["marks"]) == 6]
    slices = Counter(plan.truth["marks"].index(plan.truth["seconds"]) for plan in moments)
    assert set(slices) == {1, 2, 3, 4, 5} and chisquare(list(slices.values())).pvalue > 0.001
    assert_even([plan.truth["depth"] for plan in plans(needle.tagged(400), 400)], 0, 1)


def test_sizes_in_the_counting_world_do_not_tell_the_count() -> None:
    sides: dict[int, list[int]] = {n: [] for n in range(1, 6)}
    for plan in plans(ALL["shapes.count"], 1500):
        sides[plan.truth["number"]] += [thing.side for thing in plan.facts]
    means = [np.mean(of) for of in sides.values()]
    assert max(means) - min(means) < 8  # of 160 possible thousandths


# ---- what is painted ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", paint.SHAPES)
@pytest.mark.parametrize(
    ("x", "y", "side"), [(0.1, 0.2, 0.5), (0.0, 0.0, 0.31), (0.69, 0.5, 0.31), (0.503, 0.117, 0.25)]
)
def test_the_box_of_a_shape_is_where_its_ink_is(shape: str, x: float, y: float, side: float) -> None:
    raster = np.zeros((128, 128, 3), dtype=np.float32)
    paint.paint_shape(raster, shape=shape, ink=np.full(3, 1, np.float32), texture="filled", x=x, y=y, side=side)
    rows, columns = np.nonzero(raster[:, :, 0] > 0.02)[:2]
    edges = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    expected = (x * 128, y * 128, (x + side) * 128, (y + side) * 128)
    # The point of a triangle covers little of its pixel, and an edge may fall inside a pixel.
    assert edges == pytest.approx(expected, abs=1.6)


def test_the_ink_of_each_shape_is_its_area() -> None:
    areas = {}
    for shape in paint.SHAPES:
        raster = np.zeros((128, 128, 3), dtype=np.float32)
        paint.paint_shape(raster, shape=shape, ink=np.ones(3, np.float32), texture="filled", x=0.203, y=0.107, side=0.5)
        areas[shape] = float(raster[:, :, 0].sum() / 64**2)
    assert areas == pytest.approx({"circle": math.pi / 4, "square": 1, "triangle": 1 / 2, "cross": 5 / 9}, abs=0.01)


def test_a_circle_is_evenly_round_and_its_edge_is_smooth() -> None:
    raster = np.zeros((64, 64, 3), dtype=np.float32)
    paint.paint_shape(raster, shape="circle", ink=np.ones(3, np.float32), texture="filled", x=0.25, y=0.25, side=0.5)
    mask = raster[:, :, 0]
    assert np.allclose(mask, mask.T, atol=1e-5) and np.allclose(mask, mask[::-1], atol=1e-5)
    assert ((mask > 0.05) & (mask < 0.95)).sum() > 40


@pytest.mark.parametrize("size", [32, 64, 96, 128])
def test_pictures_have_the_size_asked_for(size: int) -> None:
    for name in ("shapes.name", "shapes.count", "digits", "glyphs"):
        options = {"heights": (6, 8)} if name == "glyphs" else {}
        assert picture_of(world(name, size=size, **options)(0, 0)).shape == (size, size, 3)


def test_an_enlarged_world_shows_each_painted_pixel_as_a_square_of_pixels() -> None:
    for small, large in (
        (world("shapes.box", size=64), enlarged(world("shapes.box", size=64), 2)),
        (world("clips.appear", size=32), enlarged(world("clips.appear", size=32), 2)),
    ):
        one, two = small(0, 3), large(0, 3)
        assert (one.answer, one.truth) == (two.answer, two.truth)
        before, after = (first_frame(example) for example in (one, two))
        assert after.shape == (2 * before.shape[0], 2 * before.shape[1], 3)
        assert (after == before.repeat(2, 0).repeat(2, 1)).all()


def test_words_cannot_be_enlarged() -> None:
    with pytest.raises(ValueError, match=r"text\.name shows more than pictures and clips; only these can be enlarged"):
        enlarged(world("text.name"), 2)(0, 0)


def test_the_colour_in_the_middle_of_a_filled_object_is_the_one_in_the_answer() -> None:
    for index in range(60):
        example = world("shapes.name", size=128)(0, index)
        thing = example.truth["objects"][0]
        if thing["texture"] == "striped":
            continue
        x1, y1, x2, y2 = thing["box"]
        pixel = picture_of(example)[int((y1 * 0.45 + y2 * 0.55) * 0.128), int((x1 + x2) / 2 * 0.128)]
        nearest = min(paint.COLOURS, key=lambda name: float(np.abs(pixel - np.array(paint.COLOURS[name])).sum()))
        assert example.answer == f"{thing['shape']}, {nearest}"


def test_stripes_change_the_look_and_not_the_name() -> None:
    flat, striped = (np.full((64, 64, 3), 200, dtype=np.float32) for _ in range(2))
    for raster, texture in ((flat, "filled"), (striped, "striped")):
        ink = np.array(paint.COLOURS["red"], dtype=np.float32)
        paint.paint_shape(raster, shape="square", ink=ink, texture=texture, x=0.1, y=0.1, side=0.5)
    assert flat[8:36, 8:36].std(axis=(0, 1)).max() < 1
    assert striped[8:36, 8:36, 0].std() > 40


def test_backgrounds_vary_in_lightness_slope_and_grain() -> None:
    made = [paint.background(np.random.default_rng(i), 64) for i in range(200)]
    levels = [float(raster.mean()) for raster in made]
    grains = [float((raster - raster.mean(axis=2, keepdims=True)).std()) for raster in made]
    assert min(levels) < 60 and max(levels) > 190
    assert max(grains) > 4 * min(grains)


# ---- each world's own promises ------------------------------------------------------------------------------------


def test_a_box_is_written_in_the_published_form() -> None:
    example = ALL["shapes.box"](0, 0)
    x1, y1, x2, y2 = example.truth["box"]
    label = example.truth["label"]
    assert example.answer == f'[{{"bbox_2d": [{x1}, {y1}, {x2}, {y2}], "label": "{label}"}}]'
    assert read_boxes(example.answer).items == (Box(x1, y1, x2, y2, label),)
    assert label in example.messages[0].text


def test_distractors_have_other_names_and_do_not_touch_the_object() -> None:
    crowded = world("shapes.box", distractors=3)
    sizes = set()
    for plan in plans(crowded, 200):
        thing, *others = plan.facts
        sizes.add(len(others))
        assert all(other.name != thing.name and shapes.apart(thing, other) for other in others)
    assert sizes == {0, 1, 2, 3}


def test_counted_objects_never_touch_and_captions_run_from_left_to_right() -> None:
    for plan in plans(ALL["shapes.count"], 200):
        assert len(plan.facts) == plan.truth["number"]
        assert all(shapes.apart(a, b) for i, a in enumerate(plan.facts) for b in plan.facts[:i])
    for plan in plans(ALL["shapes.caption"], 200):
        middles = [thing.x + thing.side / 2 for thing in plan.facts]
        assert all(b - a >= 60 for a, b in pairwise(middles))
        assert plan.answer.count("a ") >= len(middles)
    assert shapes.listing(["a", "b", "c"]) == "a, b and c"


def test_a_digit_is_a_real_scan_anywhere_at_a_third_to_most_of_the_side() -> None:
    for plan in plans(ALL["digits"], 300):
        x1, y1, x2, y2 = plan.truth["scan_box"]
        assert 300 <= x2 - x1 == y2 - y1 <= 800 and x1 >= 0 and x2 <= 1000 and y1 >= 0 and y2 <= 1000
        assert scans("train")[int(plan.answer)][plan.truth["scan"]].shape == (8, 8)


def test_ink_of_a_digit_stands_out_from_its_paper() -> None:
    differences = []
    for index in range(40):
        example = world("digits", size=64)(0, index)
        pixels = picture_of(example).mean(axis=2)
        differences.append(np.percentile(np.abs(pixels - np.median(pixels)), 99))
    assert min(differences) > 25


def test_without_scikit_learn_the_digits_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match=r"which is missing; install qvl\[test\]"):
        _all_scans.__wrapped__()


def test_a_clip_has_eight_to_sixteen_frames_and_one_mark_near_the_answer() -> None:
    for plan in plans(ALL["clips.appear"], 300):
        assert len(plan.facts.tenths) in (8, 10, 12, 14, 16)
        near = [mark for mark in plan.truth["marks"] if abs(mark - plan.truth["seconds"]) <= 0.5]
        assert near == [plan.truth["seconds"]]
        assert abs(plan.truth["first_frame_seconds"] - plan.truth["seconds"]) < 0.41
        assert plan.truth["marks"].index(plan.truth["seconds"]) > 0


def test_the_marks_of_a_clip_are_those_the_network_is_given() -> None:
    for index in range(5):
        example = ALL["clips.appear"](0, index)
        video = example.messages[0].parts[0]
        assert isinstance(video, Video)
        visual = frames_video(video.source, seconds=video.frame_seconds)
        assert visual.seconds == pytest.approx(example.truth["marks"])


def test_the_object_of_a_clip_is_absent_before_its_moment_and_present_from_then() -> None:
    example = ALL["clips.appear"](0, 1)
    video = example.messages[0].parts[0]
    assert isinstance(video, Video) and video.frame_seconds is not None
    x1, y1, x2, y2 = (int(v * 0.064) for v in example.truth["object"]["box"])
    frames = [np.asarray(frame, dtype=np.float32)[y1:y2, x1:x2] for frame in video.source]
    changes = [float(np.abs(frame - frames[0]).mean()) for frame in frames]
    for seconds, change in zip(video.frame_seconds, changes, strict=True):
        assert (change > 20) == (seconds >= example.truth["first_frame_seconds"])


@pytest.mark.parametrize("slices", [2, 32])
def test_the_asked_second_shows_the_answers_colour_and_others_distract(slices: int) -> None:
    for plan in plans(clips.at_second(slices=slices), 40):
        clip = plan.facts
        asked = [mark / 10 for mark in clip.marks].index(plan.truth["seconds"])
        assert len(clip.marks) == slices
        assert clip.things[asked].colour == plan.answer
        assert f"at {plan.truth['seconds']:.1f} seconds" in plan.question


def test_letters_are_as_high_as_told_and_of_one_word() -> None:
    for height in (5, 6, 8, 10):
        mask = glyphs._stencil("HHH", height)
        assert height <= mask.shape[0] <= height + 2
    picture = picture_of(world("glyphs", size=64, heights=(10, 10))(0, 0))
    assert picture.max() - picture.min() > 90
    with pytest.raises(ValueError, match="give 4 <= least <= most <= 16"):
        world("glyphs", size=64, heights=(3, 8))


# ---- needles ------------------------------------------------------------------------------------------------------


def test_a_needle_stands_at_its_depth_in_a_text_of_the_length_asked_for() -> None:
    for depth in (0.0, 0.25, 0.5, 1.0):
        for plan in plans(needle.tagged(2048, depth=depth), 3):
            assert 2048 <= needle.count_words(plan.facts) < 2048 + 30
            fact = f"Tag {plan.truth['key']} {plan.truth['answer']}."
            assert plan.facts.count(fact) == 1
            assert plan.truth["depth"] == pytest.approx(depth, abs=0.02)


def test_each_tag_is_set_once_and_colours_without_a_tag_distract() -> None:
    for plan in plans(needle.tagged(512, distractors=8), 20):
        assert all(plan.facts.count(f"Tag {key} ") == 1 for key in needle.KEYS)
        colours = sum(plan.facts.count(f" {colour}.") for colour in needle.VALUES)
        assert colours == 4 + 8


def test_needles_hide_in_prose_that_the_caller_gives_measured_as_the_caller_says() -> None:
    prose = [f"Sentence number {n} tells of nothing much." for n in range(400)] + ["An anchor lay there."]
    hidden = needle.tagged(1000, hay=needle.Hay(prose, len))
    plan = hidden.planned(0, 0)
    assert 1000 <= plan.truth["length"] < 1100
    assert "tells of nothing much" in plan.facts and "An anchor lay there" not in plan.facts
    assert "harbour" not in plan.facts
    with pytest.raises(ValueError, match="the prose gives a split only 0 sentences"):
        needle.Hay(["Too short."])
    with pytest.raises(ValueError, match="depth is 2; it goes from 0, the start, to 1, the end"):
        needle.tagged(depth=2)


# ---- told worlds --------------------------------------------------------------------------------------------------


def test_what_is_told_holds_the_answer_and_the_same_question_is_asked() -> None:
    told = ALL["text.box"](0, 4)
    x1, y1, x2, y2 = told.truth["box"]
    assert f"reaches from {x1} to {x2} across and from {y1} to {y2} down." in told.messages[0].text
    clip = ALL["text.appear"](0, 4)
    line = next(s for s in clip.messages[0].text.splitlines() if s.startswith(f"<{clip.answer}>"))
    named = clip.truth["object"]
    assert line.endswith(f"{named['colour']} {named['shape']}.")
    shape, colour = ALL["text.name"](0, 4).answer.split(", ")
    assert f"{colour} {shape}" in ALL["text.name"](0, 4).messages[0].text
    for kind in ("name", "box", "count", "appear"):
        assert ALL[f"text.{kind}"].plan is text.KINDS[kind][0].plan
        assert ALL[f"text.{kind}"].prior == text.KINDS[kind][0].prior
    with pytest.raises(ValueError, match="nothing of kind 'smell' can be told"):
        text.told("smell")


# ---- the blind reader ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shapes.name", "digits", "text.count"])
def test_a_blind_set_asks_the_same_and_shows_the_evidence_of_others(name: str) -> None:
    seen = [ALL[name](0, index) for index in range(12)]
    unseen = blind(seen)
    for mine, swapped in zip(seen, unseen, strict=True):
        assert (swapped.id, swapped.answer, swapped.truth) == (mine.id, mine.answer, mine.truth)
        assert swapped.messages[0].parts[-1] == mine.messages[0].parts[-1]
        assert content(swapped)[0] != content(mine)[0]
    assert sorted(map(hash, (repr(content(e)[0]) for e in seen))) == sorted(
        map(hash, (repr(content(e)[0]) for e in unseen))
    )


def test_a_blind_clip_keeps_its_times_and_shows_frames_of_another() -> None:
    seen = [ALL["clips.appear"](0, index) for index in range(40)]
    for mine, swapped in zip(seen, blind(seen), strict=True):
        own, other = mine.messages[0].parts[0], swapped.messages[0].parts[0]
        assert isinstance(own, Video) and isinstance(other, Video)
        assert own.frame_seconds == other.frame_seconds
        assert len(own.source) == len(other.source)
        assert own.source[-1].tobytes() != other.source[-1].tobytes()


def test_an_example_alone_of_its_kind_cannot_be_blinded() -> None:
    with pytest.raises(ValueError, match="only one example is alignment with image"):
        blind([ALL["shapes.name"](0, 0)])


def test_reading_what_a_blind_set_shows_earns_the_prior() -> None:
    """The perfect reader of text falls to guessing when the evidence is exchanged, and to one when it is not."""

    def read(example: Example) -> str:
        told = example.messages[0].parts[0]
        assert isinstance(told, Text)
        return str(told.text.count("(")) if "you see" in told.text else ""

    seen = [ALL["text.count"](0, index) for index in range(600)]
    assert np.mean([score(e.scorer, read(e), e.truth) for e in seen]) == 1.0
    assert np.mean([score(e.scorer, read(e), e.truth) for e in blind(seen)]) == pytest.approx(0.2, abs=0.06)


def test_pictures_are_rgb_pictures() -> None:
    part = ALL["shapes.name"](0, 0).messages[0].parts[0]
    assert isinstance(part, Image) and isinstance(part.source, Raster.Image) and part.source.mode == "RGB"
