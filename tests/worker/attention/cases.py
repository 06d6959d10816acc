"""Random steps for attention, in the kinds of layers there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from worker.attention import Attention, Batch, LayerShape
from worker.attention.cpu import CpuAttention
from worker.attention.pages import page_width, write_pages
from worker.attention.plan import Plan
from worker.attention.reference import ReferenceAttention

BLOCK_SIZE = 8
REACH = 7


class Case(NamedTuple):
    q: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    batch: Batch


def random_case(
    seed: int,
    lengths: list[int],
    counts: list[int],
    kv_heads: int = 2,
    group: int = 3,
    dtype: torch.dtype = torch.float32,
) -> Case:
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
    return Case(q, k_pages, v_pages, Batch(np.array(counts), starts, tables, torch.zeros(0, dtype=torch.int64)))


def sized_case(
    head_dim: int,
    kv_heads: int,
    group: int,
    page_size: int,
    dtype: torch.dtype,
    kv_type: torch.dtype | None = None,
    lengths: Sequence[int] = (1, 30, 130, 600, 90),
    counts: Sequence[int] = (1, 1, 130, 2, 40),
) -> Case:
    """Rows whose pages hold what was written to them."""
    num_pages = -(-np.array(lengths) // page_size)
    order = np.random.default_rng(3).permutation(num_pages.sum()) + 1
    tables = np.zeros((len(lengths), num_pages.max()), np.int64)
    for row, (first, count) in enumerate(zip(np.cumsum(num_pages) - num_pages, num_pages, strict=True)):
        tables[row, :count] = order[first : first + count]
    generator, kv_type = torch.Generator().manual_seed(head_dim), kv_type or dtype
    shape = (int(num_pages.sum()) + 1, page_size, kv_heads, page_width(head_dim, kv_type))
    pages = []
    for _ in range(2):
        numbers = torch.randn((shape[0] * page_size, kv_heads, head_dim), generator=generator).to(dtype)
        pages.append(torch.zeros(shape, dtype=torch.uint8 if kv_type.itemsize == 1 else kv_type).view(kv_type))
        write_pages(pages[-1], numbers, torch.arange(len(numbers)))
    q = torch.randn((sum(counts), kv_heads * group, head_dim), generator=generator).to(dtype)
    starts = np.array(lengths) - np.array(counts)
    return Case(q, *pages, Batch(np.array(counts), starts, tables, torch.zeros(0, dtype=torch.int64)))


def encoding(case: Case) -> Case:
    """The same case with rows that see all their keys, their own future included."""
    assert not case.batch.starts.any()
    return case._replace(batch=replace(case.batch, num_keys=case.batch.num_queries.copy()))


def crossing(case: Case) -> Case:
    """The same case with rows that see all keys, which have nothing to do with where the queries stand."""
    batch = case.batch
    starts = np.random.default_rng(len(case.q)).integers(0, 2000, len(batch.starts))
    return case._replace(batch=replace(batch, starts=starts, num_keys=batch.starts + batch.num_queries))


class Kind(NamedTuple):
    """A kind of layer: `shape` by the number of heads, `view` turns a causal case into one of this kind."""

    shape: Callable[[int], LayerShape]
    group: int = 3
    is_encoder: bool = False
    view: Callable[[Case], Case] = lambda case: case


def slopes(num_heads: int) -> torch.Tensor:
    return 2.0 ** -torch.linspace(1, 8, num_heads)


def bias(num_heads: int) -> torch.Tensor:
    return torch.randn((num_heads, 2 * REACH + 1), generator=torch.Generator().manual_seed(num_heads))


KINDS = {
    "plain": Kind(lambda heads: LayerShape(0.25)),
    "window": Kind(lambda heads: LayerShape(0.25, 13)),
    "softcap": Kind(lambda heads: LayerShape(0.25, softcap=1.5)),
    "softcap and window": Kind(lambda heads: LayerShape(0.25, 13, 1.5)),
    "slopes": Kind(lambda heads: LayerShape(0.25, slopes=slopes(heads)), group=1),
    "slopes of heads that share keys": Kind(lambda heads: LayerShape(0.25, slopes=slopes(heads))),
    "slopes and window": Kind(lambda heads: LayerShape(0.25, 13, slopes=slopes(heads))),
    "bias": Kind(lambda heads: LayerShape(1.0, bias=bias(heads)), group=1),
    "bias of heads that share keys": Kind(lambda heads: LayerShape(0.25, bias=bias(heads))),
    "everything causal": Kind(lambda heads: LayerShape(0.25, 13, 1.5, slopes(heads), bias(heads))),
    "encoder": Kind(lambda heads: LayerShape(1.0, bias=bias(heads)), group=1, is_encoder=True, view=encoding),
    "encoder with all but a window": Kind(
        lambda heads: LayerShape(0.25, None, 1.5, slopes(heads), bias(heads)), is_encoder=True, view=encoding
    ),
    "cross attention": Kind(lambda heads: LayerShape(1.0), group=1, view=crossing),
    "cross attention with softcap": Kind(lambda heads: LayerShape(1.0, softcap=1.5), view=crossing),
}


def kind_case(
    name: str, lengths: list[int], counts: list[int], dtype: torch.dtype = torch.float32
) -> tuple[Case, LayerShape]:
    """A case and a layer of that kind; an encoder has all tokens of its rows in one step."""
    kind, kv_heads = KINDS[name], 2
    counts = lengths if kind.is_encoder else counts
    case = kind.view(random_case(len(name), lengths, counts, kv_heads, kind.group, dtype))
    return case, kind.shape(kv_heads * kind.group)


def moved(case: Case, layer: LayerShape, device: torch.device) -> tuple[Case, LayerShape]:
    q, k_pages, v_pages, slots = (each.to(device) for each in (*case[:3], case.batch.slots))
    slopes, bias = (None if each is None else each.to(device) for each in (layer.slopes, layer.bias))
    return Case(q, k_pages, v_pages, replace(case.batch, slots=slots)), replace(layer, slopes=slopes, bias=bias)


def run(attention: Attention, case: Case, layer: LayerShape) -> torch.Tensor:
    meta = attention.prepare(case.batch, case.k_pages.shape[1])
    return attention.attend(case.q, case.k_pages, case.v_pages, meta, layer)


def exact(case: Case, layer: LayerShape) -> torch.Tensor:
    """By the oracle in float64."""
    wide = (part.double() for part in (case.q, case.k_pages, case.v_pages))
    return run(ReferenceAttention(), Case(*wide, case.batch), layer)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to the largest number of the result."""
    return float((found.double() - expected).abs().max() / expected.abs().max())


def difference(case: Case, layer: LayerShape, other: LayerShape | None = None, other_case: Case | None = None) -> float:
    """Largest between the implementation and the oracle, which may be given another layer or case."""
    expected = run(ReferenceAttention(), other_case or case, other or layer)
    return float((run(CpuAttention(), case, layer) - expected).abs().max())


def plan_of(case: Case, layer: LayerShape) -> Plan:
    meta = CpuAttention().prepare(case.batch, case.k_pages.shape[1])
    return meta.plan(layer, case.q.dtype, case.q.shape[1], case.k_pages.shape[2])
