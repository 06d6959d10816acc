"""Sampling on a device that nobody waits for: what the host decides and sends, and what it reads when it is there.

Which processors run follows from the host's copy of the parameters, never from numbers of the device. `TorchSampler`
says what is meant, for any device; `worker.kernels.triton.sampling` does the same in a few kernels.

A row has one place in a step: drafts are for devices of depth 0, whose host counts tokens (`worker.runner.places`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from worker.runner import noise
from worker.runner.device_rows import DeviceRows, Word, Words
from worker.runner.rows import Ints
from worker.runner.sampler import MAX_TIES, UNUSABLE, Floats, Parameters, Sampled, keep_min_p, keep_typical
from worker.runner.vocabulary import Vocabulary

LOW = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Processors:
    """All that a launch depends on besides shapes, so a key of graphs.

    `cuts`: whether any row has top-k, top-p, typical-p or min-p. `num_slots`: of token counts, where any row has
    penalties, else 0; the counts move when that changes.
    """

    cuts: bool = False
    num_slots: int = 0


@dataclass(frozen=True, slots=True)
class Ask:
    """What to sample, as the host sends it and will read the answer.

    `words` int32: rows [size], output indices [size], and the places of those that want alternatives [j]; the first
    `num_rows` of size are real. `num_top` [j] how many each wants, `with_ties` [j] by which rule.
    """

    words: Words
    num_rows: int
    processors: Processors
    tops: Ints
    num_top: Ints
    with_ties: list[bool]


class Sampler(Protocol):
    def __call__(self, logits: Tensor, words: Tensor, processors: Processors) -> Tensor:
        """Launch the picking of one token at each of k places, remember them in the rows, and return the answer.

        `logits` [k, this rank's part of the vocabulary] of any floating type; `words` the device's copy of those of
        `Ask`, with k rows. The answer, int32: ids [k], log-probabilities [k] by their bits, whether each is usable
        [k], and of those who want alternatives the ids [j, n] and log-probabilities [j, n] of the n best tokens, with
        n = `num_alternatives`. Ids are legal tokens also of rows that are not usable.
        """


def ask(state: DeviceRows, rows: Ints, output_indices: Ints, size: int | None = None) -> Ask:
    """For tokens with these indices within the output of `rows`, both [k], filled up to `size` with the spare row."""
    parameters = state.host[rows]
    num_spare = (len(rows) if size is None else size) - len(rows)
    tops = np.flatnonzero(parameters["num_top"])
    words = (rows, np.full(num_spare, state.spare_row), output_indices, np.zeros(num_spare, np.int64), tops)
    return Ask(
        np.concatenate(words).astype(np.int32),
        len(rows),
        processors_of(state, parameters),
        tops,
        parameters["num_top"][tops],
        (~parameters["is_raw"][tops]).tolist(),
    )


def processors_of(state: DeviceRows, parameters: Parameters) -> Processors:
    cuts = (parameters["top_k"] > 0) & (parameters["top_k"] < state.vocab_size)
    for name in ("top_p", "typical_p"):
        cuts |= parameters[name] < 1
    cuts |= parameters["min_p"] > 0
    return Processors(
        cuts=bool((cuts & parameters["samples"]).any()),
        num_slots=state.num_slots if parameters["needs_counts"].any() else 0,
    )


def num_alternatives(vocab_size: int) -> int:
    return min(MAX_TIES, vocab_size)


def read(words: Words, asked: Ask, vocab_size: int) -> Sampled:
    """What the answer `words`, on the host, says of the real rows."""
    size, number = (len(asked.words) - len(asked.tops)) // 2, num_alternatives(vocab_size)
    ids, logprobs, is_usable = words[: 3 * size].reshape(3, size)[:, : asked.num_rows]
    errors = dict.fromkeys(np.flatnonzero(is_usable == 0).tolist(), UNUSABLE)
    sampled = Sampled(ids.astype(np.int64), logprobs.copy().view(np.float32), errors=errors)
    if len(asked.tops):
        sampled.top_tokens = [[] for _ in range(asked.num_rows)]
        top_ids, values = words[3 * size :].reshape(2, len(asked.tops), number)
        for index, place in enumerate(asked.tops.tolist()):
            if place not in errors:
                mine = values[index].view(np.float32), int(asked.num_top[index]), asked.with_ties[index]
                sampled.top_tokens[place] = _top_tokens(top_ids[index], *mine)
    return sampled


def _top_tokens(ids: Words, logprobs: Floats, number: int, with_ties: bool) -> list[tuple[int, float]]:
    last = logprobs[min(number, len(logprobs)) - 1]
    is_reported = np.isfinite(logprobs) & (logprobs >= last if with_ties else np.arange(len(logprobs)) < number)
    return list(zip(ids[is_reported].tolist(), logprobs[is_reported].tolist(), strict=True))


class TorchSampler:
    """All of it in torch, on any device, without regard to time or memory; ranks gather their logits."""

    def __init__(self, state: DeviceRows, vocabulary: Vocabulary) -> None:
        self._state, self._vocabulary = state, vocabulary

    def __call__(self, logits: Tensor, words: Tensor, processors: Processors) -> Tensor:
        logits = self._vocabulary.gather(logits) if self._vocabulary.is_split else logits
        num_rows = len(logits)
        rows, indices, tops = torch.tensor_split(words.long(), (num_rows, 2 * num_rows))
        mine = _Columns(self._state.parameters[rows])
        raw = logits.to(torch.promote_types(logits.dtype, torch.float32))
        scores = self._hold_back(raw, rows, indices, mine)
        scores = self._penalise(scores, indices, mine) if processors.num_slots else scores
        samples = mine.ints(Word.SAMPLES) > 0
        warped = scores / mine.floats(Word.TEMPERATURE).to(scores.dtype)
        scores = torch.where(samples, cut(warped, mine) if processors.cuts else warped, scores)
        keyed = torch.where(samples, scores + gumbel(mine, indices, scores.shape[1]), scores.double())
        ids = _first_best(keyed)
        is_raw = mine.ints(Word.IS_RAW) > 0
        normalisers, wanted = torch.stack((raw.logsumexp(-1), scores.logsumexp(-1))), torch.where(is_raw, raw, scores)
        wanted = wanted - torch.where(is_raw, normalisers[0, :, None], normalisers[1, :, None])
        self._remember(rows, ids, mine, processors)
        logprobs = wanted.gather(1, ids[:, None])[:, 0].float()
        answer = [ids.int(), logprobs.view(torch.int32), torch.isfinite(normalisers).all(0).int()]
        return torch.cat([*answer, *alternatives(wanted[tops])])

    def _hold_back(self, scores: Tensor, rows: Tensor, indices: Tensor, mine: _Columns) -> Tensor:
        stops = self._state.stops[rows].long()
        is_stop = torch.arange(stops.shape[1], device=stops.device) < mine.ints(Word.NUM_STOPS)
        is_held = is_stop & (indices[:, None] < mine.ints(Word.MIN_TOKENS))
        # what is no stop goes into a column of its own
        held = scores.new_zeros((len(scores), scores.shape[1] + 1), dtype=torch.bool)
        held.scatter_(1, torch.where(is_held, stops, scores.shape[1]), True)
        return scores.masked_fill(held[:, :-1], -torch.inf)

    def _penalise(self, scores: Tensor, indices: Tensor, mine: _Columns) -> Tensor:
        """As `sampler.penalise`, which says what and why."""
        slots = mine.ints(Word.SLOT)
        repetition, frequency, presence = (
            mine.floats(word).to(scores.dtype) for word in (Word.REPETITION, Word.FREQUENCY, Word.PRESENCE)
        )
        everywhere, output = self._state.counts[slots[:, 0].clamp(min=0)].unbind(1)
        penalised = torch.where(scores < 0, scores * repetition, scores / repetition)
        penalised = torch.where(everywhere > 0, penalised, scores)
        is_openai = mine.ints(Word.IS_OPENAI) > 0
        number = torch.where(is_openai, output, everywhere).to(scores.dtype)
        lengths = (mine.ints(Word.NUM_PROMPT) + indices[:, None]).clamp(min=1)
        divisor = torch.where(is_openai, 1, lengths).to(scores.dtype)
        penalised = penalised - frequency * (number / divisor)
        penalised = penalised - presence * (number > 0)
        return torch.where(slots == -1, scores, penalised)

    def _remember(self, rows: Tensor, ids: Tensor, mine: _Columns, processors: Processors) -> None:
        self._state.last_ids.index_copy_(0, rows, ids.int())
        if processors.num_slots:
            slots, counts = mine.ints(Word.SLOT)[:, 0], self._state.counts
            one, first = (slots >= 0).int(), slots.clamp(min=0) * (2 * counts.shape[2]) + ids
            for places in (first, first + counts.shape[2]):
                counts.view(-1).scatter_add_(0, places, one)


class _Columns:
    """Parameters of k rows, [k, 1] each."""

    def __init__(self, words: Tensor) -> None:
        self._words = words

    def ints(self, word: Word) -> Tensor:
        return self._words[:, word, None].long()

    def floats(self, word: Word) -> Tensor:
        return self._words[:, word, None].view(torch.float32)


def cut(scores: Tensor, mine: _Columns) -> Tensor:
    """What top-k, top-p, typical-p and min-p leave of `scores` [k, vocab]; the rest is -inf."""
    top_k, vocab_size = mine.ints(Word.TOP_K), scores.shape[1]
    best = scores.sort(-1, descending=True).values
    last = best.gather(1, torch.where(top_k > 0, top_k, vocab_size).clamp(max=vocab_size) - 1)
    scores = scores.masked_fill(scores < last, -torch.inf)
    for word, keep in ((Word.TOP_P, keep_nucleus), (Word.TYPICAL_P, keep_typical), (Word.MIN_P, keep_min_p)):
        p = mine.floats(word).double()
        asks = p > 0 if word is Word.MIN_P else p < 1
        scores = torch.where(asks & ~keep(scores, p), -torch.inf, scores)
    return scores


def keep_nucleus(scores: Tensor, p: Tensor) -> Tensor:
    """As `sampler.keep_top_p`, by one sort."""
    values, ids = scores.double().sort(stable=True, descending=True)
    until = (values - values.logsumexp(-1, keepdim=True)).exp().cumsum(-1)
    num_before = (until < p).sum(-1, keepdim=True)
    is_kept = torch.arange(scores.shape[1], device=scores.device) <= num_before
    return torch.zeros_like(is_kept).scatter_(1, ids, is_kept)


def gumbel(mine: _Columns, indices: Tensor, vocab_size: int) -> Tensor:
    """`noise.gumbel` of every token of k rows, float64 [k, vocab]. Words are 32 bits in int64."""
    ids = torch.arange(vocab_size, device=indices.device)
    counters = (ids[::4] >> 2).expand(len(indices), -1)
    zero = torch.zeros_like(counters)
    words = counters, (indices[:, None] & LOW) + zero, zero, zero
    keys = mine.ints(Word.SEED_LOW) & LOW, mine.ints(Word.SEED_HIGH) & LOW
    for _ in range(noise.NUM_ROUNDS):
        left, right = words[0] * int(noise.MULTIPLIERS[0]), words[2] * int(noise.MULTIPLIERS[1])
        words = (
            (right >> 32 & LOW) ^ words[1] ^ keys[0],
            right & LOW,
            (left >> 32 & LOW) ^ words[3] ^ keys[1],
            left & LOW,
        )
        keys = (keys[0] + int(noise.WEYL[0])) & LOW, (keys[1] + int(noise.WEYL[1])) & LOW
    x = torch.stack(words, -1).flatten(1)[:, :vocab_size]
    uniform = ((x >> int(noise.UNUSED_BITS)).double() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


def _first_best(keyed: Tensor) -> Tensor:
    """int64 [k]: the lowest id with the largest number, and a legal one where there is none."""
    vocab_size = keyed.shape[1]
    ids = torch.arange(vocab_size, device=keyed.device)
    is_best = keyed == keyed.nan_to_num(nan=-torch.inf).amax(-1, keepdim=True)
    return torch.where(is_best, ids, vocab_size - 1).amin(-1)


def alternatives(logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities by their bits, each flat, of the best tokens of `logprobs` [j, vocab]: best first,
    lower ids first on ties. Of more than MAX_TIES that tie, torch chooses which are among them."""
    values, ids = logprobs.float().topk(num_alternatives(logprobs.shape[1]))
    ids, order = ids.sort(-1)
    values, order = values.gather(1, order).sort(stable=True, descending=True)
    return ids.gather(1, order).int().flatten(), values.view(torch.int32).flatten()
