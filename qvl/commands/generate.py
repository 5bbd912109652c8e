"""Answers one prompt with pictures, videos and PDFs in the order they were named."""

import json
import shlex
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

from qvl.commands.cli import take_in_order
from qvl.core.config import did_you_mean
from qvl.engine.generate import Event
from qvl.engine.prepare import Weights
from qvl.engine.sampling import Preset
from qvl.outside.fetch import Fetcher
from qvl.outside.hub import resolve
from qvl.outside.media import MediaLimits
from qvl.outside.workers import Decoder, WorkerPool
from qvl.prompt.media import MediaItem, MediaLoader, Opener, name_of
from qvl.prompt.message import ContentPart, Document, Image, Message, Text, Video, system, user
from qvl.prompt.placeholder import Form
from qvl.prompt.processor import Processor, Template
from qvl.prompt.sampling import VideoSampling
from qvl.session import Session
from qvl.show.terminal import Printer, Say, Voices, telling

A = TypeVar("A", bound="Asking")


@dataclass(frozen=True, kw_only=True)
class MediaOptions:
    """How pictures, videos and PDFs become tokens. Shared by the commands that take them."""

    image_min_tokens: int | None = None
    """Fewest tokens of a picture or PDF page (32 x 32 pixels each); the model folder's own budget otherwise."""
    image_max_tokens: int | None = None
    """Most tokens of a picture or PDF page."""
    fps: float | None = None
    """Frames taken from each second of a video."""
    num_frames: int | None = None
    """Frames taken from a video whatever its length; excludes fps."""
    video_max_tokens: int | None = None
    """What a whole video is scaled down to; a rule's floor for each frame, and its rounding of sides, stand above it."""
    video_preset: Literal["transformers", "qwen-vl-utils", "report"] | None = None
    """A published rule for sampling videos; the model folder's own otherwise."""
    video_form: Form = "release"
    """How a video stands in the prompt: as when the weights were released, or with the outer marks of transformers since 5.10."""
    pages: str | None = None
    """Pages of every PDF, like 1-3,7; all otherwise."""

    def video_sampling(self) -> VideoSampling | None:
        presets = {
            "transformers": VideoSampling.transformers,
            "qwen-vl-utils": VideoSampling.qwen_vl_utils,
            "report": VideoSampling.report,
        }
        return presets[self.video_preset]() if self.video_preset else None

    def part(self, kind: str, value: str) -> ContentPart:
        """What one flag adds to the message."""
        match kind:
            case "prompt":
                return Text(value)
            case "image":
                return Image(value, min_tokens=self.image_min_tokens, max_tokens=self.image_max_tokens)
            case "video":
                return Video(value, sample_fps=self.fps, num_frames=self.num_frames, max_tokens=self.video_max_tokens)
            case "pdf":
                return Document(value, pages=self.pages, max_tokens=self.image_max_tokens)
        raise ValueError(f"ask holds {kind}={value}; each entry begins with image=, video=, pdf= or prompt=.")


@dataclass(frozen=True, kw_only=True)
class Asking(MediaOptions):
    """What is asked, in order."""

    ask: tuple[str, ...] = ()
    """For --config files: the flags --image, --video, --pdf and --prompt in order, each as image=FILE or prompt=TEXT."""
    system: str | None = None
    """The system message."""

    def content(self) -> list[ContentPart]:
        return [self.part(*entry.split("=", 1)) if "=" in entry else self.part(entry, "") for entry in self.ask]

    def messages(self) -> list[Message]:
        first = [] if self.system is None else [system(self.system)]
        return [*first, user(*self.content())]


QUICKSTART = Path("runs/quickstart/checkpoint")


@dataclass(frozen=True, kw_only=True)
class Answering:
    """Which model answers, and how its tokens are drawn."""

    model: str | None = None
    """Checkpoint folder, or a name on the hub; without it the model that `make quickstart` trained."""
    adapter: Path | None = None
    """Folder of a LoRA adapter in PEFT's format, merged into the weights before answering."""
    template: Template = "auto"
    """The chat template: recognised (auto), one of the two published ones, or the folder's own Jinja text in a sandbox."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, mps."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What weights and activations are held in. auto: bfloat16 where the hardware multiplies it, else float32 (float16 on an old GPU)."""
    weights: Weights = "plain"
    """int8 rounds the decoder's for a bfloat16 CPU: answers come faster and differ a little."""
    sampling: Preset = "model"
    """Where unset values below come from: the folder's generation_config.json (greedy without one), the technical report's settings for
    text tasks, or the official evaluation settings for pictures."""
    temperature: float | None = None
    """0 takes the likeliest token each time."""
    max_tokens: int | None = None
    """Most tokens of an answer, its thought included; 1024 where the sampling says nothing."""
    top_p: float | None = None
    """Draw from the likeliest tokens that together hold this probability."""
    top_k: int | None = None
    """Draw from this many of the likeliest tokens; 0 from all."""
    min_p: float | None = None
    """Leave out tokens less likely than this part of the likeliest."""
    repetition_penalty: float | None = None
    """Above 1: tokens of the prompt and the answer become less likely."""
    presence_penalty: float | None = None
    """Above 0: tokens already in the answer become less likely."""
    seed: int | None = None
    """The same seed draws the same answer."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    hide_thinking: bool = False
    """Say only how long the thought is."""


@dataclass(frozen=True, kw_only=True)
class Generate(Asking, Answering):
    """qvl generate --model DIR --image cat.jpg --prompt "What is this?"

    --image FILE, --video FILE, --pdf FILE and --prompt TEXT may be given many times and keep their order. FILE may be an https address
    or a data URI. The answer goes to stdout, a Thinking model's thought to stderr.
    """

    logprobs: int = 0
    """With --json: this many likeliest alternatives of each token (at most 20)."""
    json: bool = False
    """Print one JSON object when the answer is whole."""
    stream: bool = True
    """Print tokens as they come."""


FLAGS = ("image", "video", "pdf", "prompt")


def parse(argv: Sequence[str], read: Callable[[Sequence[str]], A]) -> A:
    """The media and prompts in the order given; they replace those of a --config file."""
    asked, rest = take_in_order(argv, FLAGS)
    for flag in (word.partition("=")[0] for word in rest if word.startswith("--")):
        # These flags are no fields of the dataclass, so tyro does not know them to suggest.
        if advice := did_you_mean(flag, [f"--{name}" for name in FLAGS], cutoff=0.85):
            raise ValueError(f"there is no flag {flag}{advice}")
    if (word := lone_word(rest)) is not None:
        raise ValueError(f"{word!r} stands without a flag; ask with --prompt {shlex.quote(word)}.")
    args = read(rest)
    return replace(args, ask=tuple(f"{kind}={value}" for kind, value in asked)) if asked else args


def lone_word(argv: Sequence[str]) -> str | None:
    """A word that no flag takes: what people type first is the question itself."""
    taken, room = 0, 0
    for word in argv:
        if word.startswith("--"):
            taken, room = 0, 0 if "=" in word else 1 + 100 * (word == "--stop")
        elif taken < room:
            taken += 1
        else:
            return word
    return None


def run(args: Generate) -> int:
    if not args.ask:
        raise ValueError("nothing is asked; give --prompt TEXT, and --image, --video or --pdf FILE before or after it.")
    with telling() as say:
        # Media before weights: a wrong file name is answered at once.
        processor = processor_of(args)
        messages = args.messages()
        with media_loader(say, processor) as loader:
            shown, items = loader.load_all(messages)
        encoded = processor(shown)
        session = open_session(args, processor, say, num_logprobs=args.logprobs)
        events = session.answer(encoded.sample, say)
        first = next(events)
    whole = chain([first], events)
    if args.json:
        found = report(session, list(whole), encoded.sample.num_tokens, facts_of(items))
        print(json.dumps(found, ensure_ascii=False))
        return 0
    printer = Printer(voices_of(session), hide_thinking=args.hide_thinking)
    for event in whole if args.stream else list(whole):
        printer.push(event.draw.token, event.text)
        if event.finish is not None:
            printer.end(cut_off=event.finish == "length")
    return 0


def report(
    session: Session, events: Sequence[Event], num_input_tokens: int, media: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """What --json prints."""
    parsed = session.parse(events)
    calls = [{"name": call.name, "arguments": call.parsed_arguments()} for call in parsed.message.tool_calls]
    top = [[[token, round(logprob, 6)] for token, logprob in event.draw.top] for event in events]
    return {
        "tokens": [event.draw.token for event in events],
        "text": parsed.message.text,
        "thinking": parsed.message.thinking,
        **({"tool_calls": calls} if calls else {}),
        **({"problems": list(parsed.problems)} if parsed.problems else {}),
        "num_input_tokens": num_input_tokens,
        "logprobs": [round(event.draw.logprob, 6) for event in events],
        **({"top_logprobs": top} if session.sampling.num_logprobs else {}),
        "finish": events[-1].finish,
        "sampling": asdict(session.sampling),
        "dtype": str(session.model.dtype).removeprefix("torch."),
        "media": list(media),
    }


# ---- the model ----------------------------------------------------------------------------------------------------


def open_session(args: Answering, processor: Processor, say: Say, *, num_logprobs: int = 0) -> Session:
    """The session that the flags describe."""
    session = Session.open(
        processor,
        adapter=args.adapter,
        dtype=args.dtype,
        device=args.device,
        sampling=args.sampling,
        weights=args.weights,
        say=say,
    )
    names = ("temperature", "max_tokens", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "seed")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    stop = {"stop": args.stop} if args.stop else {}
    return replace(session, sampling=replace(session.sampling, num_logprobs=num_logprobs, **given, **stop))


def voices_of(session: Session) -> Voices:
    tokenizer = session.processor.tokenizer
    marks = {tokenizer.control_id(m): m for m in ("<think>", "</think>") if tokenizer.has_control(m)}
    return Voices(marks, in_thought=session.processor.starts_in_thought)


def processor_of(args: Any) -> Processor:
    """`args` has the fields of Answering and MediaOptions."""
    return Processor.from_folder(
        resolve(args.model or quickstart_model()),
        template=args.template,
        form=args.video_form,
        video_sampling=args.video_sampling(),
    )


def quickstart_model() -> str:
    """Below the current folder."""
    if not (QUICKSTART / "config.json").is_file():
        raise ValueError(
            f"no --model was given, and {QUICKSTART.absolute()} is no model; give a folder, or start from the clone where "
            "make quickstart was run."
        )
    return str(QUICKSTART)


# ---- media --------------------------------------------------------------------------------------------------------


@contextmanager
def media_loader(say: Say, processor: Processor | None = None) -> Iterator[MediaLoader]:
    """With the budgets of the processor, or the published ones. Media are decoded in a process that may crash without us."""
    # A person waits and may press Ctrl-C: the time limit only ends what hangs.
    with WorkerPool(MediaLimits(max_seconds=3600)) as pool:
        loader = MediaLoader() if processor is None else processor.media_loader()
        yield reporting(replace(loader, decoder=pool, keeps_raster=True), say)


def reporting(loader: MediaLoader, say: Say) -> MediaLoader:
    """The same loader; what it opens, fetches and decodes is reported to `say`, and to nobody else."""
    inner = loader.decoder.inner if isinstance(loader.decoder, Watched) else loader.decoder
    assert inner is not None
    return replace(loader, decoder=Watched(inner, say), open=opener(inner.limits, say))


def opener(limits: MediaLimits, say: Say) -> Opener:
    """An address the person typed is fetched from whatever public host it names; files are opened where they are used."""

    def opened(source: Any) -> Any:
        say(f"opening {name_of(source)}")
        if not (isinstance(source, str) and source.lower().startswith(("https://", "http://"))):
            return source
        say(f"fetching {source}")
        return Fetcher(allow_domains=("*",), max_bytes=limits.max_bytes, seconds=600).open(source)

    return opened


def facts_of(items: Sequence[MediaItem]) -> list[dict[str, Any]]:
    """For --json: one entry for each image, video or page."""
    return [
        {
            "kind": "pdf" if item.kind == "page" else item.kind,
            "name": name,
            "grid_thw": item.grid_thw,
            "num_tokens": item.visual.num_tokens,
            "size": [item.visual.width, item.visual.height],
            "source_size": [item.visual.source_width, item.visual.source_height],
            "timestamps": None if item.visual.seconds is None else list(item.visual.seconds),
            "frame_indices": None if item.visual.frame_indices is None else list(item.visual.frame_indices),
            "fps": item.visual.fps,
            "notes": list(item.visual.notes),
        }
        for item, name in zip(items, names_of(items), strict=True)
    ]


def names_of(items: Sequence[MediaItem]) -> list[str]:
    """As files were named; pages are counted: `paper.pdf (2 of 9)`."""
    names: list[str] = []
    total = 0
    for i in reversed(range(len(items))):
        page = items[i].page
        if page is not None and (i + 1 == len(items) or items[i + 1].page != page + 1):
            total = page
        names.append(items[i].name if page is None else f"{items[i].name} ({page} of {total})")
    return names[::-1]


class Watched:
    """A decoder that says how many frames or pages have come."""

    def __init__(self, inner: Decoder, say: Say) -> None:
        self.inner, self.say = inner, say

    @property
    def limits(self) -> MediaLimits:
        return self.inner.limits

    def run(self, job: str, stream: BinaryIO, **options: Any) -> Generator[tuple[dict[str, Any], Any]]:
        total = len(options.get("wanted") or options.get("pages") or ())
        word = "page" if "pages" in options else "frame"
        with closing(self.inner.run(job, stream, **options)) as messages:
            for done, message in enumerate(messages, 1):
                if total:
                    self.say(f"decoding {word} {min(done, total):,} of {total:,}")
                yield message
