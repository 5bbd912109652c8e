"""Write the text half of a Hugging Face folder's shape as GGUF, with random weights, for llama.cpp's llama-bench and llama-batched-bench.

    python bench/peers/gguf_shape.py FOLDER OUT.gguf

Runs in an environment with `gguf` and numpy. Only FOLDER/config.json is read: speed does not depend on the numbers in the weights, and a
folder of random weights has no tokenizer that llama.cpp's own converter would take.
"""

# pyright: basic, reportMissingImports=false
import json
import sys
from pathlib import Path

import gguf
import numpy as np


def write(folder: Path, path: str) -> None:
    shape = json.loads((folder / "config.json").read_text())["text_config"]
    wide, mlp, head_dim = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    queries, keys = shape["num_attention_heads"] * head_dim, shape["num_key_value_heads"] * head_dim
    out = gguf.GGUFWriter(path, "qwen3")
    out.add_context_length(shape["max_position_embeddings"])
    out.add_embedding_length(wide)
    out.add_feed_forward_length(mlp)
    out.add_block_count(shape["num_hidden_layers"])
    out.add_head_count(shape["num_attention_heads"])
    out.add_head_count_kv(shape["num_key_value_heads"])
    out.add_key_length(head_dim)
    out.add_value_length(head_dim)
    out.add_rope_freq_base(shape["rope_theta"])
    out.add_layer_norm_rms_eps(shape["rms_norm_eps"])
    out.add_vocab_size(shape["vocab_size"])
    out.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    out.add_tokenizer_model("none")  # token ids come in, none are made from text

    random = np.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int) -> None:
        values = random.standard_normal((rows, columns), dtype=np.float32) * np.float32(0.02)
        bf16 = gguf.GGMLQuantizationType.BF16
        out.add_tensor(f"{name}.weight", gguf.quants.quantize(values, bf16), raw_dtype=bf16)

    def ones(name: str, size: int) -> None:
        out.add_tensor(f"{name}.weight", np.ones(size, dtype=np.float32))

    matrix("token_embd", shape["vocab_size"], wide)  # also the head, where the shape ties them
    ones("output_norm", wide)
    for i in range(shape["num_hidden_layers"]):
        ones(f"blk.{i}.attn_norm", wide)
        ones(f"blk.{i}.attn_q_norm", head_dim)
        ones(f"blk.{i}.attn_k_norm", head_dim)
        ones(f"blk.{i}.ffn_norm", wide)
        for name, rows, columns in (
            ("attn_q", queries, wide),
            ("attn_k", keys, wide),
            ("attn_v", keys, wide),
            ("attn_output", wide, queries),
            ("ffn_gate", mlp, wide),
            ("ffn_up", mlp, wide),
            ("ffn_down", wide, mlp),
        ):
            matrix(f"blk.{i}.{name}", rows, columns)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


if __name__ == "__main__":
    write(Path(sys.argv[1]), sys.argv[2])
