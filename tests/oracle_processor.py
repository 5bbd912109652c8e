"""transformers' media processors in a process of their own: their answers to fixed cases, for the `oracle` tests.

They need torchvision, whose wheel loads beside a CPU torch only once two of its operators are declared. It is installed
under .oracle, outside the environment, the first time it is needed. Run as a script it writes the answers as JSON:
`python tests/oracle_processor.py OUT.json`.
"""

import hashlib
import json
import random
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".oracle"
TORCHVISION = "torchvision==0.28.0"

IMAGE_SIZES = [
    (1, 1), (1, 200), (200, 1), (31, 33), (64, 64), (96, 2048), (256, 256), (300, 420), (480, 640), (768, 1024), (1024, 1024), (1377, 801),
]  # fmt: skip
"""(height, width)."""
SMALL_BUDGET = {"shortest_edge": 4096, "longest_edge": 100_000}
MODES = ["RGB", "RGBA", "LA", "L", "P", "PA", "CMYK", "1", "P+transparency", "RGB+transparency", "YCbCr"]

VIDEOS: list[dict[str, Any]] = [
    {"frames": 7, "height": 64, "width": 96, "fps": 23.976, "call": {}},
    {"frames": 50, "height": 48, "width": 80, "fps": 25.0, "call": {}},
    {"frames": 90, "height": 100, "width": 60, "fps": 29.97, "call": {"num_frames": 5, "fps": None}},
    {"frames": 2000, "height": 16, "width": 24, "fps": 30.0, "call": {}},
    {"frames": 5, "height": 70, "width": 90, "fps": 2.0, "call": {"do_sample_frames": False}},
    {
        "frames": 40,
        "height": 200,
        "width": 300,
        "fps": 10.0,
        "call": {"size": {"shortest_edge": 4096, "longest_edge": 400_000}},
    },
    {
        "frames": 6,
        "height": 300,
        "width": 200,
        "fps": 4.0,
        "call": {"cap_pixels_per_frame": True, "max_video_tokens": 16},
    },
]
VIDEO_SIZE = {"shortest_edge": 4096, "longest_edge": 25_165_824}


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """uint8 (height, width, channels): blocks and noise, so that resizing has both edges and texture to work on."""
    rng = np.random.default_rng([seed, height, width, channels])
    coarse = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, channels))
    fine = rng.integers(-40, 41, (height, width, channels))
    return np.clip(coarse.repeat(8, 0).repeat(8, 1)[:height, :width] + fine, 0, 255).astype(np.uint8)


def clip(case: dict[str, Any]) -> np.ndarray:
    """uint8 (frames, 3, height, width)."""
    return np.stack([noise(case["height"], case["width"], seed=i).transpose(2, 0, 1) for i in range(case["frames"])])


def picture(mode: str) -> Any:
    """A Pillow image of the mode; `+transparency` adds a transparent colour."""
    from PIL import Image

    name, _, transparent = mode.partition("+")
    if name == "PA":
        image = Image.fromarray(noise(40, 50, 4), "RGBA").convert("PA")
    else:
        image = Image.fromarray(noise(40, 50, 4 if name in ("RGBA", "LA") else 3)).convert(name)
    if transparent:
        image.info["transparency"] = 3 if name == "P" else image.getpixel((0, 0))
    return image


def image_size_cases(count: int = 5000) -> list[dict[str, Any]]:
    rng = random.Random(1)
    cases = []
    for _ in range(count):
        low = rng.choice([1024, 4096, 65536, 65536, rng.randint(1, 300_000)])
        high = rng.choice([16_777_216, 16_777_216, low + rng.randint(0, 2_000_000)])
        top = rng.choice([40, 300, 3000, 12000])
        cases.append({"h": rng.randint(1, top), "w": rng.randint(1, top), "low": low, "high": max(low, high)})
    return cases


def video_size_cases(count: int = 5000) -> list[dict[str, Any]]:
    rng = random.Random(2)
    cases = []
    for _ in range(count):
        low = rng.choice([4096, 4096, rng.randint(1, 200_000)])
        high = rng.choice([25_165_824, 25_165_824, low + rng.randint(0, 30_000_000)])
        top = rng.choice([40, 300, 3000])
        size = {"h": rng.randint(1, top), "w": rng.randint(1, top), "n": rng.choice([2, 3, 5, rng.randint(2, 800)])}
        cases.append({**size, "low": low, "high": high, "cap": rng.random() < 0.3})
    return cases


def sampling_cases(count: int = 5000) -> list[dict[str, Any]]:
    rng = random.Random(3)
    cases = []
    for _ in range(count):
        total = rng.choice([1, 2, 3, 5, rng.randint(1, 100), rng.randint(1, 3000), rng.randint(1, 300_000)])
        fps = rng.choice([23.976, 24.0, 25.0, 29.97, 30000 / 1001, 30.0, 60.0, rng.uniform(0.1, 240)])
        case = {"total": total, "source_fps": fps, "fps": rng.choice([2.0, 2.0, 1.0, 4.0, rng.uniform(0.01, 30)])}
        case["num_frames"] = rng.choice([None, None, None, rng.randint(1, 64)])
        cases.append({**case, "min": rng.choice([4, 4, 1, 10]), "max": rng.choice([768, 768, 16, 2048])})
    return cases


def digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


@cache
def answers() -> dict[str, Any]:
    """transformers' answers to all cases above, from one run of this file."""
    if not (FOLDER / "torchvision").exists():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(FOLDER), TORCHVISION]
        subprocess.run(install, check=True)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "answers.json"
        done = subprocess.run([sys.executable, __file__, str(out)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the oracle process failed:\n{done.stderr}")
        return json.loads(out.read_text())


def main(out: Path) -> None:
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    sys.path.insert(0, str(FOLDER))
    torch.set_num_threads(1)

    from transformers.models.qwen2_vl import image_processing_qwen2_vl as images
    from transformers.models.qwen3_vl import video_processing_qwen3_vl as videos
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
    from transformers.video_utils import VideoMetadata

    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    size = {"shortest_edge": 65536, "longest_edge": 16_777_216}
    processor = images.Qwen2VLImageProcessor(patch_size=16, size=size, **half)

    def attempt(call: Any) -> Any:
        try:
            return call()
        except (ValueError, ZeroDivisionError):
            return None

    def image_size(case: dict[str, Any]) -> Any:
        return attempt(lambda: images.smart_resize(case["h"], case["w"], 32, case["low"], case["high"]))

    def video_size(case: dict[str, Any]) -> Any:
        most = case["high"]
        if case["cap"]:  # the lines of resize() around smart_resize
            most = max(min(768 * 1024, most // case["n"]), int(case["low"] * 1.05)) * case["n"]
        return attempt(lambda: videos.smart_resize(case["n"], case["h"], case["w"], 2, 32, case["low"], most))

    def sample(case: dict[str, Any]) -> Any:
        meta = VideoMetadata(total_num_frames=case["total"], fps=case["source_fps"])
        own = videos.Qwen3VLVideoProcessor(
            min_frames=case["min"], max_frames=case["max"], fps=None if case["num_frames"] else case["fps"]
        )
        indices = own.sample_frames(meta, num_frames=case["num_frames"])
        times = Qwen3VLProcessor._calculate_timestamps(own, indices, case["source_fps"])  # type: ignore[arg-type]
        return [indices.tolist(), times]

    def pixels(height: int, width: int, **kwargs: Any) -> Any:
        got = processor(
            images=[torch.from_numpy(noise(height, width).transpose(2, 0, 1).copy())], return_tensors="pt", **kwargs
        )
        return [digest(got["pixel_values"].numpy()), got["image_grid_thw"].tolist()]

    def movie(case: dict[str, Any]) -> Any:
        meta = VideoMetadata(
            total_num_frames=case["frames"], fps=case["fps"], frames_indices=list(range(case["frames"]))
        )
        # In the constructor, because a call does not heed max_video_tokens.
        movies = videos.Qwen3VLVideoProcessor(
            **{"size": VIDEO_SIZE, "cap_pixels_per_frame": False, **half, **case["call"]}
        )
        got = movies(
            videos=[torch.from_numpy(clip(case))], video_metadata=[meta], return_tensors="pt", return_metadata=True
        )
        meta = got["video_metadata"][0]
        indices = [int(i) for i in meta.frames_indices]
        times = Qwen3VLProcessor._calculate_timestamps(movies, list(indices), meta.fps)  # type: ignore[arg-type]
        return [digest(got["pixel_values_videos"].numpy()), got["video_grid_thw"].tolist(), indices, times]

    found = {
        "image_size": [image_size(case) for case in image_size_cases()],
        "video_size": [video_size(case) for case in video_size_cases()],
        "sampling": [sample(case) for case in sampling_cases()],
        "image": [pixels(*case) for case in IMAGE_SIZES],
        "image_small": [pixels(*case, size=SMALL_BUDGET) for case in IMAGE_SIZES],
        "mode": [digest(processor.process_image(picture(mode), do_convert_rgb=True).numpy()) for mode in MODES],
        "video": [movie(case) for case in VIDEOS],
    }
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
