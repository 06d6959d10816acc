"""Matrices of 8-bit floats: one scale for all of it, for each row, or for each block of rows and columns.

The first two as AutoFP8 and FBGEMM write them (`weight_scale`), the last as DeepSeek's files (`weight_scale_inv`, a
factor in spite of its name).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from common.errors import ConfigurationError
from worker.model.config import MAX_SIZE, ConfigReader
from worker.model.quant.matrix import QuantisedMatrix, neighbours
from worker.model.quant.reading import EIGHT_BITS_NOTE, Block, read, read_scales
from worker.model.quant.scheme import Quantisation
from worker.model.weights import Part, TensorSource

DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
SCALES = ("weight_scale_inv", "weight_scale")
OF_INPUTS = ("input_scale", "activation_scale", "input_scale_ub")
"""Factors by which others make eight bits of activations."""
HARMLESS_TEXT = """
quant_method activation_scheme activation_scale_ub modules_to_not_convert ignored_layers scale_fmt dequantize
"""


@dataclass(frozen=True, slots=True)
class Fp8:
    """`block` None: the shape of the scales tells whether they are for rows or for everything."""

    dtype: torch.dtype
    block: Block | None

    @property
    def unit(self) -> int:
        return 1 if self.block is None else self.block.width or 1

    def has(self, source: TensorSource, module: str) -> bool:
        return any(source.has(f"{module}.{name}") for name in SCALES)

    def read(self, source: TensorSource, module: str, part: Part) -> QuantisedMatrix:
        part = replace(part, is_transposed=False)
        assert part.columns is not None
        scales = next(name for name in (f"{module}.{name}" for name in SCALES) if source.has(name))
        block = self.block or _block_of(source.shape(scales), part.shape[0], scales)
        for name in OF_INPUTS:
            source.skip(f"{module}.{name}")
        return QuantisedMatrix(
            codes=read(source, module + ".weight", part, self.dtype),
            scale=read_scales(source, scales, part, block),
            zero=None,
            groups=neighbours(part.shape[1], block.width or part.shape[1])[part.columns.start : part.columns.stop],
            num_bits=8,
        )


def _block_of(shape: tuple[int, ...] | None, num_rows: int, name: str) -> Block:
    if shape in (None, (), (1,)):
        return Block(None, None)
    if shape in ((num_rows,), (num_rows, 1)):
        return Block(1, None)
    raise ConfigurationError(
        f"tensor {name} has shape {list(shape or ())}, but without weight_block_size in config.json it must be one "
        f"number, or {num_rows}"
    )


def fp8(config: ConfigReader) -> Quantisation:
    config.ignore(*HARMLESS_TEXT.split())
    config.require(expert_dtype="fp8", modules_to_convert=None)
    dtype = DTYPES[config.choice("fmt", tuple(DTYPES), "e4m3")]
    scheme = Fp8(dtype, read_block(config, "weight_block_size"))
    return Quantisation("fp8", scheme, unit=scheme.unit, notes=(EIGHT_BITS_NOTE,))


def read_block(config: ConfigReader, name: str) -> Block | None:
    """Rows and columns that share a scale."""
    value: Any = config.get(name)
    if value is None:
        return None
    is_pair = isinstance(value, list) and len(value) == 2
    if not is_pair or not all(type(size) is int and 1 <= size <= MAX_SIZE for size in value):
        raise config.error(f"{name} must be two positive integers, not {value!r:.60}")
    return Block(*value)
