"""Pictures and pages: marks where they belong, frames as the network gets them, plots without lies, escaped text."""

import hashlib
import math
import re
from base64 import b64encode
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from media_files import gradient
from qvl.prompt.coordinates import Box, Box3D, Boxes, Place, Point
from qvl.prompt.image import image_patches
from qvl.prompt.sampling import VideoMeta, VideoSampling
from qvl.prompt.video import video_patches
from qvl.show import page
from qvl.show.curves import Line, Plot
from qvl.show.draw import PALETTE, camera_for, colours_of, corners_3d, draw_places
from qvl.show.frames import contact_sheet, frames_of, stacked, with_grid
from qvl.show.heat import heat_colour, heat_map, overlay
from qvl.show.letters import font_for
from qvl.show.terminal import Voices, printable

GREY = (128, 128, 128)


def sheet(width: int = 800, height: int = 600) -> Image.Image:
    return Image.new("RGB", (width, height), GREY)


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def test_a_box_lies_on_its_pixels_and_leaves_the_rest_alone() -> None:
    picture = sheet()
    drawn = draw_places(picture, [Box(200, 150, 600, 450, "cat")])
    assert drawn.size == (800, 600)
    for x, y in ((200, 300), (600, 300), (400, 150), (400, 450)):
        assert drawn.getpixel((x, y)) == rgb(PALETTE[0])
    assert drawn.getpixel((400, 300)) == GREY and drawn.getpixel((100, 300)) == GREY
    assert picture.getpixel((200, 300)) == GREY, "the picture itself is not drawn on"


def test_a_point_is_a_dot_in_its_colour() -> None:
    drawn = draw_places(sheet(), [Point(400, 300, "nose")])
    assert drawn.getpixel((400, 300)) == rgb(PALETTE[0])
    assert drawn.getpixel((440, 330)) == GREY


def test_equal_labels_share_a_colour_and_others_differ() -> None:
    assert colours_of(["cat", "dog", "cat", None]) == {"cat": PALETTE[0], "dog": PALETTE[1], None: PALETTE[2]}


def test_relative_coordinates_meet_the_picture_through_boxes() -> None:
    boxes = Boxes(items=(Box(250, 250, 750, 750, "x"),), space="relative1000")
    drawn = draw_places(sheet(), boxes.to_pixels(800, 600))
    assert drawn.getpixel((200, 300)) == rgb(PALETTE[0]) and drawn.getpixel((400, 450)) == rgb(PALETTE[0])


def test_a_small_picture_is_enlarged_so_that_its_labels_can_be_read() -> None:
    drawn = draw_places(sheet(60, 40), [Box(15, 10, 45, 30, "cat")])
    assert drawn.size == (480, 320)
    assert drawn.getpixel((15 * 8, 20 * 8)) == rgb(PALETTE[0])


@pytest.mark.parametrize("size", [(40, 40), (640, 480), (4000, 200)])
@pytest.mark.parametrize("label", ["cat", "a label that is far too long for any box " * 5, "", "a\nb"])
def test_labels_stay_inside_whatever_the_box(size: tuple[int, int], label: str) -> None:
    width, height = size
    boxes: list[Place] = [
        Box(-50, -50, width + 50, height + 50, label),
        Box(width - 1, height - 1, width, height, label),
    ]
    drawn = draw_places(sheet(*size), [*boxes, Box(9, 9, 9, 9, label), Point(0, 0, label), Point(width, height)])
    assert drawn.width % width == 0 and drawn.height % height == 0


def test_labels_of_boxes_with_one_corner_do_not_hide_each_other() -> None:
    drawn = draw_places(sheet(), [Box(100, 100, 300, 300, "one"), Box(100, 100, 500, 500, "two")])
    corner = np.asarray(drawn)[80:120, 98:140]
    # each label fills some 17 rows of 24 pixels with its colour; the lines alone are 2 pixels wide
    assert all((corner == rgb(colour)).all(axis=-1).sum() > 200 for colour in (PALETTE[0], PALETTE[1]))


def test_the_corners_of_a_3d_box_without_angles_are_its_half_sizes() -> None:
    corners = corners_3d((1, 2, 5, 2, 4, 6, 0, 0, 0))
    assert sorted(corners)[0] == (0, 0, 2) and sorted(corners)[-1] == (2, 4, 8) and len(set(corners)) == 8


def test_half_of_a_half_turn_around_y_swaps_width_and_depth() -> None:
    corners = corners_3d((0, 0, 10, 2, 4, 6, 0, 0.5, 0))
    assert max(x for x, _, _ in corners) == pytest.approx(3) and max(z for _, _, z in corners) == pytest.approx(11)
    assert max(y for _, y, _ in corners) == pytest.approx(2)


def test_angles_turn_around_x_first_and_then_around_y() -> None:
    corners = corners_3d((0, 0, 10, 2, 4, 6, 0.5, 0.5, 0))
    assert [max(c[axis] for c in corners) for axis in range(3)] == pytest.approx([2, 3, 11])


def test_a_3d_box_is_seen_through_the_camera_and_not_behind_it() -> None:
    camera = camera_for(800, 600)
    assert camera.fx == pytest.approx(400 / math.tan(math.radians(30))) and camera.cx == 400
    front = Box3D((0, 0, 4), (1, 1, 1), (0, 0, 0), "box")
    drawn = draw_places(sheet(), [front])
    near = camera.fx * 0.5 / 3.5
    assert drawn.getpixel((round(400 - near), 300)) == rgb(PALETTE[0])
    behind = Box3D((0, 0, -4), (1, 1, 1), (0, 0, 0), "box")
    assert draw_places(sheet(), [behind]).tobytes() == sheet().tobytes()


def test_a_place_of_another_kind_is_refused() -> None:
    class Star:
        key, numbers, label = "star", (1.0, 2.0), None

    with pytest.raises(ValueError, match="'star' came; bbox_2d, point_2d and bbox_3d"):
        draw_places(sheet(), [Star()])


# ---- frames


def test_patches_turn_back_into_the_picture_they_came_from() -> None:
    raster = torch.from_numpy(gradient(64, 96)).permute(2, 0, 1).contiguous()
    visual = image_patches(raster)
    [[first, second]] = frames_of(visual.patch_PX, visual.grid_I3)
    assert first.size == (visual.width, visual.height) == (320, 224)
    small = image_patches(torch.from_numpy(np.asarray(first).copy()).permute(2, 0, 1))
    assert torch.equal(small.patch_PX, visual.patch_PX) and first.tobytes() == second.tobytes()
    [[from_floats, _]] = frames_of(visual.values_PX, visual.grid_I3)
    assert from_floats.tobytes() == first.tobytes()


def test_frames_of_a_video_come_in_pairs_and_single_slices_can_be_asked_for() -> None:
    frames = torch.stack([torch.full((3, 32, 32), value, dtype=torch.uint8) for value in (10, 20, 30, 40, 50)])
    visual = video_patches(frames, VideoMeta(num_frames=5, fps=2.0), VideoSampling(min_frames=5))
    pairs = frames_of(visual.patch_PX, visual.grid_I3)
    assert [[frame.getpixel((5, 5)) for frame in pair] for pair in pairs] == [
        [(10,) * 3, (20,) * 3],
        [(30,) * 3, (40,) * 3],
        [(50,) * 3, (50,) * 3],
    ]
    [[only, _]] = frames_of(visual.patch_PX, visual.grid_I3, [1])
    assert only.getpixel((0, 0)) == (30, 30, 30)


def test_a_contact_sheet_has_every_picture_in_rows() -> None:
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (0, 200, 200)]
    pictures = [Image.new("RGB", (64, 32), colour) for colour in colours]
    made = contact_sheet(pictures, [f"<{i}.0 seconds>" for i in range(5)], width=600)
    assert made.width == 600
    found = {colour: np.argwhere((np.asarray(made) == colour).all(axis=-1)) for colour in colours}
    assert all(len(places) > 5000 for places in found.values())
    tops = [int(found[colour][:, 0].min()) for colour in colours]
    assert tops[0] == tops[1] == tops[2] < tops[3] == tops[4]
    with pytest.raises(ValueError, match="5 pictures came with 1 captions"):
        contact_sheet(pictures, ["one"])


def test_a_grid_of_tokens_has_a_line_each_32_pixels() -> None:
    lined = np.asarray(with_grid(sheet(96, 64)))
    assert (lined[16, 32] != GREY).any() and (lined[16, 64] != GREY).any() and (lined[32, 16] != GREY).any()
    assert tuple(lined[16, 16]) == GREY


def test_stacked_blocks_wrap_words_and_shrink_wide_pictures() -> None:
    made = stacked([("one", "word " * 200, sheet(3000, 300)), ("two", "", None)], title="title", width=600)
    assert made.width == 600 and made.height > 300
    assert GREY in [made.getpixel((300, y)) for y in range(0, made.height, 5)]


# ---- heat


def test_heat_grows_from_dark_to_light_and_one_sink_does_not_darken_the_rest() -> None:
    brightness = [sum(heat_colour(i / 10)) for i in range(11)]
    assert brightness == sorted(brightness) and heat_colour(0) == (0, 0, 4) and heat_colour(2) == (252, 255, 164)
    rows = [[0.001] * 20 for _ in range(20)]
    rows[0][0] = 0.9
    assert heat_map(rows).getpixel((10, 10)) == (252, 255, 164, 210)
    assert heat_map(rows, top=0.9).getpixel((10, 10))[:3] == heat_colour(0.001 / 0.9)


def test_a_heat_map_lies_over_the_right_cell() -> None:
    rows = [[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    laid = overlay(sheet(96, 64), rows, top=1.0)
    bright, dark = laid.getpixel((80, 48)), laid.getpixel((16, 16))
    assert sum(bright) > 500 > sum(dark)  # type: ignore[arg-type]


def test_weights_that_are_all_zero_are_drawn_as_nothing() -> None:
    assert heat_map([[0.0, 0.0]]).getpixel((0, 0)) == (0, 0, 4, 60)


# ---- plots


def test_a_plot_breaks_where_a_number_is_missing() -> None:
    svg = Plot(lines=[Line(name="loss", y=[3.0, 2.0, math.nan, 1.0, 0.5])]).svg()
    assert svg.count("<polyline") == 2
    assert Plot(lines=[Line(name="loss", y=[3.0, 0.0, 1.0])], log_y=True).svg().count("<circle") == 2


def test_thinning_keeps_the_spike() -> None:
    values = [1.0] * 100_000
    values[54_321] = 9.0
    svg = Plot(lines=[Line(name="loss", y=values)]).svg()
    assert len(svg) < 60_000
    heights = [float(y) for points in re.findall(r'points="([^"]*)"', svg) for y in re.findall(r",([\d.]+)", points)]
    assert min(heights) == 34.0 and max(heights) == 260.0


def test_axes_have_round_numbers() -> None:
    svg = Plot(lines=[Line(name="a", x=[0, 1234], y=[0.013, 0.087])]).svg()
    texts = re.findall(r">([\d.,]+)</text>", svg)
    assert texts[:7] == ["0", "200", "400", "600", "800", "1,000", "1,200"]
    assert texts[7:] == ["0.02", "0.04", "0.06", "0.08"]


def test_a_plot_of_nothing_or_of_a_flat_line_is_still_a_plot() -> None:
    for values in ([], [5.0], [2.0, 2.0], [0.0, 0.0], [math.inf, math.nan], [-3e-9, 4e12]):
        plot = Plot(lines=[Line(name="a", y=values)], title="t", x_label="x", y_label="y")
        assert plot.svg().endswith("</svg>") and not re.search(r"\bnan\b", plot.svg())
        assert plot.picture(scale=1).size == (720, 300)


def test_names_in_a_plot_are_escaped() -> None:
    svg = Plot(lines=[Line(name="<b>", y=[1, 2]), Line(name="c", y=[2, 1])], title="a < b").svg()
    assert "<b>" not in svg and "&lt;b&gt;" in svg and "a &lt; b" in svg


def test_a_line_with_more_x_than_y_is_refused() -> None:
    with pytest.raises(ValueError, match="has 3 x and 2 y"):
        Line(name="loss", x=[1, 2, 3], y=[1, 2])


# ---- pages


class Balance(HTMLParser):
    """Open tags, and everything that points elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "br", "line", "circle", "polyline"):
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action", "data")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "circle", "polyline"):
            assert self.open.pop() == tag


def test_a_page_is_whole_asks_nobody_and_escapes_what_it_was_given() -> None:
    evil = '<script>alert(1)</script> & "more"'
    shown = page.section(evil, page.text(evil), page.figure(sheet(10, 10), evil))
    text = page.page(evil, [shown, evil, page.table(("a", "b"), [(1, evil), (2, "x")])], lead=evil)
    parser = Balance()
    parser.feed(text)
    assert parser.open == [] and all(link.startswith("data:image/") for link in parser.links)
    assert "<script" not in text and text.count("&lt;script&gt;") >= 6
    assert "default-src 'none'" in text and "script-src" not in text and "http" not in text.replace("http-equiv", "")


def test_the_only_script_of_a_page_is_the_one_its_policy_names() -> None:
    text = page.page("t", [], script="let a = 1;")
    digest = b64encode(hashlib.sha256(b"let a = 1;").digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text and "<script>let a = 1;</script>" in text


def test_numbers_in_a_table_stand_to_the_right_and_are_readable() -> None:
    text = page.table(("name", "count", "loss"), [("a", 12345, 0.123456), ("b", 7, 2.0)])
    assert '<td class="number">12,345</td><td class="number">0.1235</td>' in text and "<td>a</td>" in text
    assert '<th class="number">count</th>' in text and "<th>name</th>" in text


def test_pictures_with_transparency_stay_png() -> None:
    assert page.data_uri(sheet()).startswith("data:image/jpeg;base64,")
    assert page.data_uri(sheet().convert("RGBA")).startswith("data:image/png;base64,")


# ---- letters and the terminal


def test_a_font_has_the_size_that_was_asked_for() -> None:
    assert font_for(12, "cat").getlength("cat") < font_for(48, "cat").getlength("cat")


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert printable("a\x1b[31mred\x07\r\nb\tc\x9b") == "a\ufffd[31mred\ufffd\nb\tc\ufffd"


MARKS = {1: "<think>", 2: "</think>"}


def heard(tokens: list[tuple[int, str]], *, in_thought: bool) -> tuple[str, str]:
    voices = Voices(MARKS, in_thought=in_thought)
    pieces = [piece for token, text in tokens for piece in voices.push(token, text)]
    return "".join(t for is_thought, t in pieces if is_thought), "".join(
        t for is_thought, t in pieces if not is_thought
    )


def test_the_thought_ends_at_its_mark_and_takes_the_line_breaks_around_it() -> None:
    tokens = [(9, "\n"), (9, "Hm.\n"), (9, "So"), (9, "\n"), (2, "</think>"), (9, "\n\n"), (9, "Yes.\n"), (9, "End")]
    assert heard(tokens, in_thought=True) == ("Hm.\nSo", "Yes.\nEnd")


def test_a_thought_may_begin_with_its_mark_and_only_at_the_start() -> None:
    assert heard([(1, "<think>"), (9, "a"), (2, "</think>"), (9, "b")], in_thought=False) == ("a", "b")
    assert heard([(9, "b"), (1, "<think>"), (9, "a")], in_thought=False) == ("", "b<think>a")


def test_a_second_end_of_thought_is_among_the_words() -> None:
    tokens = [(9, "a"), (2, "</think>"), (9, "b"), (2, "</think>"), (9, "c")]
    assert heard(tokens, in_thought=True) == ("a", "b</think>c")


def test_a_mark_spelled_in_letters_ends_no_thought() -> None:
    assert heard([(9, "say </think> now"), (2, "</think>"), (9, "x")], in_thought=True) == ("say </think> now", "x")
    assert heard([(9, "say </think> now")], in_thought=True) == ("say </think> now", "")


def test_a_mark_held_back_for_a_stop_text_still_ends_the_thought() -> None:
    assert heard([(9, "a"), (2, ""), (9, "</think>b")], in_thought=True) == ("a", "b")
