"""Fields of a Spec set to what they would be without the architecture that needs them: (field, case, change)."""

from __future__ import annotations

from dataclasses import replace

from worker.model.spec import Activation, QkNorm, RopeKind, Spec


def with_rope(spec: Spec, **changes) -> Spec:
    return replace(spec, ropes=tuple(rope and replace(rope, **changes) for rope in spec.ropes))


LLAMA3 = dict(kind=RopeKind.LLAMA3, theta=10000.0, factor=8.0, original_positions=32)
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
    ("windows", "mistral_window_head_dim", lambda spec: replace(spec, windows=(None,) * 3)),
    ("windows", "qwen2_late_window", lambda spec: replace(spec, windows=(8,) * 3)),
    ("windows", "mistral_window_head_dim", lambda spec: replace(spec, windows=(7,) * 3)),
    ("qk_norm", "qwen3", lambda spec: replace(spec, qk_norm=QkNorm.NONE)),
    ("qkv_bias", "qwen2", lambda spec: replace(spec, qkv_bias=False)),
    ("out_bias", "llama_biases_llama3", lambda spec: replace(spec, out_bias=False)),
    ("mlp_bias", "llama_biases_llama3", lambda spec: replace(spec, mlp_bias=False)),
    ("ropes", "llama", lambda spec: with_rope(spec, theta=5000.0)),
    ("ropes", "llama_linear_tied", lambda spec: with_rope(spec, factor=1.0)),
    ("ropes", "llama_biases_llama3", lambda spec: with_rope(spec, kind=RopeKind.DEFAULT)),
    ("ropes", "llama_biases_llama3", lambda spec: with_rope(spec, low_freq_factor=0.5)),
    ("ropes", "llama_biases_llama3", lambda spec: with_rope(spec, high_freq_factor=16.0)),
    ("ropes", "llama_biases_llama3", lambda spec: with_rope(spec, original_positions=8192)),
]
