"""The processor: messages in, a Sample out; an answer's ids in, a message out."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from qvl.core.batch import Sample
from qvl.outside.workers import Decoder
from qvl.prompt.answer import Answer, parse_answer
from qvl.prompt.budget import ImageBudget
from qvl.prompt.document import load_document
from qvl.prompt.folder import Folder, read_folder, write_folder
from qvl.prompt.foreign import render_foreign
from qvl.prompt.image import image_patches, load_image
from qvl.prompt.message import ContentPart, Document, Image, Message, Video, user
from qvl.prompt.openai import messages_from_dicts
from qvl.prompt.placeholder import Form, LabelStyle, build_sample, encode, expand_slots, truncate
from qvl.prompt.sampling import VideoSampling
from qvl.prompt.template import STYLES, Segment, Style, Targets, VisualSlot, detect_style, render, rendered_text
from qvl.prompt.tokenizer import Tokenizer
from qvl.prompt.video import frames_video, load_video
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
        opener: Callable[[Any], Any] | None = None,
    ) -> Encoded:
        """A prompt, or with `add_generation_prompt=False` and `targets` a training sample.

        `decoder` says where media are decoded (a WorkerPool for files you do not trust). `opener` turns each path,
        address or data URI of a message into an open file first; a server passes its Fetcher's. `max_tokens` truncates,
        for training only.
        `strict` and `split_thinking`: see `qvl.prompt.template.render`.
        """
        conversation = self._pages_to_images(_as_messages(messages), decoder, opener)
        segments = self.render(
            conversation,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            add_vision_id=add_vision_id,
            strict=strict,
            split_thinking=split_thinking,
            targets=targets,
        )
        slots = [segment.part for segment in segments if isinstance(segment, VisualSlot)]
        visuals = [self.load(part, decoder=decoder, opener=opener) for part in slots]
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

    def load(
        self, part: Image | Video, *, decoder: Decoder | None = None, opener: Callable[[Any], Any] | None = None
    ) -> Visual:
        """The patches of one image or video, within this processor's budget or the part's own."""
        if isinstance(part.source, Visual):
            return part.source
        if self.image_budget is None or self.video_sampling is None:
            raise ValueError(
                f"{self.folder.path} has no preprocessor_config.json, so the size of pictures is unknown; "
                "copy that file from the base model's folder, or give image_budget."
            )
        open_source = opener or _as_it_is
        if isinstance(part, Image):
            budget = image_budget_for(self.image_budget, part.min_tokens, part.max_tokens)
            return image_patches(load_image(open_source(part.source), decoder), budget)
        sampling = video_sampling_for(self.video_sampling, part)
        if isinstance(part.source, tuple):
            frames = [open_source(frame) for frame in part.source]
            return frames_video(frames, sampling, decoder, fps=part.frame_fps, seconds=part.frame_seconds)
        return load_video(open_source(part.source), sampling, decoder)

    def parse_answer(self, answer: str | Sequence[int], *, starts_in_thought: bool | None = None) -> Answer:
        """The model's answer to a prompt here; by default it starts inside the thought where the template opens one."""
        inside = self.starts_in_thought if starts_in_thought is None else starts_in_thought
        return parse_answer(answer, tokenizer=self.tokenizer, starts_in_thought=inside)

    def save(self, path: Path | str) -> None:
        """Writes every file that transformers' AutoProcessor wants; the folder's own go through byte for byte."""
        write_folder(self.folder, Path(path), self.tokenizer, self.style, self.image_budget, self.video_sampling)

    def _pages_to_images(
        self, messages: Sequence[Message], decoder: Decoder | None, opener: Callable[[Any], Any] | None
    ) -> list[Message]:
        """Each document's pages as images in its place."""

        def pages(part: ContentPart) -> Iterable[ContentPart]:
            if not isinstance(part, Document):
                return [part]
            if self.image_budget is None:
                raise ValueError(f"{self.folder.path} has no preprocessor_config.json; documents need it.")
            budget = image_budget_for(self.image_budget, None, part.max_tokens)
            source = (opener or _as_it_is)(part.source)
            return [Image(visual) for visual in load_document(source, part.pages, budget, decoder)]

        return [
            message.with_content(image for part in message.content for image in pages(part))
            if any(isinstance(part, Document) for part in message.content)
            else message
            for message in messages
        ]


def image_budget_for(budget: ImageBudget, min_tokens: int | None, max_tokens: int | None) -> ImageBudget:
    """The budget with one picture's own limits; a ceiling below the floor lowers the floor."""
    high = budget.max_tokens if max_tokens is None else max_tokens
    low = min(budget.min_tokens, high) if min_tokens is None else min_tokens
    return ImageBudget(min_tokens=low, max_tokens=max(high, low) if max_tokens is None else high)


def video_sampling_for(sampling: VideoSampling, part: Video) -> VideoSampling:
    """The sampling with one video's own wishes."""
    if part.sample_fps is not None:
        sampling = replace(sampling, fps=part.sample_fps, num_frames=None)
    if part.num_frames is not None:
        sampling = replace(sampling, fps=None, num_frames=part.num_frames)
    if part.max_tokens is not None:
        low = min(sampling.min_tokens, part.max_tokens)
        sampling = replace(sampling, max_tokens=part.max_tokens, min_tokens=low)
    return sampling


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


def _as_it_is(source: Any) -> Any:
    return source
