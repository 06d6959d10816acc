"""What a model is, as plain values: all in which architectures differ, and nothing of how tensors are stored."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class RopeKind(StrEnum):
    """How rotary frequencies are stretched beyond the length of pretraining."""

    DEFAULT = "default"
    LINEAR = "linear"
    DYNAMIC = "dynamic"
    LLAMA3 = "llama3"
    YARN = "yarn"
    LONGROPE = "longrope"


class Activation(StrEnum):
    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    RELU = "relu"


class Norm(StrEnum):
    RMS = "rms"
    LAYER = "layer"


class QkNorm(StrEnum):
    """What of queries and keys is normalised before rope: each head by itself, or all heads of a token together."""

    NONE = "none"
    HEAD = "head"
    FULL = "full"


class Residual(StrEnum):
    """Where a layer's norms stand. f is attention or the feed-forward network:

    sequential          x + f(norm(x)), attention first
    parallel            x + attention(y) + mlp(y), y = norm(x)
    parallel_two_norms  the same, each with a norm of its own
    sandwich            x + norm(f(norm(x)))
    post                norm(x + f(x))
    output              x + norm(f(x))
    """

    SEQUENTIAL = "sequential"
    PARALLEL = "parallel"
    PARALLEL_TWO_NORMS = "parallel_two_norms"
    SANDWICH = "sandwich"
    POST = "post"
    OUTPUT = "output"

    @property
    def is_parallel(self) -> bool:
        return self in (Residual.PARALLEL, Residual.PARALLEL_TWO_NORMS)

    @property
    def has_input_norm(self) -> bool:
        return self not in (Residual.POST, Residual.OUTPUT)

    @property
    def has_output_norm(self) -> bool:
        return self in (Residual.SANDWICH, Residual.POST, Residual.OUTPUT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary embedding (Su et al., RoFormer, arXiv 2104.09864) in its rotate-half form.

    rotary_dim          elements of a head that turn, the first ones; None turns all
    factor              divides positions (linear) or stretches wavelengths (dynamic, llama3, yarn)
    original_positions  length of pretraining (dynamic, llama3, yarn, longrope)
    low_freq_factor, high_freq_factor
                        llama3: in periods per `original_positions`
    beta_fast, beta_slow
                        yarn: turns within `original_positions` from which on nothing, and up to which everything, is
                        stretched; `is_truncated` rounds the two places to whole dimensions
    short_factors, long_factors
                        longrope: divisors of each frequency, below and above `original_positions`
    amplitude           factor on cosine and sine (yarn, longrope)
    """

    theta: float
    kind: RopeKind = RopeKind.DEFAULT
    rotary_dim: int | None = None
    factor: float = 1.0
    original_positions: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    is_truncated: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    amplitude: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Moe:
    """A mixture of experts: each token goes to `num_active` of `num_experts`, weighed by the router's softmax.

    `is_renormalised` makes the weights of the active ones sum to one. `sparse_layers` has one entry per layer; the
    others have a plain network. `shared_ffn_size` is the width of an expert that sees every token, 0 for none, and
    `has_shared_gate` whether a sigmoid weighs it.
    """

    num_experts: int
    num_active: int
    ffn_size: int
    is_renormalised: bool
    sparse_layers: tuple[bool, ...]
    shared_ffn_size: int = 0
    has_shared_gate: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One decoder-only transformer. Sizes are counts of elements.

    windows             one entry per layer: None for full causal attention, else the number of keys a query sees, its
                        own included
    ropes               one entry per layer; None where a layer does not turn its heads
    position_offset     row of the table of learned positions where position 0 is; None without such a table
    alibi_scale         factor on ALiBi's slopes; None without
    scale               factor on the scores before softmax
    attention_softcap, logit_softcap
                        c * tanh(x / c) on scores and logits
    clip_qkv            queries, keys and values are clamped to its negative and itself
    norm_plus_one       the weight of a norm is what is stored plus one
    wide_norm           norms multiply by their weights in float32 and round once, as the model was trained; the others
                        round before, too
    embedding_size      width of the embedding where it is not hidden_size: two projections stand between
    embedding_norm      a norm stands behind the embedding; final_norm: one before the head
    embedding_scale, residual_scale, logit_scale
                        factors on embeddings, on what a layer adds, and on logits
    is_tied             what the config promises of the head; a checkpoint that holds a head tensor decides otherwise
    """

    model_type: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    max_positions: int
    activation: Activation
    norm_eps: float
    scale: float
    windows: tuple[int | None, ...]
    ropes: tuple[Rope | None, ...]
    norm: Norm = Norm.RMS
    norm_bias: bool = False
    norm_plus_one: bool = False
    wide_norm: bool = False
    residual: Residual = Residual.SEQUENTIAL
    qk_norm: QkNorm = QkNorm.NONE
    position_offset: int | None = None
    alibi_scale: float | None = None
    attention_softcap: float | None = None
    clip_qkv: float | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    is_gated: bool = True
    mlp_bias: bool = False
    moe: Moe | None = None
    embedding_size: int | None = None
    embedding_norm: bool = False
    final_norm: bool = True
    head_bias: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    is_tied: bool = False

    @property
    def is_position_bound(self) -> bool:
        """Whether the model knows nothing beyond `max_positions`; ALiBi goes on for ever."""
        return self.position_offset is not None or any(self.ropes)


@dataclass(frozen=True, slots=True, kw_only=True)
class T5Spec:
    """One encoder-decoder transformer of the T5 lineage (Raffel et al., arXiv 1910.10683). Sizes are counts of
    elements.

    num_layers          those of the decoder, which are the ones that keep keys and values
    max_positions       input and output together that the model was trained with
    num_buckets, max_distance
                        the learned bias tells apart `num_buckets` distances of key and query; those of `max_distance`
                        and more are one
    output_scale        factor on what the head sees
    decoder_start_id    first token of every answer, no part of it
    is_tied             as in Spec
    """

    model_type: str
    num_encoder_layers: int
    num_layers: int
    hidden_size: int
    num_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    max_positions: int
    activation: Activation
    is_gated: bool
    norm_eps: float
    num_buckets: int
    max_distance: int
    output_scale: float
    decoder_start_id: int
    is_tied: bool = False

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads

    @property
    def is_position_bound(self) -> bool:
        """Distances go on for ever."""
        return False


AnySpec = Spec | T5Spec
