"""Rehearsal: texts and chats that a model writes itself before it learns something else, so that it goes on practising what it knew."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from qvl.core.batch import Sample
from qvl.core.log import log
from qvl.data.order import key_of
from qvl.data.record import Record
from qvl.engine.generate import Generation
from qvl.engine.prepare import drop, prepare
from qvl.engine.sampling import Sampling
from qvl.model.qwen3vl import Qwen3VL
from qvl.prompt.message import Message, Text
from qvl.prompt.processor import Processor
from qvl.session import Session

AT_ONCE = 32
"""Answers that are written in one batch."""
LENGTH = 256
"""Tokens a sample is reckoned with when their number is planned."""
TAIL = 4096
"""Of the vocabulary the likeliest so many are drawn from: sorting all 151,936 takes longer than a small model's step."""
# Also the full stop, exclamation and question mark of Chinese and Japanese.
SENTENCE_END = re.compile("[.!?\u3002\uff01\uff1f][\"')\\]\u201d\u2019]*(?=\\s|$)")


@dataclass(frozen=True, kw_only=True)
class Room:
    """The longest of each kind, in tokens."""

    text: int
    question: int
    answer: int

    @classmethod
    def within(cls, pack_tokens: int) -> "Room":
        return cls(
            text=min(256, pack_tokens // 2), question=min(96, pack_tokens // 4), answer=min(768, pack_tokens // 2)
        )


def rehearse(
    model: Qwen3VL, processor: Processor, texts: Sequence[int], chats: Sequence[int], *, pack_tokens: int, seed: int
) -> list[Record]:
    """A record for each number of a text and of a chat; fewer where an answer does not come to its end.

    The model draws from its own distribution (temperature 1, and of the tokens only the far tail cut off), so that the loss on these
    records is, but for a constant, the divergence KL(old model || new model), estimated on samples: at the first step its gradient is
    zero on average, later it pulls back. Texts begin after `<|endoftext|>`. A chat's question is written by the model as well, in the
    user's turn (as in Magpie, arXiv 2406.08464); answers as rehearsal are arXiv 2403.01244.
    """
    room, was_training = Room.within(pack_tokens), model.training
    model.eval()
    prepare(model)
    try:
        ends = frozenset(processor.tokenizer.control_id(name) for name in ("<|im_end|>", "<|endoftext|>"))
        session = Session(
            model=model, processor=processor, sampling=Sampling(top_k=TAIL), end_tokens=ends, skips_special=True
        )
        records = [*_texts(session, texts, room, seed), *_chats(session, chats, room, seed)]
    finally:
        drop(model)
        model.train(was_training)
    return records


def _texts(session: Session, numbers: Sequence[int], room: Room, seed: int) -> Iterator[Record]:
    start = Sample(token_T=torch.tensor([session.processor.tokenizer.control_id("<|endoftext|>")]))
    for number, got in _written(session, [(n, start) for n in numbers], room.text, key=(seed, "text")):
        # One that did not end is cut after its last whole sentence: what is learned ends with <|endoftext|>.
        text = got.text.strip() if got.finish == "stop" else whole_sentences(got.text.strip())
        if text:
            yield Record(
                id=f"replay-text-{number}",
                kind="pretrain",
                source="replay",
                category="replay/text",
                messages=({"role": "document", "content": text},),
            )


def _chats(session: Session, numbers: Sequence[int], room: Room, seed: int) -> Iterator[Record]:
    processor, tokenizer = session.processor, session.processor.tokenizer
    start = Sample(token_T=torch.tensor([tokenizer.control_id("<|im_start|>"), *tokenizer.encode_text("user\n")]))
    asked = _written(session, [(n, start) for n in numbers], room.question, key=(seed, "question"))
    questions = {number: text for number, got in asked if (text := got.text.strip())}
    prompts = [(n, processor([Message("user", (Text(text),))]).sample) for n, text in questions.items()]
    for number, got in _written(session, prompts, room.answer, key=(seed, "answer")):
        if got.finish != "stop":
            continue  # taught as it stands, it would teach to stop in the middle
        answer = processor.parse_answer(got.tokens)
        words, thought = answer.message.text.strip(), answer.message.thinking
        if not words or answer.message.tool_calls or answer.problems or not answer.is_thought_closed:
            continue
        said: dict[str, str] = {"role": "assistant", "content": words} | ({"thinking": thought} if thought else {})
        yield Record(
            id=f"replay-chat-{number}",
            kind="sft",
            source="replay",
            category="replay/chat",
            messages=({"role": "user", "content": questions[number]}, said),
        )


def _written(
    session: Session,
    prompts: Sequence[tuple[int, Sample]],
    max_tokens: int,
    *,
    key: tuple[object, ...],
) -> Iterator[tuple[int, Generation]]:
    """(number, what the model wrote after the prompt); what number n gives follows from the key and n."""
    for low in range(0, len(prompts), AT_ONCE):
        part = prompts[low : low + AT_ONCE]
        log.info("the model writes its replay: %s, %d of %d", key[-1], low + len(part), len(prompts))
        sampling = [replace(session.sampling, max_tokens=max_tokens, seed=key_of(*key, n) >> 2) for n, _ in part]
        made = session.generate([sample for _, sample in part], sampling)
        yield from zip((n for n, _ in part), made, strict=True)


def whole_sentences(text: str) -> str:
    """Up to the last end of a sentence; all of it where there is none."""
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    return text[: ends[-1]] if ends else text
