"""Write the text half of a preset's shape as GGUF with random weights, for llama.cpp's own llama-bench and llama-batched-bench.

Run in an environment that has `gguf` and numpy; nothing of qvl is imported, so the shape of "0.6B" stands here once more and
`tests/test_bench.py` holds it to the preset. llama.cpp 0.3.36's tools are built from llama-cpp-python's sdist (vendor/llama.cpp):

    cmake -B build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON && cmake --build build --target llama-bench llama-batched-bench
    python bench/peers/gguf_shape.py 0.6B.gguf
    llama-bench -m 0.6B.gguf -t 2 -p 512,4096 -n 0 -r 3
    llama-batched-bench -m 0.6B.gguf -t 2 -c 8192 -npp 240 -ntg 32 -npl 1,8,16
"""

import sys

import gguf
import numpy as np

SHAPE = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
THETA, EPSILON = 5_000_000.0, 1e-6


def write(path: str) -> None:
    wide, mlp, head_dim = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["head_dim"]
    queries, keys = SHAPE["num_attention_heads"] * head_dim, SHAPE["num_key_value_heads"] * head_dim
    out = gguf.GGUFWriter(path, "qwen3")
    out.add_context_length(40960)
    out.add_embedding_length(wide)
    out.add_feed_forward_length(mlp)
    out.add_block_count(SHAPE["num_hidden_layers"])
    out.add_head_count(SHAPE["num_attention_heads"])
    out.add_head_count_kv(SHAPE["num_key_value_heads"])
    out.add_key_length(head_dim)
    out.add_value_length(head_dim)
    out.add_rope_freq_base(THETA)
    out.add_layer_norm_rms_eps(EPSILON)
    out.add_vocab_size(SHAPE["vocab_size"])
    out.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    out.add_tokenizer_model("none")  # token ids come in, none are made from text

    random = np.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int) -> None:
        values = random.standard_normal((rows, columns), dtype=np.float32) * np.float32(0.02)
        bf16 = gguf.GGMLQuantizationType.BF16
        out.add_tensor(f"{name}.weight", gguf.quants.quantize(values, bf16), raw_dtype=bf16)

    def ones(name: str, size: int) -> None:
        out.add_tensor(f"{name}.weight", np.ones(size, dtype=np.float32))

    matrix("token_embd", SHAPE["vocab_size"], wide)  # also the head: the shape ties them
    ones("output_norm", wide)
    for i in range(SHAPE["num_hidden_layers"]):
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
    write(sys.argv[1])
