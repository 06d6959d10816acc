"""Pages of 8 bits by the definitions of their formats, number by number: the oracle of what is written and read."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from worker.attention import pages as kv_pages
from worker.model import operations, t5

KV_TYPES = {"int8": torch.int8, "fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
"""By the value of --kv-cache-dtype."""
MANTISSA_BITS = {torch.float8_e4m3fn: 3, torch.float8_e5m2: 2}
BIASES = {torch.float8_e4m3fn: 7, torch.float8_e5m2: 15}


def decoded(pages: torch.Tensor) -> torch.Tensor:
    """The numbers of pages, float64 [..., d]."""
    raw = pages.view(torch.uint8).numpy().astype(np.uint32)
    if pages.dtype is torch.int8:
        scales = ((raw[..., -2:-1] << 16) | (raw[..., -1:] << 24)).view(np.float32)
        return torch.from_numpy(raw[..., :-2].astype(np.int8) * scales.astype(np.float64))
    bits, bias = MANTISSA_BITS[pages.dtype], BIASES[pages.dtype]
    mantissa, exponent = (raw & ((1 << bits) - 1)) / (1 << bits), (raw >> bits & ((1 << (7 - bits)) - 1)).astype(int)
    numbers = np.where(exponent > 0, 1 + mantissa, mantissa) * 2.0 ** (np.maximum(exponent, 1) - bias)
    if pages.dtype is torch.float8_e5m2:
        numbers[exponent == 31] = np.where(mantissa == 0, np.inf, np.nan)[exponent == 31]
    else:
        numbers[(raw & 0x7F) == 0x7F] = np.nan
    return torch.from_numpy(np.where(raw >> 7, -numbers, numbers))


def half_steps(values: torch.Tensor, kv_type: torch.dtype) -> torch.Tensor:
    """How far off each of `values` [..., d] may be when it is read again, float64: half of the distance to the next
    number of the format. The scale of int8 has 8 bits."""
    sizes = values.double().abs()
    if kv_type is torch.int8:
        return (sizes.amax(-1, keepdim=True) / 254 * (1 + 2.0**-8)).expand_as(sizes)
    bits = MANTISSA_BITS[kv_type]
    return sizes.mul(2.0 ** -(bits + 1)).clamp(min=2.0 ** -(bits + BIASES[kv_type]))


def with_other_scales(pages: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """int8 pages of which the scales [..., heads, 1] are others."""
    scales = pages[..., -2:].contiguous().view(torch.bfloat16)
    return torch.cat((pages[..., :-2], change(scales).contiguous().view(torch.int8)), -1)


def with_scales_of_other_heads(pages: torch.Tensor) -> torch.Tensor:
    return with_other_scales(pages, lambda scales: scales.roll(1, -2))


def with_larger_scales(pages: torch.Tensor) -> torch.Tensor:
    """By a fiftieth."""
    return with_other_scales(pages, lambda scales: scales * 1.02)


def nearest(values: torch.Tensor, kv_type: torch.dtype) -> torch.Tensor:
    """What `values` [..., d] become in pages of the type, as numbers of the type of `values`."""
    if kv_type is torch.int8:
        scales = (values.abs().amax(-1, keepdim=True).float() / 127).bfloat16().to(values.dtype)
        return (values / scales).round() * scales
    numbers = decoded(torch.arange(256, dtype=torch.uint8).view(kv_type))
    numbers = numbers[numbers.isfinite()].unique()
    places = torch.bucketize(values.double().contiguous(), (numbers[1:] + numbers[:-1]) / 2)
    return numbers[places].to(values.dtype)


def write_instead(
    monkeypatch: pytest.MonkeyPatch, write: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
) -> None:
    """From here on models write pages in another way."""
    for module in (operations, t5):
        monkeypatch.setattr(module, "write_pages", write)


def spoil_what_is_written(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """From here on models spoil the places [t, heads, page width] of int8 pages that they wrote."""

    def write(pages: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        kv_pages.write_pages(pages, values, slots)
        if pages.dtype is torch.int8:
            places = pages.view(-1, *pages.shape[2:])
            places[slots] = spoil(places[slots])

    write_instead(monkeypatch, write)


def share_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on int8 pages are wrong: what is written together has the scale of its largest number in each head."""
    encode = kv_pages._multiples_and_scale

    def encode_together(values: torch.Tensor) -> torch.Tensor:
        largest = values.abs().amax((0, 2))[:, None].expand(len(values), -1, 1)
        encoded = encode(torch.cat((values, largest), -1))
        return torch.cat((encoded[..., : values.shape[-1]], encoded[..., -2:]), -1)

    monkeypatch.setattr(kv_pages, "_multiples_and_scale", encode_together)
