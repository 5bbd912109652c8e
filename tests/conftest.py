"""What every test gets: the shape hook, one thread for torch (two test processes share the machine), no deadlines, a tiny model folder."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from qvl.core.log import log
from qvl.prompt.tokenizer import Tokenizer
from qvl.serve.grammar import Grammars
from tiny_checkpoint import read_tokenizer_once, tiny_checkpoint

pytest_plugins = ("shape_hook", "pytester")

torch.set_num_threads(1)

# The same examples in every run, and no verdict by the clock: a busy machine is no bug.
settings.register_profile("house", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")


@pytest.fixture(autouse=True)
def log_as_it_was() -> Iterator[None]:
    """A command sends the log to its own stderr, which here ends with its test; a server of the next one would write there."""
    yield
    log.handlers.clear()
    log.propagate = True


@pytest.fixture(scope="session")
def tiny_saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def tiny_folder(tiny_saved: Path) -> Iterator[Path]:
    """A complete tiny model; while the module runs, its tokenizer is read once, and made into a grammar's table once."""
    with pytest.MonkeyPatch.context() as patch:
        read_tokenizer_once(patch)
        patch.setattr(
            Grammars, "build", lambda self: vars(self).update(_built(self.tokenizer, self.vocab_size, self.end_tokens))
        )
        yield tiny_saved


@cache
def _built(
    tokenizer: Tokenizer, vocab_size: int, end_tokens: frozenset[int], build: Any = Grammars.build
) -> dict[str, Any]:
    grammars = Grammars(tokenizer, vocab_size, end_tokens)
    build(grammars)
    return vars(grammars)
