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

from worker.model.lora import AdaptedLinear
from worker.model.weights import DenseEmbedding, DenseLinear, num_bytes_of

POINTER, INTEGER = ctypes.c_void_p, ctypes.c_int64
SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}

WeightsType = TypeVar("WeightsType")


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("packed", POINTER),
        ("bias", POINTER),
        ("n", INTEGER),
        ("k", INTEGER),
    )


class PackedLinear:
    """x [..., in] -> [..., out], both of the type of the weights, which is one of SUFFIXES."""

    def __init__(self, library: ctypes.CDLL, dense: DenseLinear) -> None:
        weight = dense.weight if dense.weight.stride(1) == 1 else dense.weight.contiguous()
        self.dtype, (self.num_out, self.num_in) = weight.dtype, weight.shape
        self._packed, self._bias = _pack(library, weight), dense.bias
        bias = None if dense.bias is None else dense.bias.data_ptr()
        self._matrix = _Matrix(self._packed.data_ptr(), bias, self.num_out, self.num_in)
        self._address = ctypes.addressof(self._matrix)
        self._multiply = function_of(library, "multiply", weight.dtype, [POINTER, POINTER, INTEGER, INTEGER, POINTER])
        self._unpack_rows = function_of(library, "unpack_rows", weight.dtype, [POINTER, POINTER, INTEGER, POINTER])

    @property
    def num_bytes(self) -> int:
        return num_bytes_of(self._packed, self._bias)

    def __call__(self, x: Tensor) -> Tensor:
        _check(x, self.dtype, self.num_in)
        flat = x.reshape(-1, self.num_in)
        if flat.stride(1) != 1:
            flat = flat.contiguous()
        out = flat.new_empty((len(flat), self.num_out))
        self._multiply(self._address, flat.data_ptr(), len(flat), flat.stride(0), out.data_ptr())
        return out if x.dim() == 2 else out.view(*x.shape[:-1], self.num_out)

    def rows(self, numbers: Tensor) -> Tensor:
        """Those of the matrix, int64 [t] -> [t, in].

        Raises:
            IndexError: if there is no such row.
        """
        numbers = numbers.contiguous()
        if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < self.num_out:
            raise IndexError(f"rows of a matrix that has {self.num_out}")
        out = torch.empty((len(numbers), self.num_in), dtype=self.dtype)
        self._unpack_rows(self._address, numbers.data_ptr(), len(numbers), out.data_ptr())
        return out


class PackedEmbedding:
    """The rows of a head that is tied to the embedding, whose memory they share."""

    def __init__(self, head: PackedLinear) -> None:
        self._head = head

    @property
    def num_bytes(self) -> int:
        return self._head.num_bytes

    def __call__(self, tokens: Tensor) -> Tensor:
        return self._head.rows(tokens)


def pack(weights: WeightsType, library: ctypes.CDLL | None) -> WeightsType:
    """A tree of dataclasses and lists with dense products in panels, where `library` has them for their type. Lists are
    changed in place, so that only one layer is there twice at a time."""
    if library is None:
        return weights
    packed: WeightsType = _packed(weights, library)
    return packed


def _packed(node: Any, library: ctypes.CDLL) -> Any:
    if isinstance(node, DenseLinear):
        return PackedLinear(library, node) if node.weight.dtype in SUFFIXES and node.weight.numel() else node
    if isinstance(node, AdaptedLinear):
        node.base = _packed(node.base, library)
        return node
    if isinstance(node, list):
        for index, part in enumerate(node):
            node[index] = _packed(part, library)
        return node
    if isinstance(node, tuple):
        return tuple(_packed(part, library) for part in node)
    return _packed_dataclass(node, library) if is_dataclass(node) and not isinstance(node, type) else node


def _packed_dataclass(node: Any, library: ctypes.CDLL) -> Any:
    before = {part.name: getattr(node, part.name) for part in fields(node)}
    after = {name: _packed(part, library) for name, part in before.items()}
    if _is_tied(before.get("embed"), before.get("head")) and isinstance(after["head"], PackedLinear):
        after["embed"] = PackedEmbedding(after["head"])
    changed = {name: part for name, part in after.items() if part is not before[name]}
    return replace(node, **changed) if changed else node


def _is_tied(embed: object, head: object) -> bool:
    if not isinstance(embed, DenseEmbedding) or not isinstance(head, DenseLinear):
        return False
    return embed.weight.data_ptr() == head.weight.data_ptr()


def _pack(library: ctypes.CDLL, weight: Tensor) -> Tensor:
    num_elements = function_of(library, "packed_elements", weight.dtype, [INTEGER, INTEGER], INTEGER)(*weight.shape)
    packed = torch.empty(num_elements, dtype=weight.dtype)
    library.inferfleet_prefer_large_pages(POINTER(packed.data_ptr()), INTEGER(num_bytes_of(packed)))
    fill = function_of(library, "pack", weight.dtype, [POINTER, INTEGER, INTEGER, INTEGER, POINTER])
    fill(weight.data_ptr(), *weight.shape, weight.stride(0), packed.data_ptr())
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
