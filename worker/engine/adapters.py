"""Which LoRA adapter lies in which slot of the device, and who may come in when all slots are in use.

A slot is in use while a stay names it, which ends when the last launched step of the stay was applied. Adapters in
other slots stay where they are until another one needs the place: first the one to which nobody came for the longest
time.

Who needs a slot while all are in use waits, and others may overtake. So that nobody waits for ever, the oldest of those
who wait claims the slot to which nobody came for the longest time, the next one the slot after that, and so on: later
requests for the adapter in a claimed slot stay outside. Hence a claimed slot is free when those that are in it now have
ended.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field

NO_SLOT = -1


class AdapterSlots:
    """Slots 0 .. num_slots - 1. Adapters are known by their digests."""

    def __init__(self, num_slots: int) -> None:
        self._digests = [""] * num_slots
        self._num_stays = [0] * num_slots
        self._slot_of: dict[str, int] = {}
        # the one that was taken longest ago comes first; giving back changes nothing, or claims would wander
        self._by_use: dict[int, None] = dict.fromkeys(range(num_slots))

    def find(self, digest: str) -> int | None:
        """The slot that a stay with this adapter would get now, None if all are in use by others."""
        slot = self._slot_of.get(digest)
        return slot if slot is not None else next((each for each in self._by_use if not self._num_stays[each]), None)

    def take(self, digest: str) -> int:
        """One stay more with this adapter.

        Raises:
            ValueError: if all slots are in use by others.
        """
        slot = self.find(digest)
        if slot is None:
            raise ValueError(f"no slot is free for adapter {digest}")
        if self._digests[slot] != digest:
            self._slot_of.pop(self._digests[slot], None)
            self._digests[slot], self._slot_of[digest] = digest, slot
        self._num_stays[slot] += 1
        del self._by_use[slot]
        self._by_use[slot] = None
        return slot

    def release(self, slot: int) -> None:
        """One stay less."""
        self._num_stays[slot] -= 1

    def taken_longest_ago(self, besides: Container[int]) -> int | None:
        return next((slot for slot in self._by_use if slot not in besides), None)

    def check(self, stays: Iterable[tuple[str, int]]) -> None:
        """Compare the books with the (digest, slot) of every stay that has one.

        Raises:
            ValueError: naming the first thing that does not add up.
        """
        num_stays = [0] * len(self._digests)
        for digest, slot in stays:
            num_stays[slot] += 1
            if self._digests[slot] != digest:
                raise ValueError(f"slot {slot} holds adapter {self._digests[slot]}, a stay there has {digest}")
        if num_stays != self._num_stays:
            raise ValueError(f"slots are used {self._num_stays} times, stays say {num_stays}")
        if self._slot_of != {digest: slot for slot, digest in enumerate(self._digests) if digest}:
            raise ValueError("the map of adapters and the slots disagree")
        if sorted(self._by_use) != list(range(len(self._digests))):
            raise ValueError("a slot is in no place or in two of the order of use")


@dataclass(slots=True)
class Entrance:
    """One look through those who wait, in the order of their arrival."""

    slots: AdapterSlots
    claims: dict[str, int] = field(default_factory=dict)

    def may_pass(self, digest: str) -> bool:
        """Whether a request with this adapter can have a slot; "" is no adapter. Who cannot claims one."""
        if not digest:
            return True
        slot = self.slots.find(digest)
        if slot is not None and slot not in self.claims.values():
            return True
        if slot is None and digest not in self.claims:
            claimed = self.slots.taken_longest_ago(self.claims.values())
            if claimed is not None:
                self.claims[digest] = claimed
        return False
