"""Answers one prompt with pictures, videos and PDFs in the order they were named."""

import json
import shlex
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

from torch import Tensor

from qvl.commands.cli import take_in_order
from qvl.core.config import did_you_mean
from qvl.engine.generate import Event
from qvl.engine.prepare import Weights
from qvl.engine.sampling import Preset
from qvl.outside.fetch import Fetcher
from qvl.outside.hub import resolve
from qvl.outside.media import MediaLimits
from qvl.outside.workers import Decoder, WorkerPool
from qvl.prompt.budget import ImageBudget
from qvl.prompt.document import load_document
from qvl.prompt.image import image_patches, load_image
from qvl.prompt.message import ContentPart, Document, Image, Message, Text, Video, system, user
from qvl.prompt.placeholder import Form
from qvl.prompt.processor import Processor, Template, image_budget_for, video_sampling_for
from qvl.prompt.sampling import VideoSampling
from qvl.prompt.video import load_video
from qvl.prompt.visual import Visual
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
        with MediaLoader.worker(say, processor) as loader:
            loaded = loader.load_all(messages)
        encoded = processor([prepared(message, loaded) for message in messages])
        session = open_session(args, processor, say, num_logprobs=args.logprobs)
        events = session.answer(encoded.sample, say)
        first = next(events)
    whole = chain([first], events)
    if args.json:
        media = [facts for item in loaded.values() for facts in item.facts()]
        print(json.dumps(report(session, list(whole), encoded.sample.num_tokens, media), ensure_ascii=False))
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


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """One medium of a message, as the network gets it."""

    kind: Literal["image", "video", "pdf"]
    name: str
    visuals: tuple[Visual, ...]
    """One; of a PDF one for each page."""
    raster: Tensor | None = field(default=None, repr=False)
    """A picture at its own size, uint8 (3, height, width)."""

    def facts(self) -> list[dict[str, Any]]:
        """For --json: one entry for each visual."""
        count = len(self.visuals)
        return [
            {
                "kind": self.kind,
                "name": self.name if self.kind != "pdf" else f"{self.name} ({i + 1} of {count})",
                "grid_thw": grid_of(visual),
                "num_tokens": visual.num_tokens,
                "size": [visual.width, visual.height],
                "source_size": [visual.source_width, visual.source_height],
                "timestamps": None if visual.seconds is None else list(visual.seconds),
                "frame_indices": None if visual.frame_indices is None else list(visual.frame_indices),
                "fps": visual.fps,
                "notes": list(visual.notes),
            }
            for i, visual in enumerate(self.visuals)
        ]


def grid_of(visual: Visual) -> list[int]:
    """(t, h, w) of the whole visual, as Hugging Face counts."""
    return [len(visual.grid_I3), *visual.grid_I3[0, 1:].tolist()]


def prepared(message: Message, loaded: dict[int, Loaded]) -> Message:
    """The message with its media replaced by what they became; `loaded` goes by the identity of the part."""
    content: list[ContentPart] = []
    for part in message.content:
        item = loaded.get(id(part))
        if item is None:
            content.append(part)
        elif item.kind == "video":
            content += [Video(visual) for visual in item.visuals]
        else:
            content += [Image(visual) for visual in item.visuals]
    return message.with_content(content)


@dataclass(frozen=True, kw_only=True)
class MediaLoader:
    """Media to patches, decoded in a process that may crash without us; errors name the file."""

    decoder: Decoder
    say: Say
    images: ImageBudget | None = field(default_factory=ImageBudget)
    videos: VideoSampling | None = field(default_factory=VideoSampling)
    folder: str = ""

    @classmethod
    @contextmanager
    def worker(cls, say: Say, processor: Processor | None = None) -> "Iterator[MediaLoader]":
        """With the budgets of the processor, or the published ones."""
        # A person waits and may press Ctrl-C: the time limit only ends what hangs.
        with WorkerPool(MediaLimits(max_seconds=3600)) as pool:
            loader = cls(decoder=Watched(pool, say), say=say)
            if processor is not None:
                budgets = {"images": processor.image_budget, "videos": processor.video_sampling}
                loader = replace(loader, folder=str(processor.folder.path), **budgets)
            yield loader

    def watched_by(self, say: Say) -> "MediaLoader":
        """The same, with somebody else told."""
        inner = self.decoder.inner if isinstance(self.decoder, Watched) else self.decoder
        return replace(self, decoder=Watched(inner, say), say=say)

    def load_all(self, messages: Sequence[Message]) -> dict[int, Loaded]:
        """Every medium of the messages, by the identity of its part (parts may be equal and need not be hashable)."""
        parts = [part for message in messages for part in message.content if not isinstance(part, Text)]
        return {id(part): self.load(part) for part in parts}

    def load(self, part: ContentPart) -> Loaded:
        assert isinstance(part, Image | Video | Document)
        if self.images is None or self.videos is None:
            raise ValueError(
                f"{self.folder} has no preprocessor_config.json, so the size of pictures is unknown; "
                "copy that file from the base model's folder."
            )
        name = str(part.source)
        name = name if len(name) <= 200 else name[:60] + "..."  # a data URI
        self.say(f"opening {name}")
        try:
            with self._opened(part.source) as source:
                return self._loaded(part, name, source)
        except ValueError as error:
            if name in str(error):
                raise
            raise ValueError(f"{name}: {error}") from error

    def _loaded(self, part: Image | Video | Document, name: str, source: Any) -> Loaded:
        assert self.images is not None and self.videos is not None
        if isinstance(part, Video):
            video = load_video(source, video_sampling_for(self.videos, part), self.decoder)
            return Loaded(kind="video", name=name, visuals=(video,))
        if isinstance(part, Document):
            budget = image_budget_for(self.images, None, part.max_tokens)
            return Loaded(kind="pdf", name=name, visuals=tuple(load_document(source, part.pages, budget, self.decoder)))
        raster = load_image(source, self.decoder)
        visual = image_patches(raster, image_budget_for(self.images, part.min_tokens, part.max_tokens))
        return Loaded(kind="image", name=name, visuals=(visual,), raster=raster)

    @contextmanager
    def _opened(self, source: Any) -> Iterator[Any]:
        """An address the person typed is fetched from whatever public host it names; files are opened where they are used."""
        if not (isinstance(source, str) and source.lower().startswith(("https://", "http://"))):
            yield source
            return
        self.say(f"fetching {source}")
        fetcher = Fetcher(allow_domains=("*",), max_bytes=self.decoder.limits.max_bytes, seconds=600)
        with fetcher.open(source) as file:
            yield file


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
