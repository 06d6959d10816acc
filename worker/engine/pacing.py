"""How many prompt tokens a step may take, so that those who decode beside it do not wait too long."""

from __future__ import annotations

CHUNK, PARTS_OF_CHUNK, SMALLEST_CHUNK = 32, (24, 16), 12
"""Tokens, of which others are multiples: queries and keys then fill the blocks that attention and products work by.
Where not even one has room it is a part of it, and where none has the least: with fewer, going through the keys of a
long prompt costs more than its tokens."""
WEIGHT_OF_LAST = 0.3
WEIGHT_FOR_OTHERS = 1 / 64
"""What a step of one size says of those of another: little, but a size that looked too dear is tried again some day."""
STEPS_UNTIL_LOOK = 16
"""Steps with prompts after which one goes without: streams grow meanwhile, and what their own tokens take would count
as a cost of prompts."""

RECENT_STEPS = 8 * STEPS_UNTIL_LOOK
"""Ago a step without prompts may lie that fewer requests are measured by."""

SHARE_OF_PROMPTS = 0.7
"""Of the time that a step takes without prompts. Streams then keep three fifths of their speed, and prompts get two
fifths of the device, however fast either is. What a step costs for having prompts at all, as to go through the keys of
thousands of tokens for a few queries, counts as theirs."""


class PrefillPacer:
    """Learns what a step without prompts costs and, for steps of few and of many of them, a prompt token: few cost
    little beside streams that wait for weights anyway, more cost what they compute. A mixed step may last no longer
    than `limit_s`, and beside streams that had begun before the prompt came, SHARE_OF_PROMPTS longer than the same step
    without prompts. Of a burst, whose first streams begin while others of it still wait, the prompts come first. A
    `limit_s` of 0 switches both off.

    With nobody decoding the whole `max_tokens` are given: then nothing but the prompts themselves would wait.
    """

    def __init__(self, max_tokens: int, limit_s: float) -> None:
        self.max_tokens, self.limit_s = max_tokens, limit_s
        self._seconds_per_token: dict[int, float] = {}
        """By the number of binary digits of a step's prompt tokens."""
        self._decode_s: dict[int, float] = {}
        """By the number of binary digits of its requests."""
        self._noted: dict[int, int] = {}
        """Of the same sizes the number of the step that was seen last, as `_num_noted` counts them."""
        self._num_noted = 0
        self._num_mixed = 0

    def budget(self, num_decodes: int, *, has_seniors: bool) -> int:
        """For a step beside so many requests that decode, some of which began before the next prompt came or not: as
        many times CHUNK as have room, or a part of it or SMALLEST_CHUNK, or 0 where a step without prompts is due."""
        if not num_decodes or self.limit_s <= 0 or not self._seconds_per_token:
            return self.max_tokens
        decode_s = self._seconds_of(num_decodes)
        seconds = self.limit_s - decode_s
        if decode_s and has_seniors:
            if self._num_mixed >= STEPS_UNTIL_LOOK:
                return 0
            seconds = min(seconds, SHARE_OF_PROMPTS * decode_s)
        return min(self.max_tokens, self._tokens_within(seconds))

    def _tokens_within(self, seconds: float) -> int:
        for size in range(self.max_tokens.bit_length(), CHUNK.bit_length() - 1, -1):
            most = min(int(seconds / self._price(size)), (1 << size) - 1)
            if (num_tokens := most // CHUNK * CHUNK) >= 1 << size - 1:
                return num_tokens
        parts = (part for part in PARTS_OF_CHUNK if part * self._price(part.bit_length()) <= seconds)
        return next(parts, SMALLEST_CHUNK)

    def note(self, num_prompt_tokens: int, num_decodes: int, seconds: float) -> None:
        """A step of that many took that long. Few prompt tokens say nothing about their cost."""
        self._num_noted += 1
        self._num_mixed = self._num_mixed + 1 if num_prompt_tokens else 0
        if num_prompt_tokens == 0:
            size = num_decodes.bit_length()
            self._decode_s[size] = _moved(self._decode_s.get(size, 0.0), seconds)
            self._noted[size] = self._num_noted
        elif seconds > 0.0 and num_prompt_tokens >= min(SMALLEST_CHUNK, self.max_tokens):
            # what a hiccup of decoding made cheaper than nothing is no cost
            rest = max(seconds - self._seconds_of(num_decodes), 0.1 * seconds)
            self._note_price(num_prompt_tokens.bit_length(), rest / num_prompt_tokens)

    def _note_price(self, size: int, seconds: float) -> None:
        prices = self._seconds_per_token
        prices[size] = _moved(self._price(size), seconds)
        for other in prices.keys() - {size}:
            prices[other] += WEIGHT_FOR_OTHERS * (seconds - prices[other])

    def _price(self, size: int) -> float:
        """Of a token in steps of that size, or of the nearest that was seen; 0.0 if none was."""
        nearest = min(self._seconds_per_token, key=lambda known: abs(known - size), default=size)
        return self._seconds_per_token.get(nearest, 0.0)

    def _seconds_of(self, num_decodes: int) -> float:
        """What a step of so many takes without prompts, or one of fewer that was seen; 0.0 if there was none. No longer
        than one of more that was seen lately: where nearly all steps have more, those of fewer are the ones around
        which requests come and go, and take longer for that."""
        if not (fewer := [size for size in self._decode_s if size <= num_decodes.bit_length()]):
            return 0.0
        own, since = max(fewer), self._num_noted - RECENT_STEPS
        return min(
            seconds
            for size, seconds in self._decode_s.items()
            if size == own or (size > own and self._noted[size] > since)
        )


def _moved(before: float, found: float) -> float:
    return before + WEIGHT_OF_LAST * (found - before) if before else found
