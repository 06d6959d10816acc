"""Llama and those of its descendants that keep its residual form: norms before, rope, gated feed-forward networks."""

from __future__ import annotations

from typing import Any

from worker.model.config import ConfigReader
from worker.model.families.base import Family, QkvLayout, decoder, everywhere, same_window, size_of_heads
from worker.model.families.windows import layer_kinds, switched_windows, windows_of
from worker.model.spec import Norm, QkNorm, Residual, Rope, Spec

LLAMA_NAMES: dict[str, str | tuple[str, ...]] = {
    "embed": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "attention_norm": "model.layers.{i}.input_layernorm",
    "q": "model.layers.{i}.self_attn.q_proj",
    "k": "model.layers.{i}.self_attn.k_proj",
    "v": "model.layers.{i}.self_attn.v_proj",
    "out": "model.layers.{i}.self_attn.o_proj",
    "q_norm": "model.layers.{i}.self_attn.q_norm",
    "k_norm": "model.layers.{i}.self_attn.k_norm",
    "mlp_norm": "model.layers.{i}.post_attention_layernorm",
    "gate": "model.layers.{i}.mlp.gate_proj",
    "up": "model.layers.{i}.mlp.up_proj",
    "down": "model.layers.{i}.mlp.down_proj",
}
FUSED_MLP_NAMES = LLAMA_NAMES | {"gate_up": "model.layers.{i}.mlp.gate_up_proj"}
PHI3_NAMES = FUSED_MLP_NAMES | {"qkv": "model.layers.{i}.self_attn.qkv_proj"}


def llama_like(config: ConfigReader, model_type: str, **differences: Any) -> Spec:
    """What the Llama lineage reads alike."""
    if "ropes" not in differences:
        differences["ropes"] = everywhere(config, config.rope())
    if "activation" not in differences:
        differences["activation"] = config.activation()
    if "norm_eps" not in differences:
        differences["norm_eps"] = config.number("rms_norm_eps", 1e-6)
    num_kv_heads = config.integer("num_key_value_heads", config.integer("num_attention_heads"))
    return decoder(config, model_type, **{"num_kv_heads": num_kv_heads} | differences)


def llama_biases(config: ConfigReader) -> dict[str, bool]:
    """`attention_bias` is for all four projections, unlike Qwen2's."""
    bias = config.flag("attention_bias")
    return {"qkv_bias": bias, "out_bias": bias, "mlp_bias": config.flag("mlp_bias")}


def _llama(config: ConfigReader) -> Spec:
    return llama_like(config, "llama", **llama_biases(config))


def _mistral(config: ConfigReader) -> Spec:
    config.assume(sliding_window=4096, num_key_value_heads=8)
    return llama_like(config, "mistral", windows=same_window(config, config.get("sliding_window")))


def _ministral(config: ConfigReader) -> Spec:
    config.assume(sliding_window=4096, num_key_value_heads=8)
    windows = windows_of(config, layer_kinds(config, lambda layer: False), config.get("sliding_window"))
    return llama_like(config, "ministral", windows=windows)


def _qwen2(config: ConfigReader) -> Spec:
    return llama_like(config, "qwen2", qkv_bias=True, windows=_late_windows(config))


def _qwen3(config: ConfigReader) -> Spec:
    config.assume(head_dim=128)
    windows = _late_windows(config)
    return llama_like(config, "qwen3", qk_norm=QkNorm.HEAD, windows=windows, **llama_biases(config))


def _late_windows(config: ConfigReader) -> tuple[int | None, ...]:
    return switched_windows(config, lambda layer, limit: layer < limit)


def _phi3(config: ConfigReader) -> Spec:
    config.assume(rms_norm_eps=1e-5, original_max_position_embeddings=4096)
    config.require(full_attn_mod=1, interpolate_factor=1)
    rope = config.rope(head_dim=size_of_heads(config))
    windows = same_window(config, config.get("sliding_window"))
    return llama_like(config, "phi3", ropes=everywhere(config, rope), windows=windows)


def _granite(config: ConfigReader) -> Spec:
    return llama_like(
        config,
        "granite",
        embedding_scale=config.number("embedding_multiplier", 1.0),
        residual_scale=config.number("residual_multiplier", 1.0),
        scale=config.number("attention_multiplier", 1.0),
        logit_scale=1.0 / config.number("logits_scaling", 1.0),
        **llama_biases(config),
    )


def _smollm3(config: ConfigReader) -> Spec:
    config.assume(num_key_value_heads=4, tie_word_embeddings=True)
    config.ignore("max_window_layers")
    ropes = _rope_in_most_layers(config, config.rope(2_000_000.0))
    is_on, window = config.flag("use_sliding_window"), config.get("sliding_window")
    kinds = layer_kinds(config, lambda layer: ropes[layer] is not None)
    windows = windows_of(config, kinds, window if is_on else None)
    return llama_like(config, "smollm3", ropes=ropes, windows=windows, **llama_biases(config))


def _rope_in_most_layers(config: ConfigReader, rope: Rope) -> tuple[Rope | None, ...]:
    """In spite of its name `no_rope_layers` has a 1 for each layer that turns."""
    num_layers, interval = config.integer("num_hidden_layers"), config.integer("no_rope_layer_interval", 4)
    turns = config.get("no_rope_layers")
    turns = [(layer + 1) % interval != 0 for layer in range(num_layers)] if turns is None else turns
    if not isinstance(turns, list) or len(turns) != num_layers or any(turn not in (0, 1) for turn in turns):
        raise config.error("no_rope_layers must have 0 or 1 once per layer")
    return tuple(rope if turn else None for turn in turns)


def _seed_oss(config: ConfigReader) -> Spec:
    config.assume(head_dim=128, num_key_value_heads=8, attention_bias=True)
    biases = llama_biases(config) | {"out_bias": config.flag("attention_out_bias")}
    return llama_like(config, "seed_oss", **biases)


def _internlm3(config: ConfigReader) -> Spec:
    config.rename(qkv_bias="attention_bias", bias="mlp_bias")
    config.assume(head_dim=128, num_key_value_heads=2, rms_norm_eps=1e-5)
    return llama_like(config, "internlm3", **llama_biases(config))


def _ernie4_5(config: ConfigReader) -> Spec:
    config.assume(head_dim=128, num_key_value_heads=2, rms_norm_eps=1e-5, tie_word_embeddings=True)
    bias, ropes = config.flag("use_bias"), everywhere(config, config.rope(500_000.0))
    return llama_like(config, "ernie4_5", ropes=ropes, qkv_bias=bias, out_bias=bias, mlp_bias=bias)


def _stablelm(config: ConfigReader) -> Spec:
    config.require(qk_layernorm=False)
    is_parallel = config.flag("use_parallel_residual")
    return llama_like(
        config,
        "stablelm",
        num_kv_heads=config.integer("num_key_value_heads", 32),
        norm=Norm.LAYER,
        norm_bias=True,
        norm_eps=config.number("layer_norm_eps", 1e-5),
        residual=Residual.PARALLEL if is_parallel else Residual.SEQUENTIAL,
        ropes=everywhere(config, config.rope(head_dim=size_of_heads(config), default_share=0.25)),
        qkv_bias=config.flag("use_qkv_bias"),
    )


def glm_like(config: ConfigReader, model_type: str, **differences: Any) -> Spec:
    config.assume(head_dim=128, num_key_value_heads=2, rms_norm_eps=1.5625e-7, attention_bias=True)
    rope = config.rope(head_dim=size_of_heads(config), default_share=0.5)
    bias, ropes = config.flag("attention_bias"), everywhere(config, rope)
    return llama_like(config, model_type, ropes=ropes, qkv_bias=bias, **differences)


def _glm(config: ConfigReader) -> Spec:
    return glm_like(config, "glm")


LLAMA_FAMILIES: dict[str, Family] = {
    "llama": Family(build=_llama, names=LLAMA_NAMES),
    "mistral": Family(build=_mistral, names=LLAMA_NAMES),
    "ministral": Family(build=_ministral, names=LLAMA_NAMES),
    "qwen2": Family(build=_qwen2, names=LLAMA_NAMES),
    "qwen3": Family(build=_qwen3, names=LLAMA_NAMES),
    "phi3": Family(build=_phi3, names=PHI3_NAMES, qkv=QkvLayout.CONCATENATED),
    "granite": Family(build=_granite, names=LLAMA_NAMES),
    "smollm3": Family(build=_smollm3, names=LLAMA_NAMES),
    "seed_oss": Family(build=_seed_oss, names=LLAMA_NAMES),
    "internlm3": Family(build=_internlm3, names=LLAMA_NAMES),
    "ernie4_5": Family(build=_ernie4_5, names=LLAMA_NAMES, is_interleaved=True),
    "stablelm": Family(build=_stablelm, names=LLAMA_NAMES),
    "glm": Family(build=_glm, names=FUSED_MLP_NAMES, is_interleaved=True),
}
