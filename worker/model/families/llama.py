"""Llama and its descendants: RMS norms, rope, gated feed-forward networks."""

from __future__ import annotations

from typing import Any

from worker.model.config import ConfigReader
from worker.model.families.base import Family, decoder, everywhere, same_window
from worker.model.spec import QkNorm, Spec

LLAMA_NAMES = {
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


def llama_like(config: ConfigReader, model_type: str, **differences: Any) -> Spec:
    """What the Llama lineage reads alike."""
    if "ropes" not in differences:
        differences["ropes"] = everywhere(config, config.rope())
    common: dict[str, Any] = {
        "num_kv_heads": config.integer("num_key_value_heads", config.integer("num_attention_heads")),
        "norm_eps": config.number("rms_norm_eps", 1e-6),
        "activation": config.activation(),
    }
    return decoder(config, model_type, **common | differences)


def _llama(config: ConfigReader) -> Spec:
    # attention_bias puts a bias on the output projection too, unlike Qwen2's
    bias = config.flag("attention_bias")
    return llama_like(config, "llama", qkv_bias=bias, out_bias=bias, mlp_bias=config.flag("mlp_bias"))


def _mistral(config: ConfigReader) -> Spec:
    window = config.get("sliding_window", 4096)
    num_kv_heads = config.integer("num_key_value_heads", 8)
    return llama_like(config, "mistral", num_kv_heads=num_kv_heads, windows=same_window(config, window))


def _qwen2(config: ConfigReader) -> Spec:
    return llama_like(config, "qwen2", qkv_bias=True, windows=late_windows(config))


def _qwen3(config: ConfigReader) -> Spec:
    bias, head_dim = config.flag("attention_bias"), config.integer("head_dim", 128)
    windows = late_windows(config)
    return llama_like(
        config, "qwen3", head_dim=head_dim, qk_norm=QkNorm.HEAD, qkv_bias=bias, out_bias=bias, windows=windows
    )


def late_windows(config: ConfigReader) -> tuple[int | None, ...]:
    """Qwen's rule: windows only when switched on, and then by `layer_types` or from `max_window_layers` on."""
    is_on, window = config.flag("use_sliding_window"), config.get("sliding_window", 4096)
    first, kinds = config.get("max_window_layers", 28), config.get("layer_types")
    full = same_window(config, window if is_on else None)
    if kinds is None:
        return tuple(size if layer >= first else None for layer, size in enumerate(full))
    return windows_of_kinds(config, kinds, full)


def windows_of_kinds(config: ConfigReader, kinds: Any, full: tuple[int | None, ...]) -> tuple[int | None, ...]:
    """`layer_types` names full_attention or sliding_attention once per layer."""
    is_list = isinstance(kinds, list) and len(kinds) == len(full)
    if not is_list or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise config.error("layer_types must name full_attention or sliding_attention once per layer")
    return tuple(size if kind == "sliding_attention" else None for kind, size in zip(kinds, full, strict=True))


LLAMA_FAMILIES: dict[str, Family] = {
    "llama": Family(build=_llama, names=LLAMA_NAMES),
    "mistral": Family(build=_mistral, names=LLAMA_NAMES),
    "qwen2": Family(build=_qwen2, names=LLAMA_NAMES),
    "qwen3": Family(build=_qwen3, names=LLAMA_NAMES),
}
