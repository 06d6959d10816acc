from __future__ import annotations

import math

import numpy as np
import pytest

from worker.runner import noise

# the known-answer vectors that the authors of Philox publish with it (philox4x32, 10 rounds)
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> tuple:
    return tuple(np.array([int(word, 16)], dtype=np.uint64) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_published_vectors(counter, key, expected):
    assert [int(word[0]) for word in noise.philox(words(counter), words(key))] == [
        int(word[0]) for word in words(expected)
    ]


def test_one_round_less_is_another_hash(monkeypatch):
    monkeypatch.setattr(noise, "NUM_ROUNDS", 9)
    counter, key, expected = VECTORS[2]
    assert noise.philox(words(counter), words(key)) != words(expected)


def gumbel(seed: int, output_index: int, token_ids) -> np.ndarray:
    ids = np.asarray(token_ids, dtype=np.uint64)
    return noise.gumbel(np.full_like(ids, seed), np.full_like(ids, output_index), ids)


def test_the_key_is_seed_output_index_and_token():
    ids = np.arange(64)
    assert np.array_equal(gumbel(7, 3, ids), gumbel(7, 3, ids))
    assert not np.any(gumbel(7, 3, ids) == gumbel(8, 3, ids))
    assert not np.any(gumbel(7, 3, ids) == gumbel(7 + 2**32, 3, ids))
    assert not np.any(gumbel(7, 3, ids) == gumbel(7, 4, ids))
    assert len(np.unique(gumbel(7, 3, ids))) == len(ids)


def test_company_and_order_do_not_matter():
    together = gumbel(7, 3, np.arange(100))
    chosen = np.array([99, 5, 6, 7, 41, 5, 0])
    assert np.array_equal(gumbel(7, 3, chosen), together[chosen])
    mixed = noise.gumbel(*(np.array(column, dtype=np.uint64) for column in ([7, 8, 7], [3, 3, 3], [5, 5, 5])))
    assert mixed[0] == mixed[2] == together[5]
    assert mixed[1] != mixed[0]


def test_values_are_the_formula_of_the_vectors():
    # counter and key of the all-zero vector: seed 0, output index 0, tokens 0 to 3
    for token, word in enumerate(words(VECTORS[0][2])):
        uniform = ((int(word[0]) >> 9) + 0.5) * 2.0**-23
        assert gumbel(0, 0, [token])[0] == pytest.approx(-math.log(-math.log(uniform)), rel=1e-12)


def test_extremes_are_finite_and_bound_the_range():
    lowest, highest = 0.5 * 2.0**-23, 1 - 0.5 * 2.0**-23
    assert np.float32(highest) < 1
    assert np.float32((2**24 - 1 + 0.5) * 2.0**-24) == 1, "one bit more would reach 1, whose noise is infinite"
    spread = math.log(-math.log(lowest)) - math.log(-math.log(highest))
    assert spread == pytest.approx(noise.GUMBEL_RANGE, abs=1e-8)
    assert 19.4 < noise.GUMBEL_RANGE < 19.5


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def test_argmax_of_logits_plus_noise_follows_softmax():
    logits = np.log(np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.04]))
    num_draws, size = 20_000, len(logits)
    indices = np.repeat(np.arange(num_draws, dtype=np.uint64), size)
    ids = np.tile(np.arange(size, dtype=np.uint64), num_draws)
    drawn = noise.gumbel(np.full_like(ids, 11), indices, ids).reshape(num_draws, size)
    counts = np.bincount((logits + drawn).argmax(1), minlength=size)
    limit = 20.5  # 99.9 % of the chi-square distribution with 5 degrees of freedom
    assert chi_square(counts, np.exp(logits)) < limit
    wrong = np.bincount((logits * 1.1 + drawn).argmax(1), minlength=size)
    assert chi_square(wrong, np.exp(logits)) > limit
