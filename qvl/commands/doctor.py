"""What this machine has, which kernels will run on it, what is missing and how to get it."""

import dataclasses
import importlib.util
import json
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import qvl
from qvl.core.device import Facts, facts, pick_device, pick_dtype
from qvl.model.attention import describe

EXTRAS = {
    "hub": ("huggingface_hub", "fetch models by name"),
    "serve": ("fastapi", "answer over HTTP (qvl serve)"),
    "parquet": ("pyarrow", "import tables and Hugging Face data sets"),
}


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Looks at this machine and says what qvl will do on it."""

    json: bool = False
    """Print one JSON object instead of tables."""


def run(args: Doctor) -> int:
    seen = facts()
    report = {
        "qvl": qvl.__version__,
        "machine": dataclasses.asdict(seen) | {"cpu_bf16": seen.cpu_bf16},
        "choice": {"device": str(pick_device()), "dtype": str(pick_dtype(pick_device())).removeprefix("torch.")},
        "kernels": {device: kernels(device, seen) for device in ["cpu", "cuda"][: 1 + bool(seen.gpus)]},
        "missing": missing(seen),
    }
    if args.json:
        print(json.dumps(report, indent=2))
        return 0
    console = Console(highlight=False)
    _show(console, "This machine", machine_rows(seen))
    for device, chosen in report["kernels"].items():
        _show(console, f"What runs on {device}", chosen)
    _show(console, "Chosen when nothing is said", report["choice"])
    _show(console, "Missing", report["missing"] or {"nothing": "all that qvl can use is here"})
    return 0


def machine_rows(seen: Facts) -> dict[str, str]:
    """The facts as a person reads them."""
    gib = f"{seen.memory_bytes / 2**30:.1f} GiB"
    rows = {
        "qvl": qvl.__version__,
        "system": f"{seen.system} {seen.machine}, Python {seen.python_version}, torch {seen.torch_version}",
        "CPU": f"{seen.cpu_name}, {seen.num_cores} usable cores, {seen.num_threads} threads, {gib} memory",
        "CPU arithmetic": " ".join(seen.cpu_flags) or "none of the flags we know",
        "bfloat16 on CPU": "multiplied by the CPU itself" if seen.cpu_bf16 else "by way of fp32: slower than fp32",
    }
    for i, gpu in enumerate(seen.gpus):
        capability = ".".join(map(str, gpu.capability))
        rows[f"GPU {i}"] = f"{gpu.name}, capability {capability}, {gpu.memory_bytes / 2**30:.1f} GiB"
    return rows | ({} if seen.gpus else {"GPU": "none that torch can use"})


def kernels(device: str, seen: Facts) -> dict[str, str]:
    """Which implementation runs for attention, experts and compilation on a device."""
    chosen = {f"attention, {case}": kernel for case, kernel in describe(device).items()}
    if device == "cpu":
        grouped = " and ".join(seen.cpu_grouped_mm)
        chosen["experts"] = f"grouped matmul for {grouped}" if grouped else "one matmul per expert"
        native = "avx512_bf16" in seen.cpu_flags and seen.compiler is not None
        chosen["decoding"] = (
            "our own kernels, compiled at first use"
            if native
            else "by torch, slower: our kernels want avx512_bf16 and g++"
        )
        chosen["compile"] = f"with {seen.compiler}" if seen.compiler else "off: no C++ compiler"
    else:
        chosen["varlen attention"] = "available" if seen.varlen_attention else "not on this GPU or torch"
    return chosen


def missing(seen: Facts) -> dict[str, str]:
    """What could be here and is not -> what it is for and how to get it."""
    lacks = {
        f"extra {extra}": f"{purpose}: pip install 'qvl[{extra}]'"
        for extra, (package, purpose) in EXTRAS.items()
        if importlib.util.find_spec(package) is None
    }
    if seen.compiler is None:
        lacks["C++ compiler"] = "fast decoding and torch.compile on the CPU: install g++ or clang"
    if not seen.gpus and torch.version.cuda is None and torch.version.hip is None:
        lacks["GPU build of torch"] = (
            "this torch is a CPU build; with a GPU in the machine, install torch's build for it"
        )
    return lacks


def _show(console: Console, title: str, rows: dict[str, str]) -> None:
    console.print(title, style="bold")
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    for name, text in rows.items():
        table.add_row(f"  {escape(name)}", escape(text))  # [hub] is not a colour
    console.print(table)
    console.print()
