"""Guesses how a request goes on from its own tokens, and decides how many guesses a step is worth.

Who edits a text, quotes or repeats goes on as the text went on where the last tokens stood before (Yang et al.,
arXiv 2304.04487). Such guesses, the drafts, follow the request's newest token through a step of the model, and a token
is sampled behind each of them. What is sampled depends on nothing but the tokens before and on noise of its place, so
a draft that equals what was sampled before it was no guess: the tokens are those that single steps would bring.

    tokens          … the cat sat on the mat. He said: the cat
    drafts                                                     sat  on   the  mat.
    sampled behind                                        sat  on   a    …              3 tokens in one step

How likely drafts are right is known before any is tried: what would have been guessed is compared with every token
that comes, whether a step tried it or not. What they cost is measured: the time of steps with so many of them, beside
that of steps without.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from worker.engine.request import Request

Ints = npt.NDArray[np.integer[Any]]

MAX_DRAFTS_PER_STEP = 128
"""However cheap they look: each has logits of a whole vocabulary."""

GRAM_SIZES = (4, 2)
"""Tokens that must agree for a guess, the longer match first: two find the place again soon after an edit, four tell
apart places that begin alike."""

MAX_MATCH = 8
"""Longer matches are no better sign."""

MAX_INDEXED_TOKENS = 1 << 15
"""Of a longer prompt its end is looked through: a token takes about 400 bytes in the index."""

PRIOR_CHANCE = 0.5
PRIOR_WEIGHT = 8.0
DECAY_OF_ALL, DECAY_OF_ONE = 0.998, 0.95
LEAST_CHANCE = 0.01

NUM_RECENT_TIMES = 8
NUM_TRIES = 3
MAX_AGE = 512
STEPS_UNTIL_PLAIN = 64
"""Steps after which one goes without drafts, to compare them with."""
ASSUMED_COST = 0.25
LEAST_GAIN = 1.02
"""What is worth less is within the error of what was measured."""
LEAST_SECONDS = 1e-9

NOWHERE = -1


class Chances:
    """How often guesses were right, by the number of tokens that agreed before them; newer ones count more.

    Until there are enough of them what `prior` says counts too: what was seen of all requests, for a single one.
    """

    def __init__(self, decay: float, prior: Chances | None = None) -> None:
        self._decay, self._prior = decay, prior
        self._num_right = [0.0] * (MAX_MATCH + 1)
        self._num_tries = [0.0] * (MAX_MATCH + 1)

    def of(self, match: int) -> float:
        """That the next token is guessed right, where `match` tokens agree."""
        match = min(match, MAX_MATCH)
        prior = PRIOR_CHANCE if self._prior is None else self._prior.of(match)
        return (self._num_right[match] + PRIOR_WEIGHT * prior) / (self._num_tries[match] + PRIOR_WEIGHT)

    def note(self, match: int, is_right: bool) -> None:
        match = min(match, MAX_MATCH)
        self._num_right[match] = self._num_right[match] * self._decay + is_right
        self._num_tries[match] = self._num_tries[match] * self._decay + 1.0
        if self._prior is not None:
            self._prior.note(match, is_right)


class Lookup:
    """Where one request's last tokens stood before: `tokens` are the request's own, and grow as they do there, behind
    what an encoder read.

    A token takes the same time however many there are: `_ends` knows of every two and four tokens in a row the place
    behind their last occurrence. `_source` is the place whose token is the guess, `_match` how many tokens agree.
    """

    def __init__(self, tokens: array[int], of_all: Chances, encoder_ids: Sequence[int] = ()) -> None:
        self._tokens = tokens
        self._chances = Chances(DECAY_OF_ONE, of_all)
        self._ends: dict[tuple[int, ...], int] = {}
        # the last one is left, so that a guess is looked for behind it
        self._num_read = max(len(tokens) - 1, 0)
        self._text = array("i", [*encoder_ids, *tokens[: self._num_read]])
        self._note_all()
        self._source, self._match = NOWHERE, 0

    def chances(self, count: int) -> list[float]:
        """Of the next guesses, `count` at most, that they and all before them are right. Reads what is new first."""
        self._read()
        if self._source == NOWHERE:
            return []
        chance, found = 1.0, []
        for match in range(self._match, self._match + count):
            chance *= self._chances.of(match)
            if chance < LEAST_CHANCE:
                break
            found.append(chance)
        return found

    def drafts(self, count: int) -> list[int]:
        """The next guesses. A text that repeats itself goes on repeating itself beyond what there is of it."""
        period = len(self._text) - self._source
        return [self._text[self._source + place % period] for place in range(count)]

    def _note_all(self) -> None:
        """All of the text so far at once."""
        end = len(self._text)
        first = max(end - MAX_INDEXED_TOKENS, 0)
        ids = self._text[first:].tolist()
        for size in GRAM_SIZES:
            grams = zip(*(ids[offset:] for offset in range(size)), strict=False)
            self._ends.update(zip(grams, range(first + size, end + 1), strict=False))

    def _read(self) -> None:
        for token in self._tokens[self._num_read :]:
            self._follow(token)
            self._text.append(token)
            end = len(self._text)
            grams = [tuple(self._text[end - size :]) for size in GRAM_SIZES if size <= end]
            self._find_longer(grams, end)
            self._ends.update(dict.fromkeys(grams, end))
        self._num_read = len(self._tokens)

    def _follow(self, token: int) -> None:
        if self._source == NOWHERE:
            return
        is_right = self._text[self._source] == token
        self._chances.note(self._match, is_right)
        self._source, self._match = (self._source + 1, self._match + 1) if is_right else (NOWHERE, 0)

    def _find_longer(self, grams: Iterable[tuple[int, ...]], end: int) -> None:
        for gram in grams:
            if len(gram) <= self._match:
                return
            source = self._ends.get(gram, NOWHERE)
            if source != NOWHERE:
                self._source, self._match = source, self._agreeing(source, end)
                return

    def _agreeing(self, one: int, other: int) -> int:
        """How many tokens before both places agree, as far as it matters."""
        text, limit = self._text, min(one, MAX_MATCH)
        return next((n for n in range(limit) if text[one - 1 - n] != text[other - 1 - n]), limit)


class StepTimes:
    """How many times as long as one without drafts a step with some takes, neither with prompts, by rows and drafts in
    it: the median of the last few. Each was compared with steps without drafts of the same moment, since machines are
    faster and slower by a third from one second to the next. What was not seen for long is forgotten."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, int], deque[tuple[int, float]]] = {}
        self._num_noted = 0

    def note(self, num_rows: int, num_drafts: int, seconds: float) -> None:
        self._num_noted += 1
        unit = self.of(num_rows, 0) if num_drafts else 1.0
        if unit is not None:
            times = self._seen.setdefault(_kind(num_rows, num_drafts), deque(maxlen=NUM_RECENT_TIMES))
            times.append((self._num_noted, max(seconds, LEAST_SECONDS) / unit))

    def can_compare(self, num_rows: int) -> bool:
        """Whether it is known what a step without drafts takes; if not, one must be made."""
        times = self._seen.get(_kind(num_rows, 0), ())
        has_fresh = any(self._num_noted - number < STEPS_UNTIL_PLAIN for number, _ in times)
        return has_fresh and self.of(num_rows, 0) is not None

    def of(self, num_rows: int, num_drafts: int) -> float | None:
        """Seconds without drafts, a factor with some. None if such steps must be tried first."""
        times = self._seen.get(_kind(num_rows, num_drafts), ())
        fresh = sorted(time for number, time in times if self._num_noted - number < MAX_AGE)
        return fresh[len(fresh) // 2] if len(fresh) >= NUM_TRIES else None


def _kind(num_rows: int, num_drafts: int) -> tuple[int, int]:
    """Steps of one kind take about as long: rows within a fifth, drafts within twice as many."""
    return round(4 * math.log2(num_rows)), num_drafts.bit_length()


class Speculator:
    """Deals out drafts: never more than `max_drafts` to a request, and so many in all that a step brings the most
    tokens for its time. None, where that brings the most."""

    def __init__(self, max_drafts: int) -> None:
        self.max_drafts, self.times = max_drafts, StepTimes()
        self._chances = Chances(DECAY_OF_ALL)

    def drafts(self, requests: Sequence[Request]) -> dict[str, list[int]]:
        """By request id, for a step of all `requests`."""
        guesses: list[tuple[float, str]] = []
        lookups: dict[str, Lookup] = {}
        for request, count in self._guessable(requests):
            lookup = request.lookup or Lookup(request.tokens, self._chances, request.encoder_ids)
            request.lookup = lookup
            lookups[request.request_id] = lookup
            guesses += [(-chance, request.request_id) for chance in lookup.chances(count)]
        if not guesses:
            return {}
        # no guess is likelier than those before it, so the likeliest of all are the first ones of each request
        guesses.sort()
        num_chosen = self._num_worthwhile(len(requests), [-negative for negative, _ in guesses])
        counts = Counter(request_id for _, request_id in guesses[:num_chosen])
        return {request_id: lookups[request_id].drafts(count) for request_id, count in counts.items()}

    def _guessable(self, requests: Sequence[Request]) -> Iterator[tuple[Request, int]]:
        """Those whose newest token is next and known here, and how many tokens behind it they may have at most."""
        for request in requests:
            if request.residency is None or request.num_in_flight or not request.may_guess:
                continue
            num_left = request.params.max_new_tokens - request.num_output - 1
            if num_left > 0 and request.num_uncomputed(request.residency.num_computed) == 1:
                yield request, min(self.max_drafts, num_left)

    def _num_worthwhile(self, num_rows: int, chances: Sequence[float]) -> int:
        """How many of these guesses, the likeliest first, a step should try: the number that brings most tokens a
        second. What was never measured is assumed to cost a quarter of a row for each draft."""
        if not self.times.can_compare(num_rows):
            return 0
        best, best_rate, factor, num_before = 0, LEAST_GAIN * num_rows, 1.0, 0
        for count in _doubling(min(len(chances), MAX_DRAFTS_PER_STEP)):
            assumed = factor + ASSUMED_COST * (count - num_before) / num_rows
            factor, num_before = self.times.of(num_rows, count) or assumed, count
            rate = (num_rows + sum(chances[:count])) / factor
            if rate > best_rate:
                best, best_rate = count, rate
        return best


def _doubling(most: int) -> Iterator[int]:
    """1, 2, 4 ... up to `most`, which is the last."""
    count = 1
    while count < most:
        yield count
        count *= 2
    if most:
        yield most


def num_kept(picks: Ints, drafts: Ints) -> int:
    """How many of `picks` count, each sampled behind the draft before it, the first behind a known token: one more than
    drafts from the first on that equal what was sampled in their place."""
    is_wrong = picks[: len(drafts)] != drafts
    return int(is_wrong.argmax()) + 1 if is_wrong.any() else len(drafts) + 1
