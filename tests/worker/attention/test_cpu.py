from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from worker.attention import Batch, LayerShape, cpu, write_pages
from worker.attention.cpu import CpuAttention
from worker.attention.reference import ReferenceAttention

BLOCK_SIZE = 8


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def random_case(
    seed: int,
    lengths: list[int],
    counts: list[int],
    kv_heads: int = 2,
    group: int = 3,
    dtype: torch.dtype = torch.float32,
):
    """Rows of `lengths` tokens, the last `counts` of them this step's; pages dealt at random, the rest garbage."""
    draw = np.random.default_rng(seed)
    num_blocks = [-(-length // BLOCK_SIZE) for length in lengths]
    deck = draw.permutation(np.arange(1, sum(num_blocks) + 1))
    tables = draw.integers(0, len(deck) + 1, (len(lengths), max(num_blocks)))
    for row, count in enumerate(num_blocks):
        tables[row, :count], deck = deck[:count], deck[count:]
    generator = torch.Generator().manual_seed(seed)
    shape = (sum(num_blocks) + 1, BLOCK_SIZE, kv_heads, 16)
    k_pages, v_pages = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    q = torch.randn((sum(counts), kv_heads * group, 16), generator=generator).to(dtype)
    starts = np.array(lengths) - np.array(counts)
    batch = Batch(np.array(counts), starts, tables, torch.zeros(0, dtype=torch.int64))
    return q, k_pages, v_pages, batch


def run(attention, case, layer: LayerShape) -> torch.Tensor:
    q, k_pages, v_pages, batch = case
    return attention.attend(q, k_pages, v_pages, attention.prepare(batch, BLOCK_SIZE), layer)


def difference(case, layer: LayerShape, other: LayerShape | None = None) -> float:
    return float((run(CpuAttention(), case, layer) - run(ReferenceAttention(), case, other or layer)).abs().max())


MIXED = dict(lengths=[1, 9, 40, 40, 200, 17, 33, 64], counts=[1, 1, 1, 13, 1, 17, 5, 64])


@pytest.mark.parametrize("window", [None, 1, 8, 13, 1000])
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 2e-6), (torch.float64, 1e-14), (torch.bfloat16, 4e-2)])
def test_mixed_steps_equal_the_reference(window, dtype, bar):
    case = random_case(1, **MIXED, dtype=dtype)
    counts = case[3].num_queries
    assert (counts == 1).sum() > 1
    assert (counts > 1).sum() > 1
    assert difference(case, LayerShape(0.25, window)) <= bar


@pytest.mark.parametrize("seed", range(12))
def test_random_shapes_equal_the_reference(seed):
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 150, draw.integers(1, 9)).tolist()
    counts = [int(draw.choice([1, 1, draw.integers(1, length + 1), length])) for length in lengths]
    kv_heads, group = int(draw.choice([1, 2, 4])), int(draw.choice([1, 2, 5]))
    window = None if draw.integers(2) else int(draw.integers(1, 60))
    case = random_case(seed, lengths, counts, kv_heads, group)
    assert difference(case, LayerShape(0.3, window)) <= 2e-6


@pytest.mark.parametrize(
    ("layer", "wrong"),
    [
        (LayerShape(0.25, 13), LayerShape(0.25, 12)),
        (LayerShape(0.25, 13), LayerShape(0.25, None)),
        (LayerShape(0.25, None), LayerShape(0.26, None)),
    ],
)
def test_another_window_or_scale_is_told_apart(layer, wrong):
    case = random_case(1, **MIXED)
    assert difference(case, layer) <= 2e-6
    assert difference(case, layer, wrong) > 1e-3


def test_long_chunks_cut_along_the_queries_equal_the_reference(monkeypatch):
    monkeypatch.setattr(cpu, "MAX_MASK_ELEMENTS", 1000)
    case = random_case(3, [90, 120, 70], [90, 60, 1])
    plan = CpuAttention().prepare(case[3], BLOCK_SIZE).plan(None, torch.float32)
    assert [len(chunk.slices) for chunk in plan.chunks] == [6, 4]
    assert difference(case, LayerShape(0.25, None)) <= 2e-6
    assert difference(case, LayerShape(0.25, 20)) <= 2e-6


def test_decoding_rows_are_gathered_in_few_groups(monkeypatch):
    lengths = [20 + row for row in range(40)] + [400 + row for row in range(20)]
    case = random_case(4, lengths, [1] * 60)
    groups = CpuAttention().prepare(case[3], BLOCK_SIZE).plan(None, torch.float32).groups
    assert sum(len(group.tokens) for group in groups) == 60
    assert len(groups) <= 3
    gathered = sum(group.mask.numel() for group in groups)
    assert gathered <= 1.5 * sum(lengths)
    monkeypatch.setattr(cpu, "MAX_GATHERED_TOKENS", 1000)
    groups = CpuAttention().prepare(case[3], BLOCK_SIZE).plan(None, torch.float32).groups
    assert len(groups) > 10
    assert difference(case, LayerShape(0.25, None)) <= 2e-6


def test_a_window_gathers_only_the_pages_it_sees():
    case = random_case(5, [800, 801], [1, 1])
    plan = CpuAttention().prepare(case[3], BLOCK_SIZE).plan(16, torch.float32)
    assert sum(len(group.blocks) for group in plan.groups) <= 2 * 3


def changed_outside(case, rows: list[int]) -> Callable[[], None]:
    """The same case with every page that does not belong to `rows` replaced."""
    q, k_pages, v_pages, batch = case
    lengths = batch.starts + batch.num_queries
    mine = {int(page) for row in rows for page in batch.block_tables[row, : -(-int(lengths[row]) // BLOCK_SIZE)]}
    others = [page for page in range(len(k_pages)) if page not in mine]
    k_pages, v_pages = k_pages.clone(), v_pages.clone()
    k_pages[others], v_pages[others] = 50.0, -50.0
    return q, k_pages, v_pages, batch


@pytest.mark.parametrize("attention", [CpuAttention(), ReferenceAttention()])
@pytest.mark.parametrize("window", [None, 5])
def test_a_row_reads_no_page_of_another_row(attention, window):
    case = random_case(6, [20, 30, 9, 50], [1, 12, 1, 1])
    layer, mine = LayerShape(0.25, window), slice(1, 13)
    before, after = run(attention, case, layer), run(attention, changed_outside(case, [1]), layer)
    assert torch.equal(before[mine], after[mine])
    assert not torch.equal(before, after)


def test_what_lies_behind_the_last_token_in_a_page_does_not_matter():
    case = random_case(7, [19, 21], [1, 4])
    q, k_pages, v_pages, batch = case
    k_pages, v_pages = k_pages.clone(), v_pages.clone()
    for row, length in enumerate((19, 21)):
        k_pages[batch.block_tables[row, 2], length % BLOCK_SIZE :] = 1e4
        v_pages[batch.block_tables[row, 2], length % BLOCK_SIZE :] = 1e4
    layer, changed = LayerShape(0.25, None), (q, k_pages, v_pages, batch)
    assert torch.equal(run(CpuAttention(), case, layer), run(CpuAttention(), changed, layer))
    longer = replace(batch, starts=batch.starts + 1)
    with_garbage = run(CpuAttention(), (q, k_pages, v_pages, longer), layer)
    assert not torch.equal(run(CpuAttention(), (*case[:3], longer), layer), with_garbage)


def test_writing_touches_its_slots_only():
    pages = torch.zeros(4, BLOCK_SIZE, 2, 16)
    values = torch.randn(3, 2, 16)
    write_pages(pages, values, torch.tensor([9, 31, 16]))
    assert torch.equal(pages[1, 1], values[0])
    assert torch.equal(pages[3, 7], values[1])
    assert torch.equal(pages[2, 0], values[2])
    assert int((pages.abs().sum((2, 3)) > 0).sum()) == 3
