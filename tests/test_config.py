"""Config: what round-trips, and the sentence each mistake is answered with."""

import dataclasses
import enum
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvl.commands.cli import dump_yaml, load_yaml
from qvl.core.config import FLAT, from_dict, to_dict


class Order(enum.Enum):
    RANDOM = 1
    SORTED = 2


@dataclass(frozen=True, kw_only=True)
class Adam:
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)


@dataclass(frozen=True, kw_only=True)
class Sgd:
    learning_rate: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Train:
    model: str
    steps: int = 10
    temperature: float = 1.0
    optimizer: Adam | Sgd = field(default_factory=Adam)
    warmup: Sgd | None = None
    order: Order = Order.RANDOM
    dtype: Literal["fp32", "bf16"] = "fp32"
    files: tuple[Path, ...] = ()
    weights: dict[str, float] = field(default_factory=dict)
    seed: int | None = None
    cap: int | float | str = 0
    shuffle: bool = True
    stages: tuple[Adam, ...] = ()


def refusal(data: Any) -> str:
    with pytest.raises(ValueError) as caught:
        from_dict(Train, data, where="run.yaml")
    return str(caught.value)


def test_plain_values_become_a_config() -> None:
    data = {"model": "tiny", "optimizer": {"kind": "Sgd", "learning_rate": 1}, "files": ["a", "b"], "order": "SORTED"}
    config = from_dict(Train, data)
    assert config == Train(
        model="tiny", optimizer=Sgd(learning_rate=1.0), files=(Path("a"), Path("b")), order=Order.SORTED
    )
    assert type(config.optimizer.learning_rate) is float


def test_a_config_becomes_plain_values() -> None:
    plain = to_dict(Train(model="tiny", files=(Path("a"),), stages=(Adam(),)))
    assert plain == {
        "model": "tiny",
        "steps": 10,
        "temperature": 1.0,
        "optimizer": {"kind": "Adam", "learning_rate": 1e-4, "betas": [0.9, 0.95]},
        "warmup": None,
        "order": "RANDOM",
        "dtype": "fp32",
        "files": ["a"],
        "weights": {},
        "seed": None,
        "cap": 0,
        "shuffle": True,
        "stages": [{"learning_rate": 1e-4, "betas": [0.9, 0.95]}],
    }


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"model": "m", "temprature": 1}, "unknown key 'temprature' in run.yaml; did you mean 'temperature'?"),
        (
            {"model": "m", "optimizer": {"kind": "Adam", "beta": 1}},
            "unknown key 'optimizer.beta' in run.yaml; did you mean 'betas'?",
        ),
        ({"model": "m", "warmup": {"zzz": 1}}, "unknown key 'warmup.zzz' in run.yaml; known: learning_rate"),
        ({}, "run.yaml lacks model; Train has no default for it"),
        ({"model": "m", "steps": "ten"}, "'steps' in run.yaml is 'ten' (str); expected a whole number"),
        ({"model": "m", "steps": 1.5}, "'steps' in run.yaml is 1.5 (float); expected a whole number"),
        ({"model": "m", "steps": True}, "'steps' in run.yaml is True (bool); expected a whole number"),
        ({"model": 7}, "'model' in run.yaml is 7 (int); expected text"),
        ({"model": "m", "shuffle": 1}, "'shuffle' in run.yaml is 1 (int); expected true or false"),
        (
            {"model": "m", "dtype": "bf61"},
            "'dtype' in run.yaml is 'bf61' (str); expected one of 'fp32', 'bf16'; did you mean 'bf16'?",
        ),
        (
            {"model": "m", "order": "SORT"},
            "'order' in run.yaml is 'SORT' (str); expected one of RANDOM, SORTED; did you mean 'SORTED'?",
        ),
        ({"model": "m", "files": "a"}, "'files' in run.yaml is 'a' (str); expected a list of a path"),
        ({"model": "m", "files": ["a", 3]}, "'files[1]' in run.yaml is 3 (int); expected a path"),
        ({"model": "m", "weights": {"a": "b"}}, "'weights.a' in run.yaml is 'b' (str); expected a number"),
        ({"model": "m", "seed": "x"}, "'seed' in run.yaml is 'x' (str); expected a whole number"),
        (
            {"model": "m", "optimizer": {"kind": "Adan"}},
            "'optimizer' in run.yaml has kind 'Adan'; did you mean 'Adam'?",
        ),
        ({"model": "m", "optimizer": {"learning_rate": 1}}, "'optimizer' in run.yaml has no kind; known: Adam, Sgd"),
        (
            {"model": "m", "optimizer": {"kind": "Adam", "betas": [1]}},
            "'optimizer.betas' in run.yaml is [1] (list); expected a list of 2: a number, a number",
        ),
        ([1], "run.yaml is [1] (list); expected keys of Train"),
    ],
)
def test_a_mistake_is_answered_in_one_sentence(data: Any, sentence: str) -> None:
    assert refusal(data) == sentence


def test_a_config_with_gaps_can_wait_for_its_missing_values() -> None:
    gap = object()
    half = from_dict(Train, {"steps": 3}, missing=gap)
    assert (half.model, half.steps, half.optimizer) == (gap, 3, Adam())


# None of these may come back as a number, a truth, a date or nothing.
words = st.text(max_size=12) | st.sampled_from(
    [
        "no",
        "on",
        "1e-4",
        "1:30",
        "010",
        "0x1F",
        "null",
        "~",
        "true",
        "2030-01-01",
        "1_0",
        ".5",
        "<<",
        "=",
        " x",
        "# y",
        "- z",
        "a\x85b",
        "a\u2028b",
    ]
)
numbers = st.floats(allow_nan=False)
adams = st.builds(Adam, learning_rate=numbers, betas=st.tuples(numbers, numbers))
sgds = st.builds(Sgd, learning_rate=numbers)
trains = st.builds(
    Train,
    model=words,
    steps=st.integers(),
    temperature=numbers,
    optimizer=adams | sgds,
    warmup=st.none() | sgds,
    order=st.sampled_from(Order),
    dtype=st.sampled_from(["fp32", "bf16"]),
    files=st.lists(st.sampled_from(["a", "b/c", "no", "1e-4", "/x y"]).map(Path)).map(tuple),
    weights=st.dictionaries(words, numbers, max_size=3),
    seed=st.none() | st.integers(),
    cap=st.integers() | numbers | words,
    shuffle=st.booleans(),
    stages=st.lists(adams, max_size=2).map(tuple),
)


@given(trains)
def test_to_plain_and_back_is_the_same_config(config: Train) -> None:
    again = from_dict(Train, to_dict(config))
    assert again == config
    assert type(again.cap) is type(config.cap)


@given(trains)
def test_to_yaml_and_back_is_the_same_config(tmp_path_factory: pytest.TempPathFactory, config: Train) -> None:
    file = tmp_path_factory.getbasetemp() / "run.yaml"
    file.write_text(dump_yaml(config), encoding="utf-8")
    again = load_yaml(Train, file)
    assert again == config
    assert type(again.cap) is type(config.cap)


def yaml_of(tmp_path: Path, text: str) -> Train:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return load_yaml(Train, file)


@pytest.mark.parametrize(
    ("scalar", "value"),
    [
        ("1e-4", 1e-4),
        ("1.e3", 1000.0),
        (".5", 0.5),
        ("-2E+3", -2000.0),
        ("1_000", 1000),
        ("0x10", 16),
        (".inf", float("inf")),
    ],
)
def test_numbers_in_yaml_are_numbers(tmp_path: Path, scalar: str, value: float) -> None:
    assert yaml_of(tmp_path, f"model: m\ncap: {scalar}").cap == value


@pytest.mark.parametrize("scalar", ["no", "on", "1:30", "010", "2030-01-01", "1e", "e4", "yes"])
def test_words_in_yaml_stay_words(tmp_path: Path, scalar: str) -> None:
    assert yaml_of(tmp_path, f"model: {scalar}").model == scalar


def test_a_key_given_twice_in_yaml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run\.yaml is not YAML: key 'steps' stands twice"):
        yaml_of(tmp_path, "model: m\nsteps: 1\nsteps: 2\n")


def test_yaml_cannot_make_objects(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not YAML: could not determine a constructor"):
        yaml_of(tmp_path, "model: !!python/object/apply:os.getcwd []")


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        from_dict(Train, {"model": "m"}).steps = 3  # type: ignore[misc]


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A group of settings that shares its parent's keys."""

    rate: float = 0.5
    decay: float = 0.1

    def __post_init__(self) -> None:
        if self.rate <= 0:
            raise ValueError(f"rate is {self.rate}; expected more than 0")


@dataclass(frozen=True, kw_only=True)
class Grouped:
    name: str
    rate: Rate = field(default_factory=Rate, metadata=FLAT)
    adam: Adam = field(default_factory=Adam)


def test_a_flat_group_shares_its_parents_keys_and_round_trips() -> None:
    built = from_dict(Grouped, {"name": "a", "rate": 2.0, "adam": {"learning_rate": 3.0}})
    assert built == Grouped(name="a", rate=Rate(rate=2.0), adam=Adam(learning_rate=3.0))
    assert to_dict(built) == {"name": "a", "rate": 2.0, "decay": 0.1, "adam": to_dict(built.adam)}
    assert from_dict(Grouped, to_dict(built)) == built
    assert from_dict(Grouped, {"name": "a"}) == Grouped(name="a")


def test_mistakes_in_a_flat_group_are_named_by_the_keys_that_were_written() -> None:
    with pytest.raises(ValueError, match=r"unknown key 'decai' in config; did you mean 'decay'\?"):
        from_dict(Grouped, {"name": "a", "decai": 1.0})
    with pytest.raises(ValueError, match=r"'decay' in config is 'much' \(str\); expected a number"):
        from_dict(Grouped, {"name": "a", "decay": "much"})
    with pytest.raises(ValueError, match=r"rate is -1\.0; expected more than 0"):
        from_dict(Grouped, {"name": "a", "rate": -1})
