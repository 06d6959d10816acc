from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from worker.model import moe as mixtures
from worker.model.moe import StackedExperts, mixture, route
from worker.model.operations import Operations
from worker.model.spec import Activation, Moe
from worker.model.weights import DenseLinear, MlpWeights, MoeWeights

HIDDEN, NUM_EXPERTS = 24, 6
SILU = Operations().activation(Activation.SILU, is_gated=True)
# the second width is none of a grouped product, nor is the last type
KINDS = [(16, torch.float32), (7, torch.float32), (16, torch.bfloat16), (16, torch.float64)]


def moe_of(width: int, *, is_renormalised: bool = True, num_active: int = 2) -> Moe:
    return Moe(
        num_experts=NUM_EXPERTS,
        num_active=num_active,
        ffn_size=width,
        is_renormalised=is_renormalised,
        sparse_layers=(True,),
        shared_ffn_size=width,
        has_shared_gate=True,
    )


def random_weights(width: int, dtype: torch.dtype) -> MoeWeights:
    randomness = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=randomness).mul(0.4).to(dtype)

    return MoeWeights(
        router=random(NUM_EXPERTS, HIDDEN),
        up=StackedExperts(random(NUM_EXPERTS, 2 * width, HIDDEN)),
        down=StackedExperts(random(NUM_EXPERTS, HIDDEN, width)),
        shared=MlpWeights(DenseLinear(random(2 * width, HIDDEN), None), DenseLinear(random(HIDDEN, width), None)),
        shared_gate=random(1, HIDDEN),
    )


def tokens(count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(4)).to(dtype)


def expert(token: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    gate, value = (up @ token).chunk(2)
    return down @ (gate.sigmoid() * gate * value)


def token_by_token(x: torch.Tensor, weights: MoeWeights, moe: Moe) -> torch.Tensor:
    """The definition, in float64."""
    results = []
    for token in x.double():
        probabilities = (weights.router.double() @ token).exp()
        probabilities = probabilities / probabilities.sum()
        best = sorted(range(NUM_EXPERTS), key=lambda number: -float(probabilities[number]))[: moe.num_active]
        whole = sum(probabilities[number] for number in best) if moe.is_renormalised else 1.0
        result = (weights.shared_gate.double() @ token).sigmoid() * expert(
            token, weights.shared.up.weight.double(), weights.shared.down.weight.double()
        )
        for number in best:
            part = expert(token, weights.up.matrices[number].double(), weights.down.matrices[number].double())
            result = result + probabilities[number] / whole * part
        results.append(result)
    return torch.stack(results)


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("is_renormalised", [True, False])
@pytest.mark.parametrize("count", [1, 17])
@pytest.mark.parametrize(("width", "dtype"), KINDS)
def test_groups_are_the_sum_over_experts_token_by_token(width, dtype, count, is_renormalised):
    moe, weights, x = moe_of(width, is_renormalised=is_renormalised), random_weights(width, dtype), tokens(count, dtype)
    expected = token_by_token(x, weights, moe)
    got, bar = mixture(x, weights, moe, SILU, Operations()), 20 * torch.finfo(dtype).eps
    assert got.dtype is dtype
    assert error(got, expected) <= bar
    wrong = replace(weights, down=StackedExperts(weights.down.matrices.roll(1, 0)))
    assert error(mixture(x, wrong, moe, SILU, Operations()), expected) > bar


@pytest.mark.parametrize(("width", "dtype"), KINDS)
def test_both_ways_of_grouping_are_one_product_per_group(monkeypatch, width, dtype):
    calls = []
    grouped = F.grouped_mm
    monkeypatch.setattr(mixtures.F, "grouped_mm", lambda *args, **named: calls.append(1) or grouped(*args, **named))
    rows, matrices = tokens(9, dtype)[:, :width].contiguous(), random_weights(width, dtype).down.matrices
    ends = torch.tensor([0, 4, 4, 5, 9, 9], dtype=torch.int32)
    got = StackedExperts(matrices)(rows, ends)
    assert bool(calls) is (width == 16 and dtype is not torch.float64)
    for row, number in zip(range(9), [1, 1, 1, 1, 3, 4, 4, 4, 4], strict=True):
        expected = matrices[number].double() @ rows[row].double()
        assert error(got[row], expected) <= 20 * torch.finfo(dtype).eps
        assert error(got[row], matrices[number - 1].double() @ rows[row].double()) > 0.1


@pytest.mark.parametrize(("width", "dtype"), KINDS)
def test_experts_that_nobody_chose_are_not_read(width, dtype):
    moe, weights, x = moe_of(width), random_weights(width, dtype), tokens(2, dtype)
    expected = mixture(x, weights, moe, SILU, Operations())
    idle = sorted(set(range(NUM_EXPERTS)) - set(route(x, weights.router, moe)[1].flatten().tolist()))
    assert 0 < len(idle) < NUM_EXPERTS
    weights.up.matrices[idle], weights.down.matrices[idle] = torch.nan, torch.nan
    assert torch.equal(mixture(x, weights, moe, SILU, Operations()), expected)
    weights.up.matrices[:] = torch.nan
    assert mixture(x, weights, moe, SILU, Operations()).isnan().any()


@pytest.mark.parametrize(("width", "dtype"), KINDS)
def test_the_company_of_a_token_changes_it_by_rounding_only(width, dtype):
    moe, weights, x = moe_of(width), random_weights(width, dtype), tokens(64, dtype)
    alone = torch.cat([mixture(token[None], weights, moe, SILU, Operations()) for token in x])
    bar = 20 * torch.finfo(dtype).eps
    assert error(mixture(x, weights, moe, SILU, Operations()), alone.double()) <= bar
    assert error(mixture(x.flip(0), weights, moe, SILU, Operations()), alone.double()) > bar
