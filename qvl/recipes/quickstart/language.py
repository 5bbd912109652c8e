"""Chapter: a small language model learns real prose, and to answer questions about what it was told."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from qvl.core.batch import Sample
from qvl.model.config import ModelConfig, RopeConfig, preset
from qvl.model.pack import pack
from qvl.model.qwen3vl import Qwen3VL, new_model
from qvl.parallel.data_parallel import World as Ranks
from qvl.prompt.processor import Processor
from qvl.prompt.tokenizer import Tokenizer
from qvl.recipes.made_stream import MadeStream, Maker, of_text, of_world
from qvl.recipes.quickstart.ngram import ByteNgram
from qvl.recipes.quickstart.story import Skill, Story, judge
from qvl.train.loop import LoopConfig, StepReport, Watcher, fit
from qvl.train.loss import linear_cross_entropy
from qvl.train.objective import NextToken
from qvl.train.optimizer import OptimizerConfig
from qvl.train.parameters import Rates
from qvl.train.schedule import Schedule
from qvl.worlds.catalogue import world

STEPS = 260
SAMPLES = 48
WINDOW = 96
SKILLS = {"text.name": "told colour and shape", "text.count": "told number of objects", "text.digit": "told digit"}


def tell(story: Story, model: Qwen3VL, processor: Processor, texts: Sequence[str]) -> None:
    """Train on prose and told worlds; judge on held-out prose (a twentieth of the texts) and held-out scenes."""
    held_out = [text for i, text in enumerate(texts) if i % 20 == 0]
    train = [text for i, text in enumerate(texts) if i % 20]
    token_T = torch.tensor(processor.tokenizer.encode_text("\n\n".join(train)))
    makers: dict[str, tuple[Maker, float]] = {name: (of_world(world(name), processor, seed=1), 1.0) for name in SKILLS}
    makers["prose"] = (of_text(token_T, WINDOW, seed=2), 2.0)
    start = time.perf_counter()
    stream = MadeStream(makers, model.config, samples=SAMPLES, seed=3)
    config = LoopConfig(
        steps=STEPS,
        optimizer=OptimizerConfig(name="muon", lr=4e-3, weight_decay=0.02, rates=Rates(vision=0, mergers=0)),
        schedule=Schedule(kind="wsd", warmup_steps=20, decay_part=0.4, final=0.05),
    )
    fit(
        NextToken(model),
        stream,
        config,
        story.work / "language",
        Ranks(0, 1, torch.device("cpu")),
        watchers=[telling(story)],
    )
    stream.close()
    seconds = time.perf_counter() - start

    prose = "\n\n".join(held_out)[:60_000]
    counted = "\n\n".join(train).encode()[:1_500_000]
    bigram, trigram = (ByteNgram(order, counted).bits_per_byte(prose.encode()) for order in (2, 3))
    got = bits_per_byte(model, processor.tokenizer, prose)
    story.note(
        Skill(
            chapter="language",
            skill="held-out prose, bits a byte (floor: counting pairs of bytes; promise: counting triples)",
            floor=bigram,
            promise=trigram,
            got=got,
            seconds=seconds,
            is_less_better=True,
        )
    )
    for name, skill in SKILLS.items():
        score, without = judge(model, processor, world(name), count=120, seed=7)
        constant = world(name).prior.score
        story.note(
            Skill(
                chapter="language",
                skill=skill,
                floor=0.75,
                promise=0.95,
                got=score,
                blind=without,
                constant=constant,
                seconds=seconds,
            )
        )


def telling(story: Story) -> Watcher:
    def watch(report: StepReport) -> None:
        if report.step % 20 == 0 or report.step == report.steps:
            losses = "  ".join(
                f"{k.removeprefix('loss/')} {v:.2f}" for k, v in report.values.items() if k.startswith("loss/")
            )
            speed = report.values["tokens_per_second"]
            story.console.print(f"[dim]step {report.step:4}/{report.steps}  {losses}  {speed:,.0f} tokens/s[/dim]")

    return watch


@torch.no_grad()
def bits_per_byte(model: Qwen3VL, tokenizer: Tokenizer, text: str, *, window: int = 256) -> float:
    """Mean bits of each byte, read in windows; a window's first token, which nothing predicts, is charged as a uniform draw."""
    ids = tokenizer.encode_text(text)
    pieces = [ids[i : i + window] for i in range(0, len(ids), window)]
    nats = math.log(tokenizer.num_ids) * len(pieces)
    for low in range(0, len(pieces), 16):
        batch = pack([Sample(token_T=torch.tensor(piece)) for piece in pieces[low : low + 16]], model.config)
        hidden_TD = model(batch)
        sequence_T = torch.repeat_interleave(torch.arange(len(batch.lengths)), torch.tensor(batch.lengths))
        row = torch.where(sequence_T[1:] == sequence_T[:-1])[0]
        label = batch.token_T[row + 1]
        loss, _ = linear_cross_entropy(hidden_TD[row], model.head_weight, label, torch.ones(len(row)))
        nats += float(loss)
    return nats / math.log(2) / len(text.encode())


def small_model(tokenizer: Tokenizer, *, seed: int = 0) -> Qwen3VL:
    """2.2M parameters in Qwen3-VL's shape, drawn so that a few hundred steps on a CPU are enough.

    Ours, by measurement: sine-cosine positions, token rows of deviation .5, outputs of every block zero at first, QK-norm gains of 1.6.
    """
    model = new_model(small_config(tokenizer), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
            elif name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.fill_(1.6)
            elif name.endswith("embed_tokens.weight"):
                parameter.normal_(0, 0.5, generator=generator)
            elif name.endswith("pos_embed.weight"):
                parameter.mul_(0.7)
            elif parameter.ndim == 2 and "lm_head" not in name:
                parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
    return model


def small_config(tokenizer: Tokenizer) -> ModelConfig:
    nano = preset("nano")
    assert nano.vision is not None
    rows = -(-tokenizer.num_ids // 64) * 64
    vision = replace(nano.vision, deepstack_visual_indexes=(1, 2), num_position_embeddings=64, pos_embed_init="sincos")
    return replace(
        nano,
        text=replace(
            nano.text,
            vocab_size=rows,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            rope=RopeConfig(theta=10_000.0, scheme="interleaved", section=(6, 5, 5)),
            max_position_embeddings=32768,
            bos_token_id=tokenizer.control_id("<|endoftext|>"),
            eos_token_id=tokenizer.control_id("<|im_end|>"),
        ),
        vision=replace(vision, depth=4, hidden_size=96, num_heads=4, intermediate_size=384, out_hidden_size=128),
        tie_word_embeddings=False,
        image_token_id=tokenizer.control_id("<|image_pad|>"),
        video_token_id=tokenizer.control_id("<|video_pad|>"),
        vision_start_token_id=tokenizer.control_id("<|vision_start|>"),
        vision_end_token_id=tokenizer.control_id("<|vision_end|>"),
    )
