"""Drafts by one who knows every answer and makes mistakes: many right, many wrong, whatever the text."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from worker.engine.request import Request
from worker.engine.speculation import Speculator

NUM_IDS = 50
"""Mistakes are among so many first ids."""


class Guesser(Speculator):
    """`answer_of(request id)` is the whole output without drafts."""

    def __init__(self, max_drafts: int, answer_of: Callable[[str], list[int]], seed: int = 0) -> None:
        super().__init__(max_drafts)
        self._answer_of, self._rng = answer_of, random.Random(seed)

    def drafts(self, requests: Sequence[Request]) -> dict[str, list[int]]:
        return {request.request_id: self.drafts_of(request, most) for request, most in self._guessable(requests)}

    def drafts_of(self, request: Request, most: int) -> list[int]:
        rest = self._answer_of(request.request_id)[request.num_output :]
        # behind its end a request would go on in some way
        drafts = [*rest, *(self._rng.randrange(NUM_IDS) for _ in range(most))][: self._rng.randint(0, most)]
        return [token if self._rng.random() < 0.8 else (token + 1) % NUM_IDS for token in drafts]
