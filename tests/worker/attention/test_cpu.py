from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.worker.attention.cases import (
    BLOCK_SIZE,
    KINDS,
    Case,
    difference,
    encoding,
    kind_case,
    plan_of,
    random_case,
    run,
)
from worker.attention import Batch, LayerShape, plan
from worker.attention.cpu import CpuAttention
from worker.attention.pages import write_pages
from worker.attention.reference import ReferenceAttention


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


MIXED = dict(lengths=[1, 9, 40, 40, 200, 17, 33, 64], counts=[1, 1, 1, 13, 1, 17, 5, 64])
ENCODED = [1, 9, 1, 40, 120, 17]

BARS = [(torch.float32, 4e-6), (torch.float64, 1e-14), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)]


def mixed_case(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Case, LayerShape]:
    """Rows of one query beside rows of many."""
    rows = dict(lengths=ENCODED, counts=ENCODED) if KINDS[kind].is_encoder else MIXED
    case, layer = kind_case(kind, **rows, dtype=dtype)
    assert (case.batch.num_queries == 1).sum() > 1
    assert (case.batch.num_queries > 1).sum() > 1
    return case, layer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "bar"), BARS)
def test_mixed_steps_equal_the_reference(kind, dtype, bar):
    case, layer = mixed_case(kind, dtype)
    assert difference(case, layer) <= bar


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "bar"), BARS)
def test_chunks_cut_into_several_slices_equal_the_reference(kind, dtype, bar, monkeypatch):
    monkeypatch.setattr(plan, "MAX_MASK_ELEMENTS", 1000)
    case, layer = kind_case(kind, [90, 120, 70], [90, 60, 1], dtype)
    assert min(len(chunk.slices) for chunk in plan_of(case, layer).chunks) >= 3
    assert difference(case, layer) <= bar


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "bar"), BARS)
@pytest.mark.parametrize("count", [1, 37])
def test_a_single_row_equals_the_reference(kind, dtype, bar, count):
    lengths = [count] if KINDS[kind].is_encoder else [37]
    case, layer = kind_case(kind, lengths, [count], dtype)
    assert len(plan_of(case, layer).groups) == (count == 1)
    assert difference(case, layer) <= bar


@pytest.mark.parametrize("window", [1, 8, 13, 16, 17, 63, 64, 1000])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_any_window_equals_the_reference(window, softcap):
    # two prompts are run whole, where a window as long as the prompt hides nothing and one shorter by a token does
    assert {17, 64} <= {length for length, count in zip(*MIXED.values()) if length == count}
    assert difference(random_case(1, **MIXED), LayerShape(0.25, window, softcap)) <= 4e-6


@pytest.mark.parametrize("seed", range(20))
def test_random_shapes_equal_the_reference(seed):
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 150, draw.integers(1, 9)).tolist()
    counts = [int(draw.choice([1, 1, draw.integers(1, length + 1), length])) for length in lengths]
    kv_heads, group = int(draw.choice([1, 2, 4])), int(draw.choice([1, 2, 5]))
    window = None if draw.integers(2) else int(draw.integers(1, 60))
    softcap = None if draw.integers(2) else float(draw.uniform(0.5, 5))
    slopes = torch.rand(kv_heads * group) if draw.integers(2) else None
    bias = torch.randn(kv_heads * group, 2 * int(draw.integers(1, 200)) + 1) if draw.integers(2) else None
    case = random_case(seed, lengths, counts, kv_heads, group)
    assert difference(case, LayerShape(0.3, window, softcap, slopes, bias)) <= 4e-6
    if not case.batch.starts.any():
        case = encoding(case)
    assert difference(case, LayerShape(0.3, window if case.batch.num_keys is None else None, bias=bias)) <= 4e-6


WRONG_LAYERS = [
    ("plain", dict(scale=0.26)),
    ("plain", dict(window=13)),
    ("window", dict(window=12)),
    ("window", dict(window=14)),
    ("window", dict(window=None)),
    ("softcap", dict(softcap=None)),
    ("softcap and window", dict(window=12)),
    ("slopes", dict(slopes=None)),
    ("slopes", dict(slopes=-KINDS["slopes"].shape(2).slopes)),
    ("slopes of heads that share keys", dict(slopes=KINDS["slopes"].shape(6).slopes.flip(0))),
    ("bias", dict(bias=KINDS["bias"].shape(2).bias.flip(1))),
    ("bias", dict(bias=None)),
    ("encoder", dict(bias=KINDS["encoder"].shape(2).bias.flip(1))),
    ("everything causal", dict(softcap=None)),
]


@pytest.mark.parametrize(("kind", "wrong"), WRONG_LAYERS)
def test_another_layer_is_told_apart(kind, wrong):
    case, layer = mixed_case(kind)
    assert difference(case, layer) <= 4e-6
    assert difference(case, layer, replace(layer, **wrong)) > 1e-3


@pytest.mark.parametrize("kind", ["encoder", "encoder with all but a window", "cross attention"])
def test_what_is_causal_or_sees_a_key_less_is_told_apart(kind):
    case, layer = mixed_case(kind)
    num_keys = case.batch.num_keys
    causal = replace(case.batch, num_keys=None, starts=num_keys - case.batch.num_queries)
    fewer = replace(case.batch, num_keys=(num_keys - 1).clip(1))
    assert difference(case, layer) <= 4e-6
    for wrong in (causal, fewer):
        assert difference(case, layer, other_case=case._replace(batch=wrong)) > 1e-3


def test_where_queries_stand_means_nothing_to_cross_attention():
    case, layer = mixed_case("cross attention")
    assert len(set(case.batch.starts.tolist())) > 3
    elsewhere = case._replace(batch=replace(case.batch, starts=case.batch.starts * 0))
    assert torch.equal(run(CpuAttention(), case, layer), run(CpuAttention(), elsewhere, layer))


@pytest.mark.parametrize("length", [1, 2, 45])
def test_an_encoder_runs_over_keys_seen_as_one_page(length):
    generator = torch.Generator().manual_seed(length)
    q, k, v = torch.randn((3, length, 4, 16), generator=generator)
    bias = torch.randn((4, 31), generator=generator)
    whole = np.array([length])
    batch = Batch(whole, np.zeros(1, np.int64), np.zeros((1, 1), np.int64), torch.zeros(0), num_keys=whole)
    distances = (torch.arange(length) - torch.arange(length)[:, None]).clamp(-15, 15)
    scores = torch.einsum("qhd,khd->hqk", q, k) + bias[:, distances + 15]
    expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
    for attention in (CpuAttention(), ReferenceAttention()):
        got = run(attention, Case(q, k[None], v[None], batch), LayerShape(1.0, bias=bias))
        assert float((got - expected).abs().max()) <= 4e-6


FAR_LENGTHS = [1500, 1400]


@pytest.mark.parametrize(("dtype", "bar"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_far_keys_keep_their_slopes_in_narrow_types(dtype, bar, softcap):
    case = random_case(1, FAR_LENGTHS, [1, 30], dtype=dtype)
    slopes = torch.tensor([0.5, 0.25, 0.013, 0.0037, 0.0011, 0.0003])
    layer = LayerShape(0.25, softcap=softcap, slopes=slopes)
    # what lies further than 1,000 tokens away has a weight
    assert difference(case, layer, replace(layer, window=1000)) > 4 * bar
    assert difference(case, layer) <= bar
    # as if slope * key position, and not the difference of positions, had been rounded to 8 bits
    positions = torch.arange(-FAR_LENGTHS[0], FAR_LENGTHS[0] + 1) + FAR_LENGTHS[0]
    rounded = replace(layer, slopes=None, bias=(slopes[:, None] * positions).bfloat16().float())
    assert difference(case, layer, rounded) > 10 * bar


def test_windows_that_begin_far_behind_the_first_gathered_key_equal_the_reference():
    case = random_case(2, [1300, 1200], [1250, 1], kv_heads=1, group=2)
    heads = torch.tensor([0.5, 0.01])
    chunk = plan_of(case, LayerShape(0.25, 40)).chunks[0]
    assert chunk.slices[0].key_end - chunk.slices[0].key_first > 1000
    for layer in (LayerShape(0.25, 40), LayerShape(0.25, 40, slopes=heads), LayerShape(0.25, 40, 2.0)):
        assert difference(case, layer) <= 4e-6


def test_layers_of_one_shape_share_a_plan():
    case = random_case(3, **MIXED)
    meta, layer = CpuAttention().prepare(case.batch, BLOCK_SIZE), LayerShape(0.25, 13)
    first = meta.plan(layer, torch.float32, 6, 2)
    assert meta.plan(layer, torch.float32, 6, 2) is first
    assert meta.plan(LayerShape(0.25, 12), torch.float32, 6, 2) is not first


def test_masks_that_differ_by_head_take_little_memory():
    length, num_heads = 2048, 64
    whole = np.array([length])
    batch = Batch(whole, np.zeros(1, np.int64), np.zeros((1, 1), np.int64), torch.zeros(0), num_keys=whole)
    layer = LayerShape(1.0, bias=torch.randn(num_heads, 255))
    for seen in (batch, replace(batch, num_keys=None)):
        meta = CpuAttention().prepare(seen, length)
        masks = [part.mask for part in meta.plan(layer, torch.bfloat16, num_heads, num_heads).chunks[0].slices]
        assert sum(mask.nbytes for mask in masks) > 2**29
        storages = {mask.untyped_storage().data_ptr(): mask.untyped_storage().nbytes() for mask in masks}
        assert sum(storages.values()) < 2**22


def test_scores_that_a_softcap_has_written_out_are_bounded():
    case = random_case(4, [3000], [1200], kv_heads=4, group=4)
    slices = plan_of(case, LayerShape(0.25, softcap=2.0)).chunks[0].slices
    assert len(slices) > 10
    sizes = [16 * (part.end - part.first) * (part.key_end - part.key_first) for part in slices]
    assert max(sizes) <= plan.MAX_MASK_ELEMENTS < sum(sizes)


def test_decoding_rows_are_gathered_in_few_groups(monkeypatch):
    lengths = [20 + row for row in range(40)] + [400 + row for row in range(20)]
    case = random_case(4, lengths, [1] * 60)
    groups = plan_of(case, LayerShape(0.25)).groups
    assert sum(len(group.tokens) for group in groups) == 60
    assert len(groups) <= 3
    gathered = sum(group.mask.numel() for group in groups)
    assert gathered <= 1.5 * sum(lengths)
    monkeypatch.setattr(plan, "MAX_GATHERED_TOKENS", 1000)
    groups = plan_of(case, LayerShape(0.25)).groups
    assert len(groups) > 10
    assert difference(case, LayerShape(0.25, None)) <= 2e-6


def test_a_window_gathers_only_the_pages_it_sees():
    case = random_case(5, [800, 801], [1, 1])
    assert sum(len(group.blocks) for group in plan_of(case, LayerShape(0.25, 16)).groups) <= 2 * 3


def changed_outside(case: Case, rows: list[int]) -> Case:
    """The same case with every page that does not belong to `rows` replaced."""
    batch, lengths = case.batch, case.batch.starts + case.batch.num_queries
    mine = {int(page) for row in rows for page in batch.block_tables[row, : -(-int(lengths[row]) // BLOCK_SIZE)]}
    others = [page for page in range(len(case.k_pages)) if page not in mine]
    k_pages, v_pages = case.k_pages.clone(), case.v_pages.clone()
    k_pages[others], v_pages[others] = 50.0, -50.0
    return case._replace(k_pages=k_pages, v_pages=v_pages)


@pytest.mark.parametrize("attention", [CpuAttention(), ReferenceAttention()])
@pytest.mark.parametrize("kind", ["plain", "window", "softcap", "slopes", "bias"])
def test_a_row_reads_no_page_of_another_row(attention, kind):
    case, layer = kind_case(kind, [20, 30, 9, 50], [1, 12, 1, 1])
    mine = slice(1, 13)
    before, after = run(attention, case, layer), run(attention, changed_outside(case, [1]), layer)
    assert torch.equal(before[mine], after[mine])
    assert not torch.equal(before, after)


@pytest.mark.parametrize("kind", ["plain", "softcap", "slopes", "cross attention"])
def test_what_lies_behind_the_last_token_in_a_page_does_not_matter(kind):
    case, layer = kind_case(kind, [19, 21], [1, 4])
    k_pages, v_pages = case.k_pages.clone(), case.v_pages.clone()
    for row, length in enumerate((19, 21)):
        k_pages[case.batch.block_tables[row, 2], length % BLOCK_SIZE :] = 1e4
        v_pages[case.batch.block_tables[row, 2], length % BLOCK_SIZE :] = 1e4
    changed = case._replace(k_pages=k_pages, v_pages=v_pages)
    assert torch.equal(run(CpuAttention(), case, layer), run(CpuAttention(), changed, layer))
    num_keys = None if case.batch.num_keys is None else case.batch.num_keys + 1
    longer = replace(case.batch, starts=case.batch.starts + 1, num_keys=num_keys)
    with_garbage = run(CpuAttention(), changed._replace(batch=longer), layer)
    assert not torch.equal(run(CpuAttention(), case._replace(batch=longer), layer), with_garbage)


def test_writing_touches_its_slots_only():
    pages = torch.zeros(4, BLOCK_SIZE, 2, 16)
    values = torch.randn(3, 2, 16)
    write_pages(pages, values, torch.tensor([9, 31, 16]))
    assert torch.equal(pages[1, 1], values[0])
    assert torch.equal(pages[3, 7], values[1])
    assert torch.equal(pages[2, 0], values[2])
    assert int((pages.abs().sum((2, 3)) > 0).sum()) == 3
