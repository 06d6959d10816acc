"""Tiny configurations of the other lineages: name -> (class prefix in transformers, differences from SIZES)."""

from __future__ import annotations

from typing import Any

GPT2_KEYS = dict(
    hidden_size="n_embd",
    intermediate_size="n_inner",
    num_hidden_layers="n_layer",
    num_attention_heads="n_head",
    num_key_value_heads=None,
    max_position_embeddings="n_positions",
)
OWN_KEYS: dict[str, dict[str, str | None]] = {
    "Bloom": dict(
        intermediate_size=None,
        num_hidden_layers="n_layer",
        num_attention_heads="n_head",
        num_key_value_heads=None,
        max_position_embeddings="seq_length",
    ),
    "Falcon": dict(intermediate_size="ffn_hidden_size", num_key_value_heads=None),
    "GPT2": GPT2_KEYS,
    "GPTBigCode": GPT2_KEYS,
    "GPTJ": GPT2_KEYS,
    "GPTNeo": dict(num_hidden_layers="num_layers", num_attention_heads="num_heads", num_key_value_heads=None),
    "GPTNeoX": dict(num_key_value_heads=None),
    "Mpt": dict(
        hidden_size="d_model",
        intermediate_size=None,
        num_hidden_layers="n_layers",
        num_attention_heads="n_heads",
        num_key_value_heads=None,
        max_position_embeddings="max_seq_len",
    ),
    "OPT": dict(intermediate_size="ffn_dim", num_key_value_heads=None),
}
"""What a class calls the sizes, None where it has no such key."""

DEVIATIONS = dict(embedding=0.5, matrix=0.3, bias=0.15)
"""Where everything has a bias, small matrices would make a model say the same whatever it sees."""

SDPA_CASES = {"falcon_rw"}
"""References that are right with this attention only: the eager one adds Falcon's slopes twice."""

NEW_FALCON = dict(new_decoder_architecture=True, num_kv_heads=2)

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("Bloom", {}),
    "bloom_12_heads": ("Bloom", dict(hidden_size=96, num_attention_heads=12)),
    "falcon_7b": ("Falcon", dict(intermediate_size=None)),
    "falcon_11b": ("Falcon", NEW_FALCON | dict(num_ln_in_parallel_attn=1, layer_norm_epsilon=1e-2)),
    "falcon_40b": ("Falcon", NEW_FALCON | dict(tie_word_embeddings=False)),
    # The reference rounds slopes and slope times position to bfloat16. Neither loses anything here: slopes of eight
    # heads are powers of two, and positions below 256 have eight bits.
    "falcon_rw": ("Falcon", dict(alibi=True, multi_query=False, parallel_attn=False, bias=True)),
    "gpt2": ("GPT2", dict(intermediate_size=None)),
    "gpt2_unscaled": ("GPT2", dict(scale_attn_weights=False, activation_function="relu")),
    "gpt_bigcode_mha": ("GPTBigCode", dict(multi_query=False)),
    "gpt_bigcode_mqa": ("GPTBigCode", {}),
    "gpt_neo": ("GPTNeo", dict(attention_types=[[["global", "local"], 1], [["local"], 1]], window_size=8)),
    "gpt_neox": ("GPTNeoX", {}),
    "gpt_neox_sequential": ("GPTNeoX", dict(use_parallel_residual=False, rotary_pct=1.0, attention_bias=False)),
    "gptj": ("GPTJ", dict(rotary_dim=4)),
    "mpt": ("Mpt", {}),
    "mpt_12_heads_clip": (
        "Mpt",
        dict(hidden_size=96, num_attention_heads=12, attn_config=dict(clip_qkv=0.5, softmax_scale=0.7)),
    ),
    "opt": ("OPT", {}),
    "opt_350m": ("OPT", dict(word_embed_proj_dim=32, do_layer_norm_before=False)),
    "opt_no_biases": ("OPT", dict(enable_bias=False, activation_function="gelu", tie_word_embeddings=False)),
    "phi": ("Phi", dict(num_key_value_heads=None)),
    "phi_qk_norm": ("Phi", dict(qk_layernorm=True, partial_rotary_factor=0.75, hidden_act="gelu")),
    "starcoder2": ("Starcoder2", dict(use_bias=False, sliding_window=None)),
    "starcoder2_window": ("Starcoder2", dict(sliding_window=8, tie_word_embeddings=False)),
}
