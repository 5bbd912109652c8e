"""Small plots of lines, laid out once and written as SVG for pages or drawn as a picture."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image, ImageDraw

from qvl.show.letters import font_for

LINE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 34, 40


@dataclass(frozen=True, kw_only=True)
class Line:
    name: str
    y: Sequence[float]
    x: Sequence[float] | None = None
    """None counts 0, 1, 2, ..."""
    dots: bool = False
    """Single dots instead of a line."""

    def __post_init__(self) -> None:
        if self.x is not None and len(self.x) != len(self.y):
            raise ValueError(f"line {self.name!r} has {len(self.x)} x and {len(self.y)} y; give as many of each.")


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Lines over common axes. Numbers that are not finite leave gaps; with `log_y` so do numbers of 0 and less."""

    lines: Sequence[Line]
    title: str = ""
    x_label: str = ""
    y_label: str = ""
    log_y: bool = False
    width: int = 720
    height: int = 300

    def svg(self) -> str:
        """For a page: text and axes take the page's colour."""
        parts = [
            f'<svg class="plot" viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(self.title or "plot")}" '
            f'xmlns="http://www.w3.org/2000/svg">'
        ]
        for word in self._words():
            weight = ' font-weight="600"' if word.is_title else ""
            turn = f' transform="rotate(-90 {word.x:.0f} {word.y:.0f})"' if word.is_upright else ""
            colour = word.colour or "currentColor"
            parts.append(
                f'<text x="{word.x:.1f}" y="{word.y:.1f}" fill="{colour}" font-size="12" text-anchor="{word.anchor}" '
                f'dominant-baseline="middle"{weight}{turn}>{escape(word.text)}</text>'
            )
        for x1, y1, x2, y2 in self._grid():
            parts.append(
                f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="currentColor" stroke-opacity=".15"/>'
            )
        for line, colour, runs in self._strokes():
            parts.append(f'<g fill="none" stroke="{colour}" stroke-width="1.6"><title>{escape(line.name)}</title>')
            for run in runs:
                if line.dots or len(run) == 1:
                    parts += [
                        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="1.6" fill="{colour}" stroke="none"/>' for x, y in run
                    ]
                else:
                    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in run)
                    parts.append(f'<polyline points="{points}" stroke-linejoin="round"/>')
            parts.append("</g>")
        return "".join((*parts, "</svg>"))

    def picture(self, scale: int = 2) -> Image.Image:
        """For a PNG, black on white."""
        sheet = Image.new("RGB", (self.width * scale, self.height * scale), "white")
        pen = ImageDraw.Draw(sheet)
        for ends in self._grid():
            pen.line([scale * end for end in ends], fill="#dddddd", width=scale)
        for line, colour, runs in self._strokes():
            for run in runs:
                points = [(x * scale, y * scale) for x, y in run]
                if line.dots or len(run) == 1:
                    for x, y in points:
                        pen.ellipse((x - 1.6 * scale, y - 1.6 * scale, x + 1.6 * scale, y + 1.6 * scale), fill=colour)
                else:
                    pen.line(points, fill=colour, width=2 * scale, joint="curve")
        for word in self._words():
            font = font_for(12 * scale, word.text)
            fill = word.colour or "#222222"
            if word.is_upright:
                length = math.ceil(font.getlength(word.text))
                strip = Image.new("RGB", (length, 18 * scale), "white")
                ImageDraw.Draw(strip).text((0, 9 * scale), word.text, font=font, fill=fill, anchor="lm")
                strip = strip.rotate(90, expand=True)
                sheet.paste(strip, (round(word.x * scale - strip.width / 2), round(word.y * scale - length / 2)))
                continue
            anchor = {"start": "lm", "middle": "mm", "end": "rm"}[word.anchor]
            pen.text((word.x * scale, word.y * scale), word.text, font=font, fill=fill, anchor=anchor)
        return sheet

    # ---- the layout, in pixels of the SVG

    def _points(self, line: Line) -> list[tuple[float, float]]:
        xs = range(len(line.y)) if line.x is None else line.x
        return [
            (float(x), float(y))
            if math.isfinite(x) and math.isfinite(y) and (y > 0 or not self.log_y)
            else (math.nan, math.nan)
            for x, y in zip(xs, line.y, strict=True)
        ]

    def _spans(self) -> tuple[float, float, float, float]:
        seen = [point for line in self.lines for point in self._points(line) if not math.isnan(point[0])]
        if not seen:
            return 0.0, 1.0, 0.0, 1.0
        xs, ys = [x for x, _ in seen], [math.log10(y) if self.log_y else y for _, y in seen]
        return *_widened(min(xs), max(xs)), *_widened(min(ys), max(ys))

    def _to_pixels(self, x: float, y: float, spans: tuple[float, float, float, float]) -> tuple[float, float]:
        low_x, high_x, low_y, high_y = spans
        across = (x - low_x) / (high_x - low_x)
        up = ((math.log10(y) if self.log_y else y) - low_y) / (high_y - low_y)
        return LEFT + across * (self.width - LEFT - RIGHT), self.height - BOTTOM - up * (self.height - TOP - BOTTOM)

    def _strokes(self) -> list[tuple[Line, str, list[list[tuple[float, float]]]]]:
        spans = self._spans()
        strokes = []
        for i, line in enumerate(self.lines):
            runs: list[list[tuple[float, float]]] = [[]]
            for x, y in self._points(line):
                if math.isnan(x):
                    runs.append([])
                else:
                    runs[-1].append(self._to_pixels(x, y, spans))
            colour = LINE_COLOURS[i % len(LINE_COLOURS)]
            strokes.append((line, colour, [_thinned(run) for run in runs if run]))
        return strokes

    def _ticks(self) -> tuple[list[tuple[float, str]], list[tuple[float, str]]]:
        low_x, high_x, low_y, high_y = self._spans()
        if not self.log_y:
            return _round_ticks(low_x, high_x, 7), _round_ticks(low_y, high_y, 5)
        powers = range(math.floor(low_y), math.ceil(high_y) + 1)
        fine = [m * 10.0**p for p in powers for m in ((1, 2, 5) if high_y - low_y < 3 else (1,))]
        inside = [v for v in fine if low_y <= math.log10(v) <= high_y]
        return _round_ticks(low_x, high_x, 7), [(v, f"{v:g}") for v in inside]

    def _grid(self) -> list[tuple[float, float, float, float]]:
        spans = self._spans()
        (some_x, _), *_ = [*self._ticks()[0], (spans[0], "")]
        rows = [self._to_pixels(some_x, y, spans)[1] for y, _ in self._ticks()[1]]
        some_y = 10 ** spans[2] if self.log_y else spans[2]
        columns = [self._to_pixels(x, some_y, spans)[0] for x, _ in self._ticks()[0]]
        across: list[tuple[float, float, float, float]] = [(LEFT, y, self.width - RIGHT, y) for y in rows]
        return across + [(x, TOP, x, self.height - BOTTOM) for x in columns]

    def _words(self) -> list["_Word"]:
        spans = self._spans()
        some_y = 10 ** spans[2] if self.log_y else spans[2]
        words = [_Word(self.title, LEFT, 14, "start", is_title=True)] if self.title else []
        for x, text in self._ticks()[0]:
            words.append(_Word(text, self._to_pixels(x, some_y, spans)[0], self.height - BOTTOM + 13, "middle"))
        for y, text in self._ticks()[1]:
            words.append(_Word(text, LEFT - 6, self._to_pixels(spans[0], y, spans)[1], "end"))
        middle = (LEFT + self.width - RIGHT) / 2
        if self.x_label:
            words.append(_Word(self.x_label, middle, self.height - 9, "middle"))
        if self.y_label:
            words.append(_Word(self.y_label, 11, (TOP + self.height - BOTTOM) / 2, "middle", is_upright=True))
        left = LEFT + (8 * len(self.title) + 20 if self.title else 0)
        for i, line in enumerate(self.lines if len(self.lines) > 1 else ()):
            words.append(_Word(line.name, left, 14, "start", colour=LINE_COLOURS[i % len(LINE_COLOURS)]))
            left += 7 * len(line.name) + 16
        return words


@dataclass(frozen=True)
class _Word:
    text: str
    x: float
    y: float
    anchor: str
    is_title: bool = False
    is_upright: bool = False
    colour: str | None = None


def _widened(low: float, high: float) -> tuple[float, float]:
    """Room above and below a flat line."""
    if high > low:
        return low, high
    room = abs(low) * 0.1 or 1.0
    return low - room, high + room


def _round_ticks(low: float, high: float, count: int) -> list[tuple[float, str]]:
    """About `count` round numbers from low to high, with their texts."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    places = max(0, -math.floor(math.log10(step) + 1e-9))
    first = math.ceil(low / step - 1e-9)
    values = [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]
    is_large = max(abs(low), abs(high)) >= 1e6 or places > 4
    return [(v, f"{v:.3g}" if is_large else f"{v:,.{places}f}") for v in values]


def _thinned(run: list[tuple[float, float]], most: int = 1500) -> list[tuple[float, float]]:
    """At most about `most` points: of each stretch the lowest and the highest, so that no spike is lost."""
    if len(run) <= most:
        return run
    size = math.ceil(2 * len(run) / most)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(run), size):
        stretch = run[start : start + size]
        ends = {
            min(range(len(stretch)), key=lambda i: stretch[i][1]),
            max(range(len(stretch)), key=lambda i: stretch[i][1]),
        }
        kept += [stretch[i] for i in sorted(ends)]
    return kept
