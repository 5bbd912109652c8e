"""One pack of a training step: a batch, and the record and category behind each of its sequences."""

from collections.abc import Sequence
from dataclasses import dataclass

from qvl.core.batch import Batch, Sample
from qvl.model.config import ModelConfig
from qvl.model.pack import pack


@dataclass(frozen=True)
class MicroBatch:
    """`ids` and `categories` have one entry for each of the batch's sequences."""

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
