"""GPTQ's files (Frantar et al., arXiv 2210.17323), as AutoGPTQ and its successors write them.

Of a matrix [out, in] `qweight` int32 [in * bits / 32, out] has codes of neighbouring columns in one word, `qzeros`
int32 [groups, out * bits / 32] zeros of neighbouring rows, `scales` is [groups, out], and `g_idx` int32 [in] says to
which group a column belongs. The first form of the format stores zeros less one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common.errors import ConfigurationError
from worker.model.config import ConfigReader
from worker.model.quant.matrix import QuantisedMatrix
from worker.model.quant.reading import (
    WORD_BITS,
    ignore_auto_round,
    num_groups,
    read,
    read_along_columns,
    read_along_rows,
    read_group_size,
    read_groups,
)
from worker.model.quant.scheme import Quantisation
from worker.model.weights import Part, TensorSource

NUM_BITS = (2, 4, 8)
HARMLESS_TEXT = """
quant_method method meta tokenizer dataset batch_size pad_token_id damp_percent damp_auto_increment act_group_aware sym
true_sequential static_groups mse lm_head backend use_exllama exllama_config disable_exllama use_cuda_fp16 model_seqlen
max_input_length block_name_to_quantize module_name_preceding_first_block modules_in_block_to_quantize
cache_block_outputs model_name_or_path model_file_base_name hyb_act quantizer
"""
"""How the file was made, and hints for others' kernels. What is symmetric, or the head, shows in its tensors."""


@dataclass(frozen=True, slots=True)
class Gptq:
    """`group_size` None is one group. Where `may_differ`, the shapes of a matrix' tensors decide on its bits and groups
    instead."""

    num_bits: int
    group_size: int | None
    has_order: bool
    is_v2: bool
    may_differ: bool

    @property
    def unit(self) -> int:
        return math.lcm(self.group_size or 1, WORD_BITS // self.num_bits)

    def has(self, source: TensorSource, module: str) -> bool:
        return source.has(module + ".qweight")

    def read(self, source: TensorSource, module: str, part: Part) -> QuantisedMatrix:
        (num_rows, num_columns), columns = part.shape, part.columns
        assert columns is not None
        own = self._own(source, module, num_columns) if self.may_differ else self
        size = own.group_size or num_columns
        count = num_groups(num_columns, size)
        grouped = Part((num_rows, count), part.rows, range(count), is_transposed=True)
        codes = read_along_columns(source, module + ".qweight", replace(part, is_transposed=True), own.num_bits)
        is_signed = own.num_bits == 8 and count == 1 and own._is_around_128(source, module + ".qzeros")
        return QuantisedMatrix(
            codes=(codes ^ 128).view(torch.int8) if is_signed else codes,
            scale=read(source, module + ".scales", grouped),
            zero=None if is_signed else own._zeros(source, module + ".qzeros", grouped),
            groups=read_groups(source, module + ".g_idx", num_columns, columns, size, has_order=self.has_order),
            num_bits=own.num_bits,
        )

    def _own(self, source: TensorSource, module: str, num_columns: int) -> Gptq:
        packed, scales = source.shape(module + ".qweight"), source.shape(module + ".scales")
        if not packed or not scales:
            return self
        num_bits = next((bits for bits in NUM_BITS if packed[0] * WORD_BITS == num_columns * bits), None)
        if num_bits is None or scales[0] < 1 or num_columns % scales[0]:
            raise ConfigurationError(
                f"tensors {module}.qweight {list(packed)} and .scales {list(scales)} are no {num_columns} columns of "
                f"{', '.join(map(str, NUM_BITS))} bits in groups of one size"
            )
        return replace(self, num_bits=num_bits, group_size=num_columns // scales[0])

    def _zeros(self, source: TensorSource, name: str, grouped: Part) -> Tensor:
        change = None if self.is_v2 else self._plus_one
        return read_along_rows(source, name, grouped, self.num_bits, change=change).float()

    def _is_around_128(self, source: TensorSource, name: str) -> bool:
        """Whether all zeros are half of the range, which then are integers with a sign and have a fast product."""
        stored = source.whole(name)
        if stored is None or stored.dtype is not torch.int32:
            return stored is None
        words = stored if self.is_v2 else self._plus_one(stored)
        return bool((words.view(torch.uint8) == 128).all())

    def _plus_one(self, words: Tensor) -> Tensor:
        """Every code of every word, and the carry of a full one into the next: what writers take off whole words."""
        return words + sum(1 << place for place in range(0, WORD_BITS, self.num_bits))


def gptq(config: ConfigReader) -> Quantisation:
    config.ignore(*HARMLESS_TEXT.split())
    config.require(pack_dtype="int32")
    ignore_auto_round(config)
    num_bits = config.choice("bits", NUM_BITS)
    group_size = read_group_size(config)
    form = config.choice("checkpoint_format", ("gptq", "gptq_v2"), config.choice("format", ("gptq", "gptq_v2"), "gptq"))
    scheme = Gptq(
        num_bits=num_bits,
        group_size=group_size,
        has_order=config.flag("desc_act"),
        is_v2=form == "gptq_v2",
        may_differ=bool(config.get("dynamic")),
    )
    return Quantisation("gptq", scheme, unit=scheme.unit)
