"""From the options of `inferfleet bench` to the workloads of its runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from common.settings import BenchSettings
from ops.loadgen.prompts import FromFile, MadeUp, Vocabulary
from ops.loadgen.workload import Prompt, Workload

DEFAULT_DURATION_S = 30.0
MOST_WARMING = 32


@dataclass(frozen=True, slots=True)
class Plan:
    """`source` is what prompts are made of, or the prompts themselves."""

    settings: BenchSettings
    seed: int
    source: Vocabulary | Sequence[Prompt]

    @property
    def loads(self) -> list[tuple[int | None, float | None]]:
        """Clients or rate of each run."""
        if self.settings.rate:
            return [(None, rate) for rate in self.settings.rate]
        return [(clients, None) for clients in self.settings.clients]

    def workload(self, number: int) -> Workload:
        """That of a run. Each has prompts of its own, so that none is in a cache because of the one before."""
        settings, (clients, rate) = self.settings, self.loads[number]
        prompts, num_warming = self._prompts(f"{self.seed} {number}"), clients or math.ceil(rate or 1)
        num_warmup = num_warming if settings.warmup is None else settings.warmup
        is_endless = settings.duration is None and settings.num_requests is None
        return Workload(
            ask_of=prompts.ask_of,
            num_requests=settings.num_requests,
            duration_s=DEFAULT_DURATION_S if is_endless else settings.duration,
            clients=clients or min(num_warming, MOST_WARMING),
            rate=rate,
            seed=self.seed + number,
            warmup=[prompts.ask_of(-1 - place) for place in range(num_warmup)],
            timeout_s=settings.timeout,
        )

    def _prompts(self, seed: str) -> MadeUp | FromFile:
        settings = self.settings
        if not isinstance(self.source, Vocabulary):
            return FromFile(prompts=self.source, output_range=settings.output_range, seed=seed)
        return MadeUp(
            vocabulary=self.source,
            input_range=settings.input_range,
            output_range=settings.output_range,
            seed=seed,
            num_prefix=settings.prefix_tokens,
        )
