"""The weights of one rank in the layout of the forward pass, and where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

DUMMY_SEED = 20240607
CPU = torch.device("cpu")


class Linear(Protocol):
    """A product with a matrix [out, in], and a bias if there is one: [..., in] -> [..., out]."""

    @property
    def num_bytes(self) -> int: ...

    def __call__(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class DenseLinear:
    """`weight` [out, in]; `bias` [out] or None."""

    weight: Tensor
    bias: Tensor | None

    @property
    def num_bytes(self) -> int:
        return num_bytes_of(self.weight, self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Embedding(Protocol):
    """Rows of a table by number: [t] -> [t, width]."""

    @property
    def num_bytes(self) -> int: ...

    def __call__(self, tokens: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class DenseEmbedding:
    """`weight` [rows, width]."""

    weight: Tensor

    @property
    def num_bytes(self) -> int:
        return num_bytes_of(self.weight)

    def __call__(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)


class Experts(Protocol):
    """A product for each of several groups of rows: `rows` [n, in] from `ends[i - 1]` up to `ends[i]` go through the
    matrix of expert i, [n, out]. Matrices of empty groups are not read."""

    @property
    def num_bytes(self) -> int: ...

    def __call__(self, rows: Tensor, ends: Tensor) -> Tensor: ...


def num_bytes_of(*tensors: Tensor | None) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors if tensor is not None)


@dataclass(frozen=True, slots=True)
class NormWeights:
    """`weight` and `bias` [size], or [heads, head_dim] for queries and keys."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class MlpWeights:
    """`up` rows are gate, then up, where the network is gated, else up alone."""

    up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class MoeWeights:
    """`router` [experts, hidden] and `shared_gate` [1, hidden] are whole on every rank. Of each expert the matrices are
    `up` [2 * width, hidden], gate rows before up rows, and `down` [hidden, width]; width is the rank's."""

    router: Tensor
    up: Experts
    down: Experts
    shared: MlpWeights | None
    shared_gate: Tensor | None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer, fused: `qkv` rows are queries, keys, values.

    A norm of queries and keys is [heads + kv heads, head_dim], query heads first.
    """

    attention_norm: NormWeights | None
    qkv: Linear
    qk_norm: NormWeights | None
    out: Linear
    attention_out_norm: NormWeights | None
    mlp_norm: NormWeights | None
    mlp: MlpWeights | MoeWeights
    mlp_out_norm: NormWeights | None


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """`embed` and `head` have the rank's part of the vocabulary, and share their tensors where they are tied. `dtype`
    is that of activations."""

    dtype: torch.dtype
    embed: Embedding
    positions: Tensor | None
    embedding_norm: NormWeights | None
    project_in: Tensor | None
    layers: list[LayerWeights]
    final_norm: NormWeights | None
    project_out: Tensor | None
    head: Linear


@dataclass(frozen=True, slots=True)
class Part:
    """What a rank wants of a stored tensor: runs of rows and one of columns, in our layout.

    `shape` is that of the whole tensor, [rows] or [rows, columns]; with `is_transposed` the checkpoint stores it the
    other way round.
    """

    shape: tuple[int, ...]
    rows: Sequence[range]
    columns: range | None = None
    is_transposed: bool = False

    @property
    def num_rows(self) -> int:
        return sum(len(run) for run in self.rows)


class TensorSource(Protocol):
    """Where weights come from, by the checkpoint's names."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device:
        """Where targets are to be; "meta" takes sizes without memory."""

    def has(self, name: str) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...] | None:
        """That of the whole tensor as it is stored; None if one of any shape will be made up.

        Raises:
            ConfigurationError: if the tensor is missing.
        """

    def whole(self, name: str) -> Tensor | None:
        """A small tensor as it is stored, also where only sizes are asked for; None if it will be made up.

        Raises:
            ConfigurationError: if the tensor is missing or not small.
        """

    def copy_into(self, name: str, target: Tensor, part: Part) -> None:
        """Fill `target` [rows of the part, columns of the part], converting between floats of at least 16 bits; any
        other type is asked for only where it is stored.

        Raises:
            ConfigurationError: naming a missing or misshapen tensor, or one of another type.
        """

    def skip(self, name: str) -> None:
        """Another rank holds this one."""

    def finish(self, ignored: Sequence[str] = (), foreign: Sequence[str] = ()) -> None:
        """No more will be asked for.

        Raises:
            ConfigurationError: if tensors are left that nobody asked for and whose names neither end with one of
                `ignored` nor begin with one of `foreign`.
        """


class DummySource:
    """Random weights of any shape from a fixed seed: norms are one, biases and matrices normal with deviation 0.02.
    Another kind of device draws other numbers."""

    dtype = torch.bfloat16

    def __init__(self, *, is_tied: bool, head_name: str, device: torch.device = CPU) -> None:
        self.device, self._generator = device, torch.Generator(device).manual_seed(DUMMY_SEED)
        self._is_tied, self._head = is_tied, head_name + "."
        self.name = f"dummy-{DUMMY_SEED}" if device.type == "cpu" else f"dummy-{device.type}-{DUMMY_SEED}"

    def has(self, name: str) -> bool:
        if name.startswith(self._head):
            # heads are rarely stored in few bits
            return name == self._head + "bias" or (name == self._head + "weight" and not self._is_tied)
        return True

    def shape(self, name: str) -> None:
        return None

    def whole(self, name: str) -> None:
        return None

    def copy_into(self, name: str, target: Tensor, part: Part) -> None:
        if target.dim() == 1 and name.endswith("weight"):
            target.fill_(1.0)
        elif target.itemsize == 1 or not target.dtype.is_floating_point:
            _fill_with_codes(target, self._generator)
        else:
            target.normal_(0.0, 0.02, generator=self._generator)

    def skip(self, name: str) -> None:
        """Nothing is counted here."""

    def finish(self, ignored: Sequence[str] = (), foreign: Sequence[str] = ()) -> None:
        """Every name exists here, so none can be left."""


def _fill_with_codes(target: Tensor, generator: torch.Generator) -> None:
    if target.dtype.is_floating_point:
        target.copy_(torch.empty(target.shape, device=target.device).uniform_(-1.0, 1.0, generator=generator))
    else:
        bounds = torch.iinfo(target.dtype)
        target.random_(bounds.min, bounds.max + 1, generator=generator)
