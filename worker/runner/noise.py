"""Noise without state: one number per (seed, output index, token id), the same on every machine and in every batch.

The integer hash is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), whose
published test vectors fix it. This numpy version is the definition; any other must agree with it to the bit.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
Doubles = npt.NDArray[np.float64]

MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
NUM_ROUNDS = 10
WORDS_PER_COUNTER = np.uint64(4)
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)
UNUSED_BITS = np.uint64(9)

GUMBEL_RANGE = -math.log(-math.log1p(-(2.0**-24))) + math.log(24 * math.log(2.0))
"""Largest noise minus smallest: a candidate that is behind by more can never win."""


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]) -> tuple[Words, Words, Words, Words]:
    """Philox4x32-10: four words out of a counter of four and a key of two. Words are 32 bits in uint64 arrays that
    broadcast against each other."""
    first, second, third, fourth = counter
    low_key, high_key = key
    for _ in range(NUM_ROUNDS):
        left, right = first * MULTIPLIERS[0], third * MULTIPLIERS[1]
        first, second, third, fourth = (
            (right >> HALF) ^ second ^ low_key,
            right & LOW,
            (left >> HALF) ^ fourth ^ high_key,
            left & LOW,
        )
        low_key, high_key = (low_key + WEYL[0]) & LOW, (high_key + WEYL[1]) & LOW
    return first, second, third, fourth


def gumbel(seeds: Words, output_indices: Words, token_ids: Words) -> Doubles:
    """Standard Gumbel noise for arrays of equal length; cheapest where neighbours differ in the token id only.

    The key is the 64-bit seed, the counter (token id // 4, output index), and token id % 4 chooses the word x. Then
    u = ((x >> 9) + 0.5) * 2^-23 lies strictly between 0 and 1 also in float32, which more bits would not, and the
    noise is -log(-log(u)).
    """
    counters = token_ids // WORDS_PER_COUNTER
    is_first = _changes(counters) | _changes(seeds) | _changes(output_indices)
    keys, zero = seeds[is_first], np.zeros(1, dtype=np.uint64)
    words = philox((counters[is_first], output_indices[is_first] & LOW, zero, zero), (keys & LOW, keys >> HALF))
    x = np.stack(words)[token_ids % WORDS_PER_COUNTER, np.cumsum(is_first) - 1]
    uniform = ((x >> UNUSED_BITS).astype(np.float64) + 0.5) * 2.0**-23
    noise: Doubles = -np.log(-np.log(uniform))
    return noise


def _changes(values: Words) -> npt.NDArray[np.bool_]:
    """Whether each element differs from the one before; the first does."""
    changed = np.ones(len(values), dtype=np.bool_)
    np.not_equal(values[1:], values[:-1], out=changed[1:])
    return changed
