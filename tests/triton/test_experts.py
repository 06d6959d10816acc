"""Mixtures of experts against the sum over experts, token by token, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.triton.test_norms import UNITS, error, random
from worker.kernels.triton import experts
from worker.kernels.triton.operations import TritonOperations
from worker.model.moe import ListedExperts, StackedExperts, mixture
from worker.model.operations import Operations
from worker.model.spec import Activation, Moe
from worker.model.weights import DenseLinear, MoeWeights

TORCH, OURS = Operations(), TritonOperations()
# experts, active, hidden, width: odd ones, more than a tile of columns, a single one
SIZES = [(6, 2, 24, 16), (5, 3, 40, 7), (4, 1, 40, 72), (1, 1, 16, 16)]


def moe_of(num_experts: int, num_active: int, width: int) -> Moe:
    return Moe(
        num_experts=num_experts, num_active=num_active, ffn_size=width, is_renormalised=True, sparse_layers=(True,)
    )


def weights_of(
    num_experts: int, hidden: int, width: int, dtype: torch.dtype, device: torch.device, *, is_gated: bool = True
) -> MoeWeights:
    up = random(num_experts, width * (2 if is_gated else 1), hidden, dtype=dtype, device=device) * 0.4
    down = random(num_experts, hidden, width, dtype=dtype, device=device) * 0.4
    router = random(num_experts, hidden, dtype=dtype, device=device)
    return MoeWeights(router, StackedExperts(up), StackedExperts(down), None, None)


def exact(x: torch.Tensor, weights: MoeWeights, shares: torch.Tensor, chosen: torch.Tensor, *, is_gated: bool):
    results = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for token, (numbers, parts) in enumerate(zip(chosen.tolist(), shares.double(), strict=True)):
        for number, share in zip(numbers, parts, strict=True):
            inner = weights.up.matrices[number].double() @ x[token].double()
            gate, up = inner.chunk(2) if is_gated else (inner, 1.0)
            results[token] += share * (weights.down.matrices[number].double() @ (gate * gate.sigmoid() * up))
    return results


def routed(num_tokens: int, num_experts: int, num_active: int, dtype: torch.dtype, device: torch.device):
    """Shares, and experts of which the last ones are chosen rarely and one is not."""
    scores = random(num_tokens, num_experts, dtype=torch.float32, device=device)
    scores -= torch.arange(num_experts, device=device) / 2
    if num_experts > num_active:
        scores[:, 1] = -torch.inf
    shares, chosen = scores.softmax(-1).topk(num_active, -1)
    return shares.to(dtype), chosen


@pytest.mark.parametrize("is_gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", UNITS, ids=str)
def test_products_of_all_groups_are_the_sum_over_experts(device, dtype, sizes, is_gated):
    num_experts, num_active, hidden, width = sizes
    weights = weights_of(num_experts, hidden, width, dtype, device, is_gated=is_gated)
    activate = OURS.activation(Activation.SILU, is_gated=is_gated)
    assert experts.can_multiply(weights.up.matrices[0], weights.up.matrices, weights.down.matrices)
    for num_tokens in (1, 37):
        x = random(num_tokens, hidden, dtype=dtype, device=device)
        shares, chosen = routed(num_tokens, num_experts, num_active, dtype, device)
        assert num_experts == num_active or 1 not in chosen
        found = OURS.experts(x, weights, shares, chosen, activate)
        expected = exact(x, weights, shares, chosen, is_gated=is_gated)
        bar = 30 if dtype is torch.float32 else 4
        assert found.dtype is dtype and error(found, expected) <= bar, num_tokens
        others = exact(x, weights, shares, (chosen + 1) % num_experts, is_gated=is_gated)
        assert num_experts == 1 or error(found, others) > 10 * bar


def test_groups_of_every_size_find_their_tiles(device):
    """Of 16 rows: empty ones, full ones, one more, one less."""
    sizes = [0, 16, 17, 0, 15, 1, 32, 0]
    order, ends = torch.arange(sum(sizes), device=device).flip(0), torch.tensor(sizes, device=device).cumsum(0).int()
    x, matrices = (random(*shape, dtype=torch.float32, device=device) for shape in ((sum(sizes), 24), (8, 40, 24)))
    assert experts.tile_for(-(-sum(sizes) // 8), 4, is_gated=False).rows == 16
    found = experts.contract(x, matrices, order, ends, torch.ones(len(order), device=device))
    numbers = torch.repeat_interleave(torch.arange(8), torch.tensor(sizes)).to(device)
    expected = (matrices.double()[numbers] @ x.double()[..., None])[..., 0].flip(0)
    assert error(found, expected) <= 30
    assert error(found, expected.roll(1, 0)) > 1000


@pytest.mark.parametrize("rows", [16, 32, 64])
def test_tiles_of_every_size_give_the_same_products(device, monkeypatch, rows):
    weights, x = weights_of(3, 16, 40, torch.float32, device), random(70, 16, dtype=torch.float32, device=device)
    shares, chosen = routed(70, 3, 2, torch.float32, device)
    tile = experts.tile_for(rows, 4, is_gated=True)
    assert tile.rows == rows
    monkeypatch.setattr(experts, "tile_for", lambda *_, **__: tile)
    found = OURS.experts(x, weights, shares, chosen, OURS.activation(Activation.SILU, is_gated=True))
    assert error(found, exact(x, weights, shares, chosen, is_gated=True)) <= 30


@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("is_gated", [False, True])
def test_operands_of_all_stages_fit_an_a100(element_bytes, is_gated):
    for rows in range(1, 300):
        tile = experts.tile_for(rows, element_bytes, is_gated=is_gated)
        columns = tile.columns * (2 if is_gated else 1)
        assert (tile.rows + columns) * tile.depth * element_bytes * tile.num_stages <= 163 << 10


def test_experts_that_nobody_chose_are_not_read(device):
    weights, x = weights_of(6, 24, 16, torch.float32, device), random(5, 24, dtype=torch.float32, device=device)
    shares, chosen = routed(5, 6, 2, torch.float32, device)
    activate = OURS.activation(Activation.SILU, is_gated=True)
    expected = OURS.experts(x, weights, shares, chosen, activate)
    idle = sorted(set(range(6)) - set(chosen.flatten().tolist()))
    assert 0 < len(idle) < 6
    weights.up.matrices[idle], weights.down.matrices[idle] = torch.nan, torch.nan
    assert torch.equal(OURS.experts(x, weights, shares, chosen, activate), expected)
    weights.down.matrices[int(chosen[0, 0])] = torch.nan
    assert OURS.experts(x, weights, shares, chosen, activate).isnan().any()


def test_a_token_is_the_same_in_every_company_of_its_size(device):
    weights, x = weights_of(6, 24, 16, torch.bfloat16, device), random(40, 24, dtype=torch.bfloat16, device=device)
    moe, activate = moe_of(6, 2, 16), OURS.activation(Activation.SILU, is_gated=True)
    everyone = mixture(x, weights, moe, activate, OURS)
    assert torch.equal(mixture(x.flip(0), weights, moe, activate, OURS).flip(0), everyone)
    assert not torch.equal(mixture(x.roll(1, 0), weights, moe, activate, OURS), everyone)


class Asked(Exception):
    """The host wanted to know what is on the device."""


def test_the_host_asks_the_device_nothing(device, monkeypatch):
    def ask(*_):
        raise Asked

    weights, x = weights_of(6, 24, 16, torch.float32, device), random(9, 24, dtype=torch.float32, device=device)
    for name in ("tolist", "item", "__bool__", "__int__", "__index__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, ask)
    moe, activate = moe_of(6, 2, 16), OURS.activation(Activation.SILU, is_gated=True)
    mixture(x, weights, moe, activate, OURS)
    listed = ListedExperts(tuple(DenseLinear(matrix, None) for matrix in weights.up.matrices))
    with pytest.raises(Asked):
        mixture(x, replace(weights, up=listed), moe, activate, OURS)


def test_other_experts_and_types_are_left_to_torch(device):
    moe = moe_of(6, 2, 16)
    stacked = weights_of(6, 24, 16, torch.float32, device)
    listed = ListedExperts(tuple(DenseLinear(matrix, None) for matrix in stacked.up.matrices))
    for weights in (weights_of(6, 24, 16, torch.float64, device), replace(stacked, up=listed)):
        x = random(9, 24, dtype=weights.router.dtype, device=device)
        found, expected = (
            mixture(x, weights, moe, each.activation(Activation.SILU, is_gated=True), each) for each in (OURS, TORCH)
        )
        torch.testing.assert_close(found, expected)
