"""Where a step samples: behind the last token of a row, or behind the one before its drafts and each of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from worker.engine.device import StepPlan
from worker.engine.speculation import num_kept
from worker.runner.rows import AnyInts, Ints
from worker.runner.sampler import Sampled


@dataclass(frozen=True)
class Places:
    """k places of the s sampling rows of a plan, row after row."""

    plan: StepPlan

    @cached_property
    def counts(self) -> Ints:
        """[s] places of each row."""
        return self.plan.num_drafts[self.plan.samples].astype(np.int64) + 1

    @cached_property
    def rows(self) -> Ints:
        """[k]"""
        return np.repeat(self.plan.rows[self.plan.samples].astype(np.int64), self.counts)

    @cached_property
    def tokens(self) -> Ints:
        """[k] the tokens behind which is sampled, by their number in the step."""
        return ascending(self._ends - self.counts, self.counts) if self.has_drafts else self._ends - 1

    @cached_property
    def positions(self) -> Ints:
        """[k] the same by their position in the row."""
        lengths = (self.plan.starts + self.plan.num_tokens)[self.plan.samples].astype(np.int64)
        return ascending(lengths - self.counts, self.counts)

    @cached_property
    def drafts(self) -> list[AnyInts]:
        """[s] of each row."""
        return [self.plan.tokens[end - count + 1 : end] for end, count in zip(self._ends, self.counts, strict=True)]

    @cached_property
    def has_drafts(self) -> bool:
        return bool(self.plan.num_drafts.any())

    @property
    def drafts_before(self) -> list[AnyInts]:
        """[k] those of the row that come before each place."""
        return [drafts[:count] for drafts in self.drafts for count in range(len(drafts) + 1)]

    @property
    def _ends(self) -> Ints:
        return np.cumsum(self.plan.num_tokens, dtype=np.int64)[self.plan.samples]

    def num_ids(self, sampled: Sampled) -> Ints:
        """[s] how many of each row count, as in StepResult. What is unusable behind a draft is as if never tried."""
        found, first = self.counts.copy(), 0
        for row, drafts in enumerate(self.drafts):
            end = first + len(drafts) + 1
            if len(drafts):
                num_usable = next((place for place in range(first, end) if place in sampled.errors), end) - first
                found[row] = min(num_kept(sampled.ids[first:end], drafts), num_usable)
            first = end
        return found

    def that_count(self, num_ids: Ints) -> Ints:
        """Those of the k places, ascending."""
        return ascending(np.cumsum(self.counts) - self.counts, num_ids)

    def that_spoil(self, sampled: Sampled, num_ids: Ints) -> Ints:
        """Those that do not count, in rows with drafts of which some are unusable; ascending."""
        is_spoilt = np.zeros(len(self.counts), np.bool_)
        is_spoilt[self._owners[list(sampled.errors)]] = True
        counts = np.where(is_spoilt & (self.counts > 1), self.counts - num_ids, 0)
        return ascending(np.cumsum(self.counts) - counts, counts)

    def errors(self, sampled: Sampled) -> dict[int, str]:
        """By place of the row in the plan; none of rows with drafts, which may try without."""
        if not sampled.errors:
            return {}
        rows = np.flatnonzero(self.plan.samples)
        owners = {self._owners[place]: error for place, error in sampled.errors.items()}
        return {int(rows[owner]): error for owner, error in owners.items() if self.counts[owner] == 1}

    @cached_property
    def _owners(self) -> Ints:
        """[k] by their number among the s rows."""
        return np.repeat(np.arange(len(self.counts)), self.counts)


def ascending(firsts: Ints, counts: Ints) -> Ints:
    """`firsts[i]` and the numbers behind it, `counts[i]` in all, for one i after the other."""
    if (counts == 1).all():
        return firsts.copy()
    ends = np.cumsum(counts)
    numbers: Ints = np.repeat(firsts - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0)
    return numbers
