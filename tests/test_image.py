"""Pictures: every kind of file becomes the same upright RGB raster, and patches equal to transformers' to the bit."""

import base64
import io
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import oracle_processor as oracle
from media_files import encoded, gradient, png_header
from qvl.outside.media import MediaLimits
from qvl.outside.workers import InProcess
from qvl.prompt.budget import ImageBudget, smart_resize
from qvl.prompt.image import image_patches, load_image
from qvl.prompt.visual import PATCH


def raster(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)


# Equal to transformers.


@pytest.mark.oracle
def test_sizes_are_those_of_transformers_in_5000_random_cases() -> None:
    for case, expected in zip(oracle.image_size_cases(), oracle.answers()["image_size"], strict=True):
        budget = ImageBudget(min_tokens=case["low"] / 1024, max_tokens=case["high"] / 1024)
        if expected is None or 0 in expected:
            with pytest.raises(ValueError, match=r"at most 200 times|leaves nothing"):
                smart_resize(case["h"], case["w"], budget)
        else:
            assert list(smart_resize(case["h"], case["w"], budget)) == expected, case


@pytest.mark.oracle
@pytest.mark.parametrize("number", range(len(oracle.IMAGE_SIZES)), ids=[f"{h}x{w}" for h, w in oracle.IMAGE_SIZES])
@pytest.mark.parametrize("channels_last", [True, False])
def test_patches_are_those_of_transformers_to_the_bit(number: int, channels_last: bool) -> None:
    pixels = raster(oracle.noise(*oracle.IMAGE_SIZES[number]))
    if not channels_last:
        pixels = pixels.contiguous()
    small = ImageBudget.from_config({"size": oracle.SMALL_BUDGET})
    for budget, key in ((ImageBudget(), "image"), (small, "image_small")):
        visual = image_patches(pixels, budget)
        assert [oracle.digest(visual.values_PX.numpy()), visual.grid_I3.tolist()] == oracle.answers()[key][number]


@pytest.mark.oracle
@pytest.mark.parametrize("number", range(len(oracle.MODES)), ids=oracle.MODES)
def test_colour_modes_become_rgb_as_in_transformers(number: int) -> None:
    got = load_image(oracle.picture(oracle.MODES[number]))
    assert oracle.digest(got.numpy()) == oracle.answers()["mode"][number]


# What a patch is.


def test_a_patch_holds_channel_then_frame_then_rows() -> None:
    pixels = np.zeros((256, 256, 3), np.uint8)
    pixels[0, 1] = (255, 0, 51)  # row 0, column 1 of the first patch
    visual = image_patches(raster(pixels))
    assert visual.grid_I3.tolist() == [[1, 16, 16]]
    assert visual.num_tokens == 64
    first = visual.values_PX[0].view(3, 2, PATCH, PATCH)
    assert first[:, 0, 0, 1].tolist() == first[:, 1, 0, 1].tolist()  # an image is shown to both frames
    assert first[:, 0, 0, 1].tolist() == pytest.approx([1.0, -1.0, -0.6])
    assert (visual.values_PX == -1).sum().item() == visual.values_PX.numel() - 4


def test_patches_come_in_merge_blocks_of_two_by_two() -> None:
    pixels = np.zeros((256, 256, 3), np.uint8)
    pixels[16:32, 0:16] = 255  # patch row 1, column 0: third of the first block
    pixels[0:16, 32:48] = 255  # patch row 0, column 2: first of the second block
    bright = image_patches(raster(pixels)).values_PX.mean(dim=1).gt(0).nonzero().flatten()
    assert bright.tolist() == [2, 4]


def test_the_default_dtype_does_not_change_the_patches() -> None:
    pixels = raster(gradient(256, 256))
    expected = image_patches(pixels).values_PX
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = image_patches(pixels).values_PX
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == torch.float32 and torch.equal(got, expected)


# Budgets.


def test_a_budget_is_in_tokens_and_pixels_follow() -> None:
    budget = ImageBudget(min_tokens=64, max_tokens=1280)
    assert (budget.min_pixels, budget.max_pixels) == (65536, 1310720)
    assert smart_resize(3000, 4000, budget) == (960, 1312)
    assert image_patches(raster(gradient(1500, 2000)), budget).num_tokens == 960 * 1312 // 1024


def test_a_budget_reads_areas_under_the_names_of_edges() -> None:
    assert ImageBudget.from_config({"size": {"shortest_edge": 65536, "longest_edge": 16777216}}) == ImageBudget()
    odd = ImageBudget.from_config({"size": {"shortest_edge": 3137, "longest_edge": 1003521}})
    assert (odd.min_pixels, odd.max_pixels) == (3137, 1003521)
    with pytest.raises(ValueError, match="expected shortest_edge and longest_edge"):
        ImageBudget.from_config({"size": {"height": 224, "width": 224}})


@pytest.mark.parametrize("low, high", [(0, 10), (20, 10), (-1, 5), (float("nan"), 5), (1, float("inf"))])
def test_a_budget_that_makes_no_sense_is_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="expected 0 < min_tokens <= max_tokens"):
        ImageBudget(min_tokens=low, max_tokens=high)


def test_the_longer_side_may_be_200_times_the_shorter_and_no_more() -> None:
    assert smart_resize(1, 200, ImageBudget()) == (32, 3648)
    with pytest.raises(ValueError, match="the image is 201x1; the longer side may be at most 200 times the shorter"):
        image_patches(torch.zeros(3, 1, 201, dtype=torch.uint8))


# Sources.


def test_all_sources_give_the_same_raster(tmp_path: Path) -> None:
    pixels = gradient(20, 30)
    data = encoded(pixels, "PNG")
    path = tmp_path / "a picture.png"
    path.write_bytes(data)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    sources = [path, str(path), path.as_uri(), data, uri, io.BytesIO(data), Image.fromarray(pixels), raster(pixels)]
    for source in sources:
        assert torch.equal(load_image(source), raster(pixels)), source


@pytest.mark.parametrize("format", ["PNG", "BMP", "GIF", "WEBP", "JPEG"])
def test_five_formats_are_read(format: str) -> None:
    pixels = np.full((20, 30, 3), (200, 100, 50), np.uint8)
    options = {"lossless": True} if format == "WEBP" else {"quality": 100} if format == "JPEG" else {}
    got = load_image(encoded(pixels, format, **options))
    assert got.shape == (3, 20, 30) and got.dtype == torch.uint8
    assert (got.int() - raster(pixels).int()).abs().max() <= 2


def test_an_address_needs_a_fetcher() -> None:
    with pytest.raises(ValueError, match="open it with a Fetcher that allows its domain"):
        load_image("https://example.org/cat.jpg")


@pytest.mark.parametrize(
    "bad", [torch.zeros(20, 30, 3, dtype=torch.uint8), torch.zeros(3, 20, 30), torch.zeros(20, 30, dtype=torch.uint8)]
)
def test_a_raster_with_other_axes_is_refused_rather_than_guessed(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected torch.uint8 of shape 3 x height x width"):
        load_image(bad)


# Odd files that are answered.


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(orientation: int) -> None:
    pixels = gradient(20, 30)
    stored = {1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1], 5: pixels.transpose(1, 0, 2)}
    stored |= {6: np.rot90(pixels, 1), 7: np.rot90(pixels, 1)[:, ::-1], 8: np.rot90(pixels, -1)}
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored[orientation]))
    got = load_image(encoded(image, "PNG", exif=exif))
    assert torch.equal(got, raster(pixels))


def test_sixteen_bit_grey_is_scaled_and_not_clipped() -> None:
    grey = np.array([[0, 257, 32768, 65535]], np.uint16)
    assert load_image(encoded(Image.fromarray(grey), "PNG"))[0].tolist() == [[0, 1, 128, 255]]


def test_transparent_parts_become_white() -> None:
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (10, 20, 30, 255)
    got = load_image(encoded(pixels, "PNG"))
    assert got[:, 0, 0].tolist() == [10, 20, 30]
    assert got[:, 1, 1].tolist() == [255, 255, 255]


def test_a_palette_picture_with_a_transparent_colour_is_read() -> None:
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    image.putpalette([9, 8, 7, 1, 2, 3])
    assert load_image(encoded(image, "PNG", transparency=1))[:, 0].tolist() == [[9, 255], [8, 255], [7, 255]]


def test_cmyk_and_grey_jpegs_are_read() -> None:
    for mode in ("CMYK", "L"):
        got = load_image(encoded(Image.fromarray(gradient(20, 30)).convert(mode), "JPEG"))
        assert got.shape == (3, 20, 30)


def test_of_an_animation_the_first_frame_is_the_picture() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for format in ("GIF", "WEBP"):
        options = {"lossless": True} if format == "WEBP" else {}
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=100, **options)
        assert load_image(data)[:, 4, 4].tolist() == [255, 0, 0]


@pytest.mark.parametrize("height, width", [(1, 1), (1, 200), (200, 1), (3, 1), (1, 3), (1, 4)])
def test_tiny_pictures_are_answered(height: int, width: int) -> None:
    visual = image_patches(load_image(encoded(gradient(height, width), "PNG")))
    assert visual.num_tokens >= 64
    assert (visual.source_height, visual.source_width) == (height, width)


# Files that are refused, in one sentence.

WHOLE = "not a whole JPEG, PNG, WebP, GIF or BMP picture"
REFUSED = {
    "empty": (b"", WHOLE),
    "text named .png": (b"hello, I am not a picture\n" * 10, WHOLE),
    "truncated jpeg": (encoded(gradient(200, 300), "JPEG")[:2000], WHOLE),
    "truncated png": (encoded(oracle.noise(50, 50), "PNG")[:3000], WHOLE),
    "tiff is not on the list": (encoded(gradient(20, 30), "TIFF"), WHOLE),
    "50,000 x 50,000 in a small file": (png_header(50_000, 50_000), "allowed.*[Ss]cale it down first"),
    "10,000 x 10,000": (png_header(10_000, 10_000), "10000x10000, 100,000,000 pixels; at most 67,108,864"),
    "no pixels": (png_header(0, 10), WHOLE),
    "pixels missing": (png_header(100, 100, b"\x00"), WHOLE),
    "a bomb: 1000 x 1000 from few bytes is fine, the data is not": (
        png_header(8000, 8000, b"\x78\x9c" + b"\0" * 50),
        WHOLE,
    ),
    "201:1": (encoded(gradient(1, 201), "PNG"), "at most 200 times"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_bad_files_are_refused_in_one_sentence(name: str) -> None:
    data, sentence = REFUSED[name]
    with pytest.raises(ValueError, match=sentence) as caught:
        image_patches(load_image(data))
    text = str(caught.value)
    assert "\n" not in text and "0x" not in text.replace("0x10", "").replace("000x", "") and "BytesIO" not in text


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("format", ["PNG", "BMP", "GIF", "WEBP", "JPEG"])
def test_any_damage_gives_a_picture_or_a_sentence(format: str) -> None:
    rng = random.Random(0)
    whole = encoded(oracle.noise(24, 40), format)
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        data = data[: rng.choice([len(data), rng.randrange(len(data))])]
        try:
            assert load_image(bytes(data), InProcess(MediaLimits(max_pixels=10_000_000))).shape[0] == 3
        except ValueError as error:
            assert str(error).count("\n") == 0


def test_a_file_over_the_size_limit_is_not_read(tmp_path: Path) -> None:
    decoder = InProcess(MediaLimits(max_bytes=1000))
    path = tmp_path / "big.png"
    path.write_bytes(bytes(1001))
    for source in (path, bytes(1001)):
        with pytest.raises(ValueError, match="1,001 bytes; at most 1,000 are allowed"):
            load_image(source, decoder)


def test_paths_that_are_no_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        load_image(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        load_image(tmp_path)
    with pytest.raises(ValueError, match="cannot be opened"):
        load_image(tmp_path / "missing.png")
