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
YARN_ROPE = dict(
    rope_type="yarn",
    rope_theta=10000.0,
    factor=4.0,
    original_max_position_embeddings=128,
    beta_fast=4.0,
    beta_slow=2.0,
)
LONG_ROPE = dict(
    rope_type="longrope",
    rope_theta=10000.0,
    short_factor=[1.0, 1.5, 2.0],
    long_factor=[2.0, 3.0, 5.0],
    partial_rotary_factor=0.75,
)
SLIDING_FULL_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
GEMMA_ROPES = dict(
    full_attention=dict(rope_type="linear", rope_theta=1000.0, factor=8.0),
    sliding_attention=dict(rope_type="default", rope_theta=100.0),
)
OLMO_ROPES = dict(full_attention=YARN_ROPE, sliding_attention=dict(rope_type="default", rope_theta=100.0))
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
TIED = dict(tie_word_embeddings=True)

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama_biases_llama3": ("Llama", dict(attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3_ROPE)),
    "llama_linear_tied": ("Llama", dict(rope_parameters=LINEAR_ROPE, tie_word_embeddings=True)),
    "llama_mha_gelu": ("Llama", dict(num_key_value_heads=8, hidden_act="gelu_new", rms_norm_eps=1e-2)),
    "llama_yarn": ("Llama", dict(head_dim=32, rope_parameters=YARN_ROPE)),
    "llama_yarn_untruncated": ("Llama", dict(head_dim=32, rope_parameters=YARN_ROPE | dict(truncate=False))),
    "mistral_window_head_dim": ("Mistral", dict(head_dim=16, sliding_window=8)),
    "mistral_no_window": ("Mistral", dict(sliding_window=None)),
    "ministral": ("Ministral", dict(head_dim=8, sliding_window=8, layer_types=SLIDING_FULL_SLIDING)),
    "qwen2": ("Qwen2", {}),
    "qwen2_late_window": ("Qwen2", dict(use_sliding_window=True, sliding_window=8, max_window_layers=2)),
    "qwen3": ("Qwen3", dict(head_dim=16)),
    "qwen3_biases_tied": ("Qwen3", dict(head_dim=8, attention_bias=True, tie_word_embeddings=True)),
    "phi3": ("Phi3", dict(sliding_window=12)),
    "phi3_longrope_short": (
        "Phi3",
        dict(original_max_position_embeddings=512, rope_parameters=LONG_ROPE | dict(factor=8.0)),
    ),
    "phi3_longrope_long": ("Phi3", dict(original_max_position_embeddings=6, rope_parameters=LONG_ROPE)),
    "granite": (
        "Granite",
        dict(
            embedding_multiplier=12.0,
            residual_multiplier=0.22,
            attention_multiplier=0.1,
            logits_scaling=8.0,
            attention_bias=True,
            mlp_bias=True,
        ),
    ),
    "smollm3": ("SmolLM3", dict(no_rope_layer_interval=2, **TIED)),
    "smollm3_window": ("SmolLM3", dict(no_rope_layers=[1, 0, 0], use_sliding_window=True, sliding_window=8)),
    "seed_oss": ("SeedOss", dict(head_dim=16)),
    "seed_oss_biases": ("SeedOss", dict(head_dim=8, attention_bias=False, attention_out_bias=True, mlp_bias=True)),
    "internlm3": ("InternLM3", dict(head_dim=8, attention_bias=True, mlp_bias=True)),
    "ernie4_5": ("Ernie4_5", dict(head_dim=16, use_bias=True, **TIED)),
    "stablelm": ("StableLm", dict(use_qkv_bias=True)),
    "stablelm_parallel": ("StableLm", dict(use_parallel_residual=True, partial_rotary_factor=0.5)),
    "glm": ("Glm", dict(head_dim=16)),
    "glm4": ("Glm4", dict(head_dim=8, attention_bias=False)),
    "gemma": ("Gemma", dict(head_dim=16, hidden_act="gelu", **TIED)),
    "gemma2": (
        "Gemma2",
        dict(
            head_dim=16,
            query_pre_attn_scalar=24,
            sliding_window=8,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
            **TIED,
        ),
    ),
    "gemma3": (
        "Gemma3Text",
        dict(
            head_dim=16,
            query_pre_attn_scalar=24,
            sliding_window=8,
            layer_types=SLIDING_FULL_SLIDING,
            rope_parameters=GEMMA_ROPES,
            **TIED,
        ),
    ),
    "cohere": ("Cohere", TIED),
    "cohere_qk_norm_biases": ("Cohere", dict(use_qk_norm=True, attention_bias=True, logit_scale=0.25)),
    "cohere2": ("Cohere2", dict(sliding_window=8, layer_types=SLIDING_FULL_SLIDING, **TIED)),
    "olmo2": ("Olmo2", dict(attention_bias=True)),
    "olmo3": (
        "Olmo3",
        dict(head_dim=32, sliding_window=8, layer_types=SLIDING_FULL_SLIDING, rope_parameters=OLMO_ROPES),
    ),
    "exaone4": ("Exaone4", dict(sliding_window=8, layer_types=SLIDING_FULL_SLIDING)),
    "exaone4_no_window": ("Exaone4", dict(sliding_window=None, layer_types=["full_attention"] * 3)),
    "mixtral": ("Mixtral", dict(num_local_experts=4, sliding_window=8)),
    "qwen2_moe": ("Qwen2Moe", dict(shared_expert_intermediate_size=40, decoder_sparse_step=2, **EXPERTS)),
    "qwen2_moe_window": (
        "Qwen2Moe",
        dict(
            shared_expert_intermediate_size=40,
            norm_topk_prob=True,
            mlp_only_layers=[1],
            use_sliding_window=True,
            sliding_window=8,
            max_window_layers=1,
            **EXPERTS,
        ),
    ),
    "qwen3_moe": ("Qwen3Moe", dict(head_dim=16, norm_topk_prob=True, **EXPERTS)),
    "qwen3_moe_window": ("Qwen3Moe", dict(use_sliding_window=True, sliding_window=8, **EXPERTS)),
    "olmoe": ("Olmoe", dict(num_experts=4, num_experts_per_tok=2)),
}

SPLIT_LIKE_OTHERS = {
    *("llama_linear_tied", "llama_yarn", "llama_yarn_untruncated", "mistral_no_window", "ministral"),
    *("qwen2_late_window", "phi3_longrope_short", "phi3_longrope_long", "smollm3", "smollm3_window", "seed_oss"),
    *("internlm3", "stablelm_parallel", "glm", "cohere2", "exaone4_no_window", "qwen2_moe_window", "qwen3_moe_window"),
}
"""Cases that ranks divide as they divide another one; only ropes, windows and switches differ."""
