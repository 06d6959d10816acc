"""What readers of formats share: parts of stored tensors, small codes out of large words, and sizes of groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import ConfigurationError
from worker.model.config import ConfigReader
from worker.model.quant.matrix import neighbours
from worker.model.weights import Part, TensorSource

WORD_BITS = 32
EIGHT_BITS_NOTE = (
    "activations keep the model's type, which is more exact than the 8 bits that the checkpoint is meant for"
)
AUTO_ROUND_TEXT = """
amp autoround_version act_data_type act_dynamic act_group_size act_sym enable_minmax_tuning enable_norm_bias_tuning
enable_quanted_input gradient_accumulate_steps iters low_gpu_mem_usage lr minmax_lr n_samples nsamples provider
quant_block_list scale_dtype seqlen to_quant_block_names train_bs
"""
"""How AutoRound made a file in another tool's format."""


def read(source: TensorSource, name: str, part: Part, dtype: torch.dtype = torch.float32) -> Tensor:
    """A part of a tensor as `dtype`, [rows] or [rows, columns]; a tensor without dimensions as one."""
    shape = [part.num_rows] if part.shape else []
    shape += [] if part.columns is None else [len(part.columns)]
    target = torch.empty(shape, dtype=dtype, device=source.device)
    source.copy_into(name, target, part)
    return target


def covering(wanted: range, per_word: int) -> range:
    """The words in which so many neighbours each stand, of which some are wanted."""
    return range(wanted.start // per_word, -(-wanted.stop // per_word))


def unpack(words: Tensor, num_bits: int, codes: Tensor) -> None:
    """Take int32 [n, m] apart into `codes` uint8 [n, m, 32 / bits], the lowest bits first."""
    octets = words.view(torch.uint8).view(*words.shape, WORD_BITS // 8)
    for place in range(WORD_BITS // num_bits):
        octet, shift = divmod(place * num_bits, 8)
        codes[..., place] = (octets[..., octet] >> shift) & ((1 << num_bits) - 1)


def read_along_columns(source: TensorSource, name: str, part: Part, num_bits: int) -> Tensor:
    """uint8 [rows, columns] of a tensor whose words hold neighbouring columns, each row by itself."""
    assert part.columns is not None
    per_word = WORD_BITS // num_bits
    num_words, words = -(-part.shape[1] // per_word), covering(part.columns, per_word)
    packed = read(source, name, Part((part.shape[0], num_words), part.rows, words, part.is_transposed), torch.int32)
    codes = packed.new_empty((*packed.shape, per_word), dtype=torch.uint8)
    unpack(packed, num_bits, codes)
    start = part.columns.start - words.start * per_word
    return codes.flatten(1)[:, start : start + len(part.columns)]


def read_along_rows(
    source: TensorSource,
    name: str,
    part: Part,
    num_bits: int,
    order: Sequence[int] | None = None,
    change: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """uint8 [rows, columns] of a tensor whose words hold neighbouring rows: at place i of a word, the lowest bits
    being the first, row `order[i]` of its own. `change` is what is done to words before."""
    runs = [_read_run(source, name, part, rows, num_bits, order, change) for rows in part.rows]
    return runs[0] if len(runs) == 1 else torch.cat(runs)


def _read_run(
    source: TensorSource,
    name: str,
    part: Part,
    rows: range,
    num_bits: int,
    order: Sequence[int] | None,
    change: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    per_word = WORD_BITS // num_bits
    num_words, words = -(-part.shape[0] // per_word), covering(rows, per_word)
    packed = read(
        source, name, Part((num_words, part.shape[1]), [words], part.columns, part.is_transposed), torch.int32
    )
    packed = packed if change is None else change(packed)
    codes = packed.new_empty((len(words), per_word, packed.shape[1]), dtype=torch.uint8)
    unpack(packed, num_bits, codes.transpose(1, 2))
    in_order = codes if order is None else codes[:, torch.tensor(order).argsort()]
    start = rows.start - words.start * per_word
    return in_order.flatten(0, 1)[start : start + len(rows)]


def num_groups(num_columns: int, group_size: int) -> int:
    """Of a row; the last one may be shorter."""
    return -(-num_columns // group_size)


def read_groups(
    source: TensorSource, name: str, num_columns: int, columns: range, group_size: int, *, has_order: bool
) -> Tensor:
    """The group of every one of `columns`, int64 on the CPU: that of the tensor `name`, or neighbours share one.

    Without `has_order` the tensor may be absent, or hold one number throughout, as tools wrote that had no use for it.
    """
    expected = neighbours(num_columns, group_size)[columns.start : columns.stop]
    stored = source.whole(name) if has_order or source.has(name) else None
    if stored is None:
        return expected
    count = num_groups(num_columns, group_size)
    if stored.shape != (num_columns,) or stored.dtype is not torch.int32:
        raise ConfigurationError(f"tensor {name} must be I32 with shape [{num_columns}]")
    if not has_order and bool((stored == stored[0]).all()):
        return expected
    if bool(((stored < 0) | (stored >= count)).any()):
        raise ConfigurationError(f"tensor {name} must hold numbers of groups from 0 to {count - 1}")
    return stored[columns.start : columns.stop].long()


@dataclass(frozen=True, slots=True)
class Block:
    """So many rows and columns share a scale; None is all of them."""

    height: int | None
    width: int | None


def read_scales(
    source: TensorSource, name: str, part: Part, block: Block, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`dtype` [rows of the part, groups]. A scale for all may have no dimension, those for rows may have one."""
    num_rows, count = part.shape[0], num_groups(part.shape[1], block.width or part.shape[1])
    stored = source.shape(name)
    if block.height == 1:
        if stored == (num_rows,) and count == 1:
            return read(source, name, Part((num_rows,), part.rows), dtype)[:, None]
        return read(source, name, Part((num_rows, count), part.rows, range(count)), dtype)
    if block == Block(None, None) and stored in ((), (1,)):
        scale = read(source, name, Part(stored, [range(size) for size in stored]), dtype)
        return scale.view(1, 1).repeat(part.num_rows, 1)
    height = block.height or num_rows
    shape = (-(-num_rows // height), count)
    scales = read(source, name, Part(shape, [range(shape[0])], range(count)), dtype)
    return scales[torch.cat([torch.arange(rows.start, rows.stop) for rows in part.rows]) // height]


def read_group_size(config: ConfigReader) -> int | None:
    """Columns of a group; None, which files write as -1, where a row is one."""
    return None if config.get("group_size") == -1 else config.integer("group_size", 128)


def ignore_auto_round(config: ConfigReader) -> None:
    """Pass over its notes, but not over numbers that are no integers or activations of few bits."""
    config.ignore(*AUTO_ROUND_TEXT.split())
    config.require(data_type="int", act_bits=16)
