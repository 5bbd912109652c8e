"""Tensors in a safetensors file that other users may read as they may read the files beside it."""

import os
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """safetensors gives a new file to its owner alone whatever the umask says; a server under another account could not read it."""
    save_file(tensors, path, metadata=metadata)
    mask = os.umask(0o077)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
