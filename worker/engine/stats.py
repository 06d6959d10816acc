"""Counters of the engine, as they travel in every `Step` message."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class EngineStats:
    """Counted since the start of the engine. `prefix_hits` counts requests that found a part of their prompt
    computed; `encoder_tokens` are among the `prefill_tokens`. `decode_tokens` are computed one for a row and step;
    `draft_tokens` came behind them, of which `accepted_tokens` were right. `steps_too_large` had no memory on the
    device; what they were to compute counts again."""

    steps: int = 0
    batch_max: int = 0
    preemptions: int = 0
    prefix_hits: int = 0
    prefix_hit_tokens: int = 0
    chunked_prompts: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    encoder_passes: int = 0
    encoder_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    steps_too_large: int = 0

    def counters(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in self.__slots__}
