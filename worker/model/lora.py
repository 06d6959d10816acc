"""LoRA adapters beside the weights (Hu et al., arXiv 2106.09685): for a token with an adapter, the product with a
matrix W [out, in] becomes W x + B (A x), with A [rank, in] and B [out, rank] of this adapter.

Adapters lie in slots, all of which are as wide as the adapter of the largest rank among them; the others are padded
with zeros, which add nothing. Slots take memory when the first adapter comes, in those layers alone that adapters
change.

A batch holds tokens of many adapters and of none. There are two ways through:

    together       A of all slots in one product, of which each token keeps its own slot's part, then B of all slots:
                   a handful of products whatever the number of adapters; for few tokens, or slots that are narrow
    one by one     adapter by adapter, over the tokens that are its own

Ranks that hold rows of W hold the same rows of B and all of A; those that hold columns of W hold these columns of A and
all of B, and what they add to their parts is summed with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
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

FEW_COLUMNS, NARROW_SLOTS = 4096, 512
"""Up to so many tokens times the rank, or columns of all slots together, one product of all slots costs less than one
for each adapter, whose tokens have to be gathered and put back."""

MOST_WITH_ZEROS = 750_000
"""Elements of a B that has zeros beside the matrices of several targets. A small product takes as long as twice such a
one, since most of its time is spent on its way."""

Slots = npt.NDArray[np.int64]
Shape = tuple[int, int, int]
"""Targets, slots and rank."""


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
        return torch.cat([piece.rows_of(b) for piece in self.pieces])


@dataclass(frozen=True, slots=True)
class Change:
    """What an adapter has for a target: A [rank, in] and B [out, rank], the latter with the adapter's scale in it."""

    target: Target
    a: Tensor
    b: Tensor


@dataclass(frozen=True, slots=True)
class LoraStep:
    """Which slot each token of a step uses. Either `others` has for a shape of slots bool [t, targets * slots * rank],
    which columns of A x are not for a token, or `shares` for each slot its tokens, a slice where they are
    neighbours."""

    others: dict[Shape, Tensor] | None
    shares: tuple[tuple[int, slice | Tensor], ...] = ()


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring targets in one product: `columns` of A x times `b` [columns, width] go to `place` of the result. Of
    several targets `b` has each one's matrix on its diagonal, and zeros elsewhere."""

    columns: slice
    place: slice
    b: Tensor


@dataclass(slots=True, eq=False)
class AdaptedLinear:
    """`base` [t, in] -> [t, out], to whose result the adapters of a step add their parts.

    `_a` [targets, slots, rank, in] has the targets that adapters in slots change, in the order of their places, `_b`
    [slots * rank, width] of each, inside of `_runs`. `_a_columns` is `_a` as [in, targets * slots * rank].
    """

    base: Linear
    num_in: int
    slots: LoraSlots
    _users: dict[Target, set[int]] = field(default_factory=dict)
    _targets: list[Target] = field(default_factory=list)
    _a: Tensor = field(default_factory=lambda: torch.zeros(0, 0, 0))
    _a_columns: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    _b: list[Tensor] = field(default_factory=list)
    _runs: list[Run] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return self.base.num_bytes

    @property
    def is_changed(self) -> bool:
        """Whether adapters have a part in this step."""
        return self.slots.step is not None and bool(self._runs)

    def __call__(self, x: Tensor) -> Tensor:
        result = self.base(x)
        step = self.slots.step
        if step is not None and self.is_changed:
            if step.others is not None:
                self._add_to_all(x, result, step.others[self.shape])
            else:
                self._add_by_slot(x, result, step)
        return result

    def _add_to_all(self, x: Tensor, result: Tensor, others: Tensor) -> None:
        # filled, not multiplied: what is not a number in one adapter stays with its own tokens
        inner = torch.mm(x, self._a_columns).masked_fill_(others, 0.0)
        for run in self._runs:
            if len(run.b) == inner.shape[1] and run.b.shape[1] == result.shape[1]:
                result.addmm_(inner, run.b)
            else:
                result[:, run.place].addmm_(inner[:, run.columns], run.b)

    def _add_by_slot(self, x: Tensor, result: Tensor, step: LoraStep) -> None:
        rank = self._a.shape[2]
        for slot, tokens in step.shares:
            own = x[tokens] if isinstance(tokens, slice) else x.index_select(0, tokens)
            parts = F.linear(own, self._a[:, slot].flatten(0, 1)).view(len(own), -1, rank).unbind(1)
            for target, part, b in zip(self._targets, parts, self._b, strict=True):
                rows = b[slot * rank : (slot + 1) * rank]
                if isinstance(tokens, slice):
                    result[tokens, target.place].addmm_(part, rows)
                else:
                    # not index_add_, which copies all of a result whose columns are only a part
                    own_result = result[:, target.place]
                    own_result[tokens] = own_result[tokens].addmm_(part, rows)

    # What the slots hold.

    @property
    def shape(self) -> Shape:
        """Of what the slots hold here: targets that adapters change, slots and their rank."""
        return self._a.shape[0], self._a.shape[1], self._a.shape[2]

    def bytes_with(self, slot: int, targets: Sequence[Target], num_slots: int, rank: int) -> int:
        """What it would take with an adapter for `targets` in `slot`, and slots of that number and rank."""
        groups = _groups(self._sorted(self._users_with(slot, targets)), num_slots * rank)
        widths = [len(group) * (self.num_in + _size(_place_of(group))) for group in groups]
        return sum(widths) * num_slots * rank * self.slots.dtype.itemsize

    def put(self, slot: int, targets: Sequence[Target], num_slots: int, rank: int) -> None:
        """Make room in `slot`, with zeros, for an adapter that changes `targets`; none if it lies behind `num_slots`.
        Without memory for it all stays as it is."""
        users = self._users_with(slot, targets)
        wanted = self._sorted(users)
        if wanted != self._targets or self.shape[1:] != (num_slots, rank):
            self._rebuild(wanted, num_slots, rank)
        self._users = users
        self._a[:, slot : slot + 1] = 0.0
        for b in self._b:
            b[slot * rank : (slot + 1) * rank] = 0.0

    def write(self, slot: int, change: Change) -> None:
        """`change` is for one of the targets of the last `put`."""
        index = self._targets.index(change.target)
        first, num_rows = slot * self._a.shape[2], len(change.a)
        self._a[index, slot, :num_rows] = change.target.part_of_a(change.a)
        self._b[index][first : first + num_rows] = change.target.part_of_b(change.b).t()

    def _users_with(self, slot: int, targets: Sequence[Target]) -> dict[Target, set[int]]:
        kept = {target: slots - {slot} for target, slots in self._users.items()}
        for target in targets:
            kept[target] = kept.get(target, set()) | {slot}
        return {target: slots for target, slots in kept.items() if slots}

    def _sorted(self, targets: Iterable[Target]) -> list[Target]:
        return sorted(targets, key=lambda target: int(target.place.start))

    def _rebuild(self, targets: list[Target], num_slots: int, rank: int) -> None:
        """Other targets, more slots or another rank; what lies in the slots stays."""
        old = {target: pair for target, *pair in zip(self._targets, self._a, self._b, strict=True)}
        dtype, num_rows = self.slots.dtype, num_slots * rank
        new_a = torch.zeros((len(targets), num_slots, rank, self.num_in), dtype=dtype, device=self.slots.device)
        new_b: list[Tensor] = []
        runs: list[Run] = []
        for group in _groups(targets, num_rows):
            first, place = len(new_b) * num_rows, _place_of(group)
            b = torch.zeros((len(group) * num_rows, _size(place)), dtype=dtype, device=self.slots.device)
            runs.append(Run(slice(first, first + len(b)), place, b))
            blocks = [(index * num_rows, _inside(target.place, place)) for index, target in enumerate(group)]
            new_b += [b[start : start + num_rows, columns] for start, columns in blocks]
        for target, a, b in zip(targets, new_a, new_b, strict=True):
            if target in old:
                old_a, old_b = old[target]
                _copy_corner(old_a, a)
                _copy_corner(old_b.view(*old_a.shape[:2], -1), b.view(num_slots, rank, -1))
        self._targets, self._a, self._a_columns = targets, new_a, new_a.view(-1, self.num_in).t()
        self._b, self._runs = new_b, runs


def _groups(targets: Sequence[Target], num_rows: int) -> list[list[Target]]:
    """Which neighbours share a product: those whose zeros cost less than another product, for `num_rows` each."""
    groups: list[list[Target]] = []
    for target in targets:
        together = [*groups[-1], target] if groups else []
        is_next = together and together[-2].place.stop == target.place.start
        if is_next and len(together) * num_rows * _size(_place_of(together)) <= MOST_WITH_ZEROS:
            groups[-1] = together
        else:
            groups.append([target])
    return groups


def _place_of(group: Sequence[Target]) -> slice:
    return slice(group[0].place.start, group[-1].place.stop)


def _inside(place: slice, whole: slice) -> slice:
    return slice(place.start - whole.start, place.stop - whole.start)


def _size(place: slice) -> int:
    return int(place.stop - place.start)


def _copy_corner(old: Tensor, new: Tensor) -> None:
    """Of [slots, rank, ...] what both have. Ranks shrink only when what needed them is gone."""
    num_slots, rank = min(len(old), len(new)), min(old.shape[1], new.shape[1])
    new[:num_slots, :rank] = old[:num_slots, :rank]


class LoraSlots:
    """The adapters that a rank holds, and every layer they may change. `step` is what layers go by while a step runs;
    None says that no token has an adapter."""

    def __init__(self, family: Family, dtype: torch.dtype, device: torch.device | None = None) -> None:
        self.dtype, self.device = dtype, device or torch.device("cpu")
        self.step: LoraStep | None = None
        self.targets: dict[str, Target] = {}
        self._family = family
        self._layers: dict[AdaptedLinear, list[Target]] = {}
        self._ranks: list[int] = []
        self._shapes: set[Shape] = set()

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
        """Replace what `slot` holds by an adapter of this rank. Whatever `changes` raises, or a lack of memory, leaves
        the slot useless, and the others as they are, in some layers perhaps with more room than in others."""
        sizes, wanted = self._sizes_with(slot, rank), self._by_layer(targets)
        self._make_room(slot, wanted, sizes)
        self._ranks += [0] * (sizes[0] - len(self._ranks))
        self._ranks[slot] = rank
        layer_of = {target: layer for layer, own in self._layers.items() for target in own}
        for change in changes:
            layer_of[change.target].write(slot, change)

    def clear(self, slot: int) -> None:
        """Forget what `slot` holds: memory for it would be taken in vain, and is given back where there is some to move
        the others to."""
        if slot < len(self._ranks):
            self._ranks[slot] = 0
        with suppress(torch.OutOfMemoryError):
            self._make_room(slot, self._by_layer([]), (len(self._ranks), max(self._ranks, default=0)))

    def _make_room(self, slot: int, targets: Mapping[AdaptedLinear, list[Target]], sizes: tuple[int, int]) -> None:
        try:
            for layer in self._layers:
                layer.put(slot, targets[layer], *sizes)
        finally:
            self._shapes = {layer.shape for layer in self._layers}

    def use(self, slots: Slots, sent: Tensor | None = None) -> None:
        """Begin a step whose tokens use `slots` [t]; below zero is no adapter. `sent` [t] is their copy on a device on
        whose account nothing may wait: then no other numbers go there."""
        if not (slots >= 0).any():
            self.step = None
            return
        distinct = np.unique(slots[slots >= 0]).tolist()
        rank = max(self._ranks, default=0)
        is_of_one = len(distinct) == 1 and bool((slots == distinct[0]).all())
        is_small = len(slots) * rank <= FEW_COLUMNS or len(self._ranks) * rank <= NARROW_SLOTS
        if (is_small or sent is not None) and not is_of_one:
            known = torch.from_numpy(slots) if sent is None else sent
            self.step = LoraStep({shape: self._others(known, shape) for shape in self._shapes})
        else:
            self.step = LoraStep(None, tuple((slot, _tokens_of(slot, slots)) for slot in distinct))

    def _others(self, slots: Tensor, shape: Shape) -> Tensor:
        num_targets, num_slots, rank = shape
        owners = torch.arange(num_slots * rank, device=self.device) // max(rank, 1)
        return (slots[:, None] != owners).repeat(1, num_targets)

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
