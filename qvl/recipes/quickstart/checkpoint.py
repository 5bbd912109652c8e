"""The story's network in a complete Hugging Face folder: the small tokenizer, the real template, real processor files."""

import json
from pathlib import Path

from qvl.model.qwen3vl import Qwen3VL
from qvl.model.weights import save
from qvl.prompt.budget import ImageBudget
from qvl.prompt.folder import Folder, write_folder
from qvl.prompt.sampling import VideoSampling
from qvl.prompt.tokenizer import Tokenizer


def write_checkpoint(folder: Path, model: Qwen3VL, tokenizer: Tokenizer) -> None:
    """Pictures of at most 256 tokens and video of at most 1,024, so that a CPU answers at once."""
    save(model, folder)
    source = Folder(path=folder / "nothing", template=None, image_config=None, video_config=None)
    images = ImageBudget(min_tokens=4, max_tokens=256)
    videos = VideoSampling(fps=1.0, min_tokens=4, max_tokens=1024)
    write_folder(source, folder, tokenizer, "instruct", images, videos)
    # A model this small has one good answer: drawn at Qwen3-VL's temperatures it would often miss it.
    path = folder / "generation_config.json"
    ids = {key: value for key, value in json.loads(path.read_text()).items() if key.endswith("_token_id")}
    path.write_text(json.dumps({**ids, "do_sample": False}, indent=2) + "\n")
