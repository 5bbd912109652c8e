"""A tiny random Qwen3-VL in a complete Hugging Face folder: the small tokenizer, the real template, real processor files."""

from dataclasses import replace
from pathlib import Path

from qvl.model.config import ModelConfig, preset
from qvl.model.qwen3vl import new_model
from qvl.model.weights import save
from qvl.prompt.budget import ImageBudget
from qvl.prompt.folder import Folder, write_folder
from qvl.prompt.sampling import VideoSampling
from qvl.prompt.tokenizer import Tokenizer


def tiny_config(tokenizer: Tokenizer) -> ModelConfig:
    """The "nano" shape with the small vocabulary, rounded up to a multiple of 64 rows."""
    nano = preset("nano")
    rows = -(-tokenizer.num_ids // 64) * 64
    text = replace(
        nano.text,
        vocab_size=rows,
        max_position_embeddings=32768,
        bos_token_id=tokenizer.control_id("<|endoftext|>"),
        eos_token_id=tokenizer.control_id("<|im_end|>"),
    )
    return replace(
        nano,
        text=text,
        image_token_id=tokenizer.control_id("<|image_pad|>"),
        video_token_id=tokenizer.control_id("<|video_pad|>"),
        vision_start_token_id=tokenizer.control_id("<|vision_start|>"),
        vision_end_token_id=tokenizer.control_id("<|vision_end|>"),
    )


def write_checkpoint(folder: Path, tokenizer: Tokenizer, *, seed: int = 0) -> None:
    """Random weights; pictures of at most 256 tokens and video of at most 1,024, so that a CPU answers at once."""
    save(new_model(tiny_config(tokenizer), seed=seed), folder)
    source = Folder(path=folder / "nothing", template=None, image_config=None, video_config=None)
    images = ImageBudget(min_tokens=16, max_tokens=256)
    videos = VideoSampling(fps=1.0, min_tokens=16, max_tokens=1024)
    write_folder(source, folder, tokenizer, "instruct", images, videos)
