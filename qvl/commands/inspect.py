"""Shows what the network gets: resized media, sampled frames, the prompt's tokens and positions, and where an answer looks."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from qvl.commands import generate
from qvl.commands.generate import Answering, Asking, facts_of, media_loader, names_of, open_session, processor_of
from qvl.core.batch import Batch, Sample
from qvl.core.files import write_text, writing
from qvl.model.config import ModelConfig, read_config
from qvl.model.look import layers_named, look
from qvl.model.pack import pack
from qvl.prompt.media import MediaItem
from qvl.prompt.processor import Processor, Template
from qvl.prompt.tokenizer import Tokenizer
from qvl.prompt.visual import MERGE, Visual
from qvl.session import Session
from qvl.show.frames import frames_of, with_grid
from qvl.show.inspection import Attention, Inspection, Looked, Medium, Token, to_html, to_picture
from qvl.show.terminal import Say, printable, telling

MOST_SLICES = 24
"""Slices of a video on a contact sheet, two frames each."""
MOST_LOOKED = 16
"""Pictures and slices with a heat map: those that get most attention."""
MOST_WORDS = 256
"""Tokens of an answer with a map of their own."""


@dataclass(frozen=True, kw_only=True)
class Inspect(Asking):
    """qvl inspect --model DIR --image cat.jpg --prompt "Where is the cat?" --generate 16 --out page.html

    Without --model: media alone, within the published budgets. --image, --video, --pdf and --prompt keep their order.
    """

    model: str | None = None
    """Checkpoint folder, or a name on the hub. Its weights are loaded only for an answer."""
    template: Template = "auto"
    """The chat template, as in qvl generate."""
    answer: str | None = None
    """Show where these words, as the model's answer, look."""
    generate: int = 0
    """Let the model answer with up to this many tokens (greedily), and show where they look."""
    layers: str | None = None
    """Layers whose attention is averaged, from 0: all, or like 8,12-16. The middle half otherwise."""
    out: Path | None = None
    """Write one self-contained HTML page."""
    png: Path | None = None
    """Write one picture."""
    json: bool = False
    """Print one JSON object: grid_thw, num_tokens and timestamps of each medium, input_ids, and more."""
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


def parse(argv: Sequence[str], read: Callable[[Sequence[str]], Inspect]) -> Inspect:
    return generate.parse(argv, read)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Everything that was found out."""

    media: Sequence[MediaItem]
    """In the order of the prompt."""
    pads: frozenset[int] = frozenset()
    """Ids of the placeholders."""
    prompt: str | None = None
    sample: Sample | None = None
    position_3T: Tensor | None = None
    answer: Sequence[int] = ()
    """Ids at the end of the sample that are the answer's."""
    weights: Tensor | None = None
    """fp32 (answer tokens, all tokens): attention averaged over heads and layers."""
    layers: Sequence[int] = ()

    @property
    def visuals(self) -> list[Visual]:
        return [item.visual for item in self.media]


def run(args: Inspect) -> int:
    check(args)
    with telling() as say:
        processor = processor_of(args) if args.model is not None else None
        seen = see(args, processor, say)
        say("drawing")
        if args.out or args.png:
            shown = inspection(args, seen, processor)
            if args.out:
                write_text(args.out, to_html(shown))
            if args.png:
                with writing(args.png) as new:
                    to_picture(shown).save(new, "PNG")
    if args.json:
        print(json.dumps(report(seen, processor), ensure_ascii=False))
    else:
        show(seen)
        for file in filter(None, (args.out, args.png)):
            print(f"wrote {file}")
    return 0


def check(args: Inspect) -> None:
    if not args.ask:
        raise ValueError(
            "nothing to inspect; give --image, --video or --pdf FILE, and with --model also --prompt TEXT."
        )
    for file in filter(None, (args.out, args.png)):
        if not file.parent.is_dir():
            raise ValueError(f"{file} cannot be written: there is no folder {file.parent}.")
    kinds = {entry.partition("=")[0] for entry in args.ask}
    asks_answer = args.answer is not None or args.generate > 0
    if args.model is None and ("prompt" in kinds or args.system is not None or asks_answer):
        raise ValueError("words need a tokenizer; give --model DIR, or media alone.")
    if args.generate < 0 or (args.answer is not None and args.generate):
        raise ValueError("give --answer TEXT or --generate N with N above 0, not both.")
    if asks_answer and kinds == {"prompt"}:
        raise ValueError("an answer's attention is shown over pictures; give --image, --video or --pdf too.")


def see(args: Inspect, processor: Processor | None, say: Say) -> Seen:
    messages = args.messages()
    with media_loader(say, processor) as loader:
        if processor is None:
            loader = replace(loader, videos=args.video_sampling() or loader.videos)
        shown, media = loader.load_all(messages)
    seen = Seen(media=media)
    if processor is None:
        return seen
    assert args.model is not None
    encoded = processor(shown)
    sample, answer = encoded.sample, []
    config = read_config(processor.folder.path)
    session = None
    if args.answer is not None or args.generate:
        settings = Answering(
            model=args.model, device=args.device, dtype=args.dtype, temperature=0, max_tokens=max(1, args.generate)
        )
        session = open_session(settings, processor, say)
        if args.answer is not None:
            answer = ids_of_answer(args.answer, processor)
        else:
            answer = [event.draw.token for event in session.answer(sample, say)]
        sample = replace(sample, token_T=torch.cat((sample.token_T, torch.tensor(answer))))
    batch = pack([sample], config)
    pads = frozenset((config.image_token_id, config.video_token_id))
    seen = replace(seen, prompt=encoded.text, sample=sample, position_3T=batch.position_3T, answer=answer, pads=pads)
    if session is None:
        return seen
    say("looking where the answer looks")
    layers = layers_named(args.layers, config.text.num_hidden_layers)
    return replace(seen, weights=weights_of_answer(session, batch, len(answer), layers), layers=layers)


def ids_of_answer(words: str, processor: Processor) -> list[int]:
    """Words as the model would have written them; under the Thinking template after an empty thought."""
    if not words:
        raise ValueError("the answer is empty; give at least one word.")
    start = processor.tokenizer.encode_control("\n</think>\n\n") if processor.starts_in_thought else []
    return [*start, *processor.tokenizer.encode_text(words)]


def weights_of_answer(session: Session, batch: Batch, count: int, layers: Sequence[int]) -> Tensor:
    """(count, T): row i is the attention of the step that chose the answer's token i, so of the token before it."""
    first = batch.num_tokens - count - 1
    return look(session.model, batch, range(first, first + count), layers).mean(dim=0)


# ---- what is printed ----------------------------------------------------------------------------------------------


def report(seen: Seen, processor: Processor | None) -> dict[str, Any]:
    """What --json prints. `grid_thw`, `num_tokens` and `timestamps` have one entry for each medium (each page of a PDF)."""
    media = facts_of(seen.media)
    found: dict[str, Any] = {
        "grid_thw": [facts["grid_thw"] for facts in media],
        "num_tokens": [facts["num_tokens"] for facts in media],
        "timestamps": [facts["timestamps"] for facts in media],
        "media": media,
        "input_ids": None,
    }
    if seen.sample is None or processor is None or seen.position_3T is None:
        return found
    prompt_length = seen.sample.num_tokens - len(seen.answer)
    found |= {
        "input_ids": seen.sample.token_T[:prompt_length].tolist(),
        "num_input_tokens": prompt_length,
        "prompt": seen.prompt,
        "position_ids": seen.position_3T[:, :prompt_length].tolist(),
    }
    if seen.weights is not None:
        found["answer"] = {
            "tokens": list(seen.answer),
            "text": processor.tokenizer.decode(seen.answer),
            "layers": list(seen.layers),
            "attention_on_media": [[round(share, 6) for share in row] for row in shares(seen).T.tolist()],
        }
    return found


def show(seen: Seen) -> None:
    console = Console(highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("medium", overflow="fold")
    for name in ("source", "resized", "grid t x h x w", "tokens"):
        table.add_column(name, justify="right")
    for facts in facts_of(seen.media):
        sizes = ["x".join(map(str, facts[key])) for key in ("source_size", "size", "grid_thw")]
        table.add_row(printable(facts["name"]), *sizes, f"{facts['num_tokens']:,}")
    if seen.media:
        console.print(table)
    for facts in facts_of(seen.media):
        if facts["timestamps"]:
            times = " ".join(f"{second:.1f}" for second in facts["timestamps"])
            console.print(f"seconds of {printable(facts['name'])}: {times}", markup=False)
        for note in facts["notes"]:
            console.print(f"note on {printable(facts['name'])}: {note}", markup=False)
    if seen.sample is not None:
        console.print(f"prompt: {seen.sample.num_tokens - len(seen.answer):,} tokens", markup=False)
        console.print(printable(seen.prompt or ""), markup=False, style="dim", soft_wrap=True)


# ---- what is drawn ------------------------------------------------------------------------------------------------


def inspection(args: Inspect, seen: Seen, processor: Processor | None) -> Inspection:
    names = ", ".join(Path(item.name).name for item in seen.media if item.page in (None, 1))
    shown = Inspection(title=f"Inspection of {names or 'a prompt'}", media=media_of(seen.media))
    if processor is None or seen.sample is None or seen.position_3T is None:
        return shown
    config = read_config(processor.folder.path)
    return replace(
        shown,
        tokens=tokens_of(seen.sample.token_T.tolist(), len(seen.answer), processor.tokenizer, config),
        num_prompt=seen.sample.num_tokens - len(seen.answer),
        num_answer=len(seen.answer),
        positions=seen.position_3T.tolist(),
        attention=None if seen.weights is None else attention_of(seen, processor.tokenizer),
    )


def media_of(items: Sequence[MediaItem]) -> list[Medium]:
    shown = []
    for item, name in zip(items, names_of(items), strict=True):
        visual = item.visual
        t, h, w = item.grid_thw
        rows = [
            ("source", f"{visual.source_width} x {visual.source_height} pixels"),
            ("resized to", f"{visual.width} x {visual.height} pixels"),
            ("grid", f"{t} x {h} x {w} patches (time, height, width)"),
            ("tokens", f"{visual.num_tokens:,}" + (f" = {t} x {visual.num_tokens // t:,}" if t > 1 else "")),
        ]
        if visual.kind == "image":
            [[picture, _]] = frames_of(visual.patch_PX, visual.grid_I3)
            caption = "As the network sees it; each cell is one token."
            shown.append(Medium(title=name, facts=rows, pictures=[with_grid(picture)], captions=[caption]))
            continue
        slices = spread(t, MOST_SLICES)
        notes = list(visual.notes)
        if len(slices) < t:
            notes.append(f"{len(slices)} of {t} slices are shown, evenly spread")
        times = " ".join(f"{second:.1f}" for second in visual.seconds or ())
        rows += [("source fps", f"{visual.fps:.6g}"), ("slices at seconds", times)]
        pictures = [frame for pair in frames_of(visual.patch_PX, visual.grid_I3, slices) for frame in pair]
        captions = [caption for i in slices for caption in frame_captions(visual, i)]
        shown.append(Medium(title=name, facts=rows, pictures=pictures, captions=captions, notes=notes))
    return shown


def spread(count: int, most: int) -> list[int]:
    """At most `most` numbers below `count`, evenly spread, first and last among them."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def frame_captions(visual: Visual, slice_number: int) -> list[str]:
    assert visual.seconds is not None and visual.frame_indices is not None
    second = visual.seconds[slice_number]
    last = len(visual.frame_indices) - 1
    numbers = [visual.frame_indices[min(2 * slice_number + i, last)] for i in range(2)]
    return [f"<{second:.1f} seconds>, frame {number}" for number in numbers]


def tokens_of(ids: Sequence[int], num_answer: int, tokenizer: Tokenizer, config: ModelConfig) -> list[Token]:
    """Runs of placeholders become one entry; a character spread over several tokens stays whole."""
    visual = {config.image_token_id, config.video_token_id}
    tokens: list[Token] = []
    held = b""
    for place, id in enumerate(ids):
        if id in visual and tokens and tokens[-1].kind == "visual" and not held and place and ids[place - 1] == id:
            tokens[-1] = replace(tokens[-1], count=tokens[-1].count + 1)
            continue
        held += tokenizer.token_bytes(id)
        following = ids[place + 1] if place + 1 < len(ids) else None
        if _is_whole(held) or following is None or tokenizer.is_control(following):
            is_answer = place >= len(ids) - num_answer
            control: Literal["control", "plain"] = "control" if tokenizer.is_control(id) else "plain"
            kind = "visual" if id in visual else "answer" if is_answer else control
            tokens.append(Token(text=held.decode("utf-8", errors="replace"), kind=kind))
            held = b""
    return tokens


def _is_whole(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def attention_of(seen: Seen, tokenizer: Tokenizer) -> Attention:
    assert seen.weights is not None
    spans = visual_spans(seen)
    total = seen.weights.mean(dim=0)
    by_weight = sorted(range(len(spans)), key=lambda i: -float(total[spans[i].places].sum()))
    chosen = sorted(by_weight[:MOST_LOOKED])
    count = min(len(seen.answer), MOST_WORDS)
    looked = []
    for i in chosen:
        span = spans[i]
        [[picture, _]] = frames_of(span.visual.patch_PX, span.visual.grid_I3, [span.row])
        grids = seen.weights[:count, span.places].unflatten(1, (span.height, span.width)).tolist()
        looked.append(Looked(caption=span.caption, picture=picture, weights=grids))
    numbers = ", ".join(map(str, seen.layers))
    about = f"Softmax weights of the step that chose each token, mean over the heads of layers {numbers}."
    if len(chosen) < len(spans):
        about += f" Of {len(spans)} pictures and slices the {len(chosen)} that get most are shown."
    if count < len(seen.answer):
        about += f" The first {count} of {len(seen.answer)} tokens."
    return Attention(
        words=[tokenizer.decode([id]) for id in seen.answer[:count]],
        shares=shares(seen).sum(dim=0)[:count].tolist(),
        looked=looked,
        about=about,
    )


@dataclass(frozen=True, kw_only=True)
class Span:
    """The tokens of one image or slice."""

    number: int
    """Of the item that it belongs to."""
    visual: Visual
    row: int
    """Of the visual's grid."""
    places: slice
    height: int
    width: int
    caption: str


def visual_spans(seen: Seen) -> list[Span]:
    """In the order of the prompt. Placeholders stand in it in the order of the visuals, one run for each row of their grids."""
    names = names_of(seen.media)
    spans = []
    for number, (visual, starts) in enumerate(zip(seen.visuals, _starts(seen), strict=True)):
        for row, start in enumerate(starts):
            _, h, w = visual.grid_I3[row].tolist()
            height, width = h // MERGE, w // MERGE
            time = "" if visual.seconds is None else f", {visual.seconds[row]:.1f} seconds"
            places = slice(start, start + height * width)
            caption = Path(names[number]).name + time
            spans.append(
                Span(number=number, visual=visual, row=row, places=places, height=height, width=width, caption=caption)
            )
    return spans


def _starts(seen: Seen) -> list[list[int]]:
    """For each visual the place of the first token of each row of its grid."""
    assert seen.sample is not None and seen.position_3T is not None
    prompt = seen.sample.token_T[: seen.sample.num_tokens - len(seen.answer)].tolist()
    rows = [int(t * h * w) // MERGE**2 for visual in seen.visuals for t, h, w in visual.grid_I3.tolist()]
    pads = seen.pads
    places, at = [], 0
    for count in rows:
        while prompt[at] not in pads:
            at += 1
        places.append(at)
        at += count
    whole = iter(places)
    return [[next(whole) for _ in range(len(visual.grid_I3))] for visual in seen.visuals]


def shares(seen: Seen) -> Tensor:
    """(media, answer tokens): how much of each token's attention falls on each medium."""
    assert seen.weights is not None
    share = seen.weights.new_zeros(len(seen.media), len(seen.weights))
    for span in visual_spans(seen):
        share[span.number] += seen.weights[:, span.places].sum(dim=1)
    return share
