"""Records on one HTML page: pictures with their boxes, frames with their times, and the text with what is learned marked."""

import io
from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby

from PIL import Image as Picture

from qvl.data.draft import Draft, fit
from qvl.data.messages import place_of
from qvl.data.preference import draft_pair
from qvl.data.record import Record
from qvl.data.sample import load_part
from qvl.data.shard import Entry
from qvl.outside.workers import Decoder
from qvl.prompt.coordinates import Place
from qvl.prompt.image import load_image
from qvl.prompt.message import Image
from qvl.prompt.processor import Processor
from qvl.prompt.video import slice_label
from qvl.prompt.visual import Visual
from qvl.show.draw import draw_places
from qvl.show.frames import contact_sheet, frames_of
from qvl.show.page import Html, figure, image, page, tag

MOST_FRAMES = 12
MOST_PICTURES = 6
WIDEST = 720
STYLE = """
.record{margin:2rem 0;padding-top:1rem;border-top:1px solid var(--line)}
.record h2{border:0;margin:0;padding:0}.media{display:flex;flex-wrap:wrap;gap:1rem;align-items:flex-start}
.media figure{margin:.6rem 0;max-width:30rem}
.media figure.film{max-width:100%}
.learned{background:#b7e4c7;color:#0b2e13;border-radius:2px}
.control{color:var(--mark)}.pads{color:var(--faint)}
.key{font-size:.9rem}.key span{padding:.05rem .3rem;margin-right:.3rem}
@media(prefers-color-scheme:dark){.learned{background:#1f5136;color:#e6ffee}}
"""


def preview_page(
    entries: Iterable[Entry],
    processor: Processor,
    decoder: Decoder,
    *,
    title: str,
    max_tokens: int = 32768,
    max_patches: int = 131072,
) -> str:
    """A self-contained page. A record that cannot be shown says why in its place."""
    parts: list[str] = [
        tag(
            "p",
            tag("span", "learned", class_="learned"),
            tag("span", "<|control token|>", class_="control"),
            tag("span", "[n visual tokens]", class_="pads"),
            class_="key",
        )
    ]
    count = 0
    for entry in entries:
        count += 1
        try:
            parts.append(_record(entry, processor, decoder, max_tokens, max_patches))
        except ValueError as error:
            body = (tag("h2", entry.record.id), tag("p", f"This record cannot be shown: {error}"))
            parts.append(tag("section", *body, class_="record"))
    return page(title, parts, lead=f"{count} records, as the network is trained on them", style=STYLE)


def _record(entry: Entry, processor: Processor, decoder: Decoder, max_tokens: int, max_patches: int) -> Html:
    record = entry.record
    is_pair = record.kind == "pref"
    conversations = draft_pair(record, processor) if is_pair else (fit(record, processor, max_tokens, max_patches),)
    made = conversations[0]
    targets = 0 if made.sample.is_target_T is None else int(made.sample.is_target_T.sum())
    facts = [
        record.kind,
        record.category,
        record.source,
        record.license and f"licence {record.license}",
        f"{made.sample.num_tokens:,} tokens",
        f"{made.num_visual_tokens:,} visual",
        f"{targets:,} learned",
        "" if made.fate == "whole" else made.fate,
        "the chosen answer, then the rejected one" if is_pair else "",
    ]
    return tag(
        "section",
        tag("h2", record.id),
        tag("p", " · ".join(fact for fact in facts if fact), class_="faint"),
        tag("div", *_media(entry, made, processor, decoder), class_="media"),
        *(tag("pre", Html(marked_text(one, processor))) for one in conversations),
        class_="record",
    )


def marked_text(made: Draft, processor: Processor) -> str:
    """The ids as markup: what is learned, control tokens, and runs of placeholders as their count."""
    tokenizer, sample = processor.tokenizer, made.sample
    pads = {tokenizer.control_id(f"<|{kind}_pad|>") for kind in ("image", "video")}
    ids = sample.token_T.tolist()
    flags = [False] * len(ids) if sample.is_target_T is None else sample.is_target_T.tolist()

    def sort(i: int) -> tuple[bool, bool, bool]:
        # By ids, not by letters: a control token that somebody spelled is none.
        return flags[i], ids[i] in pads, tokenizer.is_control(ids[i])

    out: list[str] = []
    # Whole runs are decoded together: a letter may be spread over several ids.
    for (is_target, is_pad, is_control), places in groupby(range(len(ids)), key=sort):
        run = [ids[i] for i in places]
        text = f"[{len(run):,} visual tokens]" if is_pad else tokenizer.decode(run)
        kinds = {"learned": is_target, "pads": is_pad, "control": is_control and not is_pad}
        classes = " ".join(name for name, holds in kinds.items() if holds)
        out.append(f'<span class="{classes}">{escape(text)}</span>' if classes else escape(text))
    return "".join(out)


def _media(entry: Entry, made: Draft, processor: Processor, decoder: Decoder) -> list[Html]:
    shown: list[Html] = []
    for part in made.parts[:MOST_PICTURES]:
        visual = load_part(part, entry.media, processor, decoder)
        if isinstance(part, Image):
            name = part.source.name
            shown.append(figure(_drawn(entry, name, visual, decoder), _caption(name, visual)))
        else:
            name = part.source[0].name if isinstance(part.source, tuple) else part.source.name
            caption = tag("figcaption", _caption(name, visual))
            sheet = image(_sheet(visual, entry.record), alt=name)
            shown.append(tag("figure", sheet, caption, class_="film"))
    if len(made.parts) > MOST_PICTURES:
        shown.append(tag("p", f"and {len(made.parts) - MOST_PICTURES} more"))
    return shown


def _caption(name: str, visual: Visual) -> str:
    slices = f", {len(visual.seconds)} slices" if visual.seconds else ""
    return (
        f"{name}: {visual.source_width}x{visual.source_height} seen at {visual.width}x{visual.height}, "
        f"{visual.num_tokens:,} tokens{slices}"
    )


def _drawn(entry: Entry, name: str, visual: Visual, decoder: Decoder) -> Picture.Image:
    """The picture as it is stored, with the record's places on it; a PDF's page as the network sees it."""
    medium = entry.record.media[name]
    if medium.page_sizes is not None:
        return frames_of(visual.patch_PX, visual.grid_I3)[0][0]
    raster = load_image(io.BytesIO(entry.media[name]), decoder)
    picture = Picture.fromarray(raster.permute(1, 2, 0).contiguous().numpy())
    picture = draw_places(picture, places) if (places := places_in(entry.record, name)) else picture
    if picture.width > WIDEST:
        picture = picture.resize((WIDEST, max(1, round(picture.height * WIDEST / picture.width))))
    return picture


def places_in(record: Record, name: str) -> Sequence[Place]:
    """The boxes and points of one picture, from its annotations and from the messages; each once."""
    items = [item for item in record.objects if item.get("image") == name]
    for block in record.blocks():
        if block["type"] == "boxes":
            items += [item for item in block["items"] if item.get("image", block.get("image")) == name]
    return list(dict.fromkeys(place_of(item) for item in items))


def _sheet(visual: Visual, record: Record) -> Picture.Image:
    """Some of the slices with their times, evenly spread."""
    seconds = visual.seconds or ()
    count = min(MOST_FRAMES, len(seconds))
    chosen = [round(i * (len(seconds) - 1) / max(1, count - 1)) for i in range(count)]
    frames = [pair[0] for pair in frames_of(visual.patch_PX, visual.grid_I3, chosen)]
    labels = [slice_label(seconds[i], record.time_style) for i in chosen]
    return contact_sheet(frames, labels, width=WIDEST)
