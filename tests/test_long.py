"""Two hours of film and 256K tokens: the whole answer in memory that is bounded and accounted for."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from media_files import numbered_frame, write_video
from memory_watch import MemoryWatch
from qvl.core.batch import Sample
from qvl.engine.encoder import GROUP_PATCHES
from qvl.engine.engine import Engine, EngineSettings
from qvl.engine.request import Request
from qvl.engine.sampling import Sampling
from qvl.engine.sequence import Sequence
from qvl.model.config import preset
from qvl.model.qwen3vl import new_model
from qvl.outside.workers import WorkerPool
from qvl.prompt.budget import ImageBudget
from qvl.prompt.message import Video, user
from qvl.prompt.processor import Processor
from qvl.prompt.sampling import VideoSampling
from real_tokenizer import real_tokenizer_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

MIB = 2**20
LONGEST = 262_144
GREEDY = Sampling(temperature=0.0, max_tokens=4, ignore_eos=True)


@dataclass(frozen=True)
class Told:
    num_tokens: int
    steps: int
    most_held: int
    """Groups of frames whose visual tokens lay ready at once."""


def engine_for(tokens: int) -> Engine:
    """The nano shape in bf16, with a cache for one request of so many tokens that has been written before."""
    model = new_model(preset("nano"), dtype=torch.bfloat16).eval()
    engine = Engine(model, EngineSettings(num_blocks=-(-tokens // 64)))
    # Memory that was never written is not resident.
    engine.cache.key_LBZKH.zero_()
    engine.cache.value_LBZKH.zero_()
    answer(engine, Sample(token_T=torch.arange(4096)))
    return engine


def answer(engine: Engine, sample: Sample) -> Told:
    engine.submit(Request(id="a", sample=sample, sampling=GREEDY))
    [task] = engine._tasks.values()
    said, steps, most = [], 0, 0
    while engine.has_work:
        said += engine.step()
        steps += 1
        most = max(most, len(task.prompt.visuals.held))
    assert [event.error for event in said] == [None] * 4
    assert said[-1].finish == "length"
    return Told(sample.num_tokens, steps, most)


def test_two_hours_of_film_are_answered_in_their_patches_and_300_mib(tmp_path: Path) -> None:
    """From the file to the answer, this process and the one that decodes. The patches of the frames that are looked at are the floor."""
    path = tmp_path / "two hours.mp4"
    write_video(path, (numbered_frame(i % 4096) for i in range(2 * 3600 * 2)), fps="2", group=48)
    sampling = VideoSampling.report(min_frame_tokens=16, max_tokens=16 * 1024)
    processor = Processor.from_folder(
        real_tokenizer_folder(), template="instruct", image_budget=ImageBudget(), video_sampling=sampling
    )
    engine, memory = engine_for(32 * 1024), MemoryWatch()
    with WorkerPool() as pool, memory:
        encoded = processor([user(Video(str(path)), "What happens?")], decoder=pool)
        told = answer(engine, encoded.sample)
    [visual] = encoded.visuals
    patches = visual.patch_PX.numel()
    print(f"\n{told}, patches {patches / MIB:.0f} MiB, rise {memory.rise / MIB:.0f} MiB")
    assert visual.frame_indices is not None and visual.seconds is not None
    assert len(visual.frame_indices) == 2048 and visual.seconds[-1] > 7195
    slices, area = len(visual.grid_I3), int(visual.grid_I3[0].prod())
    assert engine.stats().encoder_asked == -(-slices // (GROUP_PATCHES // area))
    assert told.most_held == 1
    assert memory.rise < patches + 300 * MIB


def as_if_read(engine: Engine, prompt: torch.Tensor) -> None:
    """Names blocks of the cache as the prompt's, whatever they hold: a quarter of an hour of arithmetic is skipped, no memory is."""
    sequence = Sequence(request="", tokens=prompt.tolist(), num_prompt=len(prompt), max_length=LONGEST)
    sequence.name_blocks(engine.blocks.block_size, prompt_only=True)
    blocks = engine.blocks.take(len(sequence.names))
    assert blocks is not None
    for block, name in zip(blocks, sequence.names, strict=True):
        engine.blocks.name(block, name)
    engine.blocks.let_go(blocks)


def test_256k_tokens_are_read_in_the_cache_and_a_chunk() -> None:
    """The last chunk of a prompt sees the most keys, so it takes the most memory: the last two are computed, behind 258,048 tokens."""
    engine, memory = engine_for(LONGEST), MemoryWatch()
    prompt = torch.randint(0, 150_000, (LONGEST - 4,), generator=torch.Generator().manual_seed(0))
    with memory:
        as_if_read(engine, prompt[: LONGEST - 4096])
        told = answer(engine, Sample(token_T=prompt))
    assert engine.stats().prefix_tokens_found == LONGEST - 4096
    print(f"\n{told}, cache {engine.describe().gib * 1024:.0f} MiB, rise beside it {memory.rise / MIB:.0f} MiB")
    assert told.steps == 2 + 3
    assert memory.rise < 500 * MIB


def test_one_token_more_than_the_model_reads_is_refused() -> None:
    engine = engine_for(8192)
    with pytest.raises(
        ValueError, match="the prompt has 262144 tokens, the model reads 262144 with its answer; shorten it"
    ):
        engine.submit(Request(id="a", sample=Sample(token_T=torch.zeros(LONGEST, dtype=torch.int64)), sampling=GREEDY))
