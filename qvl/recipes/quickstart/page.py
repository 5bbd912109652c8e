"""The story as a page: promises, curves, and held-out pictures with what the model said of them. Written anew after each chapter."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image as Raster
from PIL import ImageDraw

from qvl.core.files import write_text
from qvl.core.log import read_jsonl
from qvl.prompt.coordinates import Box, Boxes, read_boxes
from qvl.prompt.example import Example
from qvl.prompt.message import Image, Video
from qvl.recipes.quickstart.story import HELD_OUT_SEED, Pupil, Skill, Story, answers
from qvl.scoring.registry import score_answers
from qvl.show.curves import Line, Plot
from qvl.show.draw import PALETTE
from qvl.show.page import Html, figure, page, section, table, tag, text
from qvl.worlds.world import World

RIGHT, SAID = PALETTE[2], PALETTE[0]
EACH = 4
"""Pictures of each world."""
ACROSS = 4
"""Frames in a row, every second one of a clip."""


def write_page(story: Story, pictures: dict[str, World], pupil: Pupil | None = None) -> Path:
    """index.html in the story's folder. Without a pupil that sees, the pictures stand there with their questions alone."""
    path = story.work / "index.html"
    if not story.speaks:
        return path
    if not (story.work / "pictures").is_dir():  # the same after every chapter
        save_pictures(story.work / "pictures", pictures)
    body = [
        section("Promises", promises(story.skills), text(TERMS)) if story.skills else "",
        section("Held-out pictures", text(MARKS), gallery(pictures, pupil)),
        section(
            "Learning",
            *(
                figure(Html(plot.svg()))
                for name, log in story.curves.items()
                if log.is_file()
                for plot in curves(name, log)
            ),
        ),
    ]
    lead = f"{story.size.name}, seed {story.seed}: one package from a tokenizer to a model that sees, on a CPU."
    write_text(path, page("The story of a small Qwen3-VL", [part for part in body if part], lead=lead, style=STYLE))
    return path


TERMS = (
    "Got: the mean score of greedy answers on held-out examples. Promise: what the chapter is for. Floor: below it the run fails. "
    "Blind: the same model, shown another example's evidence. Constant: the best answer that never changes. "
    "Seconds: training, beside the first skill that a lesson teaches."
)
MARKS = (
    "Green box: where the object is. Orange box: where the model says it is. The pictures lie beside this page, in pictures/, at the size "
    "the model knows; they are shown enlarged here."
)

STYLE = """
.sheet{display:grid;grid-template-columns:repeat(auto-fill,minmax(13rem,1fr));gap:1rem}
.sheet figure{margin:0}.sheet img{width:100%;image-rendering:pixelated}
.right{color:#1a7f37}.wrong{color:#c62828}
@media(prefers-color-scheme:dark){.right{color:#66bb6a}.wrong{color:#ef9a9a}}
"""


def promises(skills: Sequence[Skill]) -> Html:
    header = ("chapter", "skill", "got", "promise", "floor", "blind", "constant", "", "seconds")
    rows = [
        (
            s.chapter,
            s.skill,
            *(f"{value:.3f}" for value in (s.got, s.promise, s.floor)),
            "" if s.blind is None else f"{s.blind:.3f}",
            "" if s.constant is None else f"{s.constant:.3f}",
            s.verdict,
            "" if not s.seconds or (before is not None and before.seconds == s.seconds) else f"{s.seconds:.0f}",
        )
        for before, s in zip([None, *skills], skills, strict=False)
    ]
    return table(header, rows)


def curves(name: str, log: Path) -> list[Plot]:
    """Each category's loss, smoothed over a twentieth of the lesson; words apart from pictures, at most six lines a plot."""
    rows = list(read_jsonl(log))
    width = max(1, len(rows) // 20)
    names = sorted({key.removeprefix("loss/") for row in rows for key in row if key.startswith("loss/")})
    words = [n for n in names if n.startswith(("text.", "prose", "repeats", "needle"))]
    plots = []
    for kind in ([n for n in names if n not in words], words):
        for low in range(0, len(kind), 6):
            lines = [smoothed(n, rows, width) for n in kind[low : low + 6]]
            plots.append(Plot(lines=lines, title=name, x_label="step", y_label="loss in nats"))
    return plots


def smoothed(name: str, rows: Sequence[dict[str, Any]], width: int) -> Line:
    points = [(row["step"], row[f"loss/{name}"]) for row in rows if f"loss/{name}" in row]
    parts = [points[i : i + width] for i in range(0, len(points), width)]
    return Line(name=name, x=[part[0][0] for part in parts], y=[sum(y for _, y in part) / len(part) for part in parts])


def gallery(pictures: dict[str, World], pupil: Pupil | None) -> Html:
    """Held-out examples of each world; with a pupil, its answers: boxes drawn, right and wrong marked."""
    cards = []
    for name, world in pictures.items():
        examples = [world(HELD_OUT_SEED, i, "heldout") for i in range(EACH)]
        said = answers(pupil.model, pupil.processor, examples) if pupil else [None] * len(examples)
        names = [f"{name}-{i}" for i in range(EACH)]
        cards += [card(*shown) for shown in zip(examples, said, names, strict=True)]
    return tag("div", *cards, class_="sheet")


def save_pictures(folder: Path, pictures: dict[str, World]) -> None:
    """The gallery's pictures as files at their own size, to ask about: a larger copy is another thing to a model this small."""
    folder.mkdir()
    for name, world in pictures.items():
        for i in range(EACH):
            for part in world(HELD_OUT_SEED, i, "heldout").messages[0].parts:
                if isinstance(part, Image) and isinstance(part.source, Raster.Image):
                    part.source.save(folder / f"{name}-{i}.png")


def card(example: Example, answer: str | None, name: str) -> Html:
    question = f"{name}: {example.messages[0].text}"
    shown = picture_of(example, answer)
    if answer is None:
        return figure(shown, f"{question}", alt=question)
    got = score_answers(example, [answer])[0].value
    verdict = tag("span", f"{answer} ", class_="right" if got >= 0.5 else "wrong")
    beside = "" if got == 1 else f"(right: {example.answer}; score {got:.2f})"
    return tag("figure", figure(shown, alt=question), tag("figcaption", text(question), verdict, beside))


def picture_of(example: Example, answer: str | None) -> Raster.Image:
    """The example's picture with the boxes of the answer, or a sheet of its frames."""
    part = next(p for p in example.messages[0].parts if isinstance(p, Image | Video))
    if isinstance(part, Video):
        frames = [frame for frame in part.source if isinstance(frame, Raster.Image)][::2]
        side = frames[0].width
        sheet = Raster.new("RGB", (ACROSS * (side + 2), -(-len(frames) // ACROSS) * (side + 2)), "white")
        for i, frame in enumerate(frames):
            sheet.paste(frame, (i % ACROSS * (side + 2), i // ACROSS * (side + 2)))
        return sheet
    assert isinstance(part.source, Raster.Image)
    if answer is None or example.scorer != "iou":
        return part.source
    enlarged = part.source.resize((part.source.width * 3, part.source.height * 3), Raster.Resampling.NEAREST)
    right = Boxes(items=(Box(*example.truth["box"]),), space="relative1000")
    pen = ImageDraw.Draw(enlarged)
    # Without the labels of draw_places: the caption says them, and on a picture this small they cannot be read.
    for places, colour in ((right, RIGHT), (read_boxes(answer), SAID)):
        for box in places.to_pixels(*enlarged.size).items:
            if isinstance(box, Box):
                pen.rectangle(box.ordered().numbers, outline=colour, width=3)
    return enlarged
