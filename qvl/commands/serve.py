"""Serves a model behind an OpenAI-compatible door, with a chat page; safe by default."""

import copy
import ipaddress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Literal

import torch

from qvl.commands.generate import quickstart_model
from qvl.core.device import free_memory_bytes, pick_device, pick_dtype
from qvl.core.log import log
from qvl.engine.engine import Engine, EngineSettings
from qvl.engine.prepare import Weights, prepare
from qvl.engine.sampling import Preset, Sampling
from qvl.model.lora import CONFIG_FILE, load_adapter
from qvl.model.qwen3vl import Qwen3VL
from qvl.model.weights import load
from qvl.outside.hub import resolve
from qvl.outside.port import check_port
from qvl.prompt.processor import Processor
from qvl.session import Session

try:
    from qvl.serve.app import App, make_app
    from qvl.serve.chat import Cook, Served
    from qvl.serve.engine_thread import EngineThread
    from qvl.serve.gate import Door
    from qvl.serve.limits import Limits
    from qvl.serve.media import Kitchen
    from qvl.serve.metrics import Metrics
    from qvl.serve.run import Server
except ModuleNotFoundError as missing:
    if (missing.name or "").partition(".")[0] == "qvl":
        raise
    raise ValueError(f"qvl serve needs the package {missing.name}; run: pip install 'qvl[serve]'") from missing

GIB = 2**30
CPU_CACHE_GIB = 4.0
SHORTEST_KEY = 16
LONGEST_ANSWER = 32768
"""What the report allows (5.11)."""


@dataclass(frozen=True, kw_only=True)
class Serve:
    """qvl serve --model DIR --memory-gib 8

    The chat page is at http://127.0.0.1:8000/, OpenAI clients take http://127.0.0.1:8000/v1. It listens to this machine alone unless
    it has a key; addresses and files of this machine are out of reach of its clients until a domain or folder is allowed.
    """

    model: str | None = None
    """Checkpoint folder, or a name on the hub; without it the model that `make quickstart` trained."""
    name: str | None = None
    """What clients call the model; the folder's name otherwise."""
    adapter: tuple[str, ...] = ()
    """LoRA adapters in PEFT's format, each as NAME=FOLDER; a client picks one by its name."""
    host: str = "127.0.0.1"
    """Address to listen at. Beyond this machine (0.0.0.0) only with --api-key-file."""
    port: int = 8000
    """0 takes any free one."""
    api_key_file: Path | None = None
    """Keys of clients, one a line; every route but /health then wants one."""
    allow_domain: tuple[str, ...] = ()
    """Hosts media may be fetched from, by https alone: cdn.example.org, *.example.org, or * for any public one."""
    allow_folder: tuple[Path, ...] = ()
    """Folders media may be read from, as file:///folder/picture.png."""
    memory: float | None = None
    """Share of the memory that is free beside the weights, a GPU's or the machine's, for keys and values of all models. 0.9 on a GPU;
    on a CPU 4 GiB, or a quarter of what is free where that is less."""
    memory_gib: float | None = None
    """The same in GiB."""
    max_running: int = 64
    """Answers that run at once."""
    max_queue: int = 128
    """Requests that may wait; one more is told to come again (429)."""
    mode: Literal["fast", "exact"] = "fast"
    """exact: a request's numbers are the same to the bit alone or in any company, at the cost of speed."""
    prefix_cache: bool = True
    """Keep the beginnings of prompts for the next request that begins so."""
    media_workers: int = 1
    """Processes that decode pictures, videos and documents."""
    media_seconds: float = 60.0
    """How long one of them may work on one file; hours of film at full size need minutes."""
    template: Literal["auto", "instruct", "thinking"] = "auto"
    """The chat template: recognised (auto), or one of the two published ones."""
    sampling: Preset = "model"
    """Where values come from that a request leaves open: the folder's generation_config.json, the report's settings, the official ones."""
    max_tokens: int | None = None
    """Tokens of an answer where a request names none; the sampling's own otherwise."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, mps."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What weights and activations are held in."""
    weights: Weights = "plain"
    """int8 rounds the decoder's for a bfloat16 CPU: answers come faster and differ a little."""
    drain_seconds: float = 30.0
    """After SIGTERM: how long requests that run may take to finish."""


def run(args: Serve) -> int:
    keys = read_keys(args.api_key_file)
    check_address(args.host, keys)
    adapters = read_adapters(args.adapter)
    check_port(args.host, args.port)
    folder = Path(resolve(args.model or quickstart_model()))
    server = Server(
        build(args, folder, adapters, keys), host=args.host, port=args.port, drain_seconds=args.drain_seconds
    )
    server.run()
    return 0 if server.started else 1


def check_adapters(own: str, adapters: dict[str, Path]) -> None:
    """Before minutes of loading."""
    if own in adapters:
        raise ValueError(
            f"the model and an adapter are both called {own!r}; name one of them otherwise (--name, --adapter NAME=DIR)."
        )
    for name, path in adapters.items():
        if not (path / CONFIG_FILE).is_file():
            raise ValueError(f"the adapter {name!r} should lie in {path}, and {path / CONFIG_FILE} is missing.")


def build(
    args: Serve, folder: Path, adapters: dict[str, Path], keys: tuple[str, ...], limits: Limits | None = None
) -> App:
    """The app over loaded weights. Says what fits before anybody can ask."""
    check_adapters(own := name_of(args, folder), adapters)
    limits = limits or Limits()
    processor = Processor.from_folder(folder, template=args.template)
    device = pick_device(args.device)
    model = load(folder, dtype=pick_dtype(device, args.dtype), device=device).eval()
    models = {own: model} | {name: adapted(model, path) for name, path in adapters.items()}
    for each in models.values():
        prepare(each, free=len(models) == 1, weights=args.weights, pack=True if args.mode == "exact" else None)
    session = Session.over(model, processor, sampling=args.sampling)
    share = cache_gib(args, model) / len(models)
    settings = EngineSettings(
        memory_gib=share,
        max_running=args.max_running,
        max_queue=args.max_queue,
        mode=args.mode,
        prefix_cache=args.prefix_cache,
    )
    engines = {name: Engine(each, settings) for name, each in models.items()}
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / GIB
    for name, engine in engines.items():
        kind, fits = str(model.dtype).removeprefix("torch."), engine.describe().sentence
        log.info("%s (%s on %s): the weights take %.2f GiB, %s", name, kind, device, weights, fits)
    served = Served(
        names=tuple(engines),
        processor=processor,
        sampling=base_sampling(args, session),
        end_tokens=session.end_tokens,
        thinking=session.thinking,
        max_context=min(engine.describe().longest_context for engine in engines.values()),
        vocab_size=model.config.text.vocab_size,
    )
    kitchen = Kitchen(
        processor,
        limits,
        max_tokens=served.max_context,
        allow_domains=args.allow_domain,
        allow_folders=args.allow_folder,
        workers=args.media_workers,
        media_seconds=args.media_seconds,
    )
    metrics = Metrics(engines)
    thread = EngineThread(engines, on_stats=metrics.on_stats)
    door = Door(
        keys=keys,
        hosts=(*Door().hosts, args.host),
        max_in_flight=args.max_running + args.max_queue,
        limits=limits,
    )
    return make_app(Cook(served, kitchen), thread, metrics, door=door, media_workers=args.media_workers + 1)


def name_of(args: Serve, folder: Path) -> str:
    if args.name is not None:
        return args.name
    if args.model is None:
        return "quickstart"
    # A name on the hub is what clients know; its folder here is called after a commit.
    return folder.resolve().name if Path(args.model).is_dir() else args.model


def base_sampling(args: Serve, session: Session) -> Sampling:
    """A request that names no max_tokens gets the rest of the context, at most LONGEST_ANSWER. The fixed seed is evaluation's alone."""
    base = replace(session.sampling, seed=None)
    if args.max_tokens is not None:
        return replace(base, max_tokens=args.max_tokens)
    return base if args.sampling != "model" else replace(base, max_tokens=LONGEST_ANSWER)


def cache_gib(args: Serve, model: Qwen3VL) -> float:
    """GiB for keys and values, of all served models together."""
    if args.memory is not None and args.memory_gib is not None:
        raise ValueError("--memory and --memory-gib are both given; give one of them.")
    if args.memory is not None and not 0 < args.memory <= 1:
        raise ValueError(
            f"--memory is {args.memory}; it is a share above 0 and at most 1. For GiB there is --memory-gib."
        )
    is_cuda = model.device.type == "cuda"
    # The weights lie there already.
    free = (torch.cuda.mem_get_info(model.device)[0] if is_cuda else free_memory_bytes()) / GIB
    if args.memory_gib is not None and args.memory_gib > free:
        raise ValueError(
            f"--memory-gib is {args.memory_gib:g} and beside the weights {free:.2f} GiB are free; give less, or --memory 0.9."
        )
    if args.memory_gib is not None:
        return args.memory_gib
    if args.memory is not None:
        return free * args.memory
    return free * 0.9 if is_cuda else min(CPU_CACHE_GIB, free / 4)


def adapted(model: Qwen3VL, folder: Path) -> Qwen3VL:
    """The same weights, shared, with an adapter beside them."""
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    twin = copy.deepcopy(model, memo=shared)  # pyright: ignore[reportArgumentType]
    load_adapter(twin, folder)
    return twin


def read_adapters(entries: tuple[str, ...]) -> dict[str, Path]:
    adapters: dict[str, Path] = {}
    for entry in entries:
        name, equals, folder = entry.partition("=")
        if not (name and equals and folder):
            raise ValueError(f"--adapter is {entry!r}; write NAME=FOLDER.")
        if name in adapters:
            raise ValueError(f"two adapters are called {name!r}; give each its own name.")
        adapters[name] = Path(folder)
    return adapters


def read_keys(file: Path | None) -> tuple[str, ...]:
    if file is None:
        return ()
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ValueError(f"{file} holds no key; write one a line, for instance from: openssl rand -hex 32")
    if any(len(key) < SHORTEST_KEY or not key.isascii() or " " in key for key in keys):
        raise ValueError(
            f"{file} holds a key that is shorter than {SHORTEST_KEY} signs or has others than plain ASCII; "
            "make one with: openssl rand -hex 32"
        )
    return keys


def check_address(host: str, keys: tuple[str, ...]) -> None:
    """Beyond this machine only with a key."""
    try:
        is_here = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_here = host == "localhost"
    if not is_here and not keys:
        raise ValueError(
            f"--host {host} can be reached from other machines; give --api-key-file, or listen at 127.0.0.1."
        )
