"""Files of bitsandbytes: eight bits with a scale for each row, or four with one for each block (Dettmers et al., QLoRA,
arXiv 2305.14314).

Of a matrix [out, in] of four bits `weight` uint8 [out * in / 2, 1] has two neighbours in a byte, the first in its upper
half. `weight.quant_map` [16] is what codes stand for and `weight.absmax` the factor of each block of all numbers in a
row; these may be uint8 themselves, whose numbers `weight.nested_quant_map` [256] has, times the factor of a block in
`weight.nested_absmax`, plus an offset. `weight.quant_state.bitsandbytes__nf4` is a text in JSON with the sizes. Of
eight bits `weight` is int8 and `SCB` [out] the largest of each row.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common.errors import ConfigurationError
from worker.model.config import ConfigReader
from worker.model.quant.matrix import QuantisedMatrix, neighbours
from worker.model.quant.reading import read
from worker.model.quant.scheme import Quantisation
from worker.model.weights import Part, TensorSource

MAX_STATE_BYTES = 4096
HARMLESS_TEXT = """
quant_method _load_in_4bit _load_in_8bit bnb_4bit_compute_dtype bnb_4bit_use_double_quant llm_int8_threshold
llm_int8_skip_modules llm_int8_enable_fp32_cpu_offload llm_int8_has_fp16_weight
"""
"""What was left out shows in the tensors; columns of outliers, which others multiply apart, are stored like all."""


@dataclass(frozen=True, slots=True)
class State:
    """Numbers of a block, and factors of a block of these with what is added to them."""

    block: int = 64
    nested_block: int = 256
    offset: float = 0.0


@dataclass(frozen=True, slots=True)
class FourBits:
    """`kind` is nf4 or fp4."""

    kind: str
    unit: int = 64

    def has(self, source: TensorSource, module: str) -> bool:
        return source.has(module + ".weight.absmax")

    def read(self, source: TensorSource, module: str, part: Part) -> QuantisedMatrix:
        columns, num_columns = part.columns, part.shape[1]
        assert columns is not None
        name = module + ".weight"
        state = self._state(source, name)
        size = math.gcd(num_columns, state.block)
        return QuantisedMatrix(
            codes=torch.cat([_read_codes(source, name, part, rows) for rows in part.rows]),
            scale=torch.cat([_read_factors(source, name, part, rows, size, state) for rows in part.rows]),
            zero=None,
            groups=neighbours(num_columns, size)[columns.start : columns.stop],
            num_bits=4,
            table=read(source, name + ".quant_map", Part((16,), [range(16)])),
        )

    def _state(self, source: TensorSource, weight: str) -> State:
        name = f"{weight}.quant_state.bitsandbytes__{self.kind}"
        octets = source.whole(name)
        if octets is None:
            return State()
        if octets.dtype is not torch.uint8 or octets.numel() > MAX_STATE_BYTES:
            raise ConfigurationError(f"tensor {name} must hold a text of {MAX_STATE_BYTES} bytes at most")
        return _parsed(bytes(octets.flatten().tolist()), name)


def _parsed(text: bytes, name: str) -> State:
    try:
        values = json.loads(text)
        reader = ConfigReader(values, f"tensor {name}")
    except (ValueError, RecursionError, TypeError) as error:
        raise ConfigurationError(f"tensor {name} must hold a JSON object") from error
    offset = reader.get("nested_offset", 0.0)
    if type(offset) not in (int, float) or not math.isfinite(offset):
        raise reader.error(f"nested_offset must be a number, not {offset!r:.60}")
    return State(reader.integer("blocksize", 64), reader.integer("nested_blocksize", 256), float(offset))


def _read_codes(source: TensorSource, name: str, part: Part, rows: range) -> Tensor:
    """uint8 [rows, columns of the part]."""
    (num_rows, num_columns), columns = part.shape, part.columns
    assert columns is not None
    first, end = rows.start * num_columns, rows.stop * num_columns
    octets = range(first // 2, -(-end // 2))
    stored = Part((-(-num_rows * num_columns // 2), 1), [octets], range(1))
    packed = read(source, name, stored, torch.uint8)
    codes = torch.cat((packed >> 4, packed & 15), 1).flatten()
    whole = codes[first % 2 :][: end - first].view(len(rows), num_columns)
    return whole[:, columns.start : columns.stop]


def _read_factors(source: TensorSource, name: str, part: Part, rows: range, size: int, state: State) -> Tensor:
    """float32 [rows, columns / size]; blocks go on from row to row, so that one of `size` lies in one of theirs."""
    num_rows, num_columns = part.shape
    first, end = rows.start * num_columns // state.block, -(-rows.stop * num_columns // state.block)
    stored = Part((-(-num_rows * num_columns // state.block),), [range(first, end)])
    if source.has(name + ".nested_absmax"):
        factors = _nested(source, name, stored, state)
    else:
        factors = read(source, name + ".absmax", stored)
    starts = torch.arange(rows.start * num_columns, rows.stop * num_columns, size)
    return factors[starts // state.block - first].view(len(rows), -1)


def _nested(source: TensorSource, name: str, stored: Part, state: State) -> Tensor:
    (wanted,), (total,) = stored.rows, stored.shape
    codes = read(source, name + ".absmax", stored, torch.uint8)
    table = read(source, name + ".nested_quant_map", Part((256,), [range(256)]))
    count = -(-total // state.nested_block)
    factors = read(source, name + ".nested_absmax", Part((count,), [range(count)]))
    blocks = torch.arange(wanted.start, wanted.stop) // state.nested_block
    return table[codes.int()] * factors[blocks] + state.offset


@dataclass(frozen=True, slots=True)
class EightBits:
    unit: int = 1

    def has(self, source: TensorSource, module: str) -> bool:
        return source.has(module + ".SCB")

    def read(self, source: TensorSource, module: str, part: Part) -> QuantisedMatrix:
        (num_rows, num_columns), columns = part.shape, part.columns
        assert columns is not None
        self._check_format(source, module + ".weight_format")
        return QuantisedMatrix(
            codes=read(source, module + ".weight", replace(part, is_transposed=False), torch.int8),
            scale=read(source, module + ".SCB", Part((num_rows,), part.rows))[:, None] / 127,
            zero=None,
            groups=neighbours(num_columns, num_columns)[columns.start : columns.stop],
            num_bits=8,
        )

    def _check_format(self, source: TensorSource, name: str) -> None:
        stored = source.whole(name) if source.has(name) else None
        if stored is not None and stored.any():
            raise ConfigurationError(f"tensor {name} must be 0, which stands for rows")


def bitsandbytes(config: ConfigReader) -> Quantisation:
    config.ignore(*HARMLESS_TEXT.split())
    has_4_bits, has_8_bits = config.flag("load_in_4bit"), config.flag("load_in_8bit")
    if has_4_bits == has_8_bits:
        raise config.error("either load_in_4bit or load_in_8bit must be true")
    kind = config.choice("bnb_4bit_quant_type", ("nf4", "fp4"), "fp4")
    config.require(bnb_4bit_quant_storage="uint8")
    if has_8_bits:
        return Quantisation("bitsandbytes", EightBits())
    scheme = FourBits(kind)
    return Quantisation(f"bitsandbytes-{kind}", scheme, unit=scheme.unit)
