"""Codes for matrices that come whole: to the nearest, or by GPTQ, which makes later columns make up for earlier ones.

GPTQ (Frantar et al., arXiv 2210.17323) knows by H = X^T X of a matrix' inputs X what an error in one column costs and
which changes of the others cost least then. It goes through the columns, rounds each to the nearest and moves those
that are not rounded yet, by rows of the upper Cholesky factor of H's inverse.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.model.quant.matrix import QuantisedMatrix, neighbours

BLOCK_COLUMNS = 128
"""Columns within which each change is made at once; columns behind them get all their changes in one product."""
DAMPINGS = (0.01, 0.1, 1.0)
"""Shares of its mean that are added to the diagonal of H, the next one where rounding has spoilt the factor."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Symmetric codes: half of the range stands for zero, and `group_size` neighbours of a row share a scale, of the
    type `scale_dtype` that files keep it in. None: the whole row does."""

    num_bits: int
    group_size: int | None
    scale_dtype: torch.dtype

    @property
    def centre(self) -> int:
        return 1 << self.num_bits - 1

    def size(self, num_columns: int) -> int:
        return self.group_size or num_columns

    def scale(self, group: Tensor) -> Tensor:
        """float32 [..., 1] of weights [..., n]: the largest is half a step beyond the last code, or at the first."""
        largest = group.abs().amax(-1, keepdim=True)
        # so much more that rounding it makes it no smaller than what the largest needs
        needed = largest / (self.centre - 0.5) * (1 + torch.finfo(self.scale_dtype).eps / 2)
        scale = needed.to(self.scale_dtype).float()
        return torch.where(scale > 0, scale, 1.0)

    def codes(self, weight: Tensor, scale: Tensor) -> Tensor:
        """float32, whole numbers from 0 on."""
        return (weight / scale).round_().add_(self.centre).clamp_(0, 2 * self.centre - 1)

    def matrix(self, codes: Tensor, scale: Tensor, groups: Tensor) -> QuantisedMatrix:
        zero = torch.full_like(scale, self.centre)
        return QuantisedMatrix(codes.to(torch.uint8), scale, zero, groups, self.num_bits)


def nearest(weight: Tensor, grid: Grid) -> QuantisedMatrix:
    """`weight` float32 [rows, columns]; groups divide the columns."""
    size = grid.size(weight.shape[1])
    grouped = weight.view(len(weight), -1, size)
    scale = grid.scale(grouped)
    codes = grid.codes(grouped, scale).view(weight.shape)
    return grid.matrix(codes, scale[..., 0], neighbours(weight.shape[1], size))


def gptq(weight: Tensor, hessian: Tensor, grid: Grid, *, has_order: bool = False) -> QuantisedMatrix:
    """`weight` float32 [rows, columns], `hessian` float32 [columns, columns] of the inputs; groups divide the columns.

    `has_order` takes columns with the largest inputs first (act-order), and such columns share scales then.

    Raises:
        ValueError: the inputs were not all numbers.
    """
    order = None
    if has_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
        weight, hessian = weight[:, order], hessian[order][:, order]
    columns = weight.t().contiguous()
    factor = _factor(hessian)
    scales = torch.cat(list(_walk(columns, factor, grid)), 1)
    groups = neighbours(len(columns), grid.size(len(columns)))
    if order is None:
        return grid.matrix(columns.t(), scales, groups)
    back = order.argsort()
    return grid.matrix(columns.t()[:, back], scales, groups[back])


def _factor(hessian: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse, which is the inverse of the factor of H in the order of its last columns
    first. Columns that never had an input get the damping alone: they are rounded to the nearest."""
    mean = float(hessian.diagonal().mean()) or 1.0
    for damping in DAMPINGS:
        turned = hessian.flip(0, 1)
        turned.diagonal().add_(damping * mean)
        lower, is_spoilt = torch.linalg.cholesky_ex(turned)
        del turned
        if not is_spoilt:
            inverse = torch.eye(len(hessian))
            torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
            return inverse.flip(0, 1)
    raise ValueError("the inputs are not all numbers")


def _walk(columns: Tensor, factor: Tensor, grid: Grid) -> Iterator[Tensor]:
    """Replace `columns` [columns, rows] by their codes; yields the scales [rows, 1] of each group."""
    num_columns = len(columns)
    size = grid.size(num_columns)
    step = min(size, BLOCK_COLUMNS)
    scale = columns
    for start in range(0, num_columns, step):
        if start % size == 0:
            scale = grid.scale(columns[start : start + size].t())
            yield scale
        block = slice(start, min(start + step, num_columns))
        errors = _walk_block(columns[block], factor[block, block], scale[:, 0], grid)
        columns[block.stop :].addmm_(factor[block, block.stop :].t(), errors, alpha=-1)


def _walk_block(block: Tensor, factor: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """The errors [columns, rows] by which columns behind the block are to move."""
    errors = torch.empty_like(block)
    for index, column in enumerate(block):
        codes = grid.codes(column, scale)
        torch.sub(column, (codes - grid.centre) * scale, out=errors[index]).div_(factor[index, index])
        column.copy_(codes)
        block[index + 1 :].addmm_(factor[index, index + 1 :, None], errors[index, None], alpha=-1)
    return errors
