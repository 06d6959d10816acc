"""One function per family, from config to Spec, and the names its checkpoints use. Nothing here knows tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from common.errors import ConfigurationError
from worker.model.config import ConfigReader
from worker.model.spec import Spec

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


@dataclass(frozen=True, slots=True)
class Family:
    """`names` maps our name of a layer's parameter to the checkpoint's, without `.weight` and `.bias`."""

    build: Callable[[ConfigReader], Spec]
    names: Mapping[str, str]


def _decoder(config: ConfigReader, model_type: str, **differences: Any) -> Spec:
    """The fields that all families of the Llama lineage share. `differences` are what the caller knows better."""
    num_heads, hidden_size = config.integer("num_attention_heads"), config.integer("hidden_size")
    num_layers, max_positions = config.integer("num_hidden_layers"), config.integer("max_position_embeddings")
    common: dict[str, Any] = {
        "model_type": model_type,
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "num_kv_heads": config.integer("num_key_value_heads", num_heads),
        "head_dim": config.integer("head_dim", max(hidden_size // num_heads, 1)),
        "ffn_size": config.integer("intermediate_size"),
        "vocab_size": config.integer("vocab_size"),
        "max_positions": max_positions,
        "norm_eps": config.number("rms_norm_eps", 1e-6),
        "activation": config.activation(),
        "rope": config.rope(max_positions),
        "windows": (None,) * num_layers,
        "is_tied": config.flag("tie_word_embeddings"),
    }
    spec = Spec(**common | differences)
    if spec.num_heads % spec.num_kv_heads or spec.head_dim % 2:
        raise config.error("num_attention_heads must be a multiple of num_key_value_heads, and head_dim even")
    return spec


def _llama(config: ConfigReader) -> Spec:
    # attention_bias puts a bias on the output projection too, unlike Qwen2's
    bias = config.flag("attention_bias")
    return _decoder(config, "llama", qkv_bias=bias, out_bias=bias, mlp_bias=config.flag("mlp_bias"))


def _mistral(config: ConfigReader) -> Spec:
    window = config.get("sliding_window", 4096)
    num_kv_heads = config.integer("num_key_value_heads", 8)
    return _decoder(config, "mistral", num_kv_heads=num_kv_heads, windows=_same_window(config, window))


def _qwen2(config: ConfigReader) -> Spec:
    return _decoder(config, "qwen2", qkv_bias=True, windows=_late_windows(config))


def _qwen3(config: ConfigReader) -> Spec:
    bias, head_dim = config.flag("attention_bias"), config.integer("head_dim", 128)
    windows = _late_windows(config)
    return _decoder(config, "qwen3", head_dim=head_dim, qk_norm=True, qkv_bias=bias, out_bias=bias, windows=windows)


def _same_window(config: ConfigReader, window: Any) -> tuple[int | None, ...]:
    if window is not None and (not isinstance(window, int) or window <= 0):
        raise config.error(f"sliding_window must be a positive integer or null, not {window!r}")
    return (window,) * config.integer("num_hidden_layers")


def _late_windows(config: ConfigReader) -> tuple[int | None, ...]:
    """Qwen's rule: windows only when switched on, and then by `layer_types` or from `max_window_layers` on."""
    is_on, window = config.flag("use_sliding_window"), config.get("sliding_window", 4096)
    first, kinds = config.get("max_window_layers", 28), config.get("layer_types")
    full = _same_window(config, window if is_on else None)
    if kinds is None:
        return tuple(size if layer >= first else None for layer, size in enumerate(full))
    if len(kinds) != len(full) or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise config.error("layer_types must name full_attention or sliding_attention once per layer")
    return tuple(size if kind == "sliding_attention" else None for kind, size in zip(kinds, full, strict=True))


FAMILIES: dict[str, Family] = {
    "llama": Family(_llama, LLAMA_NAMES),
    "mistral": Family(_mistral, LLAMA_NAMES),
    "qwen2": Family(_qwen2, LLAMA_NAMES),
    "qwen3": Family(_qwen3, LLAMA_NAMES),
}


def read_spec(values: Mapping[str, Any]) -> tuple[Spec, Family]:
    """The Spec of a parsed config.json and the family it belongs to.

    Raises:
        ConfigurationError: if the model type is unknown (lists the known ones), a value is wrong, or a key says
            something that nobody here understands.
    """
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ConfigurationError(f"config.json: model_type {model_type!r} is not supported; supported are {known}")
    family, config = FAMILIES[model_type], ConfigReader(values)
    spec = family.build(config)
    config.finish()
    return spec, family
