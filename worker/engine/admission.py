"""Who fits: expected output lengths and the predicted peak of KV blocks. Arithmetic only, no state of the scheduler."""

from __future__ import annotations

from collections import deque

import numpy as np

from worker.engine.device import Ints

FIRST_EXPECTATION = 256
NUM_REMEMBERED = 256
QUANTILE = 0.9


class OutputForecast:
    """How long outputs get: the 90th percentile of the last ones, 256 tokens to begin with.

    Reserving `max_new_tokens` would leave a batch of one whenever clients do not set it; preemption catches the rest.
    """

    def __init__(self) -> None:
        self._recent: deque[int] = deque([FIRST_EXPECTATION], maxlen=NUM_REMEMBERED)
        self._expected = FIRST_EXPECTATION

    def note(self, num_output: int) -> None:
        """A request ended with `num_output` tokens."""
        self._recent.append(num_output)
        ordered = sorted(self._recent)
        self._expected = ordered[min(int(len(ordered) * QUANTILE), len(ordered) - 1)]

    def remaining(self, num_output: int, max_new_tokens: int) -> int:
        """Tokens still expected; one that outlives the expectation is expected to run half as long again."""
        expected = max(self._expected, num_output + num_output // 2 + 1)
        return max(min(expected, max_new_tokens) - num_output, 0)


def peak_blocks(num_tokens: Ints, remaining: Ints, block_size: int) -> int:
    """The largest number of blocks that requests will hold together, if each grows by `remaining` and then ends.

    `num_tokens` and `remaining` int [n]. The peak is reached just before one of them ends: sorted by remaining
    length, when the i-th ends, those before it are alive and have grown as much (lightllm's rule of the future
    peak). One block more per request stands for its partly filled one.
    """
    order = np.argsort(-remaining, kind="stable")
    alive = np.arange(1, len(order) + 1)
    tokens = np.cumsum(num_tokens[order]) + alive * remaining[order]
    return int(np.max(tokens // block_size + alive))
