"""transformers' own processor and model on video files, in a process of their own: ids, grid, patches and greedy tokens.

Run as a script: `python tests/oracle_video.py FOLDER CLIPS.json OUT.json`. torchvision's readers are not installed, so PyAV
decodes the file and transformers chooses among all its frames.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import oracle_processor
from oracle_processor import digest

QUESTION = "When does it change?"


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A file, and what is asked of it."""

    path: str
    num_frames: int | None = None
    """How many frames to take; None: the folder's own rule, 2 a second."""


@dataclass(frozen=True, kw_only=True)
class Said:
    """What transformers makes of a clip."""

    ids: list[int]
    grid: list[int]
    patches: str
    """SHA-256 of the float patches."""
    tokens: list[int]
    margin: float
    """The smallest step between the best and the second logit; near 0, rounding would decide."""


def answers(folder: Path, clips: list[Clip], max_tokens: int) -> list[Said]:
    if not (oracle_processor.FOLDER / "torchvision").exists():
        oracle_processor.answers()  # installs torchvision beside the environment
    with tempfile.TemporaryDirectory() as scratch:
        asked, out = Path(scratch) / "clips.json", Path(scratch) / "answers.json"
        asked.write_text(json.dumps({"clips": [asdict(clip) for clip in clips], "max_tokens": max_tokens}))
        command = [sys.executable, __file__, str(folder), str(asked), str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the oracle process failed:\n{done.stderr}")
        return [Said(**said) for said in json.loads(out.read_text())]


def main(folder: Path, asked: Path, out: Path) -> None:
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    sys.path.insert(0, str(oracle_processor.FOLDER))
    torch.set_num_threads(1)

    import av
    import numpy as np
    from transformers import AutoProcessor, Qwen3VLForConditionalGeneration
    from transformers.video_utils import VideoMetadata

    processor: Any = AutoProcessor.from_pretrained(folder)
    model: Any = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    own_fps = processor.video_processor.fps
    content = [{"type": "video"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    request = json.loads(asked.read_text())

    def say(clip: Clip) -> Said:
        with av.open(clip.path) as container:
            fps = float(container.streams.video[0].average_rate or 0)
            frames = [frame.to_ndarray(format="rgb24").transpose(2, 0, 1) for frame in container.decode(video=0)]
        count = len(frames)
        processor.video_processor.num_frames = clip.num_frames
        processor.video_processor.fps = None if clip.num_frames else own_fps
        media: dict[str, Any] = {}
        shown = list(range(count))
        if count == 1:  # its processor refuses a single frame, so it gets the frame twice, both at 0 seconds
            frames, shown, media = frames * 2, [0, 0], {"do_sample_frames": False}
        meta = VideoMetadata(total_num_frames=len(frames), fps=fps, frames_indices=shown)
        video = torch.from_numpy(np.stack(frames))
        inputs = processor(text=[text], videos=[video], video_metadata=[meta], return_tensors="pt", **media)
        model.model.rope_deltas = None
        settings = {"do_sample": False, "max_new_tokens": request["max_tokens"], "eos_token_id": None}
        with torch.inference_mode():
            done = model.generate(
                **inputs, **settings, pad_token_id=0, return_dict_in_generate=True, output_logits=True
            )
        best = torch.cat(done.logits).topk(2).values
        ids = inputs["input_ids"][0].tolist()
        return Said(
            ids=ids,
            grid=inputs["video_grid_thw"][0].tolist(),
            patches=digest(inputs["pixel_values_videos"].numpy()),
            tokens=done.sequences[0, len(ids) :].tolist(),
            margin=(best[:, 0] - best[:, 1]).min().item(),
        )

    out.write_text(json.dumps([asdict(say(Clip(**clip))) for clip in request["clips"]]))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
