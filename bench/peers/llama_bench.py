"""Time llama.cpp by its own two programs on a GGUF of gguf_shape.py: decoding and prefill, one line of JSON each.

    python bench/peers/llama_bench.py BUILD/bin MODEL.gguf --threads 2 >> times.jsonl

Standard library only. Each program warms up by itself; caches are f16 and flash attention is its own choice, as it comes.
"""

import argparse
import json
import subprocess
from pathlib import Path

from timing import BATCHES, CONTEXT, PROMPTS, ROUNDS, STEPS, say


def lines(command: list[str]) -> list[dict[str, float]]:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("programs", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    common = ["-m", str(args.model), "-t", str(args.threads)]
    said = subprocess.run([args.programs / "llama-bench", "--version"], capture_output=True, text=True, check=True)
    version = next(line for line in (said.stdout + said.stderr).splitlines() if "version" in line)
    peer = f"llama.cpp, {version}, built for this CPU, bf16 weights, f16 cache"
    batched = [str(args.programs / "llama-batched-bench"), *common, "-tb", str(args.threads), "-c", "8192"]
    batched += [
        "-npp",
        str(CONTEXT),
        "-ntg",
        str(STEPS),
        "-npl",
        ",".join(map(str, BATCHES)),
        "--output-format",
        "jsonl",
    ]
    found = {f"decode step, batch {row['pl']}": row["t_tg"] / STEPS for row in lines(batched)}
    prefill = [str(args.programs / "llama-bench"), *common, "-p", ",".join(map(str, PROMPTS)), "-n", "0"]
    prefill += ["-r", str(ROUNDS), "-o", "jsonl"]
    found |= {f"prefill {row['n_prompt']} tokens": row["avg_ns"] / 1e9 for row in lines(prefill)}
    for metric, seconds in found.items():
        say(metric, seconds, peer, args.threads)


if __name__ == "__main__":
    main()
