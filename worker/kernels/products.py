"""Products with matrices in panels (source/products.cpp says how they lie), in place of those that torch would do.

A row of a result depends on its own row of the input alone, to the last bit, so that a token's numbers are the same in
every company.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from worker.kernels.room import Room
from worker.model.lora import AdaptedLinear
from worker.model.weights import DenseEmbedding, DenseLinear, Linear, MlpWeights, num_bytes_of

POINTER, INTEGER = ctypes.c_void_p, ctypes.c_int64
SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}
NO_ACTIVATION = -1
"""As the kernel numbers it."""

LEAST_PASSING, MOST_PASSING = 64 << 20, 300 << 20
"""Bytes of all weights which one or two tokens load past the caches that cores share. Every few milliseconds they would
drive out of them what is said between two steps, and the processes that carry tokens on. Such loads are slower by a
thirtieth (Zen 4), which long steps do not get back; fewer weights may stay in a cache themselves."""

WeightsType = TypeVar("WeightsType")


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("packed", POINTER),
        ("bias", POINTER),
        ("n", INTEGER),
        ("k", INTEGER),
        ("is_gated", INTEGER),
    )


class PackedLinear:
    """x [..., in] -> [..., out], both of the type of the weights, which is one of SUFFIXES.

    Where a matrix `is_gated`, the upper half of its rows is the gate of the lower one.
    """

    def __init__(
        self, library: ctypes.CDLL, dense: DenseLinear, *, is_gated: bool = False, room: Room | None = None
    ) -> None:
        weight = dense.weight if dense.weight.stride(1) == 1 else dense.weight.contiguous()
        self.dtype, (self.num_out, self.num_in), self.is_gated = weight.dtype, weight.shape, is_gated
        self._bias = dense.bias
        bias = None if dense.bias is None else dense.bias.data_ptr()
        self._matrix = _Matrix(None, bias, self.num_out, self.num_in, is_gated)
        self._packed = _pack(library, weight, self._matrix, room or Room())
        self._matrix.packed = self._packed.data_ptr()
        self._address = ctypes.addressof(self._matrix)
        arguments = [POINTER, POINTER, INTEGER, INTEGER, INTEGER, POINTER, POINTER]
        self._multiply = function_of(library, "multiply", weight.dtype, arguments)
        self._unpack_rows = function_of(library, "unpack_rows", weight.dtype, [POINTER, POINTER, INTEGER, POINTER])

    @property
    def num_bytes(self) -> int:
        return num_bytes_of(self._packed, self._bias)

    @property
    def address(self) -> int:
        """That of the matrix as kernels want it."""
        return self._address

    def __call__(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return self.multiply(x)
        return self.multiply(x.reshape(-1, self.num_in)).view(*x.shape[:-1], self.num_out)

    def multiply(self, x: Tensor, activation: int = NO_ACTIVATION, residual: Tensor | None = None) -> Tensor:
        """Of x [t, in] the product, or what `activation`, a number of the kernel, makes of it: of a gated matrix
        [t, out / 2]. To a product without one `residual` [t, out] is added, both rounded before."""
        _check(x, self.dtype, self.num_in)
        if x.stride(1) != 1:
            x = x.contiguous()
        num_rows = x.shape[0]
        is_halved = self.is_gated and activation != NO_ACTIVATION
        out = x.new_empty((num_rows, self.num_out // 2 if is_halved else self.num_out))
        added = None if residual is None else residual.data_ptr()
        self._multiply(self._address, x.data_ptr(), num_rows, x.stride(0), activation, added, out.data_ptr())
        return out

    def can_add(self, residual: Tensor) -> bool:
        return residual.dtype is self.dtype and residual.is_contiguous() and residual.shape[-1] == self.num_out

    def rows(self, numbers: Tensor) -> Tensor:
        """Those of the matrix, int64 [t] -> [t, in].

        Raises:
            IndexError: if there is no such row.
        """
        numbers = numbers.contiguous()
        num_rows = numbers.shape[0]
        if num_rows and not 0 <= int(numbers.min()) <= int(numbers.max()) < self.num_out:
            raise IndexError(f"rows of a matrix that has {self.num_out}")
        out = torch.empty((num_rows, self.num_in), dtype=self.dtype)
        self._unpack_rows(self._address, numbers.data_ptr(), num_rows, out.data_ptr())
        return out


class PackedEmbedding:
    """The rows of a head that is tied to the embedding, whose memory they share."""

    def __init__(self, head: PackedLinear) -> None:
        self._head = head

    @property
    def num_bytes(self) -> int:
        return self._head.num_bytes

    @property
    def dtype(self) -> torch.dtype:
        return self._head.dtype

    @property
    def address(self) -> int:
        """That of the head."""
        return self._head.address

    def __call__(self, tokens: Tensor) -> Tensor:
        return self._head.rows(tokens)


def pack(weights: WeightsType, library: ctypes.CDLL | None, room: Room | None = None) -> WeightsType:
    """A tree of dataclasses and lists with dense products in panels, where `library` has them for their type. The
    panels are in `room`, else in one of their own."""
    if library is None:
        return weights
    room = room or Room()
    packed: WeightsType = _packed(weights, library, room)
    library.inferfleet_let_weights_pass(LEAST_PASSING <= room.num_bytes <= MOST_PASSING)
    return packed


def _packed(node: Any, library: ctypes.CDLL, room: Room, *, is_gated: bool = False) -> Any:
    if isinstance(node, DenseLinear):
        can_pack = node.weight.dtype in SUFFIXES and node.weight.numel()
        return PackedLinear(library, node, is_gated=is_gated, room=room) if can_pack else node
    if isinstance(node, AdaptedLinear):
        node.base = _packed(node.base, library, room, is_gated=is_gated)
        return node
    if isinstance(node, MlpWeights):
        up = _packed(node.up, library, room, is_gated=_is_gated(node))
        return replace(node, up=up, down=_packed(node.down, library, room))
    if isinstance(node, list):
        for index, part in enumerate(node):
            node[index] = _packed(part, library, room)
        return node
    if isinstance(node, tuple):
        return tuple(_packed(part, library, room) for part in node)
    return _packed_dataclass(node, library, room) if is_dataclass(node) and not isinstance(node, type) else node


def _packed_dataclass(node: Any, library: ctypes.CDLL, room: Room) -> Any:
    before = {part.name: getattr(node, part.name) for part in fields(node)}
    after = {name: _packed(part, library, room) for name, part in before.items()}
    if _is_tied(before.get("embed"), before.get("head")) and isinstance(after["head"], PackedLinear):
        after["embed"] = PackedEmbedding(after["head"])
    changed = {name: part for name, part in after.items() if part is not before[name]}
    return replace(node, **changed) if changed else node


def _is_gated(mlp: MlpWeights) -> bool:
    up, down = _shape(mlp.up), _shape(mlp.down)
    return up is not None and down is not None and up[0] == 2 * down[1]


def _shape(linear: Linear) -> torch.Size | None:
    base = linear.base if isinstance(linear, AdaptedLinear) else linear
    return base.weight.shape if isinstance(base, DenseLinear) else None


def alone(linear: Linear) -> PackedLinear | None:
    """`linear` if it is nothing but a product of ours in this step, so that more can be done in one go."""
    if isinstance(linear, AdaptedLinear):
        linear = linear if linear.is_changed else linear.base
    return linear if isinstance(linear, PackedLinear) else None


def _is_tied(embed: object, head: object) -> bool:
    if not isinstance(embed, DenseEmbedding) or not isinstance(head, DenseLinear):
        return False
    return embed.weight.data_ptr() == head.weight.data_ptr()


def _pack(library: ctypes.CDLL, weight: Tensor, matrix: _Matrix, room: Room) -> Tensor:
    address = ctypes.addressof(matrix)
    num_elements = function_of(library, "packed_elements", weight.dtype, [POINTER], INTEGER)(address)
    packed = room.take(num_elements, weight.dtype)
    fill = function_of(library, "pack", weight.dtype, [POINTER, POINTER, INTEGER, POINTER])
    fill(address, weight.data_ptr(), weight.stride(0), packed.data_ptr())
    return packed


def _check(x: Tensor, dtype: torch.dtype, num_in: int) -> None:
    # the kernel believes what it is told, and would read whatever lies behind
    if x.dtype is not dtype or x.shape[-1] != num_in:
        raise ValueError(f"an input of {num_in} {dtype} in a row is expected, not {x.shape[-1]} {x.dtype}")


def function_of(
    library: ctypes.CDLL, name: str, dtype: torch.dtype, arguments: Sequence[Any], result: Any = None
) -> Callable[..., Any]:
    """That of `library` for `dtype`, one of SUFFIXES."""
    function = library[f"inferfleet_{name}_{SUFFIXES[dtype]}"]
    function.argtypes, function.restype = list(arguments), result
    return function
