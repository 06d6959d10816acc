"""GPTQ against its definition: what is left of a row moves to where the error is smallest, given what is rounded."""

from __future__ import annotations

import pytest
import torch

from worker.model.quant import calibrated
from worker.model.quant.calibrated import DAMPINGS, Grid, gptq, nearest
from worker.model.quant.matrix import QuantisedMatrix

ROWS, COLUMNS = 12, 96
GRID = Grid(num_bits=4, group_size=32, scale_dtype=torch.float16)


def weights(seed: int = 0) -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))


def hessian(seed: int = 1) -> torch.Tensor:
    """Of inputs whose columns depend on each other and differ in size."""
    randomness = torch.Generator().manual_seed(seed)
    inputs = torch.randn(400, 20, generator=randomness) @ torch.randn(20, COLUMNS, generator=randomness)
    inputs += 0.3 * torch.randn(400, COLUMNS, generator=randomness)
    inputs *= torch.rand(COLUMNS, generator=randomness) * 3
    return inputs.t() @ inputs


def loss(matrix: QuantisedMatrix, seed: int = 1) -> float:
    """The squared error of the products, summed over all inputs."""
    error = (matrix.dequantised() - weights()).double()
    return float(torch.einsum("ri,ij,rj->", error, hessian(seed).double(), error))


def by_definition(weight: torch.Tensor, inputs: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The numbers that GPTQ ends with, each step by a fresh solution of the least squares that it stands for."""
    damped = inputs.double() + DAMPINGS[0] * inputs.diagonal().mean().double() * torch.eye(len(inputs))
    whole, now, done = weight.double(), weight.double().clone(), torch.zeros(weight.shape, dtype=torch.float64)
    for column in range(len(inputs)):
        if column % grid.size(len(inputs)) == 0:
            scale = grid.scale(now[:, column : column + grid.size(len(inputs))].float())
        code = (now[:, column : column + 1] / scale).round().clamp(-grid.centre, grid.centre - 1)
        done[:, column] = (code * scale)[:, 0]
        fixed, rest = slice(0, column + 1), slice(column + 1, None)
        error = whole[:, fixed] - done[:, fixed]
        now[:, rest] = whole[:, rest] + torch.linalg.solve(damped[rest, rest], damped[rest, fixed] @ error.t()).t()
    return done.float()


@pytest.mark.parametrize("num_bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", [32, None], ids=["groups", "rows"])
@pytest.mark.parametrize("block", [128, 40], ids=["one block", "blocks"])
def test_every_number_is_that_of_the_definition(
    monkeypatch: pytest.MonkeyPatch, num_bits: int, group_size: int | None, block: int
) -> None:
    monkeypatch.setattr(calibrated, "BLOCK_COLUMNS", block if group_size is None else 16)
    grid = Grid(num_bits, group_size, torch.float16)
    matrix, expected = gptq(weights(), hessian(), grid), by_definition(weights(), hessian(), grid)
    # one code in a thousand may be at the edge between two
    assert (matrix.dequantised() != expected).float().mean() < 0.005
    assert (by_definition(weights(), hessian(2), grid) != expected).float().mean() > 0.2


def test_it_beats_the_nearest_codes_on_the_inputs_that_it_has_seen() -> None:
    seen, unseen = loss(gptq(weights(), hessian(), GRID)), loss(gptq(weights(), hessian(2), GRID))
    rounded = loss(nearest(weights(), GRID))
    assert seen < 0.5 * rounded
    assert unseen > rounded, "inputs of another kind are no help"


@pytest.mark.parametrize("grid", [GRID, Grid(8, None, torch.bfloat16), Grid(2, 32, torch.float32)])
def test_without_dependent_inputs_codes_are_the_nearest(grid: Grid) -> None:
    for inputs in (torch.eye(COLUMNS), torch.zeros(COLUMNS, COLUMNS)):
        matrix, expected = gptq(weights(), inputs, grid), nearest(weights(), grid)
        assert torch.equal(matrix.codes, expected.codes)
        assert torch.equal(matrix.scale, expected.scale)
    step = expected.scale[:, expected.groups]
    assert ((expected.dequantised() - weights()).abs() <= step * 0.51).all()
    assert torch.equal(expected.scale, expected.scale.to(grid.scale_dtype).float()), "files hold it exactly"


def test_columns_without_inputs_do_as_they_would_alone() -> None:
    inputs = hessian()
    inputs[5] = inputs[:, 5] = 0.0
    matrix = gptq(weights(), inputs, Grid(4, None, torch.float32))
    scale = matrix.scale
    expected = ((weights() / scale).round().clamp(-8, 7) * scale)[:, 5]
    assert torch.equal(matrix.dequantised()[:, 5], expected)


def test_act_order_is_the_same_on_columns_in_the_order_of_their_inputs() -> None:
    matrix = gptq(weights(), hessian(), GRID, has_order=True)
    order = hessian().diagonal().argsort(descending=True)
    assert not torch.equal(order, torch.arange(COLUMNS))
    moved = gptq(weights()[:, order], hessian()[order][:, order], GRID)
    assert torch.equal(matrix.codes[:, order], moved.codes)
    assert torch.equal(matrix.groups[order], torch.arange(COLUMNS) // 32)
    assert torch.equal(matrix.dequantised()[:, order], moved.dequantised())
    assert loss(matrix) < loss(nearest(weights(), GRID))


def test_a_group_of_zeros_stays_one() -> None:
    weight = weights()
    weight[3, :32] = 0.0
    assert not nearest(weight, GRID).dequantised()[3, :32].any()
    assert gptq(weight, hessian(), GRID).dequantised().isfinite().all()


def test_inputs_that_are_no_numbers_are_an_error() -> None:
    inputs = hessian()
    inputs[7] = inputs[:, 7] = torch.nan
    with pytest.raises(ValueError, match="not all numbers"):
        gptq(weights(), inputs, GRID)


def test_inputs_of_fewer_kinds_than_columns_are_damped_until_they_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding makes the damped matrix unfit here, where the damping is as small as that."""
    monkeypatch.setattr(calibrated, "DAMPINGS", (1e-9, 0.01))
    row = torch.rand(1, COLUMNS) + 1
    assert torch.linalg.cholesky_ex(row.t() @ row + 1e-9 * torch.eye(COLUMNS))[1]
    assert gptq(weights(), row.t() @ row, GRID).dequantised().isfinite().all()
