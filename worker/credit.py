"""How many jobs a worker may take: rows of the batch and predicted memory, never the whole queue. Pure arithmetic."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

FIRST_EXPECTED_OUTPUT = 256
FIRST_EXPECTED_JOB = 512
NUM_WAITING = 2
NUM_REMEMBERED = 200
PERCENTILE = 0.9


@dataclass(slots=True)
class Credit:
    """Predicts the memory of held jobs from the lengths of recent answers, as the engine's admission does."""

    max_num_seqs: int
    kv_tokens: int
    _outputs: deque[int] = field(default_factory=lambda: deque(maxlen=NUM_REMEMBERED))
    _jobs: deque[int] = field(default_factory=lambda: deque(maxlen=NUM_REMEMBERED))

    def finished(self, num_output: int) -> None:
        self._outputs.append(num_output)

    def began(self, num_prompt: int, max_new_tokens: int) -> None:
        self._jobs.append(self.expected(num_prompt, 0, max_new_tokens))

    @property
    def expected_output(self) -> int:
        """A length that nine of ten recent answers did not exceed."""
        if len(self._outputs) < NUM_REMEMBERED // 20:
            return FIRST_EXPECTED_OUTPUT
        return max(1, sorted(self._outputs)[int(PERCENTILE * (len(self._outputs) - 1))])

    def expected(self, num_prompt: int, num_output: int, max_new_tokens: int) -> int:
        """Tokens of KV that a job is expected to need at its longest."""
        return num_prompt + min(max_new_tokens, max(self.expected_output, num_output + 1))

    def room(self, held: Iterable[tuple[int, int, int]], num_engine_waiting: int) -> int:
        """How many more jobs to take. `held` = (prompt, output so far, max_new_tokens) of each job held.

        A few more than fit are taken, so that the engine finds the next one the moment memory frees.
        """
        predicted = [self.expected(*lengths) for lengths in held]
        average = sum(self._jobs) / len(self._jobs) if self._jobs else FIRST_EXPECTED_JOB
        num_fitting = int((self.kv_tokens - sum(predicted)) / max(1.0, average))
        spare = NUM_WAITING - num_engine_waiting
        by_memory = max(num_fitting, 0) + spare if num_engine_waiting < NUM_WAITING else 0
        by_memory = max(by_memory, 0 if predicted else 1)
        return max(0, min(self.max_num_seqs - len(predicted), by_memory))
