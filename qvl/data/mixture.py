"""The mixture file: which shards are mixed, in which shares of tokens, in which stages."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qvl.core.config import from_dict
from qvl.data.store import is_remote
from qvl.data.yaml_file import read_yaml


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    path: str
    """A shard, a folder of shards, a pattern, or an address such as s3://bucket/folder."""
    weight: float = 1.0
    """Share of the mixture's tokens, relative to the other weights."""
    category: str = ""
    """Replaces the records' own category in counts."""
    max_epochs: float | None = None
    """How often each record may come up; the source then leaves the mixture. None: no limit."""

    def __post_init__(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"source {self.path} has weight {self.weight}; expected a number of at least 0.")
        if self.max_epochs is not None and not 0 < self.max_epochs < float("inf"):
            raise ValueError(f"source {self.path} has max_epochs {self.max_epochs}; expected a number above 0.")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    tokens: int
    """Tokens drawn in this stage."""
    weights: dict[str, float]
    """Weights by category or path; a source that is not named has none in this stage."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"a stage has {self.tokens} tokens; expected at least 1.")


@dataclass(frozen=True, kw_only=True)
class Replay:
    path: str
    """A mixture file, of an earlier stage for instance; in `qvl train` also texts, chats or shards."""
    share: float
    """Share of all tokens that comes from it."""

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"replay of {self.path} has share {self.share}; expected a number between 0 and 1.")


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """What is trained on. Shares are counted in tokens, not in samples: one video weighs as much as a hundred captions."""

    sources: tuple[SourceConfig, ...]
    replay: tuple[Replay, ...] = ()
    stages: tuple[StageConfig, ...] = ()
    """Weights that change on the way, each for so many tokens; the end of the last ends the data. Without stages the sources' weights
    hold to the end."""
    tokens: int | None = None
    """Ends the data after so many tokens. None: never, unless every source has max_epochs."""
    folder: str = field(default="")
    """What relative paths start from; `read_mixture` sets it to the file's folder."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("the mixture has no sources; give at least one.")
        if self.stages and (self.tokens is not None or self.replay):
            raise ValueError("the mixture has stages beside tokens or replay; say it within the stages' weights alone.")
        known = {name for s in self.sources for name in (s.category, s.path) if name}
        for stage in self.stages:
            if unknown := sorted(set(stage.weights) - known):
                raise ValueError(f"a stage weighs {unknown[0]!r}, which is no category or path of a source.")
            if sum(stage.weights.values()) <= 0 or min(stage.weights.values()) < 0:
                raise ValueError(
                    f"a stage has the weights {stage.weights}; expected at least one above 0 and none below."
                )
        if sum(s.weight for s in self.sources) <= 0:
            raise ValueError("every source of the mixture has weight 0; give one of them more.")
        if sum(r.share for r in self.replay) >= 1:
            raise ValueError("the replayed shares add up to 1 or more; nothing is left for the sources.")

    def resolved(self) -> tuple[SourceConfig, ...]:
        """The sources with whole paths and weights that sum to 1, replayed mixtures among them."""
        groups = [(1 - sum(r.share for r in self.replay), self.sources, self.folder)]
        for replay in self.replay:
            earlier = read_mixture(Path(_placed(replay.path, self.folder)))
            groups.append((replay.share, earlier.resolved(), ""))
        return tuple(
            replace(s, path=_placed(s.path, folder), weight=s.weight * share / sum(other.weight for other in sources))
            for share, sources, folder in groups
            for s in sources
        )

    def stage_weights(self) -> tuple[tuple[int | None, tuple[float, ...]], ...]:
        """(tokens, weight of each resolved source) for each stage; None tokens: no end."""
        if not self.stages:
            return ((self.tokens, tuple(s.weight for s in self.resolved())),)
        stages = []
        for stage in self.stages:
            named = [next((n for n in (s.path, s.category) if n in stage.weights), None) for s in self.sources]
            # A category's weight is shared by its sources in the proportion of their own weights.
            totals: dict[str | None, float] = {}
            for source, name in zip(self.sources, named, strict=True):
                totals[name] = totals.get(name, 0.0) + source.weight
            weights = [
                0.0 if name is None else stage.weights[name] * source.weight / (totals[name] or 1.0)
                for source, name in zip(self.sources, named, strict=True)
            ]
            if sum(weights) <= 0:
                raise ValueError(
                    f"the stage with the weights {stage.weights} draws from no source; raise the sources' weights."
                )
            stages.append((stage.tokens, tuple(w / sum(weights) for w in weights)))
        return tuple(stages)


def read_mixture(path: Path | str) -> Mixture:
    """A mixture from its YAML file; relative paths in it start from the file's folder."""
    path = Path(path)
    if path.suffix == ".tar" or (path.is_dir() and any(path.glob("*.tar"))):
        raise ValueError(
            f"{path} is data, not a mixture file; list it in a YAML file: sources: [{{path: {path.resolve()}}}]."
        )
    if path.is_dir() or path.suffix in (".jsonl", ".json", ".parquet"):
        raise ValueError(
            f"{path} is data, not a mixture file; import it to shards (qvl data import), and list them in a YAML file: "
            "sources: [{path: shards}]."
        )
    try:
        data = read_yaml(path)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; a mixture file lists sources with path and weight.") from None
    if not isinstance(data, Mapping):
        raise ValueError(f"{path} holds a {type(data).__name__}; expected the key sources with a list.")
    return mixture_from_dict({"folder": str(path.parent), **data}, where=str(path))


def mixture_from_dict(data: Mapping[str, Any], where: str = "mixture") -> Mixture:
    return from_dict(Mixture, data, where=where)


def _placed(path: str, folder: str) -> str:
    return path if not folder or is_remote(path) or Path(path).is_absolute() else str(Path(folder) / path)
