"""The processor: messages in, a Sample out; an answer's ids in, a message out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from qvl.core.batch import Sample
from qvl.outside.workers import Decoder
from qvl.prompt.answer import Answer, parse_answer
from qvl.prompt.budget import ImageBudget
from qvl.prompt.folder import Folder, read_folder, write_folder
from qvl.prompt.foreign import render_foreign
from qvl.prompt.media import MediaLoader, Opener, as_it_is
from qvl.prompt.message import Message, user
from qvl.prompt.openai import messages_from_dicts
from qvl.prompt.placeholder import Form, LabelStyle, build_sample, encode, expand_slots, truncate
from qvl.prompt.sampling import VideoSampling
from qvl.prompt.template import STYLES, Segment, Style, Targets, VisualSlot, detect_style, render, rendered_text
from qvl.prompt.tokenizer import Tokenizer
from qvl.prompt.visual import Visual

Template = Literal["auto", "instruct", "thinking", "folder"]


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A conversation as numbers."""

    sample: Sample
    visuals: tuple[Visual, ...]
    """In the order of the prompt; their patches are those of the sample, before a truncation."""
    text: str
    """What the chat template gives: each picture still as one mark."""


@dataclass(frozen=True, kw_only=True)
class Processor:
    """Tokenizer, template and budgets of one model folder."""

    tokenizer: Tokenizer
    style: Style | None
    """None: the folder's own template is run (`template="folder"`)."""
    folder: Folder
    """The files it came from; `save` hands them on."""
    image_budget: ImageBudget | None
    video_sampling: VideoSampling | None
    form: Form = "release"

    @classmethod
    def from_folder(
        cls,
        path: Path | str,
        *,
        template: Template = "auto",
        form: Form = "release",
        image_budget: ImageBudget | None = None,
        video_sampling: VideoSampling | None = None,
    ) -> "Processor":
        """Reads a Hugging Face folder. Budgets given here replace the folder's.

        Without preprocessor_config.json the folder takes text only, and a picture is an error: a guessed budget would
        change answers without a word. Where only video_preprocessor_config.json is missing (folders saved by older
        transformers), the published sampling holds. `template="folder"` runs the folder's own Jinja text in a sandbox.
        """
        folder = read_folder(path)
        images = image_budget or (None if folder.image_config is None else ImageBudget.from_config(folder.image_config))
        videos = video_sampling
        if videos is None and folder.video_config is not None:
            videos = VideoSampling.from_config(folder.video_config)
        if videos is None and images is not None:
            videos = VideoSampling()
        return cls(
            tokenizer=Tokenizer.from_folder(folder.path),
            style=_choose_style(template, folder),
            folder=folder,
            image_budget=images,
            video_sampling=videos,
            form=form,
        )

    def __call__(
        self,
        messages: Sequence[Message] | Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        add_vision_id: bool = False,
        strict: bool = True,
        split_thinking: bool = False,
        targets: Targets = "none",
        label_style: LabelStyle = "seconds",
        max_tokens: int | None = None,
        decoder: Decoder | None = None,
        opener: Opener = as_it_is,
    ) -> Encoded:
        """A prompt, or with `add_generation_prompt=False` and `targets` a training sample.

        `decoder` says where media are decoded (a WorkerPool for files you do not trust), `opener` how each path, address or data URI is
        opened. What a media loader has loaded already (a Visual) is taken as it is. `max_tokens` truncates, for training only.
        `strict` and `split_thinking`: see `qvl.prompt.template.render`.
        """
        conversation, _ = self.media_loader(decoder, opener).load_all(_as_messages(messages))
        segments = self.render(
            conversation,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            add_vision_id=add_vision_id,
            strict=strict,
            split_thinking=split_thinking,
            targets=targets,
        )
        visuals = [visual_of(segment) for segment in segments if isinstance(segment, VisualSlot)]
        ids, is_target = encode(
            expand_slots(segments, visuals, form=self.form, label_style=label_style), self.tokenizer
        )
        sample = build_sample(ids, None if targets == "none" else is_target, visuals)
        if max_tokens is not None:
            sample = truncate(sample, max_tokens, self.tokenizer)
        return Encoded(sample=sample, visuals=tuple(visuals), text=rendered_text(segments))

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        add_vision_id: bool = False,
        strict: bool = True,
        split_thinking: bool = False,
        targets: Targets = "none",
    ) -> list[Segment]:
        """The conversation as the segments of this folder's template."""
        if self.style is not None:
            return render(
                messages,
                style=self.style,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                add_vision_id=add_vision_id,
                strict=strict,
                split_thinking=split_thinking,
                targets=targets,
            )
        if targets != "none":
            raise ValueError(
                "A folder's own template does not say which words are the assistant's; "
                "train with template 'instruct' or 'thinking'."
            )
        assert self.folder.template is not None
        return render_foreign(
            self.folder.template,
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            add_vision_id=add_vision_id,
        )

    @cached_property
    def starts_in_thought(self) -> bool:
        """Whether answers begin inside a thought that the prompt has opened. Of a folder's own template, a prompt tells."""
        if self.style is not None:
            return self.style == "thinking"
        return rendered_text(self.render([user("?")])).rstrip().endswith("<think>")

    def media_loader(self, decoder: Decoder | None = None, opener: Opener = as_it_is) -> MediaLoader:
        """The media loader with this processor's budgets."""
        return MediaLoader(
            images=self.image_budget,
            videos=self.video_sampling,
            decoder=decoder,
            open=opener,
            folder=str(self.folder.path),
        )

    def parse_answer(self, answer: str | Sequence[int], *, starts_in_thought: bool | None = None) -> Answer:
        """The model's answer to a prompt here; by default it starts inside the thought where the template opens one."""
        inside = self.starts_in_thought if starts_in_thought is None else starts_in_thought
        return parse_answer(answer, tokenizer=self.tokenizer, starts_in_thought=inside)

    def save(self, path: Path | str) -> None:
        """Writes every file that transformers' AutoProcessor wants; the folder's own go through byte for byte."""
        write_folder(self.folder, Path(path), self.tokenizer, self.style, self.image_budget, self.video_sampling)


def visual_of(slot: VisualSlot) -> Visual:
    """Of a slot in a conversation whose media are loaded."""
    assert isinstance(slot.part.source, Visual)
    return slot.part.source


def _as_messages(messages: Sequence[Message] | Sequence[Mapping[str, Any]]) -> Sequence[Message]:
    if isinstance(messages, Sequence) and messages and all(isinstance(message, Message) for message in messages):
        return [message for message in messages if isinstance(message, Message)]
    return messages_from_dicts(messages)  # pyright: ignore[reportArgumentType]


def _choose_style(template: Template, folder: Folder) -> Style | None:
    if template == "instruct" or template == "thinking":
        return template
    if template not in ("auto", "folder"):
        raise ValueError(f"The template is {template!r}; it must be auto, folder, {' or '.join(STYLES)}.")
    if folder.template is None:
        raise ValueError(f"{folder.path} has no chat template; choose template 'instruct' or 'thinking'.")
    if template == "folder":
        return None
    style = detect_style(folder.template)
    if style is None:
        raise ValueError(
            f"The chat template of {folder.path} is none of Qwen3-VL's; choose template 'instruct' or 'thinking', "
            "or 'folder' to run the folder's own."
        )
    return style
