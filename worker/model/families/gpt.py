"""The other lineages: layer norms, plain feed-forward networks, learned positions or slopes or partial rope."""

from __future__ import annotations

from typing import Any

from worker.model.config import ConfigReader
from worker.model.families.base import Family, QkvLayout, decoder, everywhere, same_window, size_of_heads
from worker.model.families.llama import LLAMA_NAMES
from worker.model.spec import Activation, Norm, QkNorm, Residual, Rope, Spec

CAUSAL_MASKS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")
"""Buffers of old checkpoints. Each ending begins at a dot, so that the biases of c_attn and the like are none."""

GPT2_KEYS = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
    "n_inner": "intermediate_size",
    "activation_function": "hidden_act",
}
GPT2_NAMES = {
    "embed": "transformer.wte",
    "positions": "transformer.wpe",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
    "attention_norm": "transformer.h.{i}.ln_1",
    "qkv": "transformer.h.{i}.attn.c_attn",
    "out": "transformer.h.{i}.attn.c_proj",
    "mlp_norm": "transformer.h.{i}.ln_2",
    "up": "transformer.h.{i}.mlp.c_fc",
    "down": "transformer.h.{i}.mlp.c_proj",
}
GPTJ_NAMES = GPT2_NAMES | {
    "q": "transformer.h.{i}.attn.q_proj",
    "k": "transformer.h.{i}.attn.k_proj",
    "v": "transformer.h.{i}.attn.v_proj",
    "out": "transformer.h.{i}.attn.out_proj",
    "up": "transformer.h.{i}.mlp.fc_in",
    "down": "transformer.h.{i}.mlp.fc_out",
}
GPT_NEO_NAMES = GPT2_NAMES | {
    "q": "transformer.h.{i}.attn.attention.q_proj",
    "k": "transformer.h.{i}.attn.attention.k_proj",
    "v": "transformer.h.{i}.attn.attention.v_proj",
    "out": "transformer.h.{i}.attn.attention.out_proj",
}
BLOOM_NAMES = {
    "embed": "transformer.word_embeddings",
    "embedding_norm": "transformer.word_embeddings_layernorm",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
    "attention_norm": "transformer.h.{i}.input_layernorm",
    "qkv": "transformer.h.{i}.self_attention.query_key_value",
    "out": "transformer.h.{i}.self_attention.dense",
    "mlp_norm": "transformer.h.{i}.post_attention_layernorm",
    "up": "transformer.h.{i}.mlp.dense_h_to_4h",
    "down": "transformer.h.{i}.mlp.dense_4h_to_h",
}
FALCON_NAMES: dict[str, str | tuple[str, ...]] = BLOOM_NAMES | {
    "attention_norm": ("transformer.h.{i}.input_layernorm", "transformer.h.{i}.ln_attn"),
    "mlp_norm": ("transformer.h.{i}.post_attention_layernorm", "transformer.h.{i}.ln_mlp"),
}
GPT_NEOX_NAMES: dict[str, str | tuple[str, ...]] = {
    "embed": "gpt_neox.embed_in",
    "final_norm": "gpt_neox.final_layer_norm",
    "head": ("embed_out", "lm_head"),
    "attention_norm": "gpt_neox.layers.{i}.input_layernorm",
    "qkv": "gpt_neox.layers.{i}.attention.query_key_value",
    "out": "gpt_neox.layers.{i}.attention.dense",
    "mlp_norm": "gpt_neox.layers.{i}.post_attention_layernorm",
    "up": "gpt_neox.layers.{i}.mlp.dense_h_to_4h",
    "down": "gpt_neox.layers.{i}.mlp.dense_4h_to_h",
}
OPT_NAMES = {
    "embed": "model.decoder.embed_tokens",
    "positions": "model.decoder.embed_positions",
    "project_in": "model.decoder.project_in",
    "project_out": "model.decoder.project_out",
    "final_norm": "model.decoder.final_layer_norm",
    "head": "lm_head",
    "attention_norm": "model.decoder.layers.{i}.self_attn_layer_norm",
    "attention_out_norm": "model.decoder.layers.{i}.self_attn_layer_norm",
    "q": "model.decoder.layers.{i}.self_attn.q_proj",
    "k": "model.decoder.layers.{i}.self_attn.k_proj",
    "v": "model.decoder.layers.{i}.self_attn.v_proj",
    "out": "model.decoder.layers.{i}.self_attn.out_proj",
    "mlp_norm": "model.decoder.layers.{i}.final_layer_norm",
    "mlp_out_norm": "model.decoder.layers.{i}.final_layer_norm",
    "up": "model.decoder.layers.{i}.fc1",
    "down": "model.decoder.layers.{i}.fc2",
}
MPT_NAMES = {
    "embed": "transformer.wte",
    "final_norm": "transformer.norm_f",
    "head": "lm_head",
    "attention_norm": "transformer.blocks.{i}.norm_1",
    "qkv": "transformer.blocks.{i}.attn.Wqkv",
    "out": "transformer.blocks.{i}.attn.out_proj",
    "mlp_norm": "transformer.blocks.{i}.norm_2",
    "up": "transformer.blocks.{i}.ffn.up_proj",
    "down": "transformer.blocks.{i}.ffn.down_proj",
}
PHI_NAMES = LLAMA_NAMES | {
    "final_norm": "model.final_layernorm",
    "out": "model.layers.{i}.self_attn.dense",
    "q_norm": "model.layers.{i}.self_attn.q_layernorm",
    "k_norm": "model.layers.{i}.self_attn.k_layernorm",
    "up": "model.layers.{i}.mlp.fc1",
    "down": "model.layers.{i}.mlp.fc2",
}
STARCODER2_NAMES = LLAMA_NAMES | {
    "up": "model.layers.{i}.mlp.c_fc",
    "down": "model.layers.{i}.mlp.c_proj",
}


def gpt_like(config: ConfigReader, model_type: str, **differences: Any) -> Spec:
    """What these lineages read alike. Without `bias` everything has one."""
    bias = differences.pop("bias", True)
    common: dict[str, Any] = {
        "norm": Norm.LAYER,
        "norm_bias": True,
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": bias,
        "is_gated": False,
        "is_tied": config.flag("tie_word_embeddings", True),
    }
    # looked up only where the family does not say otherwise, so that keys it has no use for stay unknown
    if "norm_eps" not in differences:
        common["norm_eps"] = config.number("layer_norm_epsilon", 1e-5)
    if "activation" not in differences:
        common["activation"] = config.activation()
    return decoder(config, model_type, **common | differences)


# Learned positions.


def _gpt2(config: ConfigReader) -> Spec:
    config.ignore("n_ctx")
    return _gpt2_like(config, "gpt2")


def _gpt_bigcode(config: ConfigReader) -> Spec:
    # what an inference server of its own was told, and a number that follows from multi_query
    config.ignore("inference_runner", "validate_runner_input", "pre_allocate_kv_cache", "pad_key_length")
    config.ignore("num_key_value_heads")
    config.assume(activation_function="gelu_pytorch_tanh")
    config.rename(**GPT2_KEYS)
    num_kv_heads = 1 if config.flag("multi_query", True) else config.integer("num_attention_heads")
    return _gpt2_like(config, "gpt_bigcode", num_kv_heads=num_kv_heads)


def _gpt2_like(config: ConfigReader, model_type: str, **differences: Any) -> Spec:
    config.assume(activation_function="gelu_new")
    config.rename(**GPT2_KEYS)
    if not config.flag("scale_attn_weights", True):
        differences["scale"] = 1.0
    return gpt_like(config, model_type, position_offset=0, ffn_size=_four_fold(config), **differences)


def _gpt_neo(config: ConfigReader) -> Spec:
    config.ignore("attention_layers")
    config.assume(activation_function="gelu_new")
    config.rename(num_layers="num_hidden_layers", num_heads="num_attention_heads", activation_function="hidden_act")
    return gpt_like(
        config,
        "gpt_neo",
        position_offset=0,
        scale=1.0,
        qkv_bias=False,
        windows=_alternating_windows(config),
        ffn_size=_four_fold(config),
    )


def _alternating_windows(config: ConfigReader) -> tuple[int | None, ...]:
    """GPT-Neo's rule: `attention_types` has pairs of a pattern and how often it comes, global or local by layer."""
    full, given = same_window(config, config.integer("window_size", 256)), config.get("attention_types")
    try:
        # one more than right is as wrong as any other number
        kinds = [kind for pattern, times in given for kind in list(pattern) * min(times, len(full) + 1)]
    except (TypeError, ValueError):
        kinds = []
    if len(kinds) != len(full) or not all(kind in ("global", "local") for kind in kinds):
        raise config.error('attention_types must give global or local once per layer, as in [[["global"], 24]]')
    return tuple(window if kind == "local" else None for kind, window in zip(kinds, full, strict=True))


def _opt(config: ConfigReader) -> Spec:
    config.assume(activation_function="relu")
    config.rename(ffn_dim="intermediate_size", activation_function="hidden_act")
    config.require(layer_norm_elementwise_affine=True)
    hidden_size, is_normed_first = config.integer("hidden_size"), config.flag("do_layer_norm_before", True)
    width = config.integer("word_embed_proj_dim", hidden_size)
    return gpt_like(
        config,
        "opt",
        norm_eps=1e-5,
        position_offset=2,
        residual=Residual.SEQUENTIAL if is_normed_first else Residual.POST,
        bias=config.flag("enable_bias", True),
        embedding_size=width if width != hidden_size else None,
        final_norm=is_normed_first and not config.flag("_remove_final_layer_norm"),
    )


# Slopes.


def _bloom(config: ConfigReader) -> Spec:
    config.ignore("bias_dropout_fusion", "masked_softmax_fusion", "offset_alibi", "skip_bias_add", "skip_bias_add_qkv")
    config.ignore("slow_but_exact")
    config.assume(seq_length=2048)
    config.rename(n_embed="hidden_size", n_head="num_attention_heads", n_layer="num_hidden_layers")
    config.rename(seq_length="max_position_embeddings")
    return gpt_like(
        config,
        "bloom",
        alibi_scale=1.0,
        embedding_norm=True,
        activation=Activation.GELU_TANH,
        ffn_size=4 * config.integer("hidden_size"),
    )


def _mpt(config: ConfigReader) -> Spec:
    # learned_pos_emb says nothing where there are slopes; the rest is about making the model
    config.ignore("learned_pos_emb", "init_config", "init_device", "embedding_fraction", "tokenizer_name", "verbose")
    config.rename(d_model="hidden_size", n_heads="num_attention_heads", n_layers="num_hidden_layers")
    config.rename(max_seq_len="max_position_embeddings")
    config.require(expansion_ratio=4, no_bias=True, norm_type="low_precision_layernorm")
    return gpt_like(
        config,
        "mpt",
        bias=False,
        norm_bias=False,
        alibi_scale=1.0,
        activation=Activation.GELU,
        ffn_size=4 * config.integer("hidden_size"),
        **_mpt_attention(config),
    )


def _mpt_attention(config: ConfigReader) -> dict[str, Any]:
    inner = config.section("attn_config")
    inner.ignore("attn_impl", "attn_pdrop")
    inner.require(attn_type="multihead_attention", alibi=True, alibi_bias_max=8)
    keys = {"scale": "softmax_scale", "clip_qkv": "clip_qkv"}
    return {name: inner.number(key) for name, key in keys.items() if inner.get(key) is not None}


# Rope.


def _falcon(config: ConfigReader) -> Spec:
    config.assume(max_position_embeddings=2048)
    config.rename(n_embed="hidden_size", n_head="num_attention_heads", n_layer="num_hidden_layers")
    config.rename(n_head_kv="num_kv_heads", ffn_hidden_size="intermediate_size", activation="hidden_act")
    config.assume(hidden_act="gelu")
    has_slopes = config.flag("alibi")
    if has_slopes:
        config.ignore("rope_parameters", "rope_scaling", "rope_theta")
    return gpt_like(
        config,
        config.get("model_type"),
        **_falcon_layers(config),
        bias=config.flag("bias"),
        alibi_scale=size_of_heads(config) ** -0.5 if has_slopes else None,
        ropes=everywhere(config, None if has_slopes else config.rope()),
        ffn_size=config.integer("intermediate_size", config.integer("ff_factor", 4) * config.integer("hidden_size")),
    )


def _falcon_layers(config: ConfigReader) -> dict[str, Any]:
    """Heads of keys and residual form: 40B and larger have groups and two norms side by side, 11B groups and one."""
    num_heads, num_norms = config.integer("num_attention_heads"), config.get("num_ln_in_parallel_attn")
    num_kv_heads = config.integer("num_kv_heads", num_heads)
    is_parallel, is_shared = config.flag("parallel_attn", True), config.flag("multi_query", True)
    if config.flag("new_decoder_architecture", config.get("model_type") == "RefinedWeb"):
        if not is_parallel or num_norms not in (None, 1, 2):
            raise config.error("new_decoder_architecture needs parallel_attn and num_ln_in_parallel_attn 1 or 2")
        return {
            "num_kv_heads": num_kv_heads,
            "residual": Residual.PARALLEL if num_norms == 1 else Residual.PARALLEL_TWO_NORMS,
        }
    if num_norms not in (None, 1) or num_kv_heads not in (1, num_heads):
        raise config.error("num_ln_in_parallel_attn and num_kv_heads other than 1 need new_decoder_architecture")
    return {
        "num_kv_heads": 1 if is_shared else num_heads,
        "residual": Residual.PARALLEL if is_parallel else Residual.SEQUENTIAL,
    }


def _gpt_neox(config: ConfigReader) -> Spec:
    config.assume(hidden_act="gelu", tie_word_embeddings=False)
    config.rename(layer_norm_eps="layer_norm_epsilon", rotary_pct="partial_rotary_factor", rotary_emb_base="rope_theta")
    bias, is_parallel = config.flag("attention_bias", True), config.flag("use_parallel_residual", True)
    return gpt_like(
        config,
        "gpt_neox",
        residual=Residual.PARALLEL_TWO_NORMS if is_parallel else Residual.SEQUENTIAL,
        qkv_bias=bias,
        out_bias=bias,
        ropes=_partial_ropes(config, 0.25),
    )


def _phi(config: ConfigReader) -> Spec:
    config.assume(hidden_act="gelu_new", tie_word_embeddings=False)
    config.rename(layer_norm_eps="layer_norm_epsilon")
    return gpt_like(
        config,
        "phi",
        residual=Residual.PARALLEL,
        num_kv_heads=config.integer("num_key_value_heads", config.integer("num_attention_heads")),
        qk_norm=QkNorm.HEAD if config.flag("qk_layernorm") else QkNorm.NONE,
        ropes=_partial_ropes(config, 0.5),
        head_bias=True,
    )


def _starcoder2(config: ConfigReader) -> Spec:
    config.ignore("layer_norm_epsilon")
    config.assume(hidden_act="gelu_pytorch_tanh")
    config.require(mlp_type="default", norm_type="layer_norm", scale_attn_weights=True)
    return gpt_like(
        config,
        "starcoder2",
        norm_eps=config.number("norm_epsilon", 1e-5),
        num_kv_heads=config.integer("num_key_value_heads", 2),
        ropes=everywhere(config, config.rope()),
        windows=same_window(config, config.get("sliding_window")),
        bias=config.flag("use_bias", True),
    )


def _gptj(config: ConfigReader) -> Spec:
    config.assume(activation_function="gelu_new", tie_word_embeddings=False, rotary_dim=64)
    config.rename(**GPT2_KEYS)
    config.require(rotary=True, scale_attn_weights=True)
    rotary_dim, head_dim = config.integer("rotary_dim"), size_of_heads(config)
    if rotary_dim % 2 or rotary_dim > head_dim:
        raise config.error(f"rotary_dim must be an even number up to {head_dim}, the size of a head")
    return gpt_like(
        config,
        "gptj",
        residual=Residual.PARALLEL,
        ropes=everywhere(config, Rope(theta=10_000.0, rotary_dim=rotary_dim)),
        bias=False,
        mlp_bias=True,
        head_bias=True,
        ffn_size=_four_fold(config),
    )


def _partial_ropes(config: ConfigReader, default_share: float) -> tuple[Rope | None, ...]:
    return everywhere(config, config.rope(head_dim=size_of_heads(config), default_share=default_share))


def _four_fold(config: ConfigReader) -> int:
    return config.integer("intermediate_size", 4 * config.integer("hidden_size"))


FALCON = Family(build=_falcon, names=FALCON_NAMES, prefix="transformer.", qkv=QkvLayout.GROUPED)

GPT_FAMILIES: dict[str, Family] = {
    "bloom": Family(build=_bloom, names=BLOOM_NAMES, prefix="transformer.", qkv=QkvLayout.GROUPED),
    "falcon": FALCON,
    "gpt2": Family(
        build=_gpt2,
        names=GPT2_NAMES,
        prefix="transformer.",
        qkv=QkvLayout.CONCATENATED,
        is_transposed=True,
        ignored=CAUSAL_MASKS,
    ),
    "gpt_bigcode": Family(
        build=_gpt_bigcode,
        names=GPT2_NAMES,
        prefix="transformer.",
        qkv=QkvLayout.GROUPED,
        ignored=CAUSAL_MASKS,
    ),
    "gpt_neo": Family(build=_gpt_neo, names=GPT_NEO_NAMES, prefix="transformer.", ignored=CAUSAL_MASKS),
    "gpt_neox": Family(build=_gpt_neox, names=GPT_NEOX_NAMES, qkv=QkvLayout.GROUPED, ignored=CAUSAL_MASKS),
    "gptj": Family(build=_gptj, names=GPTJ_NAMES, prefix="transformer.", is_interleaved=True, ignored=CAUSAL_MASKS),
    "mpt": Family(build=_mpt, names=MPT_NAMES, prefix="transformer.", qkv=QkvLayout.CONCATENATED),
    "opt": Family(build=_opt, names=OPT_NAMES, prefix="model."),
    "phi": Family(build=_phi, names=PHI_NAMES),
    "RefinedWeb": FALCON,
    "RefinedWebModel": FALCON,
    "starcoder2": Family(build=_starcoder2, names=STARCODER2_NAMES),
}
