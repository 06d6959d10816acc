"""Turns and places against rope.rotate in float64 and write_pages."""

from __future__ import annotations

import pytest
import torch

from tests.triton.test_norms import UNITS, error, random
from worker.attention.pages import page_width, write_pages
from worker.kernels.triton import rope
from worker.kernels.triton.operations import TritonOperations
from worker.model.operations import Operations
from worker.model.rope import angles, both_ways, rotate

TORCH, OURS = Operations(), TritonOperations()
NUM_PAGES, PAGE_SIZE = 5, 16
EIGHT_BITS = [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8]
# heads, kv heads, head_dim, rotary: grouped, odd, alone, of a size that is no power of two, more than one program
SHAPES = [(6, 2, 64, 64), (3, 3, 24, 8), (1, 1, 128, 128), (5, 1, 80, 32), (18, 9, 128, 128), (4, 2, 2, 2)]


def turns_of(num_tokens: int, rotary: int, device: torch.device, dtype: torch.dtype = torch.float32):
    frequencies = 1.0 / 100.0 ** (torch.arange(0, rotary, 2) / rotary)
    return tuple(
        each.to(device) for each in angles(torch.arange(3, 3 + num_tokens), both_ways(frequencies), dtype, 1.25)
    )


def slots_of(num_tokens: int, device: torch.device) -> torch.Tensor:
    return torch.randperm(NUM_PAGES * PAGE_SIZE, generator=torch.Generator().manual_seed(1))[:num_tokens].to(device)


def pages_of(num_kv_heads: int, head_dim: int, kv_type: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    shape = NUM_PAGES, PAGE_SIZE, num_kv_heads, page_width(head_dim, kv_type)
    return tuple(torch.zeros(shape, device=device).to(kv_type) for _ in range(2))


def heads_of(num_tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device):
    """Queries and keys, and values, in one product; heads of very different sizes."""
    qkv = random(num_tokens, heads + 2 * kv_heads, head_dim, dtype=dtype, device=device)
    qkv *= torch.logspace(-3, 1, qkv.shape[1], device=device)[:, None].to(dtype)
    return qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]


def as_bytes(pages: torch.Tensor) -> torch.Tensor:
    return pages.view(torch.uint8)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", UNITS, ids=str)
def test_queries_and_keys_turn_and_keys_and_values_land_in_their_places(device, dtype, shape):
    heads, kv_heads, head_dim, rotary = shape
    turned, v = heads_of(7, heads, kv_heads, head_dim, dtype, device)
    turns, slots, pages = turns_of(7, rotary, device), slots_of(7, device), pages_of(kv_heads, head_dim, dtype, device)
    assert not v.is_contiguous() and rope.can_turn_and_write(turned, v, turns, pages)
    q = OURS.turn_and_write(turned, v, heads, turns, pages, slots)
    expected_q, expected_k = rotate(turned.double(), *(each.double() for each in turns)).split([heads, kv_heads], 1)
    found_k, found_v = (each.flatten(0, 1)[slots] for each in pages)
    bar = 4 if dtype is torch.float32 else 1.01
    assert error(q, expected_q) <= bar and error(found_k, expected_k) <= bar
    assert torch.equal(found_v, v)
    assert error(q, expected_q.flip(0)) > bar and error(found_k, expected_k.flip(0)) > bar
    others = torch.ones(NUM_PAGES * PAGE_SIZE, dtype=torch.bool, device=device).index_fill_(0, slots, False)
    assert not any(each.flatten(0, 1)[others].any() for each in pages)


@pytest.mark.parametrize("kv_type", EIGHT_BITS, ids=str)
@pytest.mark.parametrize("dtype", UNITS, ids=str)
def test_pages_of_8_bits_have_the_bytes_of_write_pages(device, dtype, kv_type):
    for heads, kv_heads, head_dim, _ in SHAPES[1:5:2]:
        turned, v = heads_of(5, heads, kv_heads, head_dim, dtype, device)
        # beyond the formats, half way between two numbers, and nothing but zeros
        v[0, 0, :2], v[1] = torch.tensor([6e4, -6e4]), 0.0
        v[2, 0] = torch.linspace(-17, 17, 35)[:head_dim].repeat(1 + head_dim // 35)[:head_dim]
        slots = slots_of(5, device)
        pages, expected = (pages_of(kv_heads, head_dim, kv_type, device) for _ in range(2))
        assert rope.can_turn_and_write(turned, v, None, pages)
        q = OURS.turn_and_write(turned, v, heads, None, pages, slots)
        for each, values in zip(expected, (turned[:, heads:], v), strict=True):
            write_pages(each, values, slots)
        assert torch.equal(q, turned[:, :heads])
        for found, should_be in zip(pages, expected, strict=True):
            assert torch.equal(as_bytes(found), as_bytes(should_be)), (heads, kv_heads, head_dim)
        assert not torch.equal(as_bytes(pages[0]), as_bytes(expected[1]))


@pytest.mark.parametrize("kv_type", EIGHT_BITS[:2], ids=str)
def test_every_number_of_16_bits_has_the_byte_of_write_pages(device, kv_type):
    every = torch.arange(1 << 16).to(torch.uint16).view(torch.bfloat16).view(4, 1, 1 << 14).to(device)
    slots = torch.arange(4, device=device)
    pages, expected = (pages_of(1, 1 << 14, kv_type, device) for _ in range(2))
    OURS.turn_and_write(torch.cat((every, every), 1), every, 1, None, pages, slots)
    write_pages(expected[0], every, slots)
    is_number = expected[0].float().isfinite()
    assert 0 < int((~is_number).sum()) < 1000
    for found in pages:
        assert torch.equal(found.float().isfinite(), is_number)
        assert torch.equal(as_bytes(found)[is_number], as_bytes(expected[0])[is_number])


@pytest.mark.parametrize("kv_type", EIGHT_BITS, ids=str)
def test_keys_are_turned_and_rounded_before_they_are_encoded(device, kv_type):
    turned, v = heads_of(6, 4, 2, 64, torch.bfloat16, device)
    turns, slots = turns_of(6, 64, device), slots_of(6, device)
    pages, expected = (pages_of(2, 64, kv_type, device) for _ in range(2))
    OURS.turn_and_write(turned, v, 4, turns, pages, slots)
    TORCH.turn_and_write(turned, v, 4, turns, expected, slots)
    assert torch.equal(as_bytes(pages[1]), as_bytes(expected[1]))
    is_same = (as_bytes(pages[0]) == as_bytes(expected[0])).float().mean()
    assert is_same > 0.999
    TORCH.turn_and_write(turned, v, 4, None, expected, slots)
    assert not torch.equal(as_bytes(pages[0]), as_bytes(expected[0]))


@pytest.mark.parametrize("kv_type", EIGHT_BITS, ids=str)
@pytest.mark.parametrize("spoiled", [torch.nan, -torch.nan, torch.inf, -torch.inf], ids=str)
def test_what_is_no_number_spoils_its_own_head_only(device, kv_type, spoiled):
    turned, v = heads_of(4, 2, 3, 17, torch.float32, device)
    v[2, 1, 5] = spoiled
    pages, slots = pages_of(3, 17, kv_type, device), slots_of(4, device)
    OURS.turn_and_write(turned, v, 2, None, pages, slots)
    written = pages[1].flatten(0, 1)[slots]
    scales = written[..., -2:].contiguous().view(torch.bfloat16) if kv_type is torch.int8 else written.float()
    assert (~scales.float().isfinite()).any(-1).nonzero().tolist() == [[2, 1]]


def test_what_kernels_cannot_turn_is_left_to_torch(device):
    turned, v = heads_of(9, 2, 1, 16, torch.float64, device)
    turns, slots = turns_of(9, 16, device, torch.float64), slots_of(9, device)
    pages, expected = (pages_of(1, 16, torch.float64, device) for _ in range(2))
    assert not rope.can_turn_and_write(turned, v, turns, pages)
    q = OURS.turn_and_write(turned, v, 2, turns, pages, slots)
    assert torch.equal(q, TORCH.turn_and_write(turned, v, 2, turns, expected, slots))
    assert all(torch.equal(*each) for each in zip(pages, expected, strict=True))
