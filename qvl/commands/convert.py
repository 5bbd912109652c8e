"""qvl convert: rewrite a checkpoint folder in the hub's layout or transformers 5's, in another dtype or shard size."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from qvl.model.weights import load, save, stored_dtype
from qvl.outside.hub import resolve


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Tokenizer, template and processor files are copied through unchanged."""

    model: str
    """Checkpoint folder, or a name on the hub."""
    out: Path
    """Folder to write. One that holds weights already is left alone unless you say --replace."""
    replace: bool = False
    """Write over the weights that lie in --out."""
    layout: Literal["hub", "v5"] = "hub"
    """How experts and config fields are spelled: as the official files, or as transformers 5 writes them."""
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"
    """What the weights are stored in. auto: as the source's files, the widest of theirs where they differ."""
    max_shard_gb: float = 5.0
    """Largest size of one weight file, in GB (10^9 bytes)."""
    expert_layout: Literal["hub", "v5"] | None = None
    """Layout of the source's expert weights; needed only when they are square."""


def run(args: Convert) -> None:
    if args.max_shard_gb <= 0:
        raise ValueError(f"max_shard_gb is {args.max_shard_gb}; it must be above 0.")
    source = resolve(args.model)
    if args.out.resolve() == source.resolve():
        raise ValueError(f"{args.out} is the source folder; write to another one.")
    if not args.replace and any(args.out.glob("*.safetensors")):
        raise ValueError(f"{args.out} holds weights already; name another folder, or say --replace to lose them.")
    dtype = stored_dtype(source) if args.dtype == "auto" else getattr(torch, args.dtype)
    model = load(source, dtype=dtype, expert_layout=args.expert_layout)
    save(model, args.out, layout=args.layout, max_shard_bytes=int(args.max_shard_gb * 1e9), companions=source)
    print(f"wrote {args.out} ({args.layout} layout, {str(dtype).removeprefix('torch.')})")
