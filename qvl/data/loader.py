"""The loader: this rank's micro-batches of every step, prefetched in order, resumed exactly from a small state."""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from qvl.core.batch import Batch, Sample
from qvl.data.deal import cost_of, deal
from qvl.data.index import fingerprint
from qvl.data.mixture import Mixture
from qvl.data.order import key_of
from qvl.data.packing import PackBudget
from qvl.data.plan import WINDOW, Item, Pack, Plan
from qvl.data.quarantine import FILE, Failure, Quarantine
from qvl.data.record import Kind
from qvl.data.source import TRAINED, Source, open_source, stand_in_items
from qvl.data.store import Store
from qvl.model.config import ModelConfig
from qvl.model.pack import pack
from qvl.outside.workers import Decoder, WorkerPool
from qvl.prompt.processor import Processor

TRIES = 64
"""Records looked at, per source, before a place in a pack stays empty."""


@dataclass(frozen=True)
class MicroBatch:
    """One pack. `ids` and `categories` have one entry for each of the batch's sequences."""

    batch: Batch
    ids: tuple[str, ...]
    categories: tuple[str, ...]


def micro_batch(
    samples: Sequence[Sample], ids: Sequence[str], categories: Sequence[str], config: ModelConfig
) -> MicroBatch:
    """The samples end to end, in the order given. Raises ValueError where `qvl.model.pack.pack` does, or where names are missing."""
    if not len(samples) == len(ids) == len(categories):
        raise ValueError(
            f"{len(samples)} samples came with {len(ids)} ids and {len(categories)} categories; give each sample one of both."
        )
    return MicroBatch(pack(samples, config), tuple(ids), tuple(categories))


class Reader(Protocol):
    """What the loader makes of records: of each something, of a pack's worth one micro-batch."""

    def read(
        self, source: Source, item: Item, processor: Processor, decoder: Decoder, store: Store, budget: PackBudget
    ) -> tuple[str, Any, str]:
        """The record's id, what it gives, and what was done to make it fit. ValueError rejects the record."""
        ...

    def collate(
        self, samples: list[Any], ids: tuple[str, ...], categories: tuple[str, ...], model_config: ModelConfig
    ) -> Any:
        """A micro-batch, with `batch`, `ids` and `categories`."""
        ...

    def num_tokens(self, micro: Any) -> int:
        """Of a micro-batch, for the counts."""
        ...


class TokenReader:
    """Records as sequences of tokens with their patches: all that the language model learns from."""

    def read(
        self, source: Source, item: Item, processor: Processor, decoder: Decoder, store: Store, budget: PackBudget
    ) -> tuple[str, Sample, str]:
        return source.read(item, processor, decoder, store, budget)

    def collate(
        self, samples: list[Sample], ids: tuple[str, ...], categories: tuple[str, ...], model_config: ModelConfig
    ) -> MicroBatch:
        return micro_batch(samples, ids, categories, model_config)

    def num_tokens(self, micro: MicroBatch) -> int:
        return micro.batch.num_tokens


@dataclass(frozen=True, kw_only=True)
class _Made:
    """What reading one pack gave."""

    micro: MicroBatch | None
    """None: nothing could be read."""
    seen: int
    failures: list[Failure]
    fates: Counter[str]


class Loader:
    """Made by `make_loader`.

    The global batch of step k follows from the mixture, the processor, the budgets and the seed. Ranks share it out; workers read it
    ahead; neither changes it. `state` belongs to the run, not to a rank.
    """

    def __init__(
        self,
        sources: tuple[Source, ...],
        plan: Plan,
        processor: Processor,
        model_config: ModelConfig,
        *,
        quarantine: Quarantine,
        decoder: Decoder,
        store: Store,
        mark: str,
        rank: int,
        world_size: int,
        workers: int,
        prefetch_packs: int,
        reader: Reader,
    ) -> None:
        if not 0 <= rank < world_size or plan.packs_per_step % world_size:
            raise ValueError(
                f"rank {rank} of {world_size} with {plan.packs_per_step} packs a step; ranks count from 0, and packs_per_step must be a "
                "multiple of the number of ranks."
            )
        self.sources, self.plan, self.processor, self.model_config = sources, plan, processor, model_config
        self.quarantine, self.decoder, self.store, self.mark = quarantine, decoder, store, mark
        self.rank, self.world_size, self.prefetch_packs = rank, world_size, prefetch_packs
        self.cost, self.reader = cost_of(model_config), reader
        self._identity = self._facts()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="qvl-data") if workers else None
        self._ahead: deque[tuple[list[Future[_Made]] | list[Pack], dict[str, Any], dict[str, Any]]] = deque()
        self._state = self._plan_state(0)
        self._steps_planned = 0
        self._counts: dict[str, Any] = self._plan_counts()
        self._fates: Counter[str] = Counter()
        self._tokens_read = 0
        self._packs_read = 0

    # ---- steps

    @property
    def num_tokens(self) -> int:
        """Of one pass over all sources."""
        return sum(int(source.lengths.token_S.sum()) for source in self.sources)

    def next_step(self) -> list[MicroBatch]:
        """This rank's packs of the next optimizer step; empty when the data is over. ValueError when too many records fail."""
        self._plan_ahead()
        work, state, counts = self._ahead.popleft()
        made = [self._make(one) if isinstance(one, tuple) else one.result() for one in work]
        self._plan_ahead()
        if work:
            self._state, self._counts = state, counts
        packs: list[MicroBatch] = []
        for one in made:
            self.quarantine.count(one.seen, one.failures)
            if one.micro is None:
                raise ValueError(
                    f"no record of a pack could be read, nor any of {TRIES} others in its places; the last: "
                    f"{one.failures[-1].reason if one.failures else 'all are in the quarantine'}"
                )
            packs.append(one.micro)
            self._fates.update(one.fates)
            self._tokens_read += self.reader.num_tokens(one.micro)
            self._packs_read += 1
        return packs

    def _plan_ahead(self) -> None:
        """Plans the next step, and with workers as many more as keep them busy."""
        while not self._ahead or (
            self._pool is not None
            and self._ahead[-1][0]
            and sum(len(w) for w, _, _ in self._ahead) < self.prefetch_packs
        ):
            packs = self.plan.next_step()
            costs = [self.cost.of(pack) for pack in packs]
            mine = [packs[i] for i in deal(costs, self.world_size, equally=True)[self.rank]]
            self._steps_planned += bool(packs)
            work = mine if self._pool is None else [self._pool.submit(self._make, one) for one in mine]
            self._ahead.append((work, self._plan_state(self._steps_planned), self._plan_counts()))

    # ---- one pack

    def _make(self, planned: Pack) -> _Made:
        samples: list[Any] = []
        ids: list[str] = []
        categories: list[str] = []
        failures: list[Failure] = []
        fates: Counter[str] = Counter()
        for item in planned:
            for candidate in self._candidates(item):
                source = self.sources[candidate.source]
                if self.quarantine.holds(source.key(candidate.record)):
                    continue
                try:
                    id, sample, fate = self.reader.read(
                        source, candidate, self.processor, self.decoder, self.store, self.plan.budget
                    )
                except ValueError as error:
                    failures.append(source.failure(candidate.record, self.store, str(error)))
                    continue
                samples.append(sample)
                ids.append(id)
                categories.append(source.category(candidate.record))
                fates[fate if candidate is item else "replacement"] += 1
                break
            else:
                fates["empty place"] += 1
        micro = None
        if samples:
            micro = self.reader.collate(samples, tuple(ids), tuple(categories), self.model_config)
        return _Made(micro=micro, seen=len(planned), failures=failures, fates=fates)

    def _candidates(self, item: Item) -> Iterable[Item]:
        """The planned record, then those that may stand in for it: of its own source first, then of the others."""
        yield item
        order = [item.source, *(i for i in range(len(self.sources)) if i != item.source)]
        for number in order:
            if self.sources[number].lengths.num_records:
                keys = [
                    key_of(self.plan.seed, "stand-in", item.source, item.draw, item.piece, attempt)
                    for attempt in range(TRIES)
                ]
                yield from stand_in_items(self.sources[number], number, item, keys)

    # ---- state

    def state(self) -> dict[str, Any]:
        """What `restore` needs to give the next step that this loader would give: JSON-able, a few kilobytes, the same on every rank."""
        return self._state

    def restore(self, state: dict[str, Any]) -> None:
        """Continues after the step at which `state` was taken, with any number of ranks and workers."""
        mine, theirs = self._identity, state.get("identity")
        if theirs != mine:
            changed = [k for k in mine if not isinstance(theirs, dict) or theirs.get(k) != mine[k]]
            raise ValueError(
                f"the loader's state was saved with another {', '.join(changed)}, so the order cannot be continued; "
                "use the same data, model folder and budgets, or start the data anew."
            )
        self._drop_ahead()
        self.plan.restore(state["plan"])
        self._steps_planned = state["step"]
        self._state, self._counts = state, self._plan_counts()

    def _plan_state(self, step: int) -> dict[str, Any]:
        return {"identity": self._identity, "step": step, "plan": self.plan.state()}

    def _facts(self) -> dict[str, Any]:
        budget = self.plan.budget
        return {
            "records": [[s.lengths.num_records, s.data_digest()] for s in self.sources],
            "weights": [[tokens, list(weights)] for tokens, weights in self.plan.stages],
            "processor": self.mark,
            "budget": [budget.tokens, budget.patches, budget.buffer, self.plan.packs_per_step],
        }

    # ---- counts

    @property
    def step(self) -> int:
        """Steps given so far, those before a restore included."""
        return self._state["step"]

    @property
    def stats(self) -> dict[str, Any]:
        """`planned` counts are global and survive a restore; `read` counts are this rank's since it started."""
        capacity = self._packs_read * self.plan.budget.tokens
        return {
            "planned": self._counts,
            "read": {
                "packs": self._packs_read,
                "samples": self.quarantine.num_seen,
                "tokens": self._tokens_read,
                "fill": self._tokens_read / capacity if capacity else 0.0,
                "whole": self._fates["whole"],
                "pieces": self._fates["piece"],
                "cut": self._fates["cut"],
                "rebudgeted": self._fates["rebudgeted"],
                "quarantined": self.quarantine.num_failed,
                "replaced": self._fates["replacement"],
                "empty places": self._fates["empty place"],
            },
        }

    def _plan_counts(self) -> dict[str, Any]:
        return {
            "left out": sum(s.left_out for s in self.sources),
            "packs": self.plan.num_packs,
            "samples": self.plan.num_samples,
            "tokens": {s.config.path: n for s, n in zip(self.sources, self.plan.tokens, strict=True)},
            "epochs": {
                s.config.path: draws / max(1, s.lengths.num_records)
                for s, draws in zip(self.sources, self.plan.draws, strict=True)
            },
        }

    # ---- end

    def _drop_ahead(self) -> None:
        for work, _, _ in self._ahead:
            for one in work:
                if isinstance(one, Future):
                    one.cancel()
        self._ahead.clear()

    def close(self) -> None:
        """Stops the workers; what they read ahead is dropped."""
        self._drop_ahead()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        if isinstance(self.decoder, WorkerPool):
            self.decoder.close()
        self.quarantine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def make_loader(
    mixture: Mixture,
    processor: Processor,
    model_config: ModelConfig,
    *,
    pack_tokens: int,
    pack_patches: int,
    packs_per_step: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    decoder: Decoder | None = None,
    cache: Path | str | None = None,
    cache_bytes: int = 50 * 1024**3,
    out: Path | str | None = None,
    max_bad_rate: float = 0.01,
    buffer: int = 256,
    prefetch_packs: int = 4,
    select: Callable[[int, Source], Source] = lambda number, source: source,
    reader: Reader | None = None,
    kinds: Sequence[Kind] = TRAINED,
    window: int = WINDOW,
) -> Loader:
    """A loader over indexed shards.

    `packs_per_step` is global: a rank gets packs_per_step / world_size of them. `workers` are threads that read ahead. Without `decoder`
    media are decoded in processes of their own that a hang or a crash cannot take along (`WorkerPool`). `cache`: folder for shards of an
    object store. `out`: folder for `quarantine.jsonl`; each rank writes its own. `max_bad_rate`: share of unreadable samples that stops
    the run. `select`: (its number in the resolved mixture, the source) -> what of the source is read. `reader`: what is made of a
    record; None: sequences of tokens. `kinds`: of the records that the shards may hold. `window`: packs that are shuffled among each other.
    """
    if workers < 0 or prefetch_packs < 1:
        raise ValueError(f"workers is {workers} and prefetch_packs {prefetch_packs}; expected at least 0 and 1.")
    store = Store(cache, cache_bytes)
    mark = fingerprint(processor)
    sources = tuple(
        select(i, open_source(config, mark, store, kinds=kinds)) for i, config in enumerate(mixture.resolved())
    )
    plan = Plan(
        [source.lengths for source in sources],
        mixture.stage_weights(),
        PackBudget(tokens=pack_tokens, patches=pack_patches, buffer=buffer),
        packs_per_step=packs_per_step,
        seed=seed,
        window=window,
    )
    name = FILE if world_size == 1 else f"{Path(FILE).stem}-{rank}.jsonl"
    return Loader(
        sources,
        plan,
        processor,
        model_config,
        quarantine=Quarantine(None if out is None else Path(out) / name, max_rate=max_bad_rate),
        decoder=decoder or WorkerPool(size=max(1, workers)),
        store=store,
        mark=mark,
        rank=rank,
        world_size=world_size,
        workers=workers,
        prefetch_packs=prefetch_packs,
        reader=reader or TokenReader(),
    )
