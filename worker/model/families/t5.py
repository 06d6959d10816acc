"""T5, its version 1.1, FLAN and mT5: one encoder-decoder, whose forms differ in few numbers and in the feed-forward
network."""

from __future__ import annotations

from worker.model.config import ACTIVATIONS, ConfigReader
from worker.model.families.base import Family
from worker.model.spec import Activation, T5Spec

MAX_DISTANCE = 1 << 16
"""A bound on the table of biases; models have 128."""


def _stack_names(stack: str, mlp_layer: int) -> dict[str, str]:
    attention, mlp = f"{stack}.block.{{i}}.layer.0", f"{stack}.block.{{i}}.layer.{mlp_layer}"
    return {
        f"{stack}_bias": f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias",
        f"{stack}_attention_norm": f"{attention}.layer_norm",
        f"{stack}_q": f"{attention}.SelfAttention.q",
        f"{stack}_k": f"{attention}.SelfAttention.k",
        f"{stack}_v": f"{attention}.SelfAttention.v",
        f"{stack}_out": f"{attention}.SelfAttention.o",
        f"{stack}_mlp_norm": f"{mlp}.layer_norm",
        f"{stack}_gate": f"{mlp}.DenseReluDense.wi_0",
        f"{stack}_gated_up": f"{mlp}.DenseReluDense.wi_1",
        f"{stack}_up": f"{mlp}.DenseReluDense.wi",
        f"{stack}_down": f"{mlp}.DenseReluDense.wo",
        f"{stack}_final_norm": f"{stack}.final_layer_norm",
    }


CROSS = "decoder.block.{i}.layer.1"
T5_NAMES: dict[str, str | tuple[str, ...]] = {
    "embed": ("shared", "encoder.embed_tokens", "decoder.embed_tokens"),
    "head": "lm_head",
    "cross_norm": f"{CROSS}.layer_norm",
    "cross_q": f"{CROSS}.EncDecAttention.q",
    "cross_k": f"{CROSS}.EncDecAttention.k",
    "cross_v": f"{CROSS}.EncDecAttention.v",
    "cross_out": f"{CROSS}.EncDecAttention.o",
    **_stack_names("encoder", 1),
    **_stack_names("decoder", 2),
}

IGNORED_SUFFIXES = (".embed_tokens.weight", ".EncDecAttention.relative_attention_bias.weight")
"""The embedding once more, and a bias that old files hold although no cross-attention uses it."""


def _t5(config: ConfigReader) -> T5Spec:
    # what tells 1.0, which scales, from 1.1 and FLAN, which do not, is the tie flag; files of newer versions of
    # transformers say it by a key of its own and tie always
    is_scaled = config.flag("scale_decoder_outputs", config.get("tie_word_embeddings") is not False)
    return _build(config, "t5", "relu", is_scaled)


def _mt5(config: ConfigReader) -> T5Spec:
    return _build(config, "mt5", "gated-gelu", is_scaled=False)


def _build(config: ConfigReader, model_type: str, feed_forward: str, is_scaled: bool) -> T5Spec:
    hidden_size, vocab_size = config.integer("d_model"), config.integer("vocab_size")
    num_encoder_layers = config.integer("num_layers")
    activation, is_gated = _feed_forward(config, feed_forward)
    num_buckets, max_distance = _buckets(config)
    config.ignore("dropout_rate", "initializer_factor")
    return T5Spec(
        model_type=model_type,
        num_encoder_layers=num_encoder_layers,
        num_layers=config.integer("num_decoder_layers", num_encoder_layers),
        hidden_size=hidden_size,
        num_heads=config.integer("num_heads"),
        head_dim=config.integer("d_kv"),
        ffn_size=config.integer("d_ff"),
        vocab_size=vocab_size,
        # as many on either side
        max_positions=2 * config.integer("n_positions", 512),
        activation=activation,
        is_gated=is_gated,
        norm_eps=config.number("layer_norm_epsilon", 1e-6),
        num_buckets=num_buckets,
        max_distance=max_distance,
        output_scale=float(hidden_size**-0.5) if is_scaled else 1.0,
        decoder_start_id=_decoder_start_id(config, vocab_size),
        is_tied=config.flag("tie_word_embeddings", default=True),
    )


def _feed_forward(config: ConfigReader, default: str) -> tuple[Activation, bool]:
    """`feed_forward_proj` is an activation's name, with gated- before it or not; newer files spell both out beside."""
    projection = str(config.get("feed_forward_proj", default))
    name = projection.removeprefix("gated-")
    if name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise config.error(
            f"feed_forward_proj {projection!r:.60} is not supported; supported are {known}, "
            "each also with gated- before it"
        )
    # the one place where gelu means its approximation
    name = "gelu_new" if projection == "gated-gelu" else name
    return config.activation("dense_act_fn", name), config.flag("is_gated_act", projection.startswith("gated-"))


def _buckets(config: ConfigReader) -> tuple[int, int]:
    num_buckets = config.integer("relative_attention_num_buckets", 32)
    max_distance = config.integer("relative_attention_max_distance", 128)
    if not 4 <= num_buckets < 2 * max_distance <= 2 * MAX_DISTANCE:
        raise config.error(
            f"relative_attention_num_buckets {num_buckets} must be at least 4 and below twice "
            f"relative_attention_max_distance {max_distance}, which may be {MAX_DISTANCE} at most"
        )
    return num_buckets, max_distance


def _decoder_start_id(config: ConfigReader, vocab_size: int) -> int:
    """T5 begins with its padding token, and files that do not name the one name the other."""
    token = config.get("decoder_start_token_id")
    token = config.get("pad_token_id") if token is None else token
    if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
        raise config.error(f"decoder_start_token_id must be a token id below {vocab_size}, not {token!r:.60}")
    return token


T5_FAMILIES: dict[str, Family] = {
    "mt5": Family(build=_mt5, names=T5_NAMES, ignored=IGNORED_SUFFIXES),
    "t5": Family(build=_t5, names=T5_NAMES, ignored=IGNORED_SUFFIXES),
}
