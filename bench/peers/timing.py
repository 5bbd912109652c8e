"""What the peers' programs share: how a step of decoding is timed, and the lines they print. Standard library only."""

import json
import statistics
import time
from collections.abc import Callable, Mapping

STEPS, WARM, ROUNDS = 32, 4, 3
CONTEXT = 240
"""Tokens of a prompt, so that decoding is timed around 256."""
BATCHES, PROMPTS = (1, 8, 16), (512, 4096)


def step_seconds(step: Callable[[], object]) -> float:
    """The middle of STEPS steps, without the first and the last few."""
    for _ in range(WARM):
        step()
    each = []
    for _ in range(STEPS - WARM - 4):
        start = time.perf_counter()
        step()
        each.append(time.perf_counter() - start)
    return statistics.median(each)


def say(metric: str, seconds: float, peer: str, threads: int) -> None:
    print(json.dumps({"metric": metric, "seconds": seconds, "peer": peer, "threads": threads}), flush=True)


def say_medians(works: Mapping[tuple[str, str], Callable[[], float]], threads: int) -> None:
    """(metric, peer) -> one run, in seconds: run once for nothing, then ROUNDS times."""
    for (metric, peer), work in works.items():
        work()
        say(metric, statistics.median(work() for _ in range(ROUNDS)), peer, threads)


def text_works(
    peer: str, decode: Callable[[int], float], prefill: Callable[[int], float]
) -> dict[tuple[str, str], Callable[[], float]]:
    """The rows of the text half: a step with so many answers, a prompt of so many tokens."""
    works = {(f"decode step, batch {n}", peer): lambda n=n: decode(n) for n in BATCHES}
    return works | {(f"prefill {n} tokens", peer): lambda n=n: prefill(n) for n in PROMPTS}
