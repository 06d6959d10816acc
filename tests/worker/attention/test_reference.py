"""The oracle against the formula, number by number."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.worker.attention.cases import BLOCK_SIZE, KINDS, REACH, Case, kind_case, random_case, run
from worker.attention import LayerShape
from worker.attention.reference import ReferenceAttention

LENGTHS, COUNTS = [1, 30, 26], [1, 1, 6]


def added(layer: LayerShape, head: int, distance: int) -> float:
    """`distance` is the key's position less the query's."""
    slope = 0.0 if layer.slopes is None else float(layer.slopes[head])
    clamped = max(-REACH, min(REACH, distance))
    return slope * distance + (0.0 if layer.bias is None else float(layer.bias[head, REACH + clamped]))


def weights(q: torch.Tensor, keys: list[torch.Tensor], position: int, head: int, layer: LayerShape, is_causal: bool):
    """Of one query in one head for all `keys`."""
    unnormalised = []
    for key_position, key in enumerate(keys):
        score = layer.scale * math.fsum((q * key).tolist())
        if layer.softcap is not None:
            score = layer.softcap * math.tanh(score / layer.softcap)
        is_seen = not is_causal or position - (layer.window or math.inf) < key_position <= position
        unnormalised.append(math.exp(score + added(layer, head, key_position - position)) if is_seen else 0.0)
    return [weight / math.fsum(unnormalised) for weight in unnormalised]


def dense(case: Case, layer: LayerShape) -> torch.Tensor:
    batch, outputs, token = case.batch, [], 0
    group = case.q.shape[1] // case.k_pages.shape[2]
    for row, count in enumerate(batch.num_queries.tolist()):
        start = int(batch.starts[row])
        length = start + count if batch.num_keys is None else int(batch.num_keys[row])
        places = [(batch.block_tables[row, at // BLOCK_SIZE], at % BLOCK_SIZE) for at in range(length)]
        for position in range(start, start + count):
            for head in range(case.q.shape[1]):
                keys, values = ([pages[place][head // group] for place in places] for pages in case[1:3])
                parts = weights(case.q[token, head], keys, position, head, layer, batch.num_keys is None)
                outputs.append(sum(weight * value for weight, value in zip(parts, values)))
            token += 1
    return torch.stack(outputs).view(case.q.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_the_formula(kind):
    assert max(LENGTHS) > 2 * BLOCK_SIZE + REACH
    case, layer = kind_case(kind, LENGTHS, COUNTS, torch.float64)
    assert float((run(ReferenceAttention(), case, layer) - dense(case, layer)).abs().max()) <= 1e-14


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        ("plain", dict(scale=0.26)),
        ("window", dict(window=12)),
        ("softcap and window", dict(window=14)),
        ("softcap", dict(softcap=None)),
        ("slopes", dict(slopes=None)),
        ("slopes of heads that share keys", dict(slopes=-KINDS["slopes"].shape(6).slopes)),
        ("bias", dict(bias=KINDS["bias"].shape(2).bias.flip(1))),
        ("encoder", dict(bias=KINDS["encoder"].shape(2).bias.flip(1))),
    ],
)
def test_the_formula_tells_another_layer_apart(kind, wrong):
    case, layer = kind_case(kind, LENGTHS, COUNTS, torch.float64)
    assert float((run(ReferenceAttention(), case, layer) - dense(case, replace(layer, **wrong))).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["encoder", "cross attention"])
def test_the_formula_tells_apart_what_is_causal_or_sees_a_key_less(kind):
    case, layer = kind_case(kind, LENGTHS, COUNTS, torch.float64)
    num_keys = case.batch.num_keys
    causal = replace(case.batch, num_keys=None, starts=num_keys - case.batch.num_queries)
    fewer = replace(case.batch, num_keys=(num_keys - 1).clip(1))
    for wrong in (causal, fewer):
        wrongly = dense(case._replace(batch=wrong), layer)
        assert float((run(ReferenceAttention(), case, layer) - wrongly).abs().max()) > 1e-3


def test_scores_of_narrow_types_are_not_rounded():
    case = random_case(1, [40], [12])
    narrow = case._replace(**{name: getattr(case, name).bfloat16() for name in ("q", "k_pages", "v_pages")})
    exact = case._replace(**{name: getattr(narrow, name).double() for name in ("q", "k_pages", "v_pages")})
    layer = LayerShape(20.0, slopes=torch.full((6,), 0.5))
    assert float((case.q.double() @ case.k_pages[1, 0, 0].double()).abs().max()) * layer.scale > 64
    expected = run(ReferenceAttention(), exact, layer)
    got = run(ReferenceAttention(), narrow, layer)
    assert got.dtype is torch.bfloat16
    # half of the last of 8 bits, and what float32 loses where values cancel out
    assert bool(((got.double() - expected).abs() <= 2.0**-8 * expected.abs() + 1e-4).all())
    # as if products of 8 bits had been kept
    rounded = exact._replace(q=(exact.q * layer.scale).bfloat16().double() / layer.scale)
    assert not bool(((run(ReferenceAttention(), rounded, layer) - expected).abs() <= 2.0**-8 * expected.abs()).all())
