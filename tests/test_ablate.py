"""Ablations: arms that differ in one switch, begin equal and see the same; honest statistics; finished runs stay finished."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from qvl.commands import cli
from qvl.commands.ablate import Ablate
from qvl.core.log import read_jsonl
from qvl.model.pack import pack
from qvl.prompt.message import user
from qvl.recipes.ablate import runner
from qvl.recipes.ablate.ablation import Ablation, Material, Probe, Trained, answers_right, surprise
from qvl.recipes.ablate.arm import Arm, config_of, maker_of, sample_of
from qvl.recipes.ablate.catalogue import ABLATIONS
from qvl.recipes.ablate.clips import NAMES, ColourClip, after_flash, change
from qvl.recipes.ablate.compare import compare
from qvl.recipes.ablate.deepstack import letter
from qvl.recipes.ablate.mrope import MROPE
from qvl.recipes.ablate.report import differences, write_report
from qvl.recipes.ablate.toy import toy_config, toy_processor
from qvl.recipes.ablate.v0 import V0
from qvl.recipes.made_stream import MadeStream
from qvl.scoring.registry import score
from qvl.worlds.world import World

CLIPS = after_flash(3, 4)
WORLDS = [
    CLIPS,
    after_flash(32, 32),
    change((1.0, 2.0)),
    change((0.5,)),
    change((4.0,)),
    change((0.0,)),
    letter(4, 8),
]


@pytest.fixture(scope="module")
def material() -> Material:
    return Material(processor=toy_processor([CLIPS, change((0.0,), is_told=True), letter(4, 8)]))


# ---- arms


@pytest.mark.parametrize("name", ABLATIONS)
def test_the_arms_of_a_pair_differ_in_one_switch(name: str) -> None:
    first, *others = (asdict(arm) for arm in ABLATIONS[name].arms.values())
    assert others
    switches = {switch for other in others for switch in first if other[switch] != first[switch]}
    assert switches == {"mrope": {"axes"}, "timestamps": {"time"}, "deepstack": {"deepstack"}, "loss": {"power"}}.get(
        name, {"pre_stage"}
    )


def test_an_arms_network_is_qwen3_vls_but_for_its_switch(material: Material) -> None:
    base = toy_config(material.processor.tokenizer)
    assert config_of(Arm(), base) == base
    assert config_of(Arm(power=0.0), base) == config_of(Arm(pre_stage=False), base) == base
    chunked = config_of(Arm(axes="chunked"), base)
    assert replace(chunked, text=replace(chunked.text, rope=base.text.rope)) == base
    assert chunked.text.rope == replace(base.text.rope, scheme="chunked")
    assert config_of(Arm(time="seconds"), base).text.rope.scheme == "absolute_time"
    without = config_of(Arm(deepstack=False), base)
    assert without == replace(base, vision=replace(base.vision, deepstack_visual_indexes=()))


@pytest.mark.parametrize("name", ABLATIONS)
def test_arms_of_a_seed_begin_with_the_same_weights_and_other_seeds_with_others(name: str, material: Material) -> None:
    first, *others = (dict(runner.start(a, material, seed=5).named_parameters()) for a in ABLATIONS[name].arms.values())
    for other in others:
        assert other.keys() <= first.keys()
        assert all("deepstack_merger" in missing for missing in first.keys() - other.keys())
        assert all(torch.equal(first[key], other[key]) for key in other)
    another = dict(runner.start(Arm(), material, seed=6).named_parameters())
    assert not torch.equal(another["lm_head.weight"], first["lm_head.weight"])


@pytest.mark.parametrize("name", ["mrope", "timestamps", "deepstack", "v0"])
def test_arms_of_a_seed_see_the_same_examples_at_every_step(name: str) -> None:
    ablation = ABLATIONS[name]
    shared = ablation.prepare()
    seen = []
    for arm in ablation.arms.values():
        config = runner.start(arm, shared, seed=0).config
        stream = MadeStream(ablation.learn(shared, arm, 4), config, samples=6, seed=4, ahead=0)
        (step,) = stream.next_step()
        stream.close()
        # Inside a pack shorter samples stand first, and other spellings of time may be shorter.
        seen.append((sorted(step.ids), int(step.batch.patch_PX.sum()), step.batch.patch_PX.shape))
    assert seen[1:] == seen[:1] * (len(seen) - 1)


# ---- samples


def test_a_slice_has_its_time_before_it_or_in_its_rotary_ids(material: Material) -> None:
    clip = ColourClip(squares=((0,), (0,), (1,)), seconds=(0.0, 0.5, 1.0, 1.5, 2.0, 2.5))
    world = change((2.0,))
    example = replace(
        world(0, 0), messages=(replace(world(0, 0).messages[0], parts=user(*show_then_ask(world, clip)).parts),)
    )
    samples = {
        time: sample_of(example.messages, material.processor, Arm(time=time), is_prompt=True)
        for time in ("marks", "order", "seconds")
    }
    marks = "<0.2 seconds><|vision_start|><|video_pad|><|vision_end|><1.2 seconds><|vision_start|><|video_pad|>"
    decode = material.processor.tokenizer.decode
    assert marks in decode(samples["marks"].token_T.tolist())
    run = "<|vision_start|><|video_pad|><|video_pad|><|video_pad|><|vision_end|>"
    assert run in decode(samples["seconds"].token_T.tolist())
    assert torch.equal(samples["order"].token_T, samples["seconds"].token_T)
    assert samples["marks"].grid_I3.tolist() == [[1, 2, 2]] * 3
    assert samples["seconds"].grid_I3.tolist() == samples["order"].grid_I3.tolist() == [[3, 2, 2]]
    assert samples["marks"].second_I is samples["order"].second_I is None
    assert samples["seconds"].second_I.tolist() == [1.0]

    def time_ids(time: str) -> list[int]:
        config = config_of(Arm(time=time), toy_config(material.processor.tokenizer))
        batch = pack([samples[time]], config)
        place_M = batch.position_3T[0, batch.visual_M]
        return (place_M - place_M[0]).tolist()

    assert time_ids("order") == [0, 1, 2]
    assert time_ids("seconds") == [0, 2, 4]  # Qwen2.5-VL: two ids a second


def show_then_ask(world: World, clip: ColourClip) -> tuple:
    return (*world.show(clip, np.random.default_rng(0)), "When?")


def test_the_answers_tokens_and_only_they_are_trained(material: Material) -> None:
    example = CLIPS(0, 0)
    for time in ("marks", "order", "seconds"):
        sample = sample_of(example.messages, material.processor, Arm(time=time))
        trained = sample.token_T[sample.is_target_T].tolist()
        assert material.processor.tokenizer.decode(trained).startswith(f"{example.answer}<|im_end|>")


def test_surprise_is_what_the_answers_tokens_cost_summed_over_each_answer(material: Material) -> None:
    run = Trained(model=runner.start(Arm(), material, seed=5).eval(), material=material, arm=Arm(), seed=2)
    total = 0.0
    for example in run.examples(CLIPS, 3):
        sample = sample_of(example.messages, material.processor, Arm())
        assert sample.is_target_T is not None
        with torch.no_grad():
            logits = run.model.logits(run.model(pack([sample], run.model.config)))[:-1].double()
        place = sample.is_target_T[1:]
        total += float(torch.nn.functional.cross_entropy(logits[place], sample.token_T[1:][place], reduction="sum"))
    assert surprise(CLIPS, 3).measure(run) == pytest.approx(total / 3, rel=1e-5)
    assert all(p.requires_grad and p.grad is None for p in run.model.parameters())


# ---- worlds


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)
def test_the_answer_of_an_example_scores_one_and_comes_again(world: World) -> None:
    for index in range(20):
        example = world(3, index, "heldout")
        assert score(example.scorer, example.answer, example.truth) == 1.0
        assert world.planned(3, index, "heldout") == world.planned(3, index, "heldout")
    assert world(3, 0, "train").id != world(3, 0, "heldout").id


def test_the_colour_after_the_flash_is_on_the_side_that_is_asked_for() -> None:
    for index in range(40):
        plan = CLIPS.planned(0, index)
        flash = plan.facts.squares.index((-1, -1))
        side = 0 if "left" in plan.question else 1
        assert NAMES[plan.facts.squares[flash + 1][side]] == plan.answer


@pytest.mark.no_shape_hook  # thousands of scorings
@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)
def test_the_prior_is_what_its_constant_answer_earns(world: World) -> None:
    prior, plans = world.prior, [world.planned(11, index) for index in range(600)]
    earned = sum(score(p.scorer, prior.answer, p.truth) for p in plans) / len(plans)
    assert earned == pytest.approx(prior.score, abs=0.07)


def test_frames_come_at_the_rate_asked_for_and_the_mark_is_the_slices_middle() -> None:
    plan = change((0.5,)).planned(0, 1)
    assert plan.facts.seconds[:4] == (0.0, 2.0, 4.0, 6.0)
    at = [row[0] for row in plan.facts.squares].index(plan.facts.squares[-1][0])
    assert plan.truth["seconds"] == 4.0 * at + 1.0
    gaps = {
        round(b - a, 1) for a, b in zip(*(change((0.0,)).planned(0, 1).facts.seconds[i:] for i in (0, 1)), strict=False)
    }
    assert len(gaps) > 2


# ---- statistics


def test_three_pairs_whose_numbers_can_be_checked_by_hand() -> None:
    # differences .1, .2, .3: mean .2, deviation .1, error .1 / sqrt 3; t(.975, 2) = 4.303, t(.8, 2) = 1.061
    found = compare("p", "b", "a", [0.5, 0.7, 0.9], [0.4, 0.5, 0.6], is_less_better=False)
    assert found.difference == pytest.approx(0.2)
    assert found.error == pytest.approx(0.057735, abs=1e-5)
    assert found.margin == pytest.approx(4.3027 * 0.057735, abs=1e-4)
    assert found.least_seen == pytest.approx((4.3027 + 1.0607) * 0.057735, abs=1e-4)
    assert not found.is_seen
    assert found.verdict == "no difference seen (+0.2 +- 0.058); 3 seeds would have seen 0.31"


def test_a_difference_beyond_its_interval_is_seen_and_says_who_is_better() -> None:
    values = [0.50, 0.52, 0.54, 0.56], [0.40, 0.43, 0.43, 0.46]
    assert compare("p", "b", "a", *values, is_less_better=False).verdict == "b better by 0.1 +- 0.0041"
    assert compare("p", "b", "a", *values, is_less_better=True).verdict == "a better by 0.1 +- 0.0041"


def test_one_seed_gives_no_verdict_and_equal_seeds_say_so() -> None:
    one = compare("p", "b", "a", [0.5], [0.25], is_less_better=False)
    assert (one.error, one.least_seen, one.is_seen) == (None, None, False)
    assert one.verdict == "one seed: b less a is +0.25, and nothing says how much of it is chance"
    assert compare("p", "b", "a", [1.0, 1.0], [1.0, 1.0], is_less_better=False).verdict == "the same in every seed"
    with pytest.raises(ValueError, match="p: 2 values of b came for 1 of a"):
        compare("p", "b", "a", [1.0, 2.0], [1.0], is_less_better=False)


def test_arms_that_do_no_better_than_a_constant_answer_have_not_learned_it() -> None:
    dumb = compare("p", "b", "a", [0.1, 0.12], [0.11, 0.1], is_less_better=False, without_looking=0.17)
    assert dumb.verdict.startswith("neither arm learned it; no difference seen")
    nats = compare("p", "b", "a", [1.9, 1.8], [1.0, 1.2], is_less_better=True, without_looking=1.79)
    assert nats.is_learned


@pytest.mark.no_shape_hook  # thousands of comparisons
def test_the_least_visible_difference_is_seen_about_four_times_in_five() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2000, 5, generator=generator)
    # deviation 1 and five seeds: (t(.975, 4) + t(.8, 4)) / sqrt 5 = (2.776 + .941) / 2.236
    pairs = (noise + 1.662).tolist()
    seen = sum(compare("p", "b", "a", row, [0.0] * 5, is_less_better=False).is_seen for row in pairs)
    assert 0.75 < seen / len(pairs) < 0.9


# ---- runs


def tiny(**changes: object) -> Ablation:
    """The mrope pair with little of everything."""
    world = after_flash(3, 3)

    def learn(material: Material, arm: Arm, seed: int):
        return {"clips": (maker_of(world, material.processor, arm, seed=seed), 1.0)}

    settings = {
        "prepare": lambda: Material(processor=toy_processor([world])),
        "learn": learn,
        "probes": {"right": answers_right(world, 4), "nats": surprise(world, 4)},
        "samples": 3,
    }
    return replace(MROPE, **(settings | changes))


def test_every_arm_and_seed_becomes_a_row_a_report_and_a_page(tmp_path: Path) -> None:
    ablation = tiny()
    rows = runner.run_ablation(ablation, tmp_path, seeds=2, steps=3)
    assert [(row["arm"], row["seed"]) for row in rows] == [
        ("interleaved", 0),
        ("chunked", 0),
        ("interleaved", 1),
        ("chunked", 1),
    ]
    assert read_jsonl(tmp_path / "rows.jsonl") == rows
    assert all(0 <= row["probes"]["right"] <= 1 < row["probes"]["nats"] for row in rows)
    assert rows[0]["probes"] != rows[1]["probes"] != rows[2]["probes"]
    found = write_report(ablation, rows, tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert [d["probe"] for d in report["differences"]] == ["right", "nats"] == [d.probe for d in found]
    assert report["differences"][1]["verdict"] == found[1].verdict
    page = (tmp_path / "report.html").read_text()
    assert page.count("<circle") == 2 * 2 * 2  # probes, arms, seeds
    assert "no correction" in page.lower()
    assert not list(tmp_path.glob("*/step-*"))


def test_a_run_can_be_had_again_to_the_bit(tmp_path: Path) -> None:
    first, again = (runner.run_ablation(tiny(), tmp_path / name, seeds=1, steps=3) for name in ("one", "two"))
    assert [row["probes"] for row in first] == [row["probes"] for row in again]
    assert [row["loss"] for row in first] == [row["loss"] for row in again]


def test_finished_runs_are_not_trained_again_and_more_seeds_go_on(tmp_path: Path) -> None:
    said: list[str] = []
    before = runner.run_ablation(tiny(), tmp_path, seeds=1, steps=2)
    after = runner.run_ablation(tiny(), tmp_path, seeds=2, steps=2, tell=said.append)
    assert after[:2] == before
    assert [line for line in said if line.startswith("run")] == [
        "run 1 of 2: interleaved, seed 1",
        "run 2 of 2: chunked, seed 1",
    ]
    said.clear()
    assert runner.run_ablation(tiny(), tmp_path, seeds=2, steps=2, tell=said.append) == after
    assert said == []


def test_a_folder_holds_runs_of_one_length(tmp_path: Path) -> None:
    runner.run_ablation(tiny(), tmp_path, seeds=1, steps=2)
    with pytest.raises(ValueError, match="rows of the two cannot be compared"):
        runner.run_ablation(tiny(), tmp_path, seeds=1, steps=3)


def test_minutes_become_steps_once(tmp_path: Path) -> None:
    steps = runner.steps_within(tiny(), 0.01, tmp_path)
    assert steps >= 10
    assert not (tmp_path / "timing").exists()
    runner.run_ablation(tiny(), tmp_path, seeds=1, steps=2)
    assert runner.steps_within(tiny(), 5.0, tmp_path) == 2


def test_differences_are_taken_over_the_seeds_both_arms_have() -> None:
    probes = {"right": Probe(measure=lambda run: 0.0, unit="")}
    rows = [
        {"arm": arm, "seed": seed, "probes": {"right": value}}
        for arm, seed, value in [("interleaved", 0, 0.2), ("chunked", 0, 0.5), ("interleaved", 1, 0.9)]
    ]
    (found,) = differences(tiny(probes=probes), rows)
    assert (found.seeds, found.arm, found.against, round(found.difference, 3)) == (1, "chunked", "interleaved", 0.3)


def test_the_switches_reach_the_training(tmp_path: Path) -> None:
    """Two arms that begin equal and see the same are no longer equal after three steps, whichever switch is thrown."""
    clip, sign, told = CLIPS, letter(4, 8), change((0.0,), is_told=True)
    shared = Material(processor=toy_processor([clip, sign, told]))
    shows = {"mrope": [clip], "timestamps": [clip], "deepstack": [sign], "loss": [sign, told]}  # answers of two lengths
    for pair, worlds in shows.items():
        ablation = tiny(
            arms=ABLATIONS[pair].arms,
            learn=lambda m, arm, seed, worlds=worlds: {
                world.name: (maker_of(world, m.processor, arm, seed=seed), 1.0) for world in worlds
            },
            samples=6,
        )
        heads = [
            runner.trained(ablation, arm, shared, tmp_path / f"{pair}-{name}", seed=0, steps=3).lm_head.weight
            for name, arm in ablation.arms.items()
        ]
        assert all(not torch.equal(heads[0], other) for other in heads[1:]), pair


def test_the_pre_stage_takes_its_steps_from_the_same_budget(tmp_path: Path) -> None:
    shared = V0.prepare()
    ablation = replace(V0, samples=4)
    with_it = runner.trained(ablation, Arm(), shared, tmp_path / "with", seed=0, steps=4)
    runner.trained(ablation, Arm(pre_stage=False), shared, tmp_path / "without", seed=0, steps=4)
    steps = {path.parent.name: len(read_jsonl(path)) for path in tmp_path.rglob("log.jsonl")}
    assert steps == {"pre_stage": 2, "with": 2, "without": 4}
    assert all(parameter.requires_grad for parameter in with_it.parameters())


# ---- the command


def test_the_command_says_what_it_cannot_do(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, sentence in (
        (["--steps", "5", "--minutes-per-run", "1"], "--steps and --minutes-per-run both say how long a run is"),
        (["--seeds", "0"], "seeds is 0"),
        (["--steps", "1"], "steps is 1"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["ablate", "mrope", *argv])
        assert sentence in " ".join(capsys.readouterr().err.split())
    assert Ablate(name="loss").seeds == 3


@pytest.mark.slow
def test_an_ablation_end_to_end_sees_letters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["ablate", "deepstack", "--seeds", "1", "--steps", "30", "--threads", "1", "--out", str(tmp_path)]
    assert cli.main(argv) == 0
    out = "".join(capsys.readouterr().out.split())  # lines are broken anywhere
    assert "oneseed" in out and "report.html" in out
    rows = read_jsonl(tmp_path / "rows.jsonl")
    assert [row["parameters"] for row in rows] == sorted((row["parameters"] for row in rows), reverse=True)
    assert all(row["probes"]["9-11 pixels, nats"] < 2.2 for row in rows)
