"""Time vLLM on a CPU with the text half of the bench's shape, one line of JSON each: decoding and prefill.

    VLLM_ENV/bin/python bench/peers/vllm_bench.py OUT/torch --threads 2 >> times.jsonl

Runs in vllm_check.py's environment. OUT/torch is the text model that openvino_bench.py writes (Qwen3ForCausalLM with random weights). The
prefix cache is off, graphs are compiled as it comes; each step of its engine is timed from outside, in its own process.
"""

# pyright: basic, reportMissingImports=false
import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

STEPS, WARM, ROUNDS = 32, 4, 3
CONTEXT = 240
"""Of a prompt, so that decoding is timed around 256."""


class Engine:
    def __init__(self, folder: Path, threads: int) -> None:
        import numpy as np
        import vllm

        self.vllm, self.random, self.count = vllm, np.random.default_rng(0), 0
        self.vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
        llm = vllm.LLM(
            str(folder),
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=8192,
            max_num_batched_tokens=8192,
            enable_prefix_caching=False,
        )
        self.inner = llm.llm_engine

    def ask(self, tokens: int, answer: int) -> None:
        wanted = self.vllm.SamplingParams(max_tokens=answer, temperature=0, ignore_eos=True, detokenize=False)
        prompt = self.random.integers(0, self.vocabulary, tokens).tolist()
        self.count += 1
        self.inner.add_request(str(self.count), {"prompt_token_ids": prompt}, wanted)

    def finish(self, asked: int, answer: int) -> None:
        lengths = []
        while self.inner.has_unfinished_requests():
            lengths += [len(out.outputs[0].token_ids) for out in self.inner.step() if out.finished]
        assert lengths == [answer] * asked, f"answers of {lengths} tokens came, not {asked} of {answer}"

    def decode(self, batch: int) -> float:
        """Seconds a step: the middle of STEPS steps after every prompt is read."""
        for _ in range(batch):
            self.ask(CONTEXT, STEPS)
        for _ in range(1 + WARM):  # the first reads all prompts
            self.inner.step()
        each = []
        for _ in range(STEPS - WARM - 4):
            start = time.perf_counter()
            self.inner.step()
            each.append(time.perf_counter() - start)
        self.finish(batch, STEPS)
        return statistics.median(each)

    def prefill(self, tokens: int) -> float:
        self.ask(tokens, 1)
        start = time.perf_counter()
        self.finish(1, 1)
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    surroundings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    surroundings |= {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    os.environ.update(surroundings | {"OMP_NUM_THREADS": str(args.threads), "VLLM_LOGGING_LEVEL": "ERROR"})
    from importlib import metadata

    import torch
    from vllm_check import MEND

    exec(MEND)  # before vLLM looks for torchvision

    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["VLLM_CACHE_ROOT"] = scratch
        engine = Engine(args.folder, args.threads)
        peer = f"vLLM for CPUs (vllm-cpu {metadata.version('vllm-cpu')}), bf16"
        works = {f"decode step, batch {batch}": lambda batch=batch: engine.decode(batch) for batch in (1, 8, 16)}
        works |= {f"prefill {tokens} tokens": lambda tokens=tokens: engine.prefill(tokens) for tokens in (512, 4096)}
        for metric, work in works.items():
            work()
            seconds = statistics.median(work() for _ in range(ROUNDS))
            print(json.dumps({"metric": metric, "seconds": seconds, "peer": peer, "threads": args.threads}), flush=True)


if __name__ == "__main__":
    main()
