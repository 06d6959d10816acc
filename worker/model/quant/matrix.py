"""A quantised matrix as plain tensors, whatever format it came in: the definition that every product is held to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class QuantisedMatrix:
    """[rows, columns] numbers, each (number of its code - zero) * scale of its row and group of columns.

    `codes` [rows, columns] uint8, int8 or a float8; with a `table` float32 [n] its number is the entry at the code,
    else the code itself. `scale` and `zero` float32 [rows, groups]; `zero` None is zero. `groups` int64 [columns],
    never on the meta device, says to which group a column belongs. `num_bits` is the width of a code.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    groups: Tensor
    num_bits: int
    table: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantised(self) -> Tensor:
        """float32 [rows, columns]."""
        numbers = self.codes.float() if self.table is None else self.table.to(self.codes.device)[self.codes.int()]
        if self.zero is not None:
            numbers = numbers - self.zero[:, self.groups]
        return numbers * self.scale[:, self.groups]

    def rows(self, wanted: Tensor | slice) -> QuantisedMatrix:
        zero = None if self.zero is None else self.zero[wanted]
        return replace(self, codes=self.codes[wanted], scale=self.scale[wanted], zero=zero)

    def columns(self, wanted: range) -> QuantisedMatrix:
        part = slice(wanted.start, wanted.stop)
        return replace(self, codes=self.codes[:, part].contiguous(), groups=self.groups[part])

    def only_used_groups(self) -> QuantisedMatrix:
        """Without the scales of groups that other ranks have; the groups that are left are numbered anew."""
        used, groups = self.groups.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        zero = None if self.zero is None else self.zero[:, used]
        return replace(self, scale=self.scale[:, used], zero=zero, groups=groups)

    def group_size(self) -> int | None:
        """Columns of every group, if all have as many and group follows upon group; else None."""
        num_columns, num_groups = len(self.groups), self.scale.shape[1]
        if num_columns % num_groups:
            return None
        size = num_columns // num_groups
        return size if torch.equal(self.groups, neighbours(num_columns, size)) else None

    def in_groups(self) -> tuple[QuantisedMatrix, Tensor | None] | None:
        """The matrix with its columns in the order of their groups, and that order, None if it was so; None if groups
        are not of one size."""
        if self.group_size() is not None:
            return self, None
        order = self.groups.argsort(stable=True)
        ordered = replace(self, codes=self.codes[:, order], groups=self.groups[order])
        return None if ordered.group_size() is None else (ordered, order)


def neighbours(num_columns: int, size: int) -> Tensor:
    """The group of each column where so many neighbours share one, int64 [columns]."""
    return torch.arange(num_columns) // size


def stacked(matrices: Iterable[QuantisedMatrix]) -> list[QuantisedMatrix]:
    """The rows of all matrices one below the other, in as few matrices as their kinds allow."""
    runs: list[list[QuantisedMatrix]] = []
    for matrix in matrices:
        if runs and _is_alike(runs[-1][0], matrix):
            runs[-1].append(matrix)
        else:
            runs.append([matrix])
    return [_stack(run) for run in runs]


def _is_alike(one: QuantisedMatrix, other: QuantisedMatrix) -> bool:
    kinds = [
        (matrix.codes.dtype, matrix.num_bits, matrix.zero is None, matrix.scale.shape[1]) for matrix in (one, other)
    ]
    if kinds[0] != kinds[1] or not torch.equal(one.groups, other.groups):
        return False
    if one.table is None or other.table is None:
        return one.table is other.table
    return torch.equal(one.table, other.table)


def _stack(matrices: Sequence[QuantisedMatrix]) -> QuantisedMatrix:
    if len(matrices) == 1:
        return matrices[0]
    zeros = [matrix.zero for matrix in matrices if matrix.zero is not None]
    return replace(
        matrices[0],
        codes=torch.cat([matrix.codes for matrix in matrices]),
        scale=torch.cat([matrix.scale for matrix in matrices]),
        zero=torch.cat(zeros) if zeros else None,
    )


def filled(parts: Iterable[QuantisedMatrix], num_rows: int) -> QuantisedMatrix:
    """The rows of matrices of one kind, `num_rows` in all, one below the other. Each is copied into its place when it
    comes: small results that stay between large tensors that go would leave holes all over the memory."""
    whole, start = None, 0
    for part in parts:
        if part.shape[0] == num_rows:
            return part
        whole = whole or _unwritten(part, num_rows)
        end = start + part.shape[0]
        for target, own in ((whole.codes, part.codes), (whole.scale, part.scale), (whole.zero, part.zero)):
            if target is not None and own is not None:
                target[start:end] = own
        start = end
    assert whole is not None
    return whole


def _unwritten(like: QuantisedMatrix, num_rows: int) -> QuantisedMatrix:
    zero = None if like.zero is None else like.zero.new_empty(num_rows, like.zero.shape[1])
    codes, scale = (tensor.new_empty(num_rows, tensor.shape[1]) for tensor in (like.codes, like.scale))
    return replace(like, codes=codes, scale=scale, zero=zero)
