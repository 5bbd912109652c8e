"""Chapter: a small language model learns real prose, and to answer questions about what it was told."""

from dataclasses import replace

import torch

from qvl.model.config import ModelConfig, RopeConfig, preset
from qvl.model.qwen3vl import Qwen3VL, new_model
from qvl.prompt.tokenizer import Tokenizer
from qvl.recipes.made_stream import Maker, of_repeats, of_text, of_world
from qvl.recipes.quickstart.ngram import KneserNey
from qvl.recipes.quickstart.story import Lesson, Pupil, Skill, Story
from qvl.recipes.quickstart.vocabulary import for_tokenizer
from qvl.train.language import bits_per_byte
from qvl.train.objective import NextToken
from qvl.train.parameters import Rates
from qvl.worlds import needle
from qvl.worlds.catalogue import world
from qvl.worlds.world import World

WINDOW = 96
SKILLS = {"text.name": "told colour and shape", "text.count": "told number of objects", "text.digit": "told digit"}


def tell(story: Story, pupil: Pupil) -> None:
    """Train on prose and told worlds; judge on held-out prose and held-out scenes."""
    lesson = Lesson(name="language", steps=story.size.language, samples=32, lr=4e-3, rates=Rates(vision=0, mergers=0))
    makers = replay(story, pupil)
    makers["text.box"] = (of_world(world("text.box"), pupil.processor, seed=story.seed), 1.2)
    longer = hay(story, pupil, 160, ask_all=True)
    makers["needle160"] = (of_world(longer, pupil.processor, seed=story.seed), 0.5)
    for name, share in (("prose", 1.6), ("text.appear", 2.4), ("needle64", 2.0)):
        makers[name] = (makers[name][0], share)
    makers["repeats"] = (of_repeats(pupil.prose_T, 40, seed=story.seed), 2.0)
    seconds = story.teach(NextToken(pupil.model), makers, lesson, seed=0)

    counted = "\n\n".join(pupil.prose).encode()[:1_500_000]
    prose = judged_prose(pupil)
    most = story.size.promise(3, 5)
    least, counting = (KneserNey(order, counted).bits_per_byte(prose.encode()) for order in (2, int(most)))
    story.note(
        Skill(
            chapter="language",
            skill=f"held-out prose, bits a byte (floor: Kneser-Ney over 2 bytes; promise: over {most:.0f})",
            floor=least,
            promise=counting,
            got=bits_per_byte(pupil.model, pupil.processor.tokenizer, prose),
            seconds=seconds,
            is_less_better=True,
        )
    )
    for name, skill in SKILLS.items():
        got, without = story.ask(pupil, world(name))
        constant = world(name).prior.score
        story.note(
            Skill(
                chapter="language",
                skill=skill,
                floor=0.75,
                promise=0.95,
                got=got,
                blind=without,
                constant=constant,
                seconds=seconds,
            )
        )


def replay(story: Story, pupil: Pupil) -> dict[str, tuple[Maker, float]]:
    """Prose, told worlds and short needles: what later lessons mix in, so that the language stays, and with it the looking back that
    films and long texts need.

    Half of the told names are pairs of colour and shape that are never named of a picture: the language knows that any shape may have any
    colour, as people's language does. Without them the model sees "red" and never says "circle" (dev/LOG.md).
    """
    told = {name: (of_world(world(name), pupil.processor, seed=story.seed), 1.0) for name in (*SKILLS, "text.appear")}
    told["text.name/all"] = (of_world(world("text.name"), pupil.processor, seed=story.seed, split="novel"), 1.0)
    short = hay(story, pupil, 64, ask_all=True)
    told["needle64"] = (of_world(short, pupil.processor, seed=story.seed), 1.0)
    return told | {"prose": (of_text(pupil.prose_T, WINDOW, seed=story.seed), 2.0)}


def parts(makers: dict[str, tuple[Maker, float]], factor: float) -> dict[str, tuple[Maker, float]]:
    """The same makers at so many times their shares."""
    return {kind: (maker, share * factor) for kind, (maker, share) in makers.items()}


def judged_prose(pupil: Pupil) -> str:
    """60 KB that no lesson reads."""
    return "\n\n".join(pupil.held_out)[:60_000]


def hay(story: Story, pupil: Pupil, length: int, *, ask_all: bool = False, depth: float | None = None) -> World:
    """A needle among real prose, `length` of the pupil's own tokens; few distractors where the text is short."""
    return needle.tagged(
        length,
        depth=depth,
        hay=pupil.hay,
        distractors=2 if length < 200 else 8,
        ask_all=ask_all,
        answers=story.size.answers,
    )


def small_model(tokenizer: Tokenizer, *, seed: int = 0) -> Qwen3VL:
    """2.2M parameters in Qwen3-VL's shape, drawn so that a few hundred steps on a CPU are enough.

    Ours, by measurement: sine-cosine positions, token rows of deviation .5, outputs of the language's blocks zero at first
    and of the tower's small, QK-norm gains of 1.6.
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
                # What the tower's blocks add is small at first, so that positions are seen through them.
                adds = "visual.blocks" in name and name.endswith(("attn.proj.weight", "linear_fc2.weight"))
                deviation = (0.3 if adds else 1.0) * parameter.shape[1] ** -0.5
                parameter.normal_(0, deviation, generator=generator)
    return model


def small_config(tokenizer: Tokenizer) -> ModelConfig:
    nano = preset("nano")
    assert nano.vision is not None
    vision = replace(nano.vision, deepstack_visual_indexes=(1, 2), num_position_embeddings=64, pos_embed_init="sincos")
    shape = replace(
        nano,
        text=replace(
            nano.text,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            rope=RopeConfig(theta=10_000.0, scheme="interleaved", section=(6, 5, 5)),
            max_position_embeddings=32768,
        ),
        vision=replace(vision, depth=4, hidden_size=96, num_heads=4, intermediate_size=384, out_hidden_size=128),
        tie_word_embeddings=False,
    )
    return for_tokenizer(shape, tokenizer)
