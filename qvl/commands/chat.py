"""Talks with a model in the terminal: files are attached with /image, /video and /pdf, boxes in answers are drawn."""

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image as Pillow
from rich.console import Console
from rich.table import Table
from rich.text import Text as Styled

from qvl.commands.generate import (
    Answering,
    MediaOptions,
    facts_of,
    media_loader,
    open_session,
    processor_of,
    reporting,
    voices_of,
)
from qvl.core.files import write_text
from qvl.engine.generate import Event
from qvl.prompt.coordinates import Box3D, Boxes, read_boxes
from qvl.prompt.media import MediaItem, MediaLoader
from qvl.prompt.message import ContentPart, Document, Image, Message, Thinking, Video, system, user
from qvl.prompt.openai import messages_to_dicts
from qvl.session import Session
from qvl.show.draw import draw_places
from qvl.show.frames import frames_of
from qvl.show.terminal import Printer, printable, telling


@dataclass(frozen=True, kw_only=True)
class Chat(MediaOptions, Answering):
    """qvl chat --model DIR

    Commands begin with /, everything else is said to the model; a line that ends in \\ goes on in the next. Files wait for the next words.
    Ctrl-C stops an answer, Ctrl-D or /quit ends the talk. Lines may come from a pipe.
    """

    system: str | None = None
    """The system message."""
    pictures: Path = Path()
    """Folder for pictures with boxes drawn on them; the current one otherwise."""


HELP = (
    ("/image FILE", "attach a picture to the next words"),
    ("/video FILE", "attach a video"),
    ("/pdf FILE", "attach a PDF, each page as a picture"),
    ("/boxes", "list the last answer's boxes and points, and draw them on the last picture once more"),
    ("/save FILE.json", "write the talk as messages in the OpenAI form"),
    ("/reset", "forget everything said, and what waits"),
    ("/help", "this list"),
    ("/quit", "end"),
)


def run(args: Chat) -> int:
    with telling() as say:
        processor = processor_of(args)
        session = replace(open_session(args, processor, say), reuse=True)
    # The status line is gone while a person types; each wait opens its own.
    with media_loader(lambda words: None, processor) as loader:
        talk = Talk(args=args, session=session, loader=loader)
        talk.reset()
        if sys.stdin.isatty():
            talk.console.print("[dim]/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends.[/]")
        while (line := talk.read_line()) is not None:
            if not talk.take(line):
                break
    return 0


@dataclass(kw_only=True)
class Talk:
    """A conversation in progress."""

    args: Chat
    session: Session
    loader: MediaLoader
    messages: list[Message] = field(default_factory=list)
    """With files by name, as /save writes them."""
    shown: list[Message] = field(default_factory=list)
    """The same with the files loaded, as the model reads them: a video is decoded once, not again each turn."""
    waiting: list[tuple[ContentPart, list[MediaItem]]] = field(default_factory=list)
    """Attached, not yet sent."""
    last_picture: Pillow.Image | None = None
    last_boxes: Boxes | None = None
    console: Console = field(default_factory=lambda: Console(highlight=False, soft_wrap=True))

    def read_line(self) -> str | None:
        """What was typed, None at the end. Ctrl-C while typing drops the line."""
        lines: list[str] = []
        while True:
            try:
                if sys.stdin.isatty():
                    line = input("... " if lines else "> ")
                else:
                    line = sys.stdin.readline()
                    if not line:
                        return "\n".join(lines) if lines else None
                    line = line.rstrip("\r\n")
            except EOFError:
                return "\n".join(lines) if lines else None
            except KeyboardInterrupt:
                self.console.print("\n[dim]/quit or Ctrl-D ends.[/]")
                lines = []
                continue
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])

    def take(self, line: str) -> bool:
        """Does what the line says; False ends the talk. A mistake is answered in one sentence, and the talk goes on."""
        name, _, rest = line.rstrip().partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "/image": lambda rest: self.attach("image", rest),
            "/video": lambda rest: self.attach("video", rest),
            "/pdf": lambda rest: self.attach("pdf", rest),
            "/boxes": lambda rest: self.show_boxes(),
            "/save": self.save,
            "/reset": lambda rest: self.reset(),
            "/help": lambda rest: self.help(),
        }
        try:
            if name in ("/quit", "/exit"):
                return False
            if name in commands:
                commands[name](rest.strip())
            elif name.startswith("/") and "/" not in name[1:]:
                raise ValueError(
                    f"there is no command {name}; /help lists them. To say it to the model, begin with a space or a word."
                )
            elif line.strip():
                self.say(line)
        except KeyboardInterrupt:
            self.console.print("\n[dim]stopped[/]")
        except (ValueError, OSError) as error:
            self.console.print(Styled(printable(str(error)), style="red"))
        return True

    # ---- commands

    def attach(self, kind: str, rest: str) -> None:
        name = file_name(kind, rest)
        part = self.args.part(kind, name)
        assert isinstance(part, Image | Video | Document)
        with telling() as say:
            items = list(reporting(self.loader, say).load(part))
        self.waiting.append((part, items))
        for facts in facts_of(items):
            t, h, w = facts["grid_thw"]
            size = "x".join(map(str, facts["size"]))
            frames = f"{t} slices of two frames, " if kind == "video" else ""
            words = f"{facts['name']}: {frames}{size} pixels, grid {t} x {h} x {w}, {facts['num_tokens']:,} tokens"
            self.console.print(Styled(printable(words), style="dim"))
            for note in facts["notes"]:
                self.console.print(Styled(f"note: {note}", style="dim"))

    def save(self, rest: str) -> None:
        file = Path(file_name("save", rest))
        write_text(file, json.dumps(messages_to_dicts(self.messages), indent=2, ensure_ascii=False) + "\n")
        self.console.print(Styled(f"wrote {printable(str(file))}", style="dim"))

    def reset(self) -> None:
        self.messages = [] if self.args.system is None else [system(self.args.system)]
        self.shown, self.waiting = list(self.messages), []
        self.last_picture = self.last_boxes = None

    def help(self) -> None:
        table = Table.grid(padding=(0, 2))
        for command, words in HELP:
            table.add_row(Styled(command, style="cyan"), words)
        self.console.print(table)

    def show_boxes(self) -> None:
        if self.last_boxes is None or not self.last_boxes.items:
            raise ValueError("the last answer has no boxes or points; ask for them in JSON.")
        table = Table(box=None, header_style="dim")
        for column in ("label", "kind", "0 to 1000", "pixels of the picture"):
            table.add_column(column)
        size = None if self.last_picture is None else self.last_picture.size
        for item in self.last_boxes:
            is_3d = isinstance(item, Box3D)
            pixels = (
                ""
                if size is None or is_3d
                else numbers(Boxes(items=(item,), space="relative1000").to_pixels(*size).items[0].numbers)
            )
            table.add_row(printable(item.label or ""), item.key, numbers(item.numbers), pixels)
        self.console.print(table)
        self.draw()

    # ---- the talk

    def say(self, words: str) -> None:
        sent = [item for _, items in self.waiting for item in items]
        shown = [*self.shown, user(*(item.part for item in sent), words)]
        with telling() as say:
            encoded = self.session.processor(shown)
            answer = self.session.answer(encoded.sample, say)
            first = next(answer)
        # From here on the words are said, whether the answer is heard to its end or not.
        self.messages.append(user(*(part for part, _ in self.waiting), words))
        self.shown, self.waiting = shown, []
        self.last_picture = picture_of(sent) or self.last_picture
        events = [first]
        printer = Printer(voices_of(self.session), hide_thinking=self.args.hide_thinking)
        is_stopped = False
        try:
            printer.push(first.draw.token, first.text)
            for event in answer:
                events.append(event)
                printer.push(event.draw.token, event.text)
        except KeyboardInterrupt:
            is_stopped = True
        printer.end(cut_off=events[-1].finish == "length")
        if is_stopped:
            self.console.print("[dim]stopped; what was said so far stays[/]")
        self.keep(events)

    def keep(self, events: Sequence[Event]) -> None:
        """The answer into the talk. A template that knows no thoughts gets none back."""
        parsed = self.session.parse(events)
        message = parsed.message
        if not self.session.processor.starts_in_thought:
            message = Message("assistant", tuple(part for part in message.parts if not isinstance(part, Thinking)))
        self.messages.append(message)
        self.shown.append(message)
        for problem in parsed.problems:
            self.console.print(Styled(printable(problem), style="dim"))
        boxes = read_boxes(message.text)
        self.last_boxes = boxes
        if boxes.items:
            self.draw()

    def draw(self) -> None:
        assert self.last_boxes is not None
        if self.last_picture is None:
            self.console.print("[dim]boxes came, but there is no picture to draw them on[/]")
            return
        marked = draw_places(self.last_picture, self.last_boxes.to_pixels(*self.last_picture.size))
        file = free_name(self.args.pictures)
        marked.save(file, "PNG")
        self.console.print(Styled(f"{len(self.last_boxes)} drawn: {file}", style="dim"))


def file_name(command: str, rest: str) -> str:
    """The rest of the line, less quotes around it and backslashes before spaces, as a terminal pastes file names."""
    if not rest:
        raise ValueError(f"/{command} stands without a file; write /{command} FILE.")
    try:
        words = shlex.split(rest)
    except ValueError:  # a quote inside the name that closes nowhere: the name is meant as it stands
        return rest
    return words[0] if len(words) == 1 else rest


def picture_of(items: Sequence[MediaItem]) -> Pillow.Image | None:
    """The last image or PDF page among them, at its own size where it is known."""
    item = next((item for item in reversed(items) if item.kind != "video"), None)
    if item is None:
        return None
    if item.raster is not None:
        return Pillow.fromarray(item.raster.permute(1, 2, 0).contiguous().numpy())
    [[picture, _]] = frames_of(item.visual.patch_PX, item.visual.grid_I3)
    return picture


def free_name(folder: Path) -> Path:
    """boxes-001.png, or the first number not taken."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    while (file := folder / f"boxes-{number:03d}.png").exists():
        number += 1
    return file


def numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" if abs(value) < 100 else f"{value:.0f}" for value in values)
