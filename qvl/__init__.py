"""The whole Qwen3-VL system in one readable package; model/qwen3vl.py is the place to start reading."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qvl.session import Reply, Session, load

__version__ = "0.1.0"
__all__ = ["Reply", "Session", "__version__", "load"]


def __getattr__(name: str) -> Any:
    # Late, so that `import qvl` loads no torch.
    if name not in ("load", "Session", "Reply"):
        raise AttributeError(f"module 'qvl' has no attribute {name!r}")
    return getattr(import_module("qvl.session"), name)
