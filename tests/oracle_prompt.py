"""transformers' Qwen3VLProcessor in a process of its own: prompt ids and patches of whole conversations with media.

Run as a script: `python tests/oracle_prompt.py FOLDER OUT.json`, where FOLDER holds the processor files.
"""

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import oracle_processor
from oracle_processor import digest, noise

# (role, parts): a text, an image by (height, width, seed), or a video by (frames, height, width, frames a second).
TALKS: list[list[tuple[str, list[Any]]]] = [
    [("user", [(64, 96, 1), "What is this?"])],
    [("user", ["Look: ", (300, 420, 2), "and", (33, 200, 3), (64, 64, 4), " compare\n"])],
    [("user", ["Watch", (5, 64, 96, 2.0), "then say when."])],
    [("user", [(7, 48, 80, 23.976), (64, 64, 5), (2, 32, 32, 1.0), "12 seconds?"])],
    [("system", ["Be brief."]), ("user", [(64, 64, 6), "a"]), ("assistant", ["b"]), ("user", [(3, 40, 64, 30.0), "c"])],
    [("user", ["u"]), ("tool", ["shot: ", (90, 60, 7)]), ("tool", [(4, 32, 64, 0.5), "done"])],
]


def random_talks(count: int) -> list[list[tuple[str, list[Any]]]]:
    rng = random.Random(5)

    def part() -> Any:
        kind = rng.random()
        if kind < 0.5:
            return "".join(
                rng.choice(["a", " b", "\n", "3", "<", ".", "é", "你好", "  "]) for _ in range(rng.randint(0, 6))
            )
        if kind < 0.8:
            return (rng.randint(20, 120), rng.randint(20, 120), rng.randint(0, 99))
        return (rng.randint(2, 6), rng.randint(32, 70), rng.randint(32, 70), rng.choice([0.5, 1.0, 2.0, 23.976, 30.0]))

    return [
        [
            (rng.choice(["user", "user", "tool"]), [part() for _ in range(rng.randint(1, 6))])
            for _ in range(rng.randint(1, 3))
        ]
        for _ in range(count)
    ]


def all_talks() -> list[list[tuple[str, list[Any]]]]:
    return TALKS + random_talks(40)


def frames_of(video: tuple[int, int, int, float]) -> list[Any]:
    """uint8 (height, width, 3) each."""
    frames, height, width, _ = video
    return [noise(height, width, seed=i) for i in range(frames)]


def answers(folder: Path) -> list[dict[str, Any]]:
    """For each talk: the rendered text, the ids in both forms, digests of the patches."""
    if not (oracle_processor.FOLDER / "torchvision").exists():
        oracle_processor.answers()  # installs torchvision beside the environment
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "answers.json"
        command = [sys.executable, __file__, str(folder), str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the oracle process failed:\n{done.stderr}")
        return json.loads(out.read_text())


def main(folder: Path, out: Path) -> None:
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    sys.path.insert(0, str(oracle_processor.FOLDER))
    torch.set_num_threads(1)

    from transformers import AutoProcessor
    from transformers.video_utils import VideoMetadata

    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor).__name__ == "Qwen3VLProcessor"

    def answer(talk: list[tuple[str, list[Any]]]) -> dict[str, Any]:
        images, videos, metas, messages = [], [], [], []
        for role, parts in talk:
            content: list[dict[str, str]] = []
            for part in parts:
                if isinstance(part, str):
                    content.append({"type": "text", "text": part})
                elif len(part) == 3:
                    content.append({"type": "image"})
                    images.append(torch.from_numpy(noise(part[0], part[1], seed=part[2]).transpose(2, 0, 1).copy()))
                else:
                    content.append({"type": "video"})
                    frames = [frame.transpose(2, 0, 1) for frame in frames_of(part)]
                    videos.append(torch.stack([torch.from_numpy(frame.copy()) for frame in frames]))
                    indices = list(range(part[0]))
                    metas.append(VideoMetadata(total_num_frames=part[0], fps=part[3], frames_indices=indices))
            messages.append({"role": role, "content": content})
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        media: dict[str, Any] = {"images": images} if images else {}
        if videos:
            media |= {"videos": videos, "video_metadata": metas, "do_sample_frames": False}
        got = processor(text=[text], return_tensors="pt", **media)
        # The release's processor puts the slices in place of the whole mark; its ids are those of that text.
        ids = got["input_ids"][0].tolist()
        release_text = processor.tokenizer.decode(_without_outer_marks(ids, processor))
        return {
            "text": text,
            "ids": ids,
            "release_ids": processor.tokenizer(release_text)["input_ids"],
            "images": digest(got["pixel_values"].numpy()) if images else None,
            "videos": digest(got["pixel_values_videos"].numpy()) if videos else None,
        }

    out.write_text(json.dumps([answer(talk) for talk in all_talks()]))


def _without_outer_marks(ids: list[int], processor: Any) -> list[int]:
    """Drops each start that no pad follows, and each end that follows another end across a video."""
    start, end = processor.vision_start_token_id, processor.vision_end_token_id
    pads = (processor.image_token_id, processor.video_token_id)
    kept: list[int] = []
    open_outer = 0
    for i, id in enumerate(ids):
        if id == start and ids[i + 1] not in pads:
            open_outer += 1
        elif id == end and ids[i - 1] not in pads:
            open_outer -= 1
        else:
            kept.append(id)
    assert open_outer == 0
    return kept


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
