"""Files of compressed-tensors: groups of modules, each with a kind of numbers and of scales.

Of a matrix [out, in] `weight` holds its codes, int8 or an 8-bit float, or `weight_packed` int32 [out, in * bits / 32]
those of neighbouring columns in one word, moved up by half of their range. `weight_scale` is [1], [out, 1],
[out, groups] or a number for each block; `weight_zero_point` has the same shape, or is packed along its rows as
codes are; `weight_g_idx` int32 [in] says to which group a column belongs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from worker.model.config import ConfigReader
from worker.model.quant.fp8 import read_block
from worker.model.quant.matrix import QuantisedMatrix
from worker.model.quant.reading import (
    EIGHT_BITS_NOTE,
    WORD_BITS,
    Block,
    num_groups,
    read,
    read_along_columns,
    read_along_rows,
    read_groups,
    read_scales,
)
from worker.model.quant.scheme import Quantisation
from worker.model.weights import Part, TensorSource

PACKED, MIXED = "pack-quantized", "mixed-precision"
FORMATS = (PACKED, "int-quantized", "float-quantized", "naive-quantized")
NOT_READ = ("weight_shape", "input_scale", "input_zero_point", "output_scale", "output_zero_point")
"""What follows from config.json, and factors by which others make eight bits of activations."""
HARMLESS_TEXT = "quant_method quantization_status global_compression_ratio ignore version"
"""Which modules were left out shows in the tensors."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Of the matrices of one group."""

    num_bits: int
    is_float: bool
    is_packed: bool
    is_symmetric: bool
    has_order: bool
    block: Block

    def fits(self, source: TensorSource, module: str, shape: tuple[int, ...]) -> bool:
        """Whether the tensors of a module [out, in] can be of this kind, as far as their names and shapes say."""
        if source.has(module + ".weight_packed") != self.is_packed:
            return False
        if source.has(module + ".weight_zero_point") and self.is_symmetric:
            return False
        width = -(-shape[1] * self.num_bits // WORD_BITS)
        if self.is_packed and source.shape(module + ".weight_packed") not in (None, (shape[0], width)):
            return False
        return source.shape(module + ".weight_scale") in (None, *self._shapes_of_scales(shape))

    def _shapes_of_scales(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        if self.block.height is None:
            return [(), (1,)]
        return [(-(-shape[0] // self.block.height), num_groups(shape[1], self.block.width or shape[1]))]

    def read(self, source: TensorSource, module: str, part: Part) -> QuantisedMatrix:
        part = replace(part, is_transposed=False)
        (_, num_columns), columns = part.shape, part.columns
        assert columns is not None
        scale = read_scales(source, module + ".weight_scale", part, self.block)
        codes, zero = self._centred(self._codes(source, module, part), self._zeros(source, module, part, scale), scale)
        size = self.block.width or num_columns
        order = module + ".weight_g_idx"
        groups = read_groups(source, order, num_columns, columns, size, has_order=self.has_order)
        return QuantisedMatrix(codes, scale, zero, groups, self.num_bits)

    def _codes(self, source: TensorSource, module: str, part: Part) -> Tensor:
        """float8 or int8, from minus half of the range on."""
        if self.is_packed:
            codes = read_along_columns(source, module + ".weight_packed", part, self.num_bits)
            return (codes - (1 << self.num_bits - 1)).view(torch.int8)
        dtype = torch.float8_e4m3fn if self.is_float else torch.int8
        return read(source, module + ".weight", part, dtype)

    def _zeros(self, source: TensorSource, module: str, part: Part, scale: Tensor) -> Tensor | None:
        """int8, of the shape of scales."""
        name = module + ".weight_zero_point"
        if self.is_symmetric:
            source.skip(name)
            return None
        if not self.is_packed or source.shape(name) in self._shapes_of_scales(part.shape):
            return read_scales(source, name, part, self.block, torch.int8)
        count = scale.shape[1]
        grouped = Part((part.shape[0], count), part.rows, range(count))
        return (read_along_rows(source, name, grouped, self.num_bits) - (1 << self.num_bits - 1)).view(torch.int8)

    def _centred(self, codes: Tensor, zero: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor | None]:
        """As QuantisedMatrix has them: those of four bits are without a sign."""
        if self.num_bits == 8:
            return codes, None if zero is None else zero.float()
        centre = torch.full_like(scale, 8.0)
        return (codes + 8).view(torch.uint8), centre if zero is None else centre + zero


@dataclass(frozen=True, slots=True)
class Compressed:
    """Every module is of the first of the kinds that it can be of."""

    kinds: Sequence[Kind]

    @property
    def unit(self) -> int:
        return math.lcm(*(kind.block.width or 1 for kind in self.kinds))

    def has(self, source: TensorSource, module: str) -> bool:
        return source.has(module + ".weight_scale")

    def read(self, source: TensorSource, module: str, part: Part) -> QuantisedMatrix:
        for name in NOT_READ:
            source.skip(f"{module}.{name}")
        fitting = (kind for kind in self.kinds if kind.fits(source, module, part.shape))
        return next(fitting, self.kinds[0]).read(source, module, part)


def compressed(config: ConfigReader) -> Quantisation:
    config.ignore(*HARMLESS_TEXT.split())
    form = config.choice("format", (*FORMATS, MIXED))
    _refuse_the_rest(config)
    groups = config.section("config_groups")
    kinds: list[Kind] = []
    has_inputs = False
    for name in groups.names():
        group = groups.section(name)
        group.ignore("targets", "format")
        has_inputs |= bool(group.get("input_activations") or group.get("output_activations"))
        if group.get("weights") is not None:
            kinds.append(_kind(group, form))
    if not kinds:
        raise config.error("config_groups must have a group of modules that are quantised")
    scheme = Compressed(tuple(dict.fromkeys(kinds)))
    return Quantisation("compressed-tensors", scheme, unit=scheme.unit, notes=(EIGHT_BITS_NOTE,) * has_inputs)


def _refuse_the_rest(config: ConfigReader) -> None:
    """Sparse weights, transformed ones, and numbers for a cache of few bits."""
    sparsity = config.section("sparsity_config")
    sparsity.require(format="dense")
    sparsity.ignore(*sparsity.names())
    config.section("transform_config").require(config_groups={})
    config.require(kv_cache_scheme=None)


def _kind(group: ConfigReader, form: str) -> Kind:
    form = group.choice("format", FORMATS, None if form == MIXED else form)
    weights = group.section("weights")
    weights.ignore("observer", "observer_kwargs", "scale_dtype", "zp_dtype")
    weights.require(dynamic=False)
    is_float = weights.choice("type", ("int", "float"), "int") == "float"
    num_bits = weights.choice("num_bits", (8,) if is_float else (4, 8), 8)
    is_symmetric = weights.flag("symmetric", default=True)
    if is_float and not is_symmetric:
        raise weights.error("symmetric must be true for floats")
    order = weights.get("actorder")
    if order not in (None, False, "weight", "static", "group", "dynamic"):
        raise weights.error(f"actorder {order!r:.60} is not supported; supported are weight, static, group, dynamic")
    return Kind(
        num_bits=num_bits,
        is_float=is_float,
        is_packed=form == PACKED,
        is_symmetric=is_symmetric,
        has_order=order in ("group", "dynamic"),
        block=_block(weights),
    )


def _block(weights: ConfigReader) -> Block:
    size, structure = weights.get("group_size"), read_block(weights, "block_structure")
    implied = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = weights.choice("strategy", ("tensor", "channel", "group", "block"), implied)
    if (strategy == "block") != (structure is not None) or (strategy == "group") == (size in (None, -1)):
        raise weights.error(f"strategy {strategy} does not go with group_size {size!r:.20} and the block_structure")
    if structure is not None:
        return structure
    if strategy == "group":
        return Block(1, weights.integer("group_size"))
    return Block(None if strategy == "tensor" else 1, None)
