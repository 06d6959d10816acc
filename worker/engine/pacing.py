"""How many prompt tokens a step may take, so that those who decode beside it do not wait too long."""

from __future__ import annotations

SMALLEST_CHUNK = 64
WEIGHT_OF_LAST = 0.3


class PrefillPacer:
    """Learns what a prompt token costs and keeps mixed steps near `target_s`; 0 switches it off.

    With nobody decoding the whole `max_tokens` are given: then nothing but the prompts themselves would wait.
    """

    def __init__(self, max_tokens: int, target_s: float) -> None:
        self.max_tokens, self.target_s = max_tokens, target_s
        self._seconds_per_token = 0.0

    def budget(self, *, anyone_decodes: bool) -> int:
        if not anyone_decodes or self.target_s <= 0 or self._seconds_per_token <= 0:
            return self.max_tokens
        return min(self.max_tokens, max(SMALLEST_CHUNK, int(self.target_s / self._seconds_per_token)))

    def note(self, num_prompt_tokens: int, seconds: float) -> None:
        """A step with that many prompt tokens took that long. Few of them say nothing about their cost."""
        if num_prompt_tokens < SMALLEST_CHUNK:
            return
        cost = seconds / num_prompt_tokens
        before = self._seconds_per_token or cost
        self._seconds_per_token = before + WEIGHT_OF_LAST * (cost - before)
