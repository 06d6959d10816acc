"""Pages of 8 bits, against the definitions of their formats."""

from __future__ import annotations

import pytest
import torch

from tests.support.kv_types import (
    KV_TYPES,
    decoded,
    half_steps,
    share_scales,
    with_larger_scales,
    with_scales_of_other_heads,
)
from tests.worker.attention.cases import BLOCK_SIZE, KINDS, Case, kind_case, run
from worker.attention.cpu import CpuAttention
from worker.attention.pages import choose_kv_type, page_width, read_pages, write_pages
from worker.attention.reference import ReferenceAttention

NUM_TOKENS, NUM_HEADS, HEAD_DIM, NUM_PAGES = 60, 3, 17, 9
TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

each_type = pytest.mark.parametrize("kv_type", KV_TYPES.values(), ids=KV_TYPES)


def random_values(dtype: torch.dtype = torch.float32, num_tokens: int = NUM_TOKENS) -> torch.Tensor:
    """Heads of very different sizes, one of them nothing but zeros."""
    values = torch.randn((num_tokens, NUM_HEADS, HEAD_DIM), generator=torch.Generator().manual_seed(1))
    values *= torch.logspace(-3, 2, NUM_HEADS)[:, None]
    values[3, 1] = 0.0
    return values.to(dtype)


def empty_pages(kv_type: torch.dtype) -> torch.Tensor:
    return torch.zeros((NUM_PAGES, BLOCK_SIZE, NUM_HEADS, page_width(HEAD_DIM, kv_type)), dtype=kv_type)


def slots_of(num_tokens: int = NUM_TOKENS) -> torch.Tensor:
    return torch.randperm(NUM_PAGES * BLOCK_SIZE, generator=torch.Generator().manual_seed(2))[:num_tokens]


def written(kv_type: torch.dtype, values: torch.Tensor) -> torch.Tensor:
    pages = empty_pages(kv_type)
    write_pages(pages, values, slots_of(len(values)))
    return pages


def is_within_half_a_step(pages: torch.Tensor, values: torch.Tensor) -> bool:
    got = decoded(pages).flatten(0, 1)[slots_of(len(values))]
    return bool(((got - values.double()).abs() <= half_steps(values, pages.dtype)).all())


def test_the_option_names_the_type():
    assert {name: choose_kv_type(name, torch.bfloat16) for name in KV_TYPES} == KV_TYPES
    assert choose_kv_type("auto", torch.bfloat16) is torch.bfloat16


@each_type
@pytest.mark.parametrize("dtype", TYPES)
def test_numbers_become_the_nearest_ones_of_the_format(kv_type, dtype):
    values = random_values(dtype)
    pages = written(kv_type, values)
    assert is_within_half_a_step(pages, values)
    errors = (decoded(pages).flatten(0, 1)[slots_of()] - values.double()).abs()
    assert bool((errors > 0.9 * half_steps(values, kv_type)).any())
    others = torch.ones(NUM_PAGES * BLOCK_SIZE, dtype=torch.bool).index_fill_(0, slots_of(), False)
    assert not decoded(pages).flatten(0, 1)[others].any()


def test_wrong_scales_and_steps_are_told_apart():
    values = random_values()
    right = written(torch.int8, values)
    assert not is_within_half_a_step(with_scales_of_other_heads(right), values)
    assert not is_within_half_a_step(with_larger_scales(right), values)
    for kv_type in (torch.float8_e4m3fn, torch.float8_e5m2):
        next_ones = written(kv_type, values).view(torch.uint8).bitwise_xor(1).view(kv_type)
        assert not is_within_half_a_step(next_ones, values)


@each_type
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("has_nan", [False, True])
def test_every_byte_is_read_as_the_format_says(kv_type, dtype, has_nan):
    pages = written(kv_type, random_values(num_tokens=NUM_PAGES * BLOCK_SIZE))
    if kv_type is not torch.int8:
        every = torch.tensor([byte for byte in range(256) if byte not in (0x7F, 0xFF)], dtype=torch.uint8)
        pages.view(torch.uint8).view(-1)[: len(every)] = every
    if has_nan:
        write_pages(pages, torch.full((1, NUM_HEADS, HEAD_DIM), -torch.nan), torch.tensor([40]))
    blocks = torch.tensor([5, 0, 7, 1])
    expected = decoded(pages)[blocks].flatten(0, 1).to(dtype)
    assert bool(expected.isnan().any()) == (has_nan or kv_type is torch.float8_e5m2)
    torch.testing.assert_close(read_pages(pages, blocks, dtype), expected, rtol=0, atol=0, equal_nan=True)


def bytes_in_pieces(kv_type: torch.dtype, sizes: list[int]) -> torch.Tensor:
    pages = empty_pages(kv_type)
    for part, slots in zip(random_values().split(sizes), slots_of().split(sizes), strict=True):
        write_pages(pages, part, slots)
    return pages.view(torch.uint8)


PIECES = [1, 1, 20, 7, 1, 30]


@each_type
def test_bytes_of_a_token_do_not_depend_on_its_company(kv_type):
    assert torch.equal(bytes_in_pieces(kv_type, PIECES), bytes_in_pieces(kv_type, [NUM_TOKENS]))


def test_a_scale_that_tokens_share_is_told_apart(monkeypatch):
    share_scales(monkeypatch)
    assert not torch.equal(bytes_in_pieces(torch.int8, PIECES), bytes_in_pieces(torch.int8, [NUM_TOKENS]))


@pytest.mark.parametrize("name", ["fp8_e4m3fn", "fp8_e5m2"])
@pytest.mark.parametrize("dtype", TYPES)
def test_what_is_beyond_a_format_becomes_its_largest_number(name, dtype):
    kv_type = KV_TYPES[name]
    largest = torch.finfo(kv_type).max
    beyond = torch.tensor([1.0, 1.2, 50.0]) * largest if dtype is not torch.float16 else torch.tensor([65504.0])
    assert beyond.max() > largest
    values = random_values(dtype)
    values[0, 0, : 2 * len(beyond)] = torch.cat((beyond, -beyond)).to(dtype)
    got = read_pages(written(kv_type, values), torch.arange(NUM_PAGES), dtype)[slots_of()[0], 0]
    assert got[: 2 * len(beyond)].tolist() == [largest] * len(beyond) + [-largest] * len(beyond)


@each_type
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("spoiled", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_stays_none(kv_type, dtype, spoiled):
    values = random_values(dtype)
    values[7, 1, 5] = spoiled
    pages = written(kv_type, values)
    every = torch.arange(NUM_PAGES)
    spoiled_heads = ~read_pages(pages, every, dtype).isfinite().all(-1)
    assert spoiled_heads.nonzero().tolist() == [[int(slots_of()[7]), 1]]


# Attention.


def encoded(case: Case, kv_type: torch.dtype) -> Case:
    """The same case over pages of another type."""

    def encode(pages: torch.Tensor) -> torch.Tensor:
        made = torch.zeros((*pages.shape[:-1], page_width(pages.shape[-1], kv_type)), dtype=kv_type)
        write_pages(made, pages.flatten(0, 1), torch.arange(len(pages) * BLOCK_SIZE))
        return made

    return case._replace(k_pages=encode(case.k_pages), v_pages=encode(case.v_pages))


def exact(case: Case) -> Case:
    """By the oracle, over the numbers that the pages mean."""
    return case._replace(k_pages=decoded(case.k_pages), v_pages=decoded(case.v_pages), q=case.q.double())


ROWS = dict(lengths=[1, 9, 40, 40, 100, 17], counts=[1, 1, 1, 13, 1, 17])


@each_type
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 4e-6), (torch.bfloat16, 4e-2)])
def test_attention_is_that_over_the_numbers_that_pages_mean(kind, kv_type, dtype, bar):
    case, layer = kind_case(kind, **ROWS, dtype=dtype)
    case = encoded(case, kv_type)
    expected = run(ReferenceAttention(), exact(case), layer)
    for attention in (CpuAttention(), ReferenceAttention()):
        assert float((run(attention, case, layer) - expected).abs().max()) <= bar


def test_attention_over_other_numbers_is_told_apart():
    case, layer = kind_case("plain", **ROWS)
    case = encoded(case, torch.int8)
    expected = run(ReferenceAttention(), exact(case), layer)
    for wrong in (
        case._replace(k_pages=case.v_pages, v_pages=case.k_pages),
        case._replace(k_pages=with_scales_of_other_heads(case.k_pages)),
        case._replace(v_pages=with_scales_of_other_heads(case.v_pages)),
    ):
        assert float((run(CpuAttention(), wrong, layer) - expected).abs().max()) > 1e-2
