"""Families whose feed-forward networks are mixtures of experts."""

from __future__ import annotations

from typing import Any

from worker.model.config import ConfigReader
from worker.model.families.base import Family, everywhere, same_window
from worker.model.families.llama import LLAMA_NAMES, llama_biases, llama_like
from worker.model.families.windows import switched_windows
from worker.model.spec import Moe, QkNorm, Spec

MIXTRAL_NAMES = LLAMA_NAMES | {
    "router": "model.layers.{i}.block_sparse_moe.gate",
    "expert_gate": "model.layers.{i}.block_sparse_moe.experts.{e}.w1",
    "expert_up": "model.layers.{i}.block_sparse_moe.experts.{e}.w3",
    "expert_down": "model.layers.{i}.block_sparse_moe.experts.{e}.w2",
}
QWEN_NAMES = LLAMA_NAMES | {
    "router": "model.layers.{i}.mlp.gate",
    "expert_gate": "model.layers.{i}.mlp.experts.{e}.gate_proj",
    "expert_up": "model.layers.{i}.mlp.experts.{e}.up_proj",
    "expert_down": "model.layers.{i}.mlp.experts.{e}.down_proj",
    "shared_gate_proj": "model.layers.{i}.mlp.shared_expert.gate_proj",
    "shared_up": "model.layers.{i}.mlp.shared_expert.up_proj",
    "shared_down": "model.layers.{i}.mlp.shared_expert.down_proj",
    "shared_gate": "model.layers.{i}.mlp.shared_expert_gate",
}


def _mixtral(config: ConfigReader) -> Spec:
    config.rename(num_local_experts="num_experts")
    config.assume(num_key_value_heads=8, rms_norm_eps=1e-5, num_experts=8, num_experts_per_tok=2)
    return llama_like(
        config,
        "mixtral",
        ropes=everywhere(config, config.rope(1_000_000.0)),
        windows=same_window(config, config.get("sliding_window")),
        moe=_moe(config, config.integer("intermediate_size"), is_renormalised=True),
    )


def _qwen2_moe(config: ConfigReader) -> Spec:
    config.assume(num_key_value_heads=16, num_experts=60, num_experts_per_tok=4, moe_intermediate_size=1408)
    # every second layer, unlike Qwen2
    windows = switched_windows(config, lambda layer, limit: layer % 2 == 1 or layer >= limit)
    shared = {"shared_ffn_size": config.integer("shared_expert_intermediate_size", 5632), "has_shared_gate": True}
    moe = _qwen_moe(config, **shared)
    return llama_like(config, "qwen2_moe", qkv_bias=config.flag("qkv_bias", default=True), windows=windows, moe=moe)


def _qwen3_moe(config: ConfigReader) -> Spec:
    config.rename(num_local_experts="num_experts")
    config.assume(num_key_value_heads=4, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768)
    config.ignore("max_window_layers")
    is_on, window = config.flag("use_sliding_window"), config.get("sliding_window", 4096)
    windows, moe = same_window(config, window if is_on else None), _qwen_moe(config)
    return llama_like(config, "qwen3_moe", qk_norm=QkNorm.HEAD, windows=windows, moe=moe, **llama_biases(config))


def _olmoe(config: ConfigReader) -> Spec:
    config.assume(rms_norm_eps=1e-5, num_experts=64, num_experts_per_tok=8)
    moe = _moe(config, config.integer("intermediate_size"), is_renormalised=config.flag("norm_topk_prob"))
    return llama_like(config, "olmoe", qk_norm=QkNorm.FULL, moe=moe, **llama_biases(config))


def _qwen_moe(config: ConfigReader, **shared: Any) -> Moe:
    """Plain networks in the layers of `mlp_only_layers` and in all but each `decoder_sparse_step`th."""
    step, plain = config.integer("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    if not isinstance(plain, list) or any(type(layer) is not int for layer in plain):
        raise config.error(f"mlp_only_layers must be a list of layer numbers, not {plain!r:.60}")
    layers = range(config.integer("num_hidden_layers"))
    return _moe(
        config,
        config.integer("moe_intermediate_size"),
        is_renormalised=config.flag("norm_topk_prob"),
        sparse_layers=tuple(layer not in plain and (layer + 1) % step == 0 for layer in layers),
        **shared,
    )


def _moe(config: ConfigReader, ffn_size: int, **differences: Any) -> Moe:
    num_experts, num_active = config.integer("num_experts"), config.integer("num_experts_per_tok")
    if num_active > num_experts:
        raise config.error(f"num_experts_per_tok {num_active} must be at most the {num_experts} experts there are")
    common: dict[str, Any] = {"sparse_layers": (True,) * config.integer("num_hidden_layers")}
    return Moe(num_experts=num_experts, num_active=num_active, ffn_size=ffn_size, **common | differences)


MOE_FAMILIES: dict[str, Family] = {
    "mixtral": Family(build=_mixtral, names=MIXTRAL_NAMES),
    "qwen2_moe": Family(build=_qwen2_moe, names=QWEN_NAMES),
    "qwen3_moe": Family(build=_qwen3_moe, names=QWEN_NAMES),
    "olmoe": Family(build=_olmoe, names=QWEN_NAMES),
}
