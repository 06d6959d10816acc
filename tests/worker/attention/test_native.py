from __future__ import annotations

import ctypes
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.worker.attention.cases import KINDS, Case, error, exact, kind_case, random_case, sized_case
from worker.attention import Batch, LayerShape
from worker.attention.native import NativeAttention
from worker.attention.reference import ReferenceAttention
from worker.kernels.build import cpu_flags, load_library, supported_levels

BARS = {torch.float32: 3e-6, torch.bfloat16: 1e-2}
"""Relative to the largest number of the result."""

MIXED = dict(lengths=[1, 9, 40, 40, 200, 17, 33, 64, 1100], counts=[1, 1, 1, 13, 1, 17, 5, 64, 3])
ENCODED = [1, 9, 1, 40, 120, 17]


class CountingAttention(NativeAttention):
    """Says as well how many segments of rows are read with those of others."""

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__(library)
        self._count = library.inferfleet_num_shared_segments
        self._count.argtypes, self._count.restype = [ctypes.c_void_p] * 2, ctypes.c_int64

    def num_shared_segments(self, case: Case, layer: LayerShape) -> int:
        meta = self.prepare(case.batch, case.k_pages.shape[1])
        shape = case.q.shape[1], case.k_pages.shape[2], case.q.shape[2]
        return self._count(meta.address, self.address_of(layer, *shape, case.q.dtype, case.k_pages.dtype))


@pytest.fixture(params=[level.name for level in supported_levels(cpu_flags())], scope="module")
def native(request) -> CountingAttention:
    library = load_library(request.param)
    library.inferfleet_set_threads(3)
    return CountingAttention(library)


def run(attention, case: Case, layer: LayerShape) -> torch.Tensor:
    meta = attention.prepare(case.batch, case.k_pages.shape[1])
    return attention.attend(case.q, case.k_pages, case.v_pages, meta, layer)


def mixed_case(kind: str, dtype: torch.dtype) -> tuple[Case, LayerShape]:
    rows = dict(lengths=ENCODED, counts=ENCODED) if KINDS[kind].is_encoder else MIXED
    return kind_case(kind, **rows, dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", BARS, ids=str)
def test_mixed_steps_of_every_kind_of_layer_equal_the_reference(native, kind, dtype):
    case, layer = mixed_case(kind, dtype)
    expected = exact(case, layer)
    assert error(run(native, case, layer), expected) <= BARS[dtype]
    wrong = replace(layer, scale=layer.scale * 1.5, window=layer.window and layer.window + 1)
    assert error(run(native, case, wrong), expected) > 2 * BARS[dtype]


@pytest.mark.parametrize(
    ("head_dim", "kv_heads", "group", "page_size"),
    [(64, 2, 3, 16), (80, 1, 8, 16), (128, 2, 1, 32), (20, 3, 2, 8), (256, 1, 4, 16), (7, 1, 71, 64)],
)
@pytest.mark.parametrize("dtype", BARS, ids=str)
def test_heads_of_any_size_and_number_equal_the_reference(native, dtype, head_dim, kv_heads, group, page_size):
    case = sized_case(head_dim, kv_heads, group, page_size, dtype)
    layer = LayerShape(head_dim**-0.5)
    expected = exact(case, layer)
    assert error(run(native, case, layer), expected) <= BARS[dtype]
    shifted = case._replace(batch=replace(case.batch, starts=np.maximum(case.batch.starts - 1, 0)))
    assert error(run(native, shifted, layer), expected) > 2 * BARS[dtype]


@pytest.mark.parametrize("kv_type", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("dtype", BARS, ids=str)
def test_pages_of_few_bits_are_read_as_what_they_stand_for(native, dtype, kv_type):
    case, layer = sized_case(48, 2, 2, 16, dtype, kv_type), LayerShape(0.15)
    expected = run(ReferenceAttention(), case._replace(q=case.q.double()), layer)
    assert error(run(native, case, layer), expected) <= BARS[dtype]
    other = case._replace(v_pages=case.k_pages)
    assert error(run(native, other, layer), expected) > 2 * BARS[dtype]


@pytest.mark.parametrize("kind", ["plain", "everything causal"])
@pytest.mark.parametrize("dtype", BARS, ids=str)
def test_a_query_is_the_same_to_the_last_bit_in_every_company_and_chunk(native, dtype, kind):
    case, layer = kind_case(kind, [1200, 300, 50], [700, 300, 50], dtype)
    together = run(native, case, layer)
    batch, first = case.batch, 0
    for row, count in enumerate(batch.num_queries):
        for sizes in ([1] * 3, [16, 5], [129]):
            start, at = int(batch.starts[row]), first
            for size in (size for size in sizes if at + size <= first + count):
                alone = Batch(
                    np.array([size]), np.array([start + at - first]), batch.block_tables[row : row + 1], batch.slots
                )
                part = run(native, case._replace(q=case.q[at : at + size], batch=alone), layer)
                assert torch.equal(part, together[at : at + size]), (row, at - first, size)
                at += size
        first += count


SHARED = dict(lengths=[1200, 1030, 1200, 600, 1600, 1540, 30, 1100], counts=[1, 1, 1, 1, 1, 1, 1, 2])
"""The first four begin alike, so do the next two; those of two tokens in a step do not share."""
NUM_SHARED = 2 + 2 + 2 + 1 + 2 * 3


def sharing_case(kind: str, dtype: torch.dtype) -> tuple[Case, LayerShape]:
    case, layer = kind_case(kind, **SHARED, dtype=dtype)
    tables = case.batch.block_tables.copy()
    for first, end in ((0, 4), (4, 6)):
        for row in range(first + 1, end):
            num_pages = min(SHARED["lengths"][row] - 1, 1536) // case.k_pages.shape[1]
            tables[row, :num_pages] = tables[first, :num_pages]
    tables[7, :64] = tables[0, :64]
    return case._replace(batch=replace(case.batch, block_tables=tables)), layer


@pytest.mark.parametrize("kind", ["plain", "slopes of heads that share keys", "bias of heads that share keys"])
@pytest.mark.parametrize("dtype", BARS, ids=str)
def test_rows_that_begin_alike_are_read_together_and_stay_the_same_to_the_last_bit(native, dtype, kind):
    case, layer = sharing_case(kind, dtype)
    assert native.num_shared_segments(case, layer) == NUM_SHARED
    found = run(native, case, layer)
    assert error(found, exact(case, layer)) <= BARS[dtype]
    first = 0
    for row, count in enumerate(case.batch.num_queries):
        batch = case.batch
        alone = Batch(
            *(part[row : row + 1] for part in (batch.num_queries, batch.starts, batch.block_tables)), batch.slots
        )
        queries = case._replace(q=case.q[first : first + count], batch=alone)
        assert native.num_shared_segments(queries, layer) == 0
        assert torch.equal(run(native, queries, layer), found[first : first + count]), row
        first += count
    tables = case.batch.block_tables.copy()
    tables[2, 3] = tables[4, 3]
    other = case._replace(batch=replace(case.batch, block_tables=tables))
    assert native.num_shared_segments(other, layer) == NUM_SHARED - 1
    assert not torch.equal(run(native, other, layer)[2], found[2])


def test_a_window_shares_what_lies_in_it_as_a_whole(native):
    case, layer = sharing_case("plain", torch.float32)
    layer = replace(layer, window=700)
    assert native.num_shared_segments(case, layer) == 3 + 2
    assert error(run(native, case, layer), exact(case, layer)) <= BARS[torch.float32]


def test_what_is_no_number_stays_in_its_row(native):
    case, layer = random_case(3, [40, 70, 30], [1, 9, 1]), LayerShape(0.25)
    expected = run(native, case, layer)
    pages = case.v_pages.clone()
    pages[case.batch.block_tables[1, 2]] = torch.nan
    found = run(native, case._replace(v_pages=pages), layer)
    assert found[1:10].isnan().all()
    assert torch.equal(found[[0, 10]], expected[[0, 10]])


def test_what_no_query_sees_need_not_be_a_number(native):
    case, layer = random_case(5, [13, 70], [1, 70]), LayerShape(0.25)
    pages = [case.k_pages.clone(), case.v_pages.clone()]
    for each in pages:
        for row, length in enumerate((13, 70)):
            each[case.batch.block_tables[row, length // 8], length % 8 :] = torch.nan
    spoilt = case._replace(k_pages=pages[0], v_pages=pages[1])
    assert not native.reads_whole_pages and spoilt.k_pages.isnan().any()
    assert torch.equal(run(native, spoilt, layer), run(native, case, layer))


def test_queries_may_be_a_part_of_wider_rows(native):
    case, layer = random_case(4, **MIXED), LayerShape(0.25)
    wide = torch.randn(len(case.q), case.q.shape[1] + 5, 16)
    wide[:, :-5] = case.q
    assert not wide[:, :-5].is_contiguous()
    assert torch.equal(run(native, case._replace(q=wide[:, :-5]), layer), run(native, case, layer))


@pytest.mark.parametrize("seed", range(10))
def test_random_rows_equal_the_reference(native, seed):
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 700, draw.integers(1, 9))
    counts = [int(draw.choice([1, 1, draw.integers(1, length + 1)])) for length in lengths]
    layer = LayerShape(0.25, window=int(draw.choice([0, 20, 300])) or None)
    case = random_case(seed, lengths.tolist(), counts)
    assert error(run(native, case, layer), exact(case, layer)) <= BARS[torch.float32]
