"""Shapes of well-known models, as config.json has them, and the same small enough for a dry run.

Sizes are those of the models' own files: Llama 3.1 8B, Qwen3 0.6B, T5 large, BLOOM 7B1, Falcon 7B and Mixtral 8x7B, of
the last four with fewer layers.
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

LLAMA_8B: Config = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
QWEN3_600M: Config = {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 4096,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}
MIXTRAL: Config = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
FALCON: Config = {
    "model_type": "falcon",
    "hidden_size": 4544,
    "num_hidden_layers": 8,
    "num_attention_heads": 71,
    "multi_query": True,
    "parallel_attn": True,
    "vocab_size": 65024,
    "max_position_embeddings": 2048,
}
BLOOM: Config = {"model_type": "bloom", "hidden_size": 4096, "n_layer": 8, "n_head": 32, "vocab_size": 250880}
T5: Config = {
    "model_type": "t5",
    "d_model": 1024,
    "d_kv": 64,
    "d_ff": 4096,
    "num_layers": 8,
    "num_heads": 16,
    "vocab_size": 32128,
    "decoder_start_token_id": 0,
}

TINY: Config = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 4096,
}
TINY_OTHER: Config = {"hidden_size": 64, "vocab_size": 512}
SHAPES: dict[str, tuple[Config, Config]] = {
    "llama": (LLAMA_8B, LLAMA_8B | TINY),
    "qwen3": (QWEN3_600M, QWEN3_600M | TINY),
    "mixtral": (MIXTRAL, MIXTRAL | TINY),
    "falcon": (FALCON, FALCON | TINY_OTHER | {"num_hidden_layers": 2, "num_attention_heads": 4}),
    "bloom": (BLOOM, BLOOM | TINY_OTHER | {"n_layer": 2, "n_head": 4}),
    "t5": (T5, T5 | {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 512}),
}
"""By name: in full, and for a dry run."""
