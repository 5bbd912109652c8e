"""Walks through the code: which files and forms a request, a row and a pixel pass on their way.

    python -m dev.walk --model runs/quickstart/checkpoint

Counted are, between the two ends of a walk, in all threads of this process:

- modules: files of `qvl/` of which a function ran. Files that only log or rename, or say what the machine is, are not on the way (BESIDE).
- forms: classes of `qvl/` of which an instance was made on the way and handed from one file to another, as an argument or as what a
  function returns, and `dict`, the form of JSON. Processors, configs and models are there before, so they do not count; a class that is
  made anew for each request does.
"""

import http.client
import json
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image as Raster

import qvl
from qvl.commands.serve import Serve, build
from qvl.data.index import build_index, fingerprint
from qvl.data.ingest import import_data
from qvl.data.loader import make_loader
from qvl.data.mixture import mixture_from_dict
from qvl.model.weights import load
from qvl.parallel.data_parallel import World
from qvl.prompt.processor import Processor
from qvl.serve.run import Server
from qvl.train.objective import NextToken

ROOT = Path(qvl.__file__).parent
BESIDE = {"core/log.py", "core/files.py", "core/device.py", "core/config.py"}


@dataclass
class Walk:
    """What was passed, in the order in which it was first met."""

    modules: dict[str, None] = field(default_factory=dict)
    forms: dict[str, None] = field(default_factory=dict)
    _made: set[type] = field(default_factory=set)

    def profile(self, frame: FrameType, event: str, value: Any) -> None:
        """For sys.setprofile."""
        if event not in ("call", "return"):
            return
        code = frame.f_code
        if code.co_name == "__init__" and event == "call":
            made = frame.f_locals.get("self")
            if type(made).__module__.startswith("qvl."):
                self._made.add(type(made))
        here = _module(code.co_filename)
        if here is None or here in BESIDE or code.co_name == "<module>":
            return
        self.modules.setdefault(here)
        back = frame.f_back
        if back is None or _module(back.f_code.co_filename) in (here, None):
            return
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        for handed in [value] if event == "return" else [frame.f_locals.get(name) for name in names]:
            self._note(handed)

    def _note(self, handed: Any) -> None:
        if isinstance(handed, list | tuple) and handed:
            handed = handed[0]
        if type(handed) in self._made or type(handed) is dict:
            self.forms.setdefault(type(handed).__qualname__)


def _module(filename: str) -> str | None:
    return filename[len(str(ROOT)) + 1 :] if filename.startswith(str(ROOT)) else None


@contextmanager
def walking() -> Iterator[Walk]:
    walk = Walk()
    before = sys.getprofile()
    threading.setprofile(walk.profile)
    sys.setprofile(walk.profile)
    try:
        yield walk
    finally:
        sys.setprofile(before)
        threading.setprofile(None)  # type: ignore[arg-type]


def row_and_pixel(model: Path, work: Path) -> tuple[Walk, Walk]:
    """A row of JSONL until its pack lies ready; the pixels of its image from the shard's bytes until the loss."""
    Raster.fromarray(np.full((64, 96, 3), 128, np.uint8)).save(work / "image.png")
    chat = [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "Grey."}]
    (work / "rows.jsonl").write_text(json.dumps({"messages": chat, "images": ["image.png"]}) + "\n")
    processor, network = Processor.from_folder(model), load(model)
    mark, objective = fingerprint(processor), NextToken(network)
    with walking() as row:
        (shard,) = import_data(work / "rows.jsonl", work / "shards").shards
        build_index(str(shard), processor, mark=mark)
    mixture = mixture_from_dict({"sources": [{"path": str(work / "shards"), "weight": 1.0}]})
    loader = make_loader(
        mixture, processor, network.config, pack_tokens=256, pack_patches=1024, packs_per_step=1, seed=0
    )
    # The first step plans and reads; the second one is only what a pixel passes.
    loader.next_step()
    with walking() as pixel:
        (micro,) = loader.next_step()
        prepared = objective.prepare(micro)
        objective(prepared, prepared.denominator, World(0, 1, torch.device("cpu")))
    loader.close()
    return row, pixel


def request(model: Path) -> Walk:
    """A chat request over HTTP until its reply."""
    flags: dict[str, Any] = {"name": "walk", "memory_gib": 0.05, "dtype": "float32", "device": "cpu", "max_tokens": 4}
    app = build(Serve(model=str(model), port=0, **flags), model, {}, (), None)
    server = Server(app, host="127.0.0.1", port=0, drain_seconds=5)
    with walking() as walk:  # the server's threads begin under the profile
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            pass
        walk.modules.clear()
        walk.forms.clear()
        _ask(server)
    server.should_exit = True
    thread.join(20)
    return walk


def _ask(server: Server) -> None:
    asked = {"model": "walk", "messages": [{"role": "user", "content": "Hello."}], "max_tokens": 2, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", "/v1/chat/completions", json.dumps(asked), {"Content-Type": "application/json"})
    reply = connection.getresponse()
    text = reply.read()
    connection.close()
    if reply.status != 200:
        raise ValueError(f"the server answered {reply.status}: {text[:200]!r}; 200 was expected.")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Print the walks of a request, a row and a pixel through the code."""

    model: Path = Path("runs/quickstart/checkpoint")


def walks(model: Path) -> dict[str, Walk]:
    with tempfile.TemporaryDirectory() as work:
        row, pixel = row_and_pixel(model, Path(work))
    return {"request": request(model), "row": row, "pixel": pixel}


def main(options: Options) -> None:
    for name, walk in walks(options.model).items():
        print(f"{name}: {len(walk.modules)} modules, {len(walk.forms)} forms")
        print(f"  modules: {', '.join(walk.modules)}\n  forms: {', '.join(walk.forms)}")


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m dev.walk"))
