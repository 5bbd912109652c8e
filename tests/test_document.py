"""PDF pages: named by ranges, rendered at the size the budget can use, refused in a sentence when they cannot be read."""

import io
import math

import numpy as np
import pytest
import torch

from media_files import encrypted_pdf, form_pdf, pdf
from qvl.outside.media import MediaLimits
from qvl.outside.workers import InProcess, WorkerPool
from qvl.prompt.budget import ImageBudget, smart_resize
from qvl.prompt.document import load_document, page_target, parse_pages

A4 = (595, 842)


@pytest.mark.parametrize(
    "text, numbers",
    [
        (None, [0, 1, 2, 3, 4, 5, 6]),
        ("1-3,7", [0, 1, 2, 6]),
        ("2", [1]),
        (" 3 - 4 , 1 ", [2, 3, 0]),
        ("6-", [5, 6]),
        ("2,2", [1, 1]),
    ],
)
def test_page_ranges_count_from_one(text: str | None, numbers: list[int]) -> None:
    assert parse_pages(text, 7, 100) == numbers


@pytest.mark.parametrize("text", ["0", "8", "3-2", "5-9", "1,,2", "", "a", "-3", "1-2-3", "1;2", "99999999999999"])
def test_page_ranges_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="the page range"):
        parse_pages(text, 7, 100)


def test_no_more_pages_than_allowed_are_taken() -> None:
    with pytest.raises(ValueError, match="7 pages were asked for and at most 5 are allowed"):
        parse_pages(None, 7, 5)
    with pytest.raises(ValueError, match="3 pages were asked for and at most 2"):
        list(load_document(pdf([A4] * 3), decoder=InProcess(MediaLimits(max_pages=2))))


def test_each_page_is_an_image_of_its_own_shape() -> None:
    upright, wide = load_document(pdf([A4, (842, 595)]), dpi=72)
    assert (upright.height, upright.width) == (832, 608)
    assert (wide.height, wide.width) == (608, 832)
    assert [upright.kind, wide.kind] == ["image", "image"]


def test_the_named_pages_come_in_the_order_named() -> None:
    # Page n has a black square of 10 n points: the dark share of the page tells which one it is.
    pages = list(load_document(pdf([(200, 200)] * 5), "4,1-2", dpi=144))
    dark = [math.sqrt((page.values_PX < 0).float().mean().item()) * 200 for page in pages]
    assert [round(side / 10) for side in dark] == [4, 1, 2]


def test_a_page_is_rendered_just_large_enough_for_the_budget() -> None:
    for budget in (ImageBudget(), ImageBudget(max_tokens=1280), ImageBudget(min_tokens=4, max_tokens=64)):
        scale = page_target(*A4, budget, dpi=200)[2]
        rendered = (math.ceil(A4[1] * scale), math.ceil(A4[0] * scale))
        target = smart_resize(round(A4[1] * 200 / 72), round(A4[0] * 200 / 72), budget)
        assert all(got >= want for got, want in zip(rendered, target, strict=True))
        assert math.prod(rendered) <= 1.2 * math.prod(target)
    (page,) = load_document(pdf([A4]), budget=ImageBudget(max_tokens=1280))
    assert 1100 < page.num_tokens <= 1280
    (page,) = load_document(pdf([A4]))
    assert page.num_tokens == 73 * 52  # 200 dpi, though the budget would allow 16,384 tokens


def test_a_poster_does_not_make_a_huge_raster() -> None:
    (page,) = load_document(pdf([(14_400, 14_400)]), budget=ImageBudget(max_tokens=1024))
    assert page.num_tokens == 1024
    assert max(page.source_height, page.source_width) <= 1024 + 1


def test_a_worker_renders_the_same_pages() -> None:
    data = pdf([(200, 100), (100, 200)])
    with WorkerPool() as pool:
        for inside, outside in zip(load_document(data, decoder=pool), load_document(data), strict=True):
            assert torch.equal(inside.patch_PX, outside.patch_PX)


@pytest.mark.parametrize(
    "data, sentence",
    [
        (b"", "not a readable PDF"),
        (b"%PDF-1.4 and nothing else", "not a readable PDF"),
        (b"no PDF at all" * 100, "not a readable PDF"),
        (encrypted_pdf(), "the PDF is encrypted; save it without a password and send that"),
        (pdf([]), "no pages|not a readable PDF"),
        (pdf([(2, 14_000)]), "at most 200 times"),
    ],
)
def test_bad_documents_are_refused_in_one_sentence(data: bytes, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        list(load_document(data))
    assert "\n" not in str(caught.value)


def test_a_wrong_password_is_said_to_be_wrong() -> None:
    with pytest.raises(ValueError, match="encrypted and the password is wrong"):
        list(load_document(encrypted_pdf(), password="guess"))


def test_dpi_has_bounds() -> None:
    with pytest.raises(ValueError, match="dpi is 0; expected 10 to 1200"):
        list(load_document(pdf([A4]), dpi=0))


def test_what_was_typed_into_a_form_is_drawn() -> None:
    ((header, pixels),) = InProcess().run("pdf_pages", io.BytesIO(form_pdf()), pages=[0], scales=[1.0])
    page = np.asarray(pixels).reshape(header["height"], header["width"], 3)
    assert (page[45:75, 25:55] == 0).all() and (page[:35] == 255).all(), "the field's square, and no highlight"
