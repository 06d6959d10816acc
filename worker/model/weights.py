"""From named tensors to fused weights in the layout of the forward pass, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from worker.model.checkpoint import ProgressFunction
from worker.model.spec import Spec

DUMMY_SEED = 20240607


@dataclass(frozen=True, slots=True)
class Linear:
    """`weight` [out, in]; `bias` [out] or None."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer, fused: `qkv` rows are queries, keys, values; `gate_up` rows are gate, then up.

    `qk_norm` [heads + kv heads, head_dim] holds the query norm once per head, then the key norm.
    """

    attention_norm: Tensor
    qkv: Linear
    qk_norm: Tensor | None
    out: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """`embed` and `head` are [vocab, hidden], the same tensor where they are tied."""

    embed: Tensor
    layers: list[LayerWeights]
    final_norm: Tensor
    head: Tensor


class TensorSource(Protocol):
    """Where weights come from, by the checkpoint's names."""

    @property
    def dtype(self) -> torch.dtype: ...

    def has(self, name: str) -> bool: ...

    def copy_into(self, name: str, target: Tensor) -> None:
        """Fill `target`, converting to its dtype. Raises ConfigurationError naming a missing or misshapen tensor."""

    def finish(self) -> None:
        """Raise ConfigurationError if tensors are left that nobody asked for."""


class DummySource:
    """Random weights of any shape from a fixed seed: norms are one, biases and matrices normal with deviation 0.02."""

    dtype = torch.bfloat16

    def __init__(self, spec: Spec, on_progress: ProgressFunction | None = None) -> None:
        self._generator = torch.Generator().manual_seed(DUMMY_SEED)
        self._is_tied, self._total = spec.is_tied, num_parameters(spec) * self.dtype.itemsize
        self._on_progress, self._done = on_progress, 0

    def has(self, name: str) -> bool:
        return not (self._is_tied and name.startswith("lm_head"))

    def copy_into(self, name: str, target: Tensor) -> None:
        if name.endswith("norm.weight"):
            target.fill_(1.0)
        else:
            target.normal_(0.0, 0.02, generator=self._generator)
        self._done += target.numel() * self.dtype.itemsize
        if self._on_progress is not None:
            self._on_progress(min(self._done, self._total), self._total)

    def finish(self) -> None:
        """Every name exists here, so none can be left."""


class _Builder:
    """Allocates fused tensors and has the source fill their parts."""

    def __init__(self, names: Mapping[str, str], source: TensorSource, dtype: torch.dtype) -> None:
        self._names, self._source, self._dtype = names, source, dtype

    def vector(self, name: str, size: int, layer: int = 0) -> Tensor:
        return self._fill([(name, size)], "weight", (), layer)

    def linear(self, parts: list[tuple[str, int]], num_in: int, has_bias: bool, layer: int = 0) -> Linear:
        """One product out of several: `parts` are (our name, number of rows)."""
        weight = self._fill(parts, "weight", (num_in,), layer)
        return Linear(weight, self._fill(parts, "bias", (), layer) if has_bias else None)

    def matrix(self, name: str, num_rows: int, num_in: int) -> Tensor:
        return self._fill([(name, num_rows)], "weight", (num_in,), 0)

    def has(self, name: str) -> bool:
        return self._source.has(self._names[name] + ".weight")

    def _fill(self, parts: list[tuple[str, int]], kind: str, width: tuple[int, ...], layer: int) -> Tensor:
        target = torch.empty((sum(rows for _, rows in parts), *width), dtype=self._dtype)
        start = 0
        for name, rows in parts:
            full_name = f"{self._names[name].format(i=layer)}.{kind}"
            self._source.copy_into(full_name, target[start : start + rows])
            start += rows
        return target


def load_weights(spec: Spec, names: Mapping[str, str], source: TensorSource, dtype: torch.dtype) -> DecoderWeights:
    """Read all weights as `dtype` on the CPU.

    Whether head and embedding are tied is decided by the checkpoint: without a head tensor they are, with a different
    one they are not, whatever the config says.

    Raises:
        ConfigurationError: if a tensor is missing, misshapen or superfluous; the message names it.
    """
    builder = _Builder(names, source, dtype)
    embed = builder.matrix("embed", spec.vocab_size, spec.hidden_size)
    layers = [_load_layer(spec, builder, layer) for layer in range(spec.num_layers)]
    final_norm = builder.vector("final_norm", spec.hidden_size)
    head = builder.matrix("head", spec.vocab_size, spec.hidden_size) if builder.has("head") else embed
    source.finish()
    return DecoderWeights(embed, layers, final_norm, embed if torch.equal(head, embed) else head)


def _load_layer(spec: Spec, builder: _Builder, layer: int) -> LayerWeights:
    hidden, ffn = spec.hidden_size, spec.ffn_size
    qkv = [("q", spec.query_size), ("k", spec.kv_size), ("v", spec.kv_size)]
    return LayerWeights(
        attention_norm=builder.vector("attention_norm", hidden, layer),
        qkv=builder.linear(qkv, hidden, spec.qkv_bias, layer),
        qk_norm=_load_qk_norm(spec, builder, layer) if spec.qk_norm else None,
        out=builder.linear([("out", hidden)], spec.query_size, spec.out_bias, layer),
        mlp_norm=builder.vector("mlp_norm", hidden, layer),
        gate_up=builder.linear([("gate", ffn), ("up", ffn)], hidden, spec.mlp_bias, layer),
        down=builder.linear([("down", hidden)], ffn, spec.mlp_bias, layer),
    )


def _load_qk_norm(spec: Spec, builder: _Builder, layer: int) -> Tensor:
    query = builder.vector("q_norm", spec.head_dim, layer).expand(spec.num_heads, -1)
    key = builder.vector("k_norm", spec.head_dim, layer).expand(spec.num_kv_heads, -1)
    return torch.cat((query, key))


def num_parameters(spec: Spec) -> int:
    """Elements of all weights, biases and norms left out, an untied head included."""
    attention = spec.hidden_size * (2 * spec.query_size + 2 * spec.kv_size)
    layer = attention + 3 * spec.hidden_size * spec.ffn_size
    return spec.num_layers * layer + spec.vocab_size * spec.hidden_size * (1 if spec.is_tied else 2)
