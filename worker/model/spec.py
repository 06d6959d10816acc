"""What a decoder is, as plain values: all in which architectures differ, and nothing of how tensors are stored."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class RopeKind(StrEnum):
    """How rotary frequencies are stretched beyond the length of pretraining."""

    DEFAULT = "default"
    LINEAR = "linear"
    LLAMA3 = "llama3"


class Activation(StrEnum):
    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    RELU = "relu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary embedding (Su et al., RoFormer, arXiv 2104.09864) in its rotate-half form.

    `factor` divides positions (linear) or the long wavelengths (llama3); the other three belong to llama3 only and are
    in periods per `original_positions`.
    """

    theta: float
    kind: RopeKind = RopeKind.DEFAULT
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One decoder-only transformer. Sizes are counts of elements.

    `windows` has one entry per layer: None for full causal attention, else the number of keys a query sees, its own
    included. `qk_norm` normalises each query and key head before rope. `is_tied` says what the config promises of
    the head; a checkpoint that holds a head tensor decides otherwise.
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
    norm_eps: float
    activation: Activation
    rope: Rope
    windows: tuple[int | None, ...]
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    is_tied: bool = False

    @property
    def scale(self) -> float:
        """Factor on the scores before softmax."""
        return float(self.head_dim**-0.5)

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes that keys and values of one token take over all layers."""
        return 2 * self.num_layers * self.kv_size * itemsize
