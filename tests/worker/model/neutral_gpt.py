"""Fields of a Spec set to what they would be without the architecture that needs them: (field, case, change)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tests.worker.model.neutral_llama import with_rope
from worker.model.spec import Activation, Norm, QkNorm, Residual, Spec


def to(**changes: Any) -> Callable[[Spec], Spec]:
    return lambda spec: replace(spec, **changes)


NEUTRALISED: list[tuple[str, str, Callable[[Spec], Spec]]] = [
    ("norm", "stablelm", to(norm=Norm.RMS)),
    ("norm_bias", "stablelm", to(norm_bias=False)),
    ("norm_eps", "falcon_11b", to(norm_eps=1e-5)),
    ("qk_norm", "phi_qk_norm", to(qk_norm=QkNorm.NONE)),
    ("residual", "gpt_neox", to(residual=Residual.SEQUENTIAL)),
    ("residual", "gpt_neox_sequential", to(residual=Residual.PARALLEL_TWO_NORMS)),
    ("residual", "falcon_40b", to(residual=Residual.PARALLEL)),
    ("residual", "opt_350m", to(residual=Residual.SEQUENTIAL)),
    ("activation", "bloom", to(activation=Activation.GELU)),
    ("activation", "mpt", to(activation=Activation.GELU_TANH)),
    ("activation", "opt", to(activation=Activation.GELU)),
    ("position_offset", "gpt2", to(position_offset=None)),
    ("position_offset", "opt", lambda spec: replace(spec, position_offset=0, max_positions=spec.max_positions + 2)),
    ("alibi_scale", "bloom", to(alibi_scale=None)),
    ("alibi_scale", "bloom_12_heads", to(alibi_scale=0.5)),
    ("alibi_scale", "mpt_12_heads_clip", to(alibi_scale=None)),
    ("alibi_scale", "falcon_rw", to(alibi_scale=1.0)),
    ("scale", "mpt_12_heads_clip", lambda spec: replace(spec, scale=spec.head_dim**-0.5)),
    ("scale", "gpt2_unscaled", lambda spec: replace(spec, scale=spec.head_dim**-0.5)),
    ("scale", "gpt_neo", lambda spec: replace(spec, scale=spec.head_dim**-0.5)),
    ("clip_qkv", "mpt_12_heads_clip", to(clip_qkv=None)),
    ("windows", "gpt_neo", to(windows=(None,) * 3)),
    ("windows", "gpt_neo", to(windows=(8,) * 3)),
    ("windows", "starcoder2_window", to(windows=(None,) * 3)),
    ("is_gated", "stablelm", to(is_gated=False)),
    ("embedding_size", "opt_350m", to(embedding_size=None)),
    ("embedding_norm", "bloom", to(embedding_norm=False)),
    ("final_norm", "opt", to(final_norm=False)),
    ("head_bias", "phi", to(head_bias=False)),
    ("head_bias", "gptj", to(head_bias=False)),
    ("ropes", "gpt_neox", lambda spec: with_rope(spec, rotary_dim=None)),
    ("ropes", "gptj", lambda spec: with_rope(spec, rotary_dim=2)),
    ("ropes", "falcon_7b", to(ropes=(None,) * 3)),
]
