"""Tiny configurations of Llama and its descendants: name -> (class prefix in transformers, differences from SIZES)."""

from __future__ import annotations

from typing import Any

LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
LINEAR_ROPE = dict(rope_type="linear", rope_theta=10000.0, factor=4.0)

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama_biases_llama3": ("Llama", dict(attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3_ROPE)),
    "llama_linear_tied": ("Llama", dict(rope_parameters=LINEAR_ROPE, tie_word_embeddings=True)),
    "llama_mha_gelu": ("Llama", dict(num_key_value_heads=8, hidden_act="gelu_new", rms_norm_eps=1e-2)),
    "mistral_window_head_dim": ("Mistral", dict(head_dim=16, sliding_window=8)),
    "mistral_no_window": ("Mistral", dict(sliding_window=None)),
    "qwen2": ("Qwen2", {}),
    "qwen2_late_window": ("Qwen2", dict(use_sliding_window=True, sliding_window=8, max_window_layers=2)),
    "qwen3": ("Qwen3", dict(head_dim=16)),
    "qwen3_biases_tied": ("Qwen3", dict(head_dim=8, attention_bias=True, tie_word_embeddings=True)),
}
