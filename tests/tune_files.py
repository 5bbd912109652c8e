"""A network of a few thousand weights over the tokenizer of bytes, for tests of tuning runs."""

from dataclasses import replace

import torch

from data_files import model_config
from qvl.model.config import ModelConfig
from qvl.model.qwen3vl import Qwen3VL, new_model
from qvl.prompt.processor import Processor
from tiny_checkpoint import tiny_config


def small_config(small: Processor) -> ModelConfig:
    ids, tiny, tokenizer = model_config(small), tiny_config(), small.tokenizer
    text = replace(
        tiny.text,
        vocab_size=320,
        bos_token_id=tokenizer.control_id("<|endoftext|>"),
        eos_token_id=tokenizer.control_id("<|im_end|>"),
        initializer_range=0.02,
    )
    return replace(ids, text=text, vision=tiny.vision)


def small_model(small: Processor) -> Qwen3VL:
    return new_model(small_config(small), seed=0, dtype=torch.float32)
