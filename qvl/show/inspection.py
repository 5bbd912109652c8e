"""The page and the picture of `qvl inspect`: media as the network gets them, prompt, positions, where an answer looks."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from qvl.show.curves import Line, Plot
from qvl.show.frames import contact_sheet, stacked
from qvl.show.heat import heat_map, overlay
from qvl.show.page import Html, data_uri, figure, image, page, section, table, tag


@dataclass(frozen=True, kw_only=True)
class Medium:
    """An image, a PDF page or a video."""

    title: str
    facts: Sequence[tuple[str, str]]
    pictures: Sequence[Image.Image]
    """What the network sees: one of an image, sampled frames of a video."""
    captions: Sequence[str]
    notes: Sequence[str] = ()

    def sheet(self) -> Image.Image:
        return self.pictures[0] if len(self.pictures) == 1 else contact_sheet(self.pictures, self.captions)

    def words(self) -> str:
        return "; ".join([*(f"{name} {value}" for name, value in self.facts), *self.notes])


@dataclass(frozen=True, kw_only=True)
class Token:
    """One token of the prompt, or a run of equal placeholders."""

    text: str
    kind: Literal["plain", "control", "visual", "answer"]
    count: int = 1


@dataclass(frozen=True, kw_only=True)
class Looked:
    """What an answer's tokens see of one picture or video slice."""

    caption: str
    picture: Image.Image
    weights: Sequence[Sequence[Sequence[float]]]
    """For each token of the answer the weights of the grid, row by row."""

    def mean(self) -> list[list[float]]:
        count = len(self.weights)
        rows, columns = len(self.weights[0]), len(self.weights[0][0])
        return [[sum(grid[r][c] for grid in self.weights) / count for c in range(columns)] for r in range(rows)]


@dataclass(frozen=True, kw_only=True)
class Attention:
    words: Sequence[str]
    """The answer's tokens."""
    shares: Sequence[float]
    """How much of each token's attention falls on pictures at all, 0 to 1."""
    looked: Sequence[Looked]
    about: str
    """Which layers, which pictures."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    title: str
    media: Sequence[Medium] = ()
    tokens: Sequence[Token] = ()
    """Prompt and answer; a character that several tokens spell is one entry."""
    num_prompt: int = 0
    num_answer: int = 0
    """Tokens as the network counts them."""
    positions: Sequence[Sequence[int]] | None = None
    """Rotary ids (time, height, width) of each token."""
    attention: Attention | None = None


STYLE = """
.words{display:flex;flex-wrap:wrap;gap:.25rem;margin:.6rem 0}
.words button{font:.86rem/1.4 ui-monospace,Menlo,monospace;border:1px solid var(--line);background:var(--panel);color:var(--ink);
border-radius:4px;padding:.15rem .45rem;cursor:pointer}
.words button[aria-pressed=true]{border-color:var(--mark);box-shadow:inset 0 0 0 1px var(--mark)}
.looks{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,22rem),1fr));gap:1rem}
.frames{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(45%,12rem),1fr));gap:.6rem}
.looks figure,.frames figure{margin:0}.look{position:relative;line-height:0}
.look img{width:100%;height:auto}.look img.heat{position:absolute;inset:0;height:100%;image-rendering:pixelated}
.prompt .control{color:var(--mark);font-weight:600}.prompt .visual{background:var(--note);border-radius:3px;padding:0 .2rem}
.prompt .answer{border-bottom:2px solid var(--mark)}
.prompt .odd{background:color-mix(in srgb,var(--ink) 7%,transparent)}
.scale{height:.6rem;border-radius:3px;max-width:16rem;margin-top:.5rem;
background:linear-gradient(90deg,#000004,#280b54,#65156e,#9f2a63,#d44842,#f57d15,#fac127,#fcffa4)}
"""
SCRIPT = """
const heats = %s;
document.querySelectorAll('.words button').forEach(button => button.addEventListener('click', () => {
  document.querySelectorAll('.words button').forEach(other => other.setAttribute('aria-pressed', other === button));
  document.querySelectorAll('img.heat').forEach((img, i) => { img.src = heats[+button.dataset.token][i]; });
}));
"""
POSITIONS = (
    "Words count up on all three axes together. A picture stands still in time and spreads over its rows and columns; the words after it "
    "go on after the larger of the two."
)


def to_html(seen: Inspection) -> str:
    """One self-contained page."""
    parts: list[str] = []
    for medium in seen.media:
        if len(medium.pictures) == 1:
            shown = figure(_at_most(medium.pictures[0], 1600), "; ".join(medium.captions), alt=medium.title)
        else:
            frames = [
                figure(_at_most(picture, 480), caption)
                for picture, caption in zip(medium.pictures, medium.captions, strict=True)
            ]
            shown = tag("div", *frames, class_="frames")
        notes = [tag("p", note, class_="faint") for note in medium.notes]
        parts.append(section(medium.title, table(("", ""), medium.facts), shown, *notes))
    if seen.tokens:
        legend = "Control tokens are coloured, shading shows where plain tokens end."
        lead = tag("p", f"{_counted(seen)}. {legend}", class_="faint")
        parts.append(section("Prompt", lead, _prompt(seen.tokens)))
    if seen.positions is not None:
        caption = tag("p", POSITIONS, class_="faint")
        parts.append(section("Positions", figure(Html(_positions(seen.positions).svg())), caption))
    script = ""
    if seen.attention is not None:
        shown, script = _attention(seen.attention)
        parts.append(shown)
    return page(seen.title, parts, style=STYLE, script=script)


def to_picture(seen: Inspection) -> Image.Image:
    """The same as one tall picture; of the attention, the mean over the answer's tokens."""
    blocks: list[tuple[str, str, Image.Image | None]] = []
    for medium in seen.media:
        blocks.append((medium.title, medium.words(), medium.sheet()))
    if seen.tokens:
        blocks.append((f"Prompt, {_counted(seen)}", "".join(_token_words(token) for token in seen.tokens), None))
    if seen.positions is not None:
        blocks.append(("Positions", POSITIONS, _positions(seen.positions).picture()))
    if (attention := seen.attention) is not None:
        heats = [
            overlay(look.picture, look.mean(), _top([look.mean() for look in attention.looked]))
            for look in attention.looked
        ]
        sheet = heats[0] if len(heats) == 1 else contact_sheet(heats, [look.caption for look in attention.looked])
        words = f"{attention.about} Mean over the answer: {''.join(attention.words)}"
        blocks.append(("Where the answer looks", words, sheet))
    return stacked(blocks, title=seen.title)


def _counted(seen: Inspection) -> str:
    return f"{seen.num_prompt:,} tokens" + (f" and {seen.num_answer:,} of answer" if seen.num_answer else "")


def _prompt(tokens: Sequence[Token]) -> Html:
    spans, is_odd = [], False
    for token in tokens:
        kind = token.kind
        if kind == "plain":
            kind = "plain odd" if is_odd else "plain"
            is_odd = not is_odd
        words = _token_words(token)
        # A coloured line break would be seen by nobody.
        spans.append(
            tag("span", words.replace("\n", "\u21b5\n"), class_=kind)
            if words.strip(" ")
            else tag("span", words, class_=kind)
        )
    return tag("pre", *spans, class_="prompt")


def _token_words(token: Token) -> str:
    return token.text if token.count == 1 else f"{token.text} \u00d7 {token.count:,}"


def _positions(positions: Sequence[Sequence[int]]) -> Plot:
    names = ("time", "height", "width")
    lines = [Line(name=name, y=axis) for name, axis in zip(names, positions, strict=True)]
    return Plot(lines=lines[::-1], title="Rotary ids", x_label="token", y_label="id")


def _attention(attention: Attention) -> tuple[Html, str]:
    """The section, and the script that shows one token's map instead of the mean."""
    grids = [[look.mean() for look in attention.looked]]
    grids += [[look.weights[i] for look in attention.looked] for i in range(len(attention.words))]
    heats = [[data_uri(heat_map(rows, _top(each))) for rows in each] for each in grids]
    buttons = [tag("button", "mean", type="button", data_token="0", aria_pressed="true")]
    for i, (word, share) in enumerate(zip(attention.words, attention.shares, strict=True), 1):
        shown = word.replace("\n", "\u21b5").replace(" ", "\u00b7") or "\u2205"
        hint = f"{share:.1%} of this token's attention is on pictures"
        buttons.append(tag("button", shown, type="button", data_token=str(i), aria_pressed="false", title=hint))
    looks = []
    for look, first in zip(attention.looked, heats[0], strict=True):
        ground = image(_at_most(look.picture, 960).convert("L").convert("RGB"), alt=look.caption)
        heat = Html(f'<img class="heat" src="{first}" alt="">')
        looks.append(tag("figure", tag("div", ground, heat, class_="look"), tag("figcaption", look.caption)))
    share = sum(attention.shares) / len(attention.shares)
    lead = f"{attention.about} On average {share:.1%} of the attention falls on pictures. Choose a token:"
    scale = tag(
        "div",
        tag("div", class_="scale"),
        tag("p", "none to strongest (99th percentile) for the chosen token", class_="faint"),
    )
    body = (tag("p", lead), tag("div", *buttons, class_="words"), tag("div", *looks, class_="looks"), scale)
    return section("Where the answer looks", *body), SCRIPT % json.dumps(heats)


def _at_most(picture: Image.Image, side: int) -> Image.Image:
    """No larger than a page can use: a picture of 16,384 tokens has 16 million pixels."""
    scale = side / max(picture.size)
    if scale >= 1:
        return picture
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _top(grids: Sequence[Sequence[Sequence[float]]]) -> float:
    """One scale for all pictures of a token: the 99th percentile (see heat_map)."""
    flat = sorted(weight for rows in grids for row in rows for weight in row)
    return flat[min(len(flat) - 1, int(len(flat) * 0.99))]
