"""LoRA adapters beside the weights (Hu et al., arXiv 2106.09685): for a token with an adapter, the product with a
matrix W [out, in] becomes W x + B (A x), with A [rank, in] and B [out, rank] of this adapter.

Adapters lie in slots, all of which are as wide as the adapter of the largest rank among them; the others are padded
with zeros, which add nothing. Slots take memory when the first adapter comes, in those layers alone that adapters
change.

A batch holds tokens of many adapters and of none. There are two ways through:

    few tokens    A of all slots in one product, of which each token keeps its own slot's part, then B of all slots:
                  a handful of products whatever the number of adapters
    many tokens   adapter by adapter, over the tokens that are its own

Ranks that hold rows of W hold the same rows of B and all of A; those that hold columns of W hold these columns of A and
all of B, and what they add to their parts is summed with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from worker.model.families.base import Family
from worker.model.weights import Linear

if TYPE_CHECKING:
    from worker.model.loading import Piece

FEW_COLUMNS = 4096
"""Up to so many tokens times the rank, all slots in one product cost less than a product for each adapter."""

Slots = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """A stored matrix of `shape` [out, in] that adapters may change: the pieces of it that the rank holds, and where
    their rows are in the result of the layer they belong to."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    place: slice

    def part_of_a(self, a: Tensor) -> Tensor:
        """Of A [rank, in] what the rank multiplies its inputs with."""
        columns = self.pieces[0].part.columns
        assert columns is not None
        return a[:, columns.start : columns.stop]

    def part_of_b(self, b: Tensor) -> Tensor:
        """Of B [out, rank] the rows that the rank adds to its result, in their order there."""
        return torch.cat([_rows(b, piece) for piece in self.pieces])


def _rows(b: Tensor, piece: Piece) -> Tensor:
    rows = torch.cat([b[run.start : run.stop] for run in piece.part.rows])
    return rows if piece.order is None else rows[piece.order]


@dataclass(frozen=True, slots=True)
class Change:
    """What an adapter has for a target: A [rank, in] and B [out, rank], the latter with the adapter's scale in it."""

    target: Target
    a: Tensor
    b: Tensor


@dataclass(frozen=True, slots=True)
class LoraStep:
    """Which slot each token of a step uses. Either `others` bool [t, 1, slots * rank] says which columns of A x are not
    for a token, or `shares` has for each slot its tokens, a slice where they are neighbours."""

    others: Tensor | None
    shares: tuple[tuple[int, slice | Tensor], ...] = ()


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring targets of equal width, numbers `first` to `end` of the layer: one product for all of them. `b`
    [targets, slots * rank, width]."""

    first: int
    end: int
    place: slice
    b: Tensor

    def rows(self, result: Tensor) -> Tensor:
        """Its part of a result [t, out], [targets, t, width]."""
        return result[:, self.place].view(len(result), len(self.b), -1).transpose(0, 1)


@dataclass(slots=True, eq=False)
class AdaptedLinear:
    """`base` [t, in] -> [t, out], to whose result the adapters of a step add their parts.

    `_a` [targets, slots, rank, in] has the targets that adapters in slots change, in the order of their places.
    """

    base: Linear
    num_in: int
    slots: LoraSlots
    _users: dict[Target, set[int]] = field(default_factory=dict)
    _targets: list[Target] = field(default_factory=list)
    _a: Tensor = field(default_factory=lambda: torch.zeros(0, 0, 0))
    _runs: list[Run] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return self.base.num_bytes

    def __call__(self, x: Tensor) -> Tensor:
        result = self.base(x)
        step = self.slots.step
        if step is not None and self._runs:
            if step.others is not None:
                self._add_to_all(x, result, step.others)
            else:
                self._add_by_slot(x, result, step)
        return result

    def _add_to_all(self, x: Tensor, result: Tensor, others: Tensor) -> None:
        inner = F.linear(x, self._a.view(-1, self.num_in)).view(len(x), len(self._targets), -1)
        # filled, not multiplied: what is not a number in one adapter stays with its own tokens
        inner = inner.masked_fill_(others, 0.0).transpose(0, 1)
        for run in self._runs:
            run.rows(result).baddbmm_(inner[run.first : run.end], run.b)

    def _add_by_slot(self, x: Tensor, result: Tensor, step: LoraStep) -> None:
        num_targets, _, rank, _ = self._a.shape
        for slot, tokens in step.shares:
            own = x[tokens] if isinstance(tokens, slice) else x.index_select(0, tokens)
            inner = F.linear(own, self._a[:, slot].flatten(0, 1)).view(len(own), num_targets, rank).transpose(0, 1)
            for run in self._runs:
                part, b = inner[run.first : run.end], run.b[:, slot * rank : (slot + 1) * rank]
                if isinstance(tokens, slice):
                    run.rows(result[tokens]).baddbmm_(part, b)
                else:
                    result[:, run.place].index_add_(0, tokens, torch.bmm(part, b).transpose(0, 1).flatten(1))

    # What the slots hold.

    def bytes_with(self, slot: int, targets: Sequence[Target], num_slots: int, rank: int) -> int:
        """What it would take with an adapter for `targets` in `slot`, and slots of that number and rank."""
        sizes = [self.num_in + _size(target.place) for target in self._users_with(slot, targets)]
        return sum(sizes) * num_slots * rank * self.slots.dtype.itemsize

    def put(self, slot: int, targets: Sequence[Target], num_slots: int, rank: int) -> None:
        """Make room in `slot`, with zeros, for an adapter that changes `targets`."""
        self._users = self._users_with(slot, targets)
        wanted = sorted(self._users, key=lambda target: int(target.place.start))
        if wanted != self._targets or self._a.shape[1:3] != (num_slots, rank):
            self._rebuild(wanted, num_slots, rank)
        self._a[:, slot] = 0.0
        for run in self._runs:
            run.b[:, slot * rank : (slot + 1) * rank] = 0.0

    def write(self, slot: int, change: Change) -> None:
        """`change` is for one of the targets of the last `put`."""
        first, num_rows = slot * self._a.shape[2], len(change.a)
        self._a[self._targets.index(change.target), slot, :num_rows] = change.target.part_of_a(change.a)
        b = self._b_of_targets()[change.target]
        b[first : first + num_rows] = change.target.part_of_b(change.b).t()

    def _users_with(self, slot: int, targets: Sequence[Target]) -> dict[Target, set[int]]:
        kept = {target: slots - {slot} for target, slots in self._users.items()}
        for target in targets:
            kept[target] = kept.get(target, set()) | {slot}
        return {target: slots for target, slots in kept.items() if slots}

    def _b_of_targets(self) -> dict[Target, Tensor]:
        """[slots * rank, width] of each."""
        return dict(zip(self._targets, (b for run in self._runs for b in run.b), strict=True))

    def _rebuild(self, targets: list[Target], num_slots: int, rank: int) -> None:
        """Other targets, more slots or another rank; what lies in the slots stays."""
        old_a, old_b = dict(zip(self._targets, self._a, strict=True)), self._b_of_targets()
        self._targets, dtype = targets, self.slots.dtype
        self._a = torch.zeros((len(targets), num_slots, rank, self.num_in), dtype=dtype)
        self._runs = _empty_runs(targets, num_slots * rank, dtype)
        new_b = self._b_of_targets()
        for target, new_a in zip(targets, self._a, strict=True):
            if target in old_a:
                _copy_corner(old_a[target], new_a)
                old = old_b[target].view(*old_a[target].shape[:2], -1)
                _copy_corner(old, new_b[target].view(num_slots, rank, -1))


def _empty_runs(targets: Sequence[Target], num_rows: int, dtype: torch.dtype) -> list[Run]:
    runs: list[Run] = []
    for own in _neighbours(targets):
        first, width = runs[-1].end if runs else 0, _size(own[0].place)
        place = slice(own[0].place.start, own[-1].place.stop)
        runs.append(Run(first, first + len(own), place, torch.zeros((len(own), num_rows, width), dtype=dtype)))
    return runs


def _neighbours(targets: Sequence[Target]) -> list[list[Target]]:
    """Those that follow upon each other and are equally wide together."""
    groups: list[list[Target]] = []
    for target in targets:
        if groups and _is_next(groups[-1][-1].place, target.place):
            groups[-1].append(target)
        else:
            groups.append([target])
    return groups


def _is_next(one: slice, other: slice) -> bool:
    return bool(one.stop == other.start) and _size(one) == _size(other)


def _size(place: slice) -> int:
    return int(place.stop - place.start)


def _copy_corner(old: Tensor, new: Tensor) -> None:
    """Of [slots, rank, ...] what both have. Ranks shrink only when what needed them is gone."""
    num_slots, rank = min(len(old), len(new)), min(old.shape[1], new.shape[1])
    new[:num_slots, :rank] = old[:num_slots, :rank]


class LoraSlots:
    """The adapters that a rank holds, and every layer they may change. `step` is what layers go by while a step runs;
    None says that no token has an adapter."""

    def __init__(self, family: Family, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.step: LoraStep | None = None
        self.targets: dict[str, Target] = {}
        self._family = family
        self._layers: dict[AdaptedLinear, list[Target]] = {}
        self._ranks: list[int] = []

    def wrap(self, base: Linear, pieces: Sequence[Piece]) -> AdaptedLinear:
        """A layer that adapters may change; `base` has the rows of all pieces, one below the other."""
        columns = pieces[0].part.columns
        assert columns is not None
        layer, start = AdaptedLinear(base, len(columns), self), 0
        self._layers[layer] = []
        for (key, number), group in groupby(pieces, lambda piece: (piece.key, piece.layer)):
            same = tuple(group)
            stop = start + sum(piece.part.num_rows for piece in same)
            names = self._family.candidates(key, number, 0)
            target = Target(names[0], same[0].part.shape, same, slice(start, stop))
            self._layers[layer].append(target)
            self.targets.update(dict.fromkeys(names, target))
            start = stop
        return layer

    @property
    def num_bytes(self) -> int:
        sizes = len(self._ranks), max(self._ranks, default=0)
        return sum(layer.bytes_with(-1, [], *sizes) for layer in self._layers)

    def growth(self, slot: int, rank: int, targets: Sequence[Target]) -> int:
        """Bytes more that the slots would take with such an adapter."""
        sizes, wanted = self._sizes_with(slot, rank), self._by_layer(targets)
        return sum(layer.bytes_with(slot, wanted[layer], *sizes) for layer in self._layers) - self.num_bytes

    def put(self, slot: int, rank: int, targets: Sequence[Target], changes: Iterator[Change]) -> None:
        """Replace what `slot` holds by an adapter of this rank. Whatever `changes` raises leaves the slot useless."""
        sizes, wanted = self._sizes_with(slot, rank), self._by_layer(targets)
        for layer in self._layers:
            layer.put(slot, wanted[layer], *sizes)
        self._ranks += [0] * (sizes[0] - len(self._ranks))
        self._ranks[slot] = rank
        layer_of = {target: layer for layer, own in self._layers.items() for target in own}
        for change in changes:
            layer_of[change.target].write(slot, change)

    def clear(self, slot: int) -> None:
        """Forget what `slot` holds, if it was ever used: memory for it would be taken in vain."""
        if slot < len(self._ranks):
            self.put(slot, 0, [], iter(()))

    def use(self, slots: Slots) -> None:
        """Begin a step whose tokens use `slots` [t]; below zero is no adapter."""
        distinct = np.unique(slots[slots >= 0]).tolist()
        rank = max(self._ranks, default=0)
        if len(distinct) > 1 and len(slots) * rank <= FEW_COLUMNS:
            owners = torch.arange(len(self._ranks)).repeat_interleave(rank)
            self.step = LoraStep((torch.from_numpy(slots)[:, None] != owners)[:, None])
        elif distinct:
            self.step = LoraStep(None, tuple((slot, _tokens_of(slot, slots)) for slot in distinct))
        else:
            self.step = None

    def _sizes_with(self, slot: int, rank: int) -> tuple[int, int]:
        """How many slots there are with an adapter of this rank in `slot`, and how wide."""
        others = self._ranks[:slot] + self._ranks[slot + 1 :]
        return max(len(self._ranks), slot + 1), max([rank, *others])

    def _by_layer(self, targets: Sequence[Target]) -> Mapping[AdaptedLinear, list[Target]]:
        wanted = set(targets)
        return {layer: [target for target in own if target in wanted] for layer, own in self._layers.items()}


def _tokens_of(slot: int, slots: Slots) -> slice | Tensor:
    tokens = np.flatnonzero(slots == slot)
    first, end = int(tokens[0]), int(tokens[-1]) + 1
    return slice(first, end) if end - first == len(tokens) else torch.from_numpy(tokens)
