"""Starts the ranks of a small run on this machine and gives back how it ended, in one exit code and no traceback of a launcher."""

import sys
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes

from qvl.core.device import Place, place, take_place


def run_ranks(main: Callable[..., int], ranks: int, *arguments: Any) -> int:
    """`main(*arguments)` in `ranks` processes that find each other through `join_world`; the first exit code that is not 0.

    In this process where one rank is asked for, or where torchrun has started this one already. `main` and its arguments are pickled to
    the children, so `main` is a function of a module. An exception in a rank ends the others and is shown once.
    """
    if ranks == 1 or place().world_size > 1:
        return main(*arguments)
    # The parent keeps the store where ranks meet, as torchrun's agent does: its port is free for sure, and no rank has to come first.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    context = start_processes(_rank, (ranks, store.port, main, arguments), ranks, join=False, start_method="spawn")
    assert context is not None
    try:
        while not context.join():
            pass
    except ProcessExitedException as end:
        return end.exit_code if end.exit_code >= 0 else 128 - end.exit_code
    except ProcessRaisedException as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        for process in context.processes:
            if process is not None:
                process.terminate()
        return 130
    return 0


def _rank(rank: int, ranks: int, port: int, main: Callable[..., int], arguments: tuple[Any, ...]) -> None:
    take_place(Place(rank=rank, world_size=ranks, local_rank=rank), port)
    sys.exit(main(*arguments))
