"""Time OpenVINO on a Hugging Face folder's shape, one line of JSON each: decoding and prefill of its text half by OpenVINO GenAI, and a
picture through transformers' vision tower, converted for exactly its grid.

    python bench/peers/openvino_bench.py FOLDER TOKENIZER OUT --threads 2 >> times.jsonl

Runs in an environment of its own (README.md). FOLDER gives the shape; TOKENIZER is any folder with a tokenizer, which the pipeline wants
and never uses; OUT keeps the converted models. An exported folder scales pictures down to 256 tokens, so the tower runs by OpenVINO
alone, which leaves preparation out. The prefix cache is off and no two prompts are alike: with it on, a prompt read before costs nothing.
Each answer's length is checked, because a request that is refused takes no time either.
"""

# pyright: basic, reportMissingImports=false, reportArgumentType=false, reportOperatorIssue=false
import argparse
import json
import time
from pathlib import Path

import numpy as np
import openvino as ov
import openvino_genai as genai
import transformers
from timing import CONTEXT, STEPS, say_medians, step_seconds, text_works


def convert(folder: Path, tokenizer: Path, out: Path) -> None:
    import torch
    from openvino_tokenizers import convert_tokenizer
    from optimum.intel import OVModelForCausalLM

    text = json.loads((folder / "config.json").read_text())["text_config"]
    text |= {"model_type": "qwen3", "rope_scaling": None}
    config = transformers.Qwen3Config(**text | {"tie_word_embeddings": True})
    model = transformers.Qwen3ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(out / "torch")
    OVModelForCausalLM.from_pretrained(out / "torch", export=True, compile=False, load_in_8bit=False).save_pretrained(
        out
    )
    parts = convert_tokenizer(transformers.AutoTokenizer.from_pretrained(tokenizer), with_detokenizer=True)
    for part, name in zip(parts, ("openvino_tokenizer.xml", "openvino_detokenizer.xml"), strict=True):
        ov.save_model(part, out / name)


GRID = ((1, 64, 64),)
"""1024 x 1024 pixels."""


class Tower:
    """The vision tower and its mergers for one picture of GRID."""

    def __init__(self, folder: Path, out: Path, threads: int) -> None:
        if not (out / "tower.xml").exists():
            self._convert(folder, out)
        hints = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "bf16", "PERFORMANCE_HINT": "LATENCY"}
        self.inner = ov.Core().compile_model(out / "tower.xml", "CPU", hints)
        shape = self.inner.input(0).get_partial_shape().to_shape()
        self.patches = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)

    def _convert(self, folder: Path, out: Path) -> None:
        import torch
        from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
        from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

        class Merged(torch.nn.Module):
            def __init__(self, tower: torch.nn.Module) -> None:
                super().__init__()
                self.tower = tower

            def forward(self, patches):
                merged, levels = self.tower(patches, torch.tensor(GRID))
                return (merged, *levels)

        facts = json.loads((folder / "config.json").read_text())["vision_config"]
        config = Qwen3VLVisionConfig(**facts)
        config._attn_implementation = "sdpa"
        width = config.in_channels * config.temporal_patch_size * config.patch_size**2
        with torch.no_grad():
            tower = Merged(Qwen3VLVisionModel(config).eval())
            example = torch.randn(GRID[0][0] * GRID[0][1] * GRID[0][2], width)
            model = ov.convert_model(tower, example_input=example, input=[ov.PartialShape(list(example.shape))])
        ov.save_model(model, out / "tower.xml", compress_to_fp16=False)

    def encode(self) -> float:
        start = time.perf_counter()
        out = self.inner(self.patches)
        assert out[0].shape[0] == GRID[0][1] * GRID[0][2] // 4, f"{out[0].shape} came"
        return time.perf_counter() - start


class Pipeline:
    def __init__(self, out: Path, threads: int, batch_tokens: int) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size, scheduler.max_num_batched_tokens = 4, batch_tokens
        scheduler.enable_prefix_caching = False
        self.inner = genai.ContinuousBatchingPipeline(out, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads})
        self.vocabulary = json.loads((out / "config.json").read_text())["vocab_size"]
        self.random, self.count = np.random.default_rng(0), 0

    def ask(self, tokens: int, answer: int):
        wanted = genai.GenerationConfig(max_new_tokens=answer, ignore_eos=True, do_sample=False)
        prompt = self.random.integers(0, self.vocabulary, (1, tokens), dtype=np.int64)
        self.count += 1
        return self.inner.add_request(self.count, ov.Tensor(prompt), wanted)

    def finish(self, handles, answer: int) -> None:
        while self.inner.has_non_finished_requests():
            self.inner.step()
        for handle in handles:
            (found,) = handle.read_all()
            assert len(found.generated_ids) == answer, f"{len(found.generated_ids)} tokens came, not {answer}"

    def decode(self, batch: int) -> float:
        """Seconds a step, after every prompt is read."""
        handles = [self.ask(CONTEXT, STEPS) for _ in range(batch)]
        self.inner.step()  # reads all prompts, which fit one step's budget
        seconds = step_seconds(self.inner.step)
        self.finish(handles, STEPS)
        return seconds

    def prefill(self, tokens: int) -> float:
        start = time.perf_counter()
        self.finish([self.ask(tokens, 1)], 1)
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("folder", "tokenizer", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    if not (args.out / "openvino_model.xml").exists():
        convert(args.folder, args.tokenizer, args.out)
    tower = Tower(args.folder, args.out, args.threads)
    pipeline = Pipeline(args.out, args.threads, 4096)
    genai_peer = f"OpenVINO GenAI {genai.__version__.split('-')[0]}, continuous batching, its own choice of precision"
    tower_peer = f"OpenVINO {ov.__version__.split('-')[0]}, transformers' tower for this grid, bf16"
    works = {("encode 1024x1024 image", tower_peer): tower.encode}
    works |= text_works(genai_peer, pipeline.decode, pipeline.prefill)
    say_medians(works, args.threads)


if __name__ == "__main__":
    main()
