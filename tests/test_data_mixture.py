"""The mixture file: sources, weights, stages, replay, and what is wrong with it in a sentence."""

from pathlib import Path

import pytest

from qvl.data.mixture import mixture_from_dict, read_mixture


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_mixture_is_a_small_yaml_file(tmp_path) -> None:
    text = """
sources:
  - {path: captions, weight: 3, category: caption}
  - {path: s3://bucket/text, weight: 1, max_epochs: 2}
tokens: 1_000_000
"""
    mixture = read_mixture(written(tmp_path / "m.yaml", text))
    one, two = mixture.resolved()
    assert (one.path, one.weight, one.category, one.max_epochs) == (str(tmp_path / "captions"), 0.75, "caption", None)
    assert (two.path, two.weight, two.max_epochs) == ("s3://bucket/text", 0.25, 2.0)
    assert mixture.stage_weights() == ((1_000_000, (0.75, 0.25)),)


def test_replay_brings_an_earlier_mixture_in_at_its_share(tmp_path) -> None:
    (tmp_path / "old").mkdir()
    written(tmp_path / "old" / "s0.yaml", "sources: [{path: a, weight: 1}, {path: b, weight: 3}]")
    written(tmp_path / "old" / "s1.yaml", "sources: [{path: c}]")
    text = "sources: [{path: new}]\nreplay: [{path: old/s0.yaml, share: 0.2}, {path: old/s1.yaml, share: 0.2}]"
    sources = read_mixture(written(tmp_path / "m.yaml", text)).resolved()
    assert [(Path(s.path).relative_to(tmp_path).as_posix(), round(s.weight, 6)) for s in sources] == [
        ("new", 0.6),
        ("old/a", 0.05),
        ("old/b", 0.15),
        ("old/c", 0.2),
    ]


def test_stages_weigh_categories_and_paths() -> None:
    mixture = mixture_from_dict(
        {
            "sources": [
                {"path": "a", "category": "text", "weight": 1},
                {"path": "b", "category": "text", "weight": 3},
                {"path": "c"},
            ],
            "stages": [{"tokens": 100, "weights": {"text": 1}}, {"tokens": 50, "weights": {"text": 1, "c": 3}}],
        }
    )
    assert mixture.stage_weights() == ((100, (0.25, 0.75, 0.0)), (50, (0.0625, 0.1875, 0.75)))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("sources: []", "the mixture has no sources"),
        ("- a", r"m\.yaml holds a list; expected the key sources"),
        ("sources: [{path: a, wieght: 2}]", r"unknown key 'sources\[0\]\.wieght' in .*m\.yaml; did you mean 'weight'"),
        ("sources: [{path: a, weight: -1}]", "source a has weight -1.0; expected a number of at least 0"),
        ("sources: [{path: a, weight: 0}]", "every source of the mixture has weight 0"),
        ("sources: [{path: a}]\nreplay: [{path: b, share: 1.5}]", "replay of b has share 1.5"),
        (
            "sources: [{path: a}]\nstages: [{tokens: 5, weights: {b: 1}}]",
            "a stage weighs 'b', which is no category or path",
        ),
        ("sources: [{path: a}]\nstages: [{tokens: 0, weights: {a: 1}}]", "a stage has 0 tokens"),
        ("sources: [", r"m\.yaml is not YAML"),
    ],
)
def test_what_is_wrong_with_a_mixture_is_said_in_a_sentence(tmp_path, text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        read_mixture(written(tmp_path / "m.yaml", text))


def test_a_mixture_is_read_by_the_rules_of_every_other_yaml_file(tmp_path) -> None:
    text = "sources:\n  - &first {path: a, weight: 1e-3, category: no}\n  - {<<: *first, path: b}\n"
    first, second = read_mixture(written(tmp_path / "m.yaml", text)).sources
    assert (first.path, first.weight, first.category) == ("a", 0.001, "no")
    assert (second.path, second.weight, second.category) == ("b", 0.001, "no")


def test_a_mixture_that_is_not_there_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"none\.yaml does not exist"):
        read_mixture(tmp_path / "none.yaml")


def test_data_where_a_mixture_file_is_wanted_is_told_how_to_become_one(tmp_path: Path) -> None:
    for name in ("mine.jsonl", "shards"):
        (tmp_path / "shards").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match="is data, not a mixture file; import it"):
            read_mixture(tmp_path / name)
