"""The processor files of a Hugging Face folder, read and written."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvl.core.config import read_json, read_object
from qvl.prompt.budget import ImageBudget
from qvl.prompt.sampling import PIXELS_PER_VIDEO_TOKEN, VideoSampling
from qvl.prompt.template import Style, jinja_template
from qvl.prompt.tokenizer import Tokenizer
from qvl.prompt.visual import FRAMES, MERGE, PATCH

IMAGE_FILE, VIDEO_FILE = "preprocessor_config.json", "video_preprocessor_config.json"
WHOLE_FILE = "processor_config.json"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json")
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")


@dataclass(frozen=True, kw_only=True)
class Folder:
    path: Path
    template: str | None
    """The Jinja text of the chat template."""
    image_config: Mapping[str, Any] | None
    video_config: Mapping[str, Any] | None


def read_folder(path: Path | str) -> Folder:
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path} is no folder; a Hugging Face model folder was expected.")
    # transformers 5 writes both into one file, and reads that one first.
    whole = read_object(path / WHOLE_FILE) if (path / WHOLE_FILE).exists() else {}
    configs: list[Mapping[str, Any] | None] = []
    for name, part in ((IMAGE_FILE, "image_processor"), (VIDEO_FILE, "video_processor")):
        nested = whole.get(part)
        config = nested if isinstance(nested, dict) else read_json(path / name) if (path / name).exists() else None
        if config is not None:
            _check_processing(path / (WHOLE_FILE if nested is config else name), config)
        configs.append(config)
    return Folder(path=path, template=_read_template(path), image_config=configs[0], video_config=configs[1])


def _read_template(path: Path) -> str | None:
    """chat_template.jinja, else chat_template.json, else the entry of tokenizer_config.json: transformers' order."""
    if (path / "chat_template.jinja").exists():
        # newline="" keeps the bytes: the text is handed on as it came.
        with (path / "chat_template.jinja").open(encoding="utf-8", newline="") as file:
            return file.read()
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = read_json(path / name).get("chat_template") if (path / name).exists() else None
        if isinstance(found, list):  # several by name
            found = next((entry["template"] for entry in found if entry.get("name") == "default"), None)
        if found is not None:
            return found
    return None


BICUBIC = 3
"""Pillow's number for it, which processor files use."""
FIXED: dict[str, tuple[Any, ...]] = {
    "patch_size": (PATCH,),
    "temporal_patch_size": (FRAMES,),
    "merge_size": (MERGE,),
    "do_resize": (True,),
    "do_rescale": (True,),
    "do_normalize": (True,),
    "do_convert_rgb": (True,),
    "do_sample_frames": (True,),
    "do_center_crop": (False,),
    "do_pad": (False,),
    "resample": (BICUBIC, "bicubic"),
}
"""What Qwen3-VL's processor files say, and the network was trained with. None and a missing key mean the same."""
RESCALE_FACTOR = 1 / 255


def _check_processing(file: Path, config: Mapping[str, Any]) -> None:
    """Refuses what would change patches or pixels: it is neither followed nor dropped without a word."""
    for key, values in FIXED.items():
        if config.get(key) is not None and config[key] not in values:
            raise ValueError(
                f"{file} has {key} {config[key]}; Qwen3-VL has {values[0]}. Take the file of a Qwen3-VL folder."
            )
    factor = config.get("rescale_factor")
    if factor is not None and not (isinstance(factor, int | float) and abs(factor - RESCALE_FACTOR) < 1e-6):
        raise ValueError(f"{file} has rescale_factor {factor}; Qwen3-VL has 1/255. Take the file of a Qwen3-VL folder.")
    for key in ("image_mean", "image_std"):
        if any(value != 0.5 for value in config.get(key) or ()):
            raise ValueError(f"{file} has {key} {config[key]}; Qwen3-VL has 0.5 for each channel.")


# ---- writing ------------------------------------------------------------------------------------------------------


def write_folder(
    folder: Folder,
    out: Path,
    tokenizer: Tokenizer,
    style: Style | None,
    images: ImageBudget | None,
    videos: VideoSampling | None,
) -> None:
    """Files of the source folder go through byte for byte; what is missing is written, with the budgets in use."""
    if out.resolve() == folder.path.resolve():
        raise ValueError(f"{out} is the folder the processor came from; save to another one.")
    given = None if videos is None else video_config(videos)  # refuses before anything is written
    out.mkdir(parents=True, exist_ok=True)
    for name in (*TOKENIZER_FILES, *TEMPLATE_FILES, "tokenizer_config.json", "generation_config.json"):
        if (folder.path / name).exists():
            shutil.copyfile(folder.path / name, out / name)
    if not (out / "tokenizer.json").exists():
        _write_json(out / "tokenizer.json", tokenizer.description, indent=None)
    if not (out / "tokenizer_config.json").exists():
        _write_json(out / "tokenizer_config.json", tokenizer_config(tokenizer))
    if folder.template is None and style is not None:
        (out / "chat_template.jinja").write_text(jinja_template(style), encoding="utf-8")
    elif folder.template is not None and not (out / "chat_template.jinja").exists():
        # A template kept inside JSON moves into its own file too, the form every reader knows.
        (out / "chat_template.jinja").write_bytes(folder.template.encode())
    if not (out / "generation_config.json").exists() and style is not None:
        _write_json(out / "generation_config.json", generation_config(tokenizer, style))
    if images is not None:
        _write_config(
            folder.path / IMAGE_FILE, out / IMAGE_FILE, folder.image_config, image_config(images), IMAGE_CONFIG
        )
    if given is not None:
        before = folder.video_config
        if before is not None and before.get("num_frames") is not None:
            given = {"num_frames": None, **given}  # or the older number would go on holding
        _write_config(folder.path / VIDEO_FILE, out / VIDEO_FILE, before, given, VIDEO_CONFIG)


def _write_config(
    source: Path, out: Path, before: Mapping[str, Any] | None, now: Mapping[str, Any], fresh: Mapping[str, Any]
) -> None:
    """The source file itself where the budgets are still its own, else its content with the new budgets."""
    if before is None:
        _write_json(out, {**fresh, **now})
    elif all(before.get(key) == value for key, value in now.items()) and source.exists():
        shutil.copyfile(source, out)
    else:
        older = ("min_pixels", "max_pixels") if "size" in now else ()  # or they would go on holding
        _write_json(out, {**{key: value for key, value in before.items() if key not in older}, **now})


COMMON_CONFIG = {
    "patch_size": PATCH,
    "temporal_patch_size": FRAMES,
    "merge_size": MERGE,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
}
IMAGE_CONFIG = {**COMMON_CONFIG, "image_processor_type": "Qwen2VLImageProcessorFast"}
VIDEO_CONFIG = {**COMMON_CONFIG, "video_processor_type": "Qwen3VLVideoProcessor", "do_sample_frames": True}


def image_config(budget: ImageBudget) -> dict[str, Any]:
    """What the budget decides in preprocessor_config.json; `size` holds areas in pixels under the names of edges."""
    return {"size": {"longest_edge": budget.max_pixels, "shortest_edge": budget.min_pixels}}


def video_config(sampling: VideoSampling) -> dict[str, Any]:
    """What the sampling decides in video_preprocessor_config.json; `size` holds pixels times frames."""
    if sampling.rule != "transformers":
        raise ValueError(
            f"The sampling rule {sampling.rule!r} cannot be written for transformers, which has only its own."
        )
    high, low = (round(tokens * PIXELS_PER_VIDEO_TOKEN) for tokens in (sampling.max_tokens, sampling.min_tokens))
    config: dict[str, Any] = {"size": {"longest_edge": high, "shortest_edge": low}, "fps": sampling.fps}
    if sampling.num_frames is not None:
        config["num_frames"] = sampling.num_frames
    return config | {"min_frames": sampling.min_frames, "max_frames": sampling.max_frames}


def tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    decoder = {
        str(token.id): {"content": token.name, **flags, "special": token.is_special}
        for token in tokenizer.control_tokens
    }
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": _name(tokenizer, tokenizer.eos_id),
        "errors": "replace",
        "model_max_length": 262144,
        "pad_token": _name(tokenizer, tokenizer.pad_id),
        "processor_class": "Qwen3VLProcessor",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def _name(tokenizer: Tokenizer, id: int | None) -> str | None:
    return next((token.name for token in tokenizer.control_tokens if token.id == id), None)


def generation_config(tokenizer: Tokenizer, style: Style) -> dict[str, Any]:
    """The published sampling of the two kinds of model."""
    ends = [id for id in (tokenizer.eos_id, tokenizer.pad_id) if id is not None]
    sampling = {"temperature": 0.7, "top_p": 0.8} if style == "instruct" else {"temperature": 1.0, "top_p": 0.95}
    return {
        "bos_token_id": tokenizer.pad_id,
        "do_sample": True,
        "eos_token_id": ends,
        "pad_token_id": tokenizer.pad_id,
        "repetition_penalty": 1.0,
        "top_k": 20,
        **sampling,
    }


def _write_json(file: Path, data: Mapping[str, Any], indent: int | None = 2) -> None:
    file.write_text(json.dumps(data, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
