"""Do two engines compute the same model? Their likeliest tokens, with the logs of their probabilities, side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

NUM_POSITIONS, NUM_TOP = 8, 5
ROUNDING = 2.0**-24
"""Half a unit in the last place of float32, relative."""
PRODUCTS_IN_A_ROW = 4
"""Of a layer: queries and values, attention's output, gate and up, down."""
Top = Sequence[Sequence[tuple[int, float]]]


def tolerance(config: Mapping[str, Any]) -> float:
    """What rounding in float32 can make of a log-probability.

    A sum of n products is off by about sqrt(n) roundings, and so are those that follow each other, since their errors
    have no common direction (Higham, Accuracy and Stability of Numerical Algorithms, 2.8); a logit is at most about as
    large as the log of the vocabulary's size where weights are random.
    """
    longest = max(config["hidden_size"], config["intermediate_size"])
    num_products = PRODUCTS_IN_A_ROW * config["num_hidden_layers"]
    return ROUNDING * math.sqrt(longest * num_products) * math.log(config["vocab_size"])


def difference(one: Top, other: Top) -> float:
    """The largest difference of two log-probabilities; infinite if what one found likeliest is not among the other's.

    An id that only one has may be as likely as the other's last. Where the choices differ, what follows them is not the
    same text and does not count: the difference is then at least how much likelier one found its own choice.
    """
    largest = 0.0
    for mine, theirs in zip(one, other, strict=True):
        largest = max(largest, _at_position(dict(mine), dict(theirs)))
        if mine[0][0] != theirs[0][0]:
            break
    return largest


def _at_position(one: dict[int, float], other: dict[int, float]) -> float:
    first, second = next(iter(one)), next(iter(other))
    if first not in other or second not in one:
        return math.inf
    common = [abs(one[number] - other[number]) for number in one.keys() & other.keys()]
    extra = [
        side[number] - min(rest.values())
        for side, rest in ((one, other), (other, one))
        for number in side.keys() - rest
    ]
    return max([*common, *extra, one[first] - one[second], other[second] - other[first]])
