"""Fields of a Spec set to what they would be without the architecture that needs them: (field, case, change)."""

from __future__ import annotations

from dataclasses import replace

from worker.model.spec import Activation, QkNorm, Residual, RopeKind, Spec


def with_rope(spec: Spec, **changes) -> Spec:
    return replace(spec, ropes=tuple(rope and replace(rope, **changes) for rope in spec.ropes))


def with_moe(spec: Spec, **changes) -> Spec:
    assert spec.moe is not None
    return replace(spec, moe=replace(spec.moe, **changes))


NEUTRALISED = [
    ("num_layers", "llama", lambda spec: replace(spec, num_layers=2, windows=(None, None), ropes=spec.ropes[:2])),
    ("hidden_size", "llama", lambda spec: replace(spec, hidden_size=32)),
    ("num_heads", "llama", lambda spec: replace(spec, num_heads=4)),
    ("num_kv_heads", "llama", lambda spec: replace(spec, num_kv_heads=spec.num_heads)),
    ("head_dim", "qwen3", lambda spec: replace(spec, head_dim=spec.hidden_size // spec.num_heads)),
    ("ffn_size", "llama", lambda spec: replace(spec, ffn_size=64)),
    ("vocab_size", "llama", lambda spec: replace(spec, vocab_size=256)),
    ("norm_eps", "llama_mha_gelu", lambda spec: replace(spec, norm_eps=1e-6)),
    ("activation", "llama_mha_gelu", lambda spec: replace(spec, activation=Activation.SILU)),
    ("activation", "gemma", lambda spec: replace(spec, activation=Activation.GELU)),
    ("windows", "mistral_window_head_dim", lambda spec: replace(spec, windows=(None,) * 3)),
    ("windows", "qwen2_late_window", lambda spec: replace(spec, windows=(8,) * 3)),
    ("windows", "mistral_window_head_dim", lambda spec: replace(spec, windows=(7,) * 3)),
    ("windows", "gemma2", lambda spec: replace(spec, windows=(None, 8, None))),
    ("windows", "qwen2_moe_window", lambda spec: replace(spec, windows=(8, None, 8))),
    ("norm_plus_one", "gemma", lambda spec: replace(spec, norm_plus_one=False)),
    ("norm_plus_one", "gemma3", lambda spec: replace(spec, norm_plus_one=False)),
    ("residual", "gemma2", lambda spec: replace(spec, residual=Residual.SEQUENTIAL)),
    ("residual", "olmo2", lambda spec: replace(spec, residual=Residual.POST)),
    ("residual", "stablelm", lambda spec: replace(spec, residual=Residual.PARALLEL)),
    ("qk_norm", "qwen3", lambda spec: replace(spec, qk_norm=QkNorm.NONE)),
    ("qk_norm", "cohere_qk_norm_biases", lambda spec: replace(spec, qk_norm=QkNorm.NONE)),
    ("qk_norm", "olmo2", lambda spec: replace(spec, qk_norm=QkNorm.NONE)),
    ("scale", "gemma2", lambda spec: replace(spec, scale=spec.head_dim**-0.5)),
    ("scale", "granite", lambda spec: replace(spec, scale=spec.head_dim**-0.5)),
    ("attention_softcap", "gemma2", lambda spec: replace(spec, attention_softcap=None)),
    ("logit_softcap", "gemma2", lambda spec: replace(spec, logit_softcap=None)),
    ("embedding_scale", "gemma", lambda spec: replace(spec, embedding_scale=1.0)),
    ("embedding_scale", "granite", lambda spec: replace(spec, embedding_scale=1.0)),
    ("residual_scale", "granite", lambda spec: replace(spec, residual_scale=1.0)),
    ("logit_scale", "granite", lambda spec: replace(spec, logit_scale=1.0)),
    ("logit_scale", "cohere", lambda spec: replace(spec, logit_scale=1.0)),
    ("qkv_bias", "qwen2", lambda spec: replace(spec, qkv_bias=False)),
    ("out_bias", "llama_biases_llama3", lambda spec: replace(spec, out_bias=False)),
    ("mlp_bias", "llama_biases_llama3", lambda spec: replace(spec, mlp_bias=False)),
    ("ropes", "llama", lambda spec: with_rope(spec, theta=5000.0)),
    ("ropes", "glm", lambda spec: with_rope(spec, rotary_dim=None)),
    ("ropes", "llama_linear_tied", lambda spec: with_rope(spec, factor=1.0)),
    ("ropes", "llama_biases_llama3", lambda spec: with_rope(spec, kind=RopeKind.DEFAULT)),
    ("ropes", "llama_biases_llama3", lambda spec: with_rope(spec, factor=1.0)),
    ("ropes", "llama_biases_llama3", lambda spec: with_rope(spec, low_freq_factor=0.5)),
    ("ropes", "llama_biases_llama3", lambda spec: with_rope(spec, high_freq_factor=16.0)),
    ("ropes", "llama_biases_llama3", lambda spec: with_rope(spec, original_positions=8192)),
    ("ropes", "llama_yarn", lambda spec: with_rope(spec, kind=RopeKind.LINEAR)),
    ("ropes", "llama_yarn", lambda spec: with_rope(spec, factor=1.0)),
    ("ropes", "llama_yarn", lambda spec: with_rope(spec, original_positions=512)),
    ("ropes", "llama_yarn", lambda spec: with_rope(spec, beta_fast=32.0)),
    ("ropes", "llama_yarn", lambda spec: with_rope(spec, beta_slow=1.0)),
    ("ropes", "llama_yarn", lambda spec: with_rope(spec, amplitude=1.0)),
    ("ropes", "llama_yarn_untruncated", lambda spec: with_rope(spec, is_truncated=True)),
    ("ropes", "phi3_longrope_short", lambda spec: with_rope(spec, short_factors=(1.0,) * 3)),
    ("ropes", "phi3_longrope_short", lambda spec: with_rope(spec, amplitude=1.0)),
    ("ropes", "phi3_longrope_long", lambda spec: with_rope(spec, long_factors=(1.0,) * 3)),
    ("ropes", "phi3_longrope_long", lambda spec: with_rope(spec, original_positions=512)),
    ("ropes", "gemma3", lambda spec: replace(spec, ropes=spec.ropes[:1] * 3)),
    ("ropes", "olmo3", lambda spec: replace(spec, ropes=spec.ropes[:1] * 3)),
    ("ropes", "smollm3", lambda spec: replace(spec, ropes=spec.ropes[:1] * 3)),
    ("ropes", "cohere2", lambda spec: replace(spec, ropes=spec.ropes[:1] * 3)),
    ("ropes", "exaone4", lambda spec: replace(spec, ropes=spec.ropes[:1] * 3)),
    ("ropes", "exaone4_no_window", lambda spec: replace(spec, ropes=(None,) * 3)),
    ("moe", "mixtral", lambda spec: with_moe(spec, num_active=1)),
    ("moe", "mixtral", lambda spec: with_moe(spec, is_renormalised=False)),
    ("moe", "mixtral", lambda spec: with_moe(spec, num_experts=3)),
    ("moe", "mixtral", lambda spec: with_moe(spec, ffn_size=40)),
    ("moe", "olmoe", lambda spec: with_moe(spec, is_renormalised=True)),
    ("moe", "qwen2_moe", lambda spec: with_moe(spec, sparse_layers=(True,) * 3)),
    ("moe", "qwen2_moe", lambda spec: with_moe(spec, shared_ffn_size=0)),
    ("moe", "qwen2_moe", lambda spec: with_moe(spec, has_shared_gate=False)),
]
