"""The media loader: sources opened in order, one item each (a page each for documents), limits, faults that say where."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Raster

from media_files import encoded, gradient, numbered_frame, pdf, write_video
from qvl.outside.workers import InProcess
from qvl.prompt.budget import ImageBudget
from qvl.prompt.media import MediaFault, MediaLoader
from qvl.prompt.message import Document, Image, Text, Video, assistant, user
from qvl.prompt.visual import Visual


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("media")
    (path / "a.png").write_bytes(encoded(gradient(64, 96), "PNG"))
    (path / "paper.pdf").write_bytes(pdf([(200, 200)] * 3))
    write_video(path / "clip.mp4", [numbered_frame(n) for n in range(25)])
    return path


def test_every_file_becomes_an_item_in_its_place(folder: Path) -> None:
    talk = [
        user(Image(str(folder / "a.png")), "First.", Document(str(folder / "paper.pdf"), pages="3,1")),
        assistant("Seen."),
        user("And?", Video(str(folder / "clip.mp4"))),
    ]
    shown, items = MediaLoader().load_all(talk)
    assert [(item.kind, item.page) for item in items] == [("image", None), ("page", 1), ("page", 2), ("video", None)]
    assert [Path(item.name).name for item in items] == ["a.png", "paper.pdf", "paper.pdf", "clip.mp4"]
    assert [type(part) for part in shown[0].content] == [Image, Text, Image, Image]
    assert [part.source for part in shown[0].content if isinstance(part, Image)] == [item.visual for item in items[:3]]
    assert shown[1] is talk[1]
    assert shown[2].content == (Text("And?"), Video(items[3].visual))


def test_what_is_loaded_stays_and_is_no_item(folder: Path) -> None:
    shown, items = MediaLoader().load_all([user(Image(str(folder / "a.png")))])
    again, none = MediaLoader(open=lambda source: pytest.fail("opened")).load_all(shown)
    assert again == shown and none == []
    assert isinstance(items[0].visual, Visual)


def test_a_parts_wishes_hold_for_it_alone(folder: Path) -> None:
    small, plain = Image(str(folder / "a.png"), max_tokens=4), Image(str(folder / "a.png"))
    _, items = MediaLoader(images=ImageBudget(min_tokens=1)).load_all([user(small, plain)])
    assert items[0].visual.num_tokens <= 4 and items[1].visual.num_tokens == 6
    assert [item.budget.max_tokens for item in items] == [4, ImageBudget().max_tokens]


def test_an_image_is_kept_at_its_own_size_where_asked(folder: Path) -> None:
    (item,) = MediaLoader(keeps_raster=True).load(Image(str(folder / "a.png")))
    assert item.raster is not None and item.raster.shape == (3, 64, 96)
    (item,) = MediaLoader().load(Image(str(folder / "a.png")))
    assert item.raster is None
    assert item.without_patches().visual.patch_PX.shape[0] == 0 and item.without_patches().grid_thw == item.grid_thw


def test_what_the_opener_opens_is_closed_and_frames_one_by_one(folder: Path) -> None:
    files: list[io.BytesIO] = []

    def opened(source: object) -> io.BytesIO:
        assert sum(not file.closed for file in files) == 0
        files.append(io.BytesIO((folder / "a.png").read_bytes()))
        return files[-1]

    loader = MediaLoader(open=opened)
    list(loader.load(Image("one")))
    list(loader.load(Video(("one", "two", "three"), frame_fps=2)))
    assert len(files) == 4 and all(file.closed for file in files)


def test_frames_have_one_deadline(folder: Path) -> None:
    frames = tuple(str(folder / "a.png") for _ in range(3))
    with pytest.raises(MediaFault, match="reading the frames took longer than 0 seconds"):
        list(MediaLoader(frames_seconds=0.0).load(Video(frames, frame_fps=2)))


def test_a_fault_says_which_file_and_where(folder: Path) -> None:
    talk = [user("q"), user(Image(str(folder / "a.png")), "words", Image(str(folder / "none.png")))]
    with pytest.raises(MediaFault, match=r"none\.png") as caught:
        MediaLoader().load_all(talk)
    assert (caught.value.message, caught.value.part) == (1, 2)
    with pytest.raises(MediaFault, match=r"^data:image/png;base64,[^ ]*: ") as caught:
        MediaLoader().load_all([user(Image("data:image/png;base64," + "A" * 400))])
    assert len(str(caught.value)) < 300 and not str(caught.value.error).startswith("data:")


def test_all_items_together_have_a_limit_and_a_video_is_refused_before_it_is_decoded(folder: Path) -> None:
    image = Image(str(folder / "a.png"))
    MediaLoader(images=ImageBudget(min_tokens=1)).load_all([user(image, image)], max_tokens=12)
    with pytest.raises(MediaFault, match="with this one the media have more than the 11 tokens that fit") as caught:
        MediaLoader(images=ImageBudget(min_tokens=1)).load_all([user(image, image)], max_tokens=11)
    assert caught.value.part == 1
    with pytest.raises(MediaFault, match=r"the video would be [0-9,]+ tokens and 1 fit"):
        MediaLoader().load_all([user(Video(str(folder / "clip.mp4")))], max_tokens=1)


def test_whoever_waits_may_stop_between_two_items(folder: Path) -> None:
    class Gone(Exception):
        pass

    seen: list[int] = []

    def check() -> None:
        seen.append(1)
        if len(seen) == 2:
            raise Gone

    with pytest.raises(Gone):
        MediaLoader().load_all([user(*[Image(str(folder / "a.png"))] * 4)], check=check)
    assert len(seen) == 2


def test_a_folder_without_budgets_takes_no_images(folder: Path) -> None:
    with pytest.raises(MediaFault, match=r"DIR has no preprocessor_config\.json"):
        list(MediaLoader(images=None, folder="DIR").load(Image(str(folder / "a.png"))))


def test_rasters_and_pillow_images_need_no_opening() -> None:
    pixels = gradient(64, 96)
    (one,) = MediaLoader(decoder=InProcess()).load(Image(Raster.fromarray(pixels)))
    (other,) = MediaLoader().load(Image(torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))))
    assert torch.equal(one.visual.patch_PX, other.visual.patch_PX) and one.name == ""
