"""A font for pictures: Pillow's own where it has the letters, else one of the machine's that does."""

from functools import cache

from PIL import Image, ImageDraw, ImageFont

from qvl.core.log import say_once

Font = ImageFont.FreeTypeFont

# By name, as the systems have them: FreeType looks in their font folders. The first is for most scripts without Chinese.
OTHERS = (
    "DejaVuSans.ttf",
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "wqy-microhei.ttc",
    "DroidSansFallbackFull.ttf",
    "PingFang.ttc",
    "Arial Unicode.ttf",
    "msyh.ttc",
    "arial.ttf",
)


def font_for(size: int, text: str = "") -> Font:
    """A font of `size` pixels that has every letter of `text`, as far as this machine has one."""
    letters = frozenset(text) - frozenset(" \n\t")
    own = _own(size)
    if all(_has(own, letter) for letter in letters):
        return own
    best, most = own, sum(_has(own, letter) for letter in letters)
    for name in OTHERS:
        font = _system(name, size)
        count = 0 if font is None else sum(_has(font, letter) for letter in letters)
        if font is not None and count > most:
            best, most = font, count
    if most < len(letters):
        say_once("no font on this machine has all letters of the labels; install one such as Noto Sans CJK to see them")
    return best


@cache
def _own(size: int) -> Font:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "this Pillow was built without FreeType"
    return font


@cache
def _system(name: str, size: int) -> Font | None:
    try:
        return ImageFont.truetype(name, size)
    except OSError:  # not on this machine: the next name is tried
        return None


@cache
def _has(font: Font, letter: str) -> bool:
    """Whether the letter is drawn otherwise than a code point that no font has."""
    return _drawn(font, letter) != _drawn(font, "\U000fffff")


def _drawn(font: Font, letter: str) -> bytes:
    picture = Image.new("L", (2 * round(font.size), 2 * round(font.size)))
    ImageDraw.Draw(picture).text((0, 0), letter, font=font, fill=255)
    return picture.tobytes()
