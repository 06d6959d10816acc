"""How keys and values lie in pages: as they are, or in 8 bits, which writing encodes and reading decodes.

Which, the type of the pages says; any type that is not named here holds numbers as they are:

    float8_e4m3fn, float8_e5m2   clamped to the largest number of the type; what is no number stays none
    int8                         [..., d + 2]: d multiples, from -127 to 127, of a scale per token and head, which is
                                 1/127 of the largest number there, a bfloat16 in the last two bytes

A token's bytes depend on nothing but its own numbers, so that chunks, company and preemption change none of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_TYPE = torch.bfloat16
SCALE_BYTES = SCALE_TYPE.itemsize
LARGEST_MULTIPLE = 127
NOT_A_NUMBER = 0x7F
"""The bits of float8_e4m3fn without the sign."""


def choose_kv_type(option: str, dtype: torch.dtype) -> torch.dtype:
    """The type of the pages by `--kv-cache-dtype`, for a model that computes in `dtype`."""
    return dtype if option == "auto" else getattr(torch, option.replace("fp8", "float8"))


def page_width(head_dim: int, kv_type: torch.dtype) -> int:
    """Elements that a head of a token takes."""
    return head_dim + SCALE_BYTES if kv_type is torch.int8 else head_dim


def write_pages(pages: Tensor, values: Tensor, slots: Tensor) -> None:
    """Put `values` [t, kv heads, d] at `slots` [t] of `pages` [pages, page size, kv heads, page width]."""
    places = pages.view(-1, *pages.shape[2:])
    if pages.dtype is torch.int8:
        values = _multiples_and_scale(values)
    elif pages.dtype.itemsize == 1:
        # torch moves float8 by index as bytes only
        places, values = places.view(torch.int8), _clamped(values, pages.dtype).view(torch.int8)
    places.index_copy_(0, slots, values)


def read_pages(pages: Tensor, blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """The tokens of `blocks` [n] of `pages`, as `dtype`: [n * page size, kv heads, d]."""
    gathered = pages.index_select(0, blocks).flatten(0, 1)
    if pages.dtype is torch.int8:
        return _multiplied(gathered, dtype)
    if pages.dtype is torch.float8_e4m3fn:
        return _widened(gathered).to(dtype)
    return gathered.to(dtype)


def _multiples_and_scale(values: Tensor) -> Tensor:
    """Symmetric rounding to the nearest multiple: no number is off by more than half of the scale."""
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    scales = (wide.abs().amax(-1, keepdim=True) / LARGEST_MULTIPLE).clamp(min=torch.finfo(SCALE_TYPE).tiny)
    # one that is rounded down makes less than 127.5 of the largest number: u = 2**-8
    scales = scales.to(SCALE_TYPE)
    return torch.cat(((wide / scales).round_().to(torch.int8), scales.view(torch.int8)), -1)


def _multiplied(pages: Tensor, dtype: torch.dtype) -> Tensor:
    scales = pages[..., -SCALE_BYTES:].contiguous().view(SCALE_TYPE)
    # small scales are beyond float16
    return (pages[..., :-SCALE_BYTES] * scales.to(torch.promote_types(dtype, SCALE_TYPE))).to(dtype)


def _clamped(values: Tensor, kv_type: torch.dtype) -> Tensor:
    limit = torch.finfo(kv_type).max
    # an infinite number would be clamped too, and its request would go on with it
    return values.masked_fill(values.isinf(), torch.nan).clamp(-limit, limit).to(kv_type)


def _widened(pages: Tensor) -> Tensor:
    """float8_e4m3fn as float32, several times faster than torch's own conversion on a CPU: the bits are those of a
    float16 whose exponent is 8 less. Only what is no number has none there."""
    as_bytes = pages.view(torch.int8)
    if as_bytes.bitwise_and(NOT_A_NUMBER).max() == NOT_A_NUMBER:
        return pages.float()
    halves = as_bytes.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~(1 << 14)).view(torch.float16)
    return halves.float().mul_(2.0**8)
