"""The kernels of worker/attention/triton.py against the reference in float64."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.worker.attention.cases import KINDS, Case, error, exact, kind_case, moved, random_case, run, sized_case
from worker.attention import Batch, DeviceBatch, LayerShape
from worker.attention import triton as launching
from worker.attention.reference import ReferenceAttention
from worker.attention.triton import TritonAttention, choose_num_parts, few_tile, has_much_memory, kind_of, to_device

BARS = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Relative to the largest number of the result."""

MIXED = dict(lengths=[1, 40, 70, 9], counts=[1, 1, 23, 2])
ENCODED = [1, 9, 27]
SHORT = dict(lengths=[1, 9, 200, 129], counts=[1, 1, 1, 1])
SIZED = dict(lengths=[1, 30, 150], counts=[1, 1, 40])
ONE_EACH = dict(lengths=[1, 30, 150], counts=[1, 1, 3])


def attend(case: Case, layer: LayerShape, device: torch.device, num_parts: int | None = None) -> torch.Tensor:
    return run(TritonAttention(num_parts), *moved(case, layer, device)).cpu()


def wrong_layers(layer: LayerShape) -> list[LayerShape]:
    """Each with one mistake in what the layer asks for."""
    wrong = [replace(layer, scale=layer.scale * 1.2)]
    if layer.window is not None:
        wrong.append(replace(layer, window=layer.window + 1))
    if layer.softcap is not None:
        wrong.append(replace(layer, softcap=None))
    if layer.slopes is not None:
        wrong.append(replace(layer, slopes=-layer.slopes))
    if layer.bias is not None:
        wrong.append(replace(layer, bias=layer.bias.roll(1, 1)))
    return wrong


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_steps_of_every_kind_of_layer_equal_the_reference(device, kind):
    rows = dict(lengths=ENCODED, counts=ENCODED) if KINDS[kind].is_encoder else MIXED
    case, layer = kind_case(kind, **rows)
    expected = exact(case, layer)
    found = attend(case, layer, device)
    assert error(found, expected) <= BARS[torch.float32]
    for wrong in wrong_layers(layer):
        assert error(found, exact(case, wrong)) > 2 * BARS[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["everything causal", "cross attention with softcap"])
def test_short_rows_in_parts_equal_the_reference_in_every_type(device, kind, dtype):
    case, layer = kind_case(kind, **SHORT, dtype=dtype)
    expected = exact(case, layer)
    assert error(attend(case, layer, device, num_parts=3), expected) <= BARS[dtype]
    if layer.window is None:
        short = case._replace(batch=replace(case.batch, num_keys=case.batch.num_keys - (case.batch.num_keys > 64) * 64))
        assert error(exact(short, layer), expected) > 2 * BARS[dtype]


def test_guesses_of_any_number_are_two_sizes_of_tile():
    def sizes(group: int) -> set[int]:
        tiles = [few_tile(group, 128, 2, count, 2, launching.AS_THEY_ARE) for count in range(1, 90)]
        return {tile.num_queries for tile in tiles}

    assert sizes(1) == sizes(4) == sizes(8) == {16, 64} and sizes(20) == {64} and sizes(71) == {128}


def test_what_a_gpu_can_do_is_asked_once(monkeypatch):
    asked, gpu = [], torch.device("cuda", 99)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or (8, 6))
    pages = SimpleNamespace(dtype=torch.float8_e4m3fn, is_cuda=True, device=gpu)
    assert [(kind_of(pages), has_much_memory(pages)) for _ in range(3)] == [(launching.E4M3_BITS, False)] * 3
    assert asked == [gpu]


def test_no_part_of_a_long_row_is_left_out(device, monkeypatch):
    case, layer = random_case(7, [200, 3, 90], [1, 1, 2], kv_heads=1), LayerShape(0.25)
    expected = exact(case, layer)
    for num_parts in (2, 5, 64):
        assert error(attend(case, layer, device, num_parts), expected) <= BARS[torch.float32]
    # as if the combining kernel stopped one part early
    shape = few_tile(3, 16, 4, 2, 4, launching.AS_THEY_ARE)
    assert 200 / shape.num_keys > 5
    kernel = launching.combine_kernel
    monkeypatch.setattr(launching, "combine_kernel", OnePartLess(kernel))
    assert error(attend(case, layer, device, 5), expected) > 1e-3


class OnePartLess:
    """Leaves the last part of each row unread."""

    def __init__(self, kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(parts, logs, *others, **constants):
            logs[..., -1] = -torch.inf
            self.kernel[grid](parts, logs, *others, **constants)

        return launch


@pytest.mark.parametrize(
    ("head_dim", "kv_heads", "group", "page_size"),
    [(64, 2, 3, 16), (80, 1, 8, 64), (96, 3, 1, 128), (256, 1, 4, 32), (20, 1, 71, 16)],
)
def test_heads_of_any_size_and_number_equal_the_reference(device, head_dim, kv_heads, group, page_size):
    case = sized_case(head_dim, kv_heads, group, page_size, torch.bfloat16, **(SIZED if group < 71 else ONE_EACH))
    layer = LayerShape(head_dim**-0.5)
    expected = exact(case, layer)
    assert error(attend(case, layer, device), expected) <= BARS[torch.bfloat16]
    shifted = case._replace(batch=replace(case.batch, starts=np.maximum(case.batch.starts - 1, 0)))
    assert error(attend(shifted, layer, device), expected) > 2 * BARS[torch.bfloat16]


@pytest.mark.parametrize("kv_type", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2, "bytes"], ids=str)
def test_pages_of_few_bits_are_read_as_what_they_stand_for(device, kv_type, monkeypatch):
    if kv_type == "bytes":
        kv_type = torch.float8_e4m3fn
        monkeypatch.setattr(launching, "kind_of", lambda pages: launching.E4M3_BITS)
    case, layer = sized_case(48, 2, 2, 16, torch.float16, kv_type, **SIZED), LayerShape(0.15)
    expected = run(ReferenceAttention(), case._replace(q=case.q.double()), layer)
    assert error(attend(case, layer, device), expected) <= BARS[torch.float16]
    other = case._replace(v_pages=case.k_pages)
    assert error(attend(other, layer, device), expected) > 2 * BARS[torch.float16]


def test_what_is_no_number_in_pages_of_float8_as_bytes_stays_none(device, monkeypatch):
    monkeypatch.setattr(launching, "kind_of", lambda pages: launching.E4M3_BITS)
    case, layer = sized_case(16, 1, 2, 16, torch.float16, torch.float8_e4m3fn, **SIZED), LayerShape(0.15)
    assert attend(case, layer, device).isfinite().all()
    case.v_pages.view(torch.uint8)[case.batch.block_tables[0, 0], 0] = 0x7F
    found = attend(case, layer, device)
    assert found[0].isnan().all() and found[1:].isfinite().all()


@pytest.mark.parametrize("is_long", [False, True])
def test_rows_without_queries_and_steps_without_rows_are_legal(device, is_long):
    counts = [0, 1, 0, 0, 60 if is_long else 1, 0]
    case, layer = random_case(2, [8, 40, 1, 30, 60, 9], counts), LayerShape(0.25)
    assert (case.batch.num_queries == 0).sum() == 4 and len(case.q) == sum(counts)
    expected = exact(case, layer)
    for num_parts in (1, 2):
        assert error(attend(case, layer, device, num_parts), expected) <= BARS[torch.float32]
    empty = Batch(
        *(part[:0] for part in (case.batch.num_queries, case.batch.starts, case.batch.block_tables)), case.batch.slots
    )
    assert attend(case._replace(q=case.q[:0], batch=empty), layer, device).shape == (0, 6, 16)


def test_a_recorded_step_is_right_for_any_rows_within_its_bounds(device):
    case, layer = moved(random_case(9, [300, 17, 90, 140], [1] * 4), LayerShape(0.25, 100), device)
    whole, attention = to_device(case.batch), TritonAttention()
    tables = torch.zeros((9, 1000), dtype=torch.int32, device=device)
    tables[[7, 0, 3, 5], : whole.tables.shape[1]] = whole.tables
    # two rows more than there are, which have one query at the beginning of page 0
    step = DeviceBatch(
        rows=torch.tensor([7, 0, 3, 5, 8, 8], dtype=torch.int32, device=device),
        query_starts=torch.arange(7, dtype=torch.int32, device=device),
        starts=torch.cat((whole.starts, torch.zeros(2, dtype=torch.int32, device=device))),
        tables=tables,
        slots=torch.zeros(6, dtype=torch.int64, device=device),
        max_queries=1,
        max_keys=8000,
    )
    assert choose_num_parts(2 * 6, step, layer, few_tile(3, 16, 4, 1, 4, launching.AS_THEY_ARE)) > 1
    assert attention.prepare(step, 8) is step
    q = torch.cat((case.q, case.q[:2]))
    found = attention.attend(q, case.k_pages, case.v_pages, step, layer)
    assert found.isfinite().all()
    assert error(found[:4].cpu(), exact(*moved(case, layer, torch.device("cpu")))) <= BARS[torch.float32]


def test_what_is_no_number_stays_in_its_row_and_what_no_query_sees_need_not_be_one(device):
    case, layer = random_case(3, [45, 70, 30, 150], [1, 20, 1, 1], kv_heads=1), LayerShape(0.25, 64)
    expected = attend(case, layer, device, num_parts=2)
    tables, lengths = case.batch.block_tables, case.batch.starts + case.batch.num_queries
    for pages in (case.k_pages, case.v_pages):
        pages[0] = torch.nan
        for row, length in enumerate(lengths):
            pages[tables[row, (length - 1) // 8], (length - 1) % 8 + 1 :] = torch.nan
        # before the window
        pages[tables[3, :10]] = torch.nan
    assert not TritonAttention.reads_whole_pages and case.k_pages.isnan().any()
    assert torch.equal(attend(case, layer, device, num_parts=2), expected)
    case.v_pages[tables[1, 2]] = torch.nan
    found = attend(case, layer, device, num_parts=2)
    assert found[1:21].isnan().all()
    assert torch.equal(found[[0, 21, 22]], expected[[0, 21, 22]])


def test_queries_may_be_a_part_of_wider_rows(device):
    case, layer = random_case(4, **MIXED), LayerShape(0.25)
    wide = torch.randn(len(case.q), case.q.shape[1] + 5, 16)
    wide[:, :-5] = case.q
    assert not wide[:, :-5].is_contiguous()
    assert torch.equal(attend(case._replace(q=wide[:, :-5]), layer, device), attend(case, layer, device))


def test_pages_beyond_what_32_bits_count_are_found(device):
    case, layer = random_case(5, [40, 9], [1, 9], kv_heads=1), LayerShape(0.25)
    num_pages, kv_type = 2**24 + 20, torch.float8_e5m2
    far = [torch.empty((num_pages, *case.k_pages.shape[1:]), dtype=kv_type) for _ in range(2)]
    assert far[0].stride(0) * 2**24 >= 2**31
    near = case._replace(k_pages=case.k_pages.to(kv_type), v_pages=case.v_pages.to(kv_type))
    for pages, few in zip(far, near[1:3], strict=True):
        pages[2**24 : 2**24 + len(few)] = few
    batch = replace(case.batch, block_tables=case.batch.block_tables + 2**24)
    found = attend(Case(case.q, *far, batch), layer, device)
    assert error(found, run(ReferenceAttention(), near._replace(q=case.q.double()), layer)) <= BARS[torch.float32]


@pytest.mark.parametrize("seed", range(4))
def test_random_rows_equal_the_reference(device, seed):
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 150, draw.integers(1, 5))
    counts = [int(draw.choice([1, 0, draw.integers(1, min(length, 40) + 1)])) for length in lengths]
    layer = LayerShape(0.25, window=int(draw.choice([0, 20, 90])) or None)
    case = random_case(
        seed, lengths.tolist(), counts, kv_heads=int(draw.choice([1, 3])), group=int(draw.choice([1, 5]))
    )
    assert error(attend(case, layer, device), exact(case, layer)) <= BARS[torch.float32]
