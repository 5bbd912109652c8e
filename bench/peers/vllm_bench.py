"""Time vLLM on a CPU with the text half of the bench's shape, one line of JSON each: decoding and prefill.

    VLLM_ENV/bin/python bench/peers/vllm_bench.py OUT/torch --threads 2 >> times.jsonl

Runs in vllm_check.py's environment. OUT/torch is the text model that openvino_bench.py writes (Qwen3ForCausalLM with random weights). The
prefix cache is off, graphs are compiled as it comes; each step of its engine is timed from outside, in its own process.
"""

# pyright: basic, reportMissingImports=false
import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from timing import CONTEXT, STEPS, say_medians, step_seconds, text_works
from vllm_check import MEND, THEIR_SURROUNDINGS


class Engine:
    def __init__(self, folder: Path) -> None:
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
        """Seconds a step, after every prompt is read."""
        for _ in range(batch):
            self.ask(CONTEXT, STEPS)
        self.inner.step()  # reads all prompts
        seconds = step_seconds(self.inner.step)
        self.finish(batch, STEPS)
        return seconds

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
    os.environ.update(THEIR_SURROUNDINGS)
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="4", OMP_NUM_THREADS=str(args.threads), VLLM_LOGGING_LEVEL="ERROR")
    from importlib import metadata

    import torch

    torch.set_num_threads(args.threads)
    kept: dict[str, object] = {}
    exec(MEND, kept)  # before vLLM looks for torchvision; what it makes is gone with the names it made
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "sitecustomize.py").write_text(MEND)  # and for the processes that vLLM starts
        os.environ.update(VLLM_CACHE_ROOT=scratch, PYTHONPATH=scratch)
        engine = Engine(args.folder)
        peer = f"vLLM for CPUs (vllm-cpu {metadata.version('vllm-cpu')}), bf16"
        say_medians(text_works(peer, engine.decode, engine.prefill), args.threads)


if __name__ == "__main__":
    main()
