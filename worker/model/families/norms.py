"""Descendants of Llama that put their norms elsewhere: around layers, behind them, or one before both halves."""

from __future__ import annotations

from typing import Any

from worker.model.config import FULL, SLIDING, ConfigReader
from worker.model.families.base import Family, everywhere
from worker.model.families.llama import FUSED_MLP_NAMES, LLAMA_NAMES, glm_like, llama_biases, llama_like
from worker.model.families.windows import every, layer_kinds, windows_of
from worker.model.spec import Activation, Norm, QkNorm, Residual, Spec

SANDWICH_NAMES = LLAMA_NAMES | {
    "attention_out_norm": "model.layers.{i}.post_attention_layernorm",
    "mlp_norm": "model.layers.{i}.pre_feedforward_layernorm",
    "mlp_out_norm": "model.layers.{i}.post_feedforward_layernorm",
}
GLM4_NAMES = FUSED_MLP_NAMES | {
    "attention_out_norm": "model.layers.{i}.post_self_attn_layernorm",
    "mlp_out_norm": "model.layers.{i}.post_mlp_layernorm",
}


# Gemma: norms around both halves from the second on.


def _gemma_like(config: ConfigReader, model_type: str, **differences: Any) -> Spec:
    config.assume(head_dim=256, tie_word_embeddings=True)
    return llama_like(
        config,
        model_type,
        norm_plus_one=True,
        wide_norm=True,
        embedding_scale=config.integer("hidden_size") ** 0.5,
        **llama_biases(config),
        **differences,
    )


def _gemma(config: ConfigReader) -> Spec:
    config.rename(hidden_activation="hidden_act")
    activation = config.activation(default="gelu_pytorch_tanh")
    # the first releases say gelu and were trained with its approximation
    activation = Activation.GELU_TANH if activation is Activation.GELU else activation
    return _gemma_like(config, "gemma", activation=activation)


def _gemma2(config: ConfigReader) -> Spec:
    config.assume(attn_logit_softcapping=50.0, final_logit_softcapping=30.0)
    config.ignore("sliding_window_size")
    kinds = layer_kinds(config, every(2))
    return _sandwich_gemma(config, "gemma2", windows=windows_of(config, kinds, config.get("sliding_window", 4096)))


def _gemma3_text(config: ConfigReader) -> Spec:
    config.ignore("_sliding_window_pattern")
    kinds = layer_kinds(config, every(config.integer("sliding_window_pattern", 6)))
    ropes = config.ropes_by_kind(full_theta=1_000_000.0, sliding_theta=10_000.0)
    return _sandwich_gemma(
        config,
        "gemma3_text",
        qk_norm=QkNorm.HEAD,
        windows=windows_of(config, kinds, config.get("sliding_window", 4096)),
        ropes=tuple(ropes[kind] for kind in kinds),
    )


def _sandwich_gemma(config: ConfigReader, model_type: str, **differences: Any) -> Spec:
    config.assume(num_key_value_heads=4)
    config.ignore("hidden_act")
    return _gemma_like(
        config,
        model_type,
        residual=Residual.SANDWICH,
        activation=config.activation("hidden_activation", "gelu_pytorch_tanh"),
        scale=config.number("query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=_limit(config, "attn_logit_softcapping"),
        logit_softcap=_limit(config, "final_logit_softcapping"),
        **differences,
    )


def _limit(config: ConfigReader, name: str) -> float | None:
    return None if config.get(name) is None else config.number(name)


def _glm4(config: ConfigReader) -> Spec:
    return glm_like(config, "glm4", residual=Residual.SANDWICH)


# Cohere: one norm before both halves, which are added up.


def _cohere_like(config: ConfigReader, model_type: str, **differences: Any) -> Spec:
    config.assume(tie_word_embeddings=True)
    return llama_like(
        config,
        model_type,
        norm=Norm.LAYER,
        norm_eps=config.number("layer_norm_eps", 1e-5),
        residual=Residual.PARALLEL,
        logit_scale=config.number("logit_scale", 0.0625),
        **llama_biases(config),
        **differences,
    )


def _cohere(config: ConfigReader) -> Spec:
    # Command R's files count fewer positions than the model knows, and have the true number here
    positions = config.integer("model_max_length", config.integer("max_position_embeddings"))
    return _cohere_like(
        config,
        "cohere",
        max_positions=positions,
        qk_norm=QkNorm.HEAD if config.flag("use_qk_norm") else QkNorm.NONE,
        ropes=everywhere(config, config.rope(500_000.0)),
    )


def _cohere2(config: ConfigReader) -> Spec:
    config.require(position_embedding_type="rope_gptj", order_of_interleaved_layers="local_attn_first")
    config.require(use_parallel_block=True, use_gated_activation=True, rotary_pct=1.0)
    config.ignore("use_embedding_sharing", "use_parallel_embedding", "layer_switch")
    config.require(head_dim=config.integer("hidden_size") // config.integer("num_attention_heads"))
    kinds, rope = layer_kinds(config, every(config.integer("sliding_window_pattern", 4))), config.rope()
    return _cohere_like(
        config,
        "cohere2",
        windows=windows_of(config, kinds, config.get("sliding_window", 4096)),
        ropes=tuple(rope if kind == SLIDING else None for kind in kinds),
    )


# OLMo: norms behind, none before.


def _olmo2(config: ConfigReader) -> Spec:
    return _olmo_like(config, "olmo2")


def _olmo3(config: ConfigReader) -> Spec:
    theta = config.number("rope_theta", 500_000.0)
    kinds, ropes = layer_kinds(config, every(4)), config.ropes_by_kind(theta, theta)
    windows = windows_of(config, kinds, config.get("sliding_window", 4096))
    return _olmo_like(config, "olmo3", windows=windows, ropes=tuple(ropes[kind] for kind in kinds))


def _olmo_like(config: ConfigReader, model_type: str, **differences: Any) -> Spec:
    config.assume(rms_norm_eps=1e-5)
    return llama_like(
        config,
        model_type,
        wide_norm=True,
        residual=Residual.OUTPUT,
        qk_norm=QkNorm.FULL,
        **llama_biases(config),
        **differences,
    )


def _exaone4(config: ConfigReader) -> Spec:
    config.assume(rms_norm_eps=1e-5, sliding_window=4096)
    window, pattern = config.get("sliding_window"), config.get("sliding_window_pattern", 4)
    # LLLG, or the length of that
    period = len(pattern) if isinstance(pattern, str) and pattern == "L" * (len(pattern) - 1) + "G" else pattern
    if window and (not isinstance(period, int) or period <= 0):
        raise config.error(f"sliding_window_pattern must be such as LLLG, or a positive integer, not {pattern!r:.60}")
    kinds, rope = layer_kinds(config, every(period) if window else lambda layer: True), config.rope()
    return llama_like(
        config,
        "exaone4",
        residual=Residual.OUTPUT,
        qk_norm=QkNorm.HEAD,
        windows=windows_of(config, kinds, window),
        ropes=tuple(None if window and kind == FULL else rope for kind in kinds),
    )


NORMS_FAMILIES: dict[str, Family] = {
    "gemma": Family(build=_gemma, names=LLAMA_NAMES),
    "gemma2": Family(build=_gemma2, names=SANDWICH_NAMES),
    "gemma3_text": Family(build=_gemma3_text, names=SANDWICH_NAMES),
    "glm4": Family(build=_glm4, names=GLM4_NAMES, is_interleaved=True),
    "cohere": Family(build=_cohere, names=LLAMA_NAMES, is_interleaved=True, has_norm_per_head=True),
    "cohere2": Family(build=_cohere2, names=LLAMA_NAMES, is_interleaved=True),
    "olmo2": Family(build=_olmo2, names=SANDWICH_NAMES),
    "olmo3": Family(build=_olmo3, names=SANDWICH_NAMES),
    "exaone4": Family(build=_exaone4, names=SANDWICH_NAMES),
}
