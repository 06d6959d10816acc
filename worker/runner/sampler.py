"""From logits to tokens: processors in a fixed order, keyed noise, log-probabilities.

Order: minimum length, repetition, frequency and presence penalties, temperature, top-k, top-p, typical-p, min-p, then
the choice. Each processor sees only the rows that ask for it, and what it does to a row depends on that row alone. Sums
that decide what is kept are float64 in a fixed order, so that company in the batch cannot move a boundary.

Where ranks hold parts of the vocabulary all of them call this with equal rows and get equal results. Of most rows it is
enough to compare the best token of each part; noise is keyed by the token's id in the whole vocabulary, so the outcome
is that of one rank. Rows whose processors weigh tokens against each other are gathered and run as on one rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worker.model.operations import Operations, Summary
from worker.runner import noise
from worker.runner.noise import Doubles
from worker.runner.rows import AnyInts, Ints, Rows, is_among
from worker.runner.vocabulary import Vocabulary

Flags = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.floating[Any]]
KeepRule = Callable[[Tensor, Tensor], Tensor]
Summarise = Callable[[Tensor], Summary]
Parameters = npt.NDArray[np.void]

IN_TORCH = Operations()

NOISE_MARGIN = noise.GUMBEL_RANGE + 1e-6
"""A candidate behind the best by more cannot win; the rest covers rounding in the logarithms."""

NUCLEUS_HEAD = 1024
"""Top-p looks at this many best tokens first, and sorts the vocabulary only when they do not reach the mass."""

MAX_TIES = 256
"""At most this many alternatives of one position are reported, however many tie at the last place."""

UNUSABLE = "the model produced logits that are not numbers or excluded every token"


@dataclass(slots=True)
class Sampled:
    """`ids` int64 [k], `logprobs` float32 [k], `top_tokens` and `errors` as in StepResult."""

    ids: Ints
    logprobs: npt.NDArray[np.float32]
    top_tokens: list[list[tuple[int, float]]] = field(default_factory=list)
    errors: dict[int, str] = field(default_factory=dict)


def chosen(sampled: Sampled, places: Ints) -> Sampled:
    """What was picked at some of the places, without errors."""
    tops = [sampled.top_tokens[place] for place in places] if sampled.top_tokens else []
    return Sampled(sampled.ids[places], sampled.logprobs[places], tops)


@dataclass(frozen=True, slots=True)
class _Task:
    """Rows to pick tokens for, out of the token ids `ids`; `counts` int32 [rows with penalties, 2, ids]."""

    rows: Ints
    output_indices: Ints
    parameters: Parameters
    stop_ids: list[Ints]
    ids: range
    counts: Tensor | None
    summarise: Summarise

    def of(self, members: Ints) -> _Task:
        """Some of the rows, among them all with penalties."""
        rows, indices, parameters = self.rows[members], self.output_indices[members], self.parameters[members]
        return replace(self, rows=rows, output_indices=indices, parameters=parameters)


def sample(
    logits: Tensor,
    rows: Ints,
    output_indices: Ints,
    state: Rows,
    vocabulary: Vocabulary,
    beyond: Sequence[AnyInts] = (),
    summarise: Summarise = IN_TORCH.summarise,
) -> Sampled:
    """Pick one token at each of k places of rows.

    `logits` [k, this rank's part of the vocabulary] of any floating type; `rows` [k] where each one's parameters are in
    `state`; `output_indices` [k] index of the token to pick within the row's output. `state` is only read; where it
    does not know all output before a place, the rest is in `beyond` [k]. `summarise` is that of Operations.

    Ranks exchange five numbers for each row that is decided by the best tokens of their parts, in one collective; the
    logits of all other rows in another, and the token counts of those with penalties among these in a third.
    """
    if not vocabulary.is_split:
        return _sample_here(logits, _task(rows, output_indices, state, vocabulary, beyond, summarise))
    needs_whole = state.parameters["needs_whole"][rows]
    ways, found = {_sample_gathered: needs_whole, _sample_split: ~needs_whole}, []
    for run, is_member in ways.items():
        members = np.flatnonzero(is_member)
        if len(members):
            theirs = [beyond[member] for member in members.tolist()] if beyond else ()
            task = _task(rows[members], output_indices[members], state, vocabulary, theirs, summarise)
            mine = logits if len(members) == len(rows) else logits[torch.from_numpy(members)]
            found.append((members, run(mine, task, vocabulary)))
    return found[0][1] if len(found) == 1 else _merge(found, len(rows))


def most_likely(logits: Tensor, summarise: Summarise) -> Sampled | None:
    """What `sample` picks where no row asks for more, from `logits` of the whole vocabulary. None if some are such that
    `sample` has to say what is wrong with them."""
    most, picked, normalisers = summarise(logits)
    if not all(map(math.isfinite, normalisers.tolist())):
        return None
    return Sampled(picked, (most - normalisers).astype(np.float32, copy=False))


def _task(
    rows: Ints,
    output_indices: Ints,
    state: Rows,
    vocabulary: Vocabulary,
    beyond: Sequence[AnyInts],
    summarise: Summarise,
) -> _Task:
    parameters = state.parameters[rows]
    counted, counts = np.flatnonzero(parameters["needs_counts"]), None
    if len(counted):
        counts = state.counts.of(rows[counted], [beyond[place] for place in counted.tolist()] if beyond else ())
    return _Task(rows, output_indices, parameters, state.stop_ids, vocabulary.mine, counts, summarise)


def _merge(parts: list[tuple[Ints, Sampled]], num_rows: int) -> Sampled:
    """One result for all rows out of results for the rows at these places."""
    merged = Sampled(np.zeros(num_rows, dtype=np.int64), np.zeros(num_rows, dtype=np.float32))
    if any(sampled.top_tokens for _, sampled in parts):
        merged.top_tokens = [[] for _ in range(num_rows)]
    for places, sampled in parts:
        merged.ids[places], merged.logprobs[places] = sampled.ids, sampled.logprobs
        for index, tops in enumerate(sampled.top_tokens):
            merged.top_tokens[places[index]] = tops
        merged.errors |= {int(places[index]): error for index, error in sampled.errors.items()}
    return merged


def _sample_here(logits: Tensor, task: _Task) -> Sampled:
    """For `logits` of the whole vocabulary."""
    view, columns, _ = _choose(logits, task)
    sampled = _sampled(columns, view.values(columns), view.raw_normalisers, view.processed_normalisers, task)
    if task.parameters["num_top"].any():
        sampled.top_tokens = _top_tokens(view, task.parameters, sampled.errors)
    return sampled


def _sample_gathered(logits: Tensor, task: _Task, vocabulary: Vocabulary) -> Sampled:
    """Every rank does all of the work, from the same numbers."""
    counts = None if task.counts is None else vocabulary.gather(task.counts)
    return _sample_here(vocabulary.gather(logits), replace(task, ids=range(vocabulary.size), counts=counts))


def _sample_split(logits: Tensor, task: _Task, vocabulary: Vocabulary) -> Sampled:
    """The best of the best tokens of all parts. Of ranks that tie the first one has the lower id."""
    view, columns, best = _choose(logits, task)
    mine = (best, columns + task.ids.start, view.values(columns), view.raw_normalisers, view.processed_normalisers)
    everyone = vocabulary.group.all_gather(torch.from_numpy(np.stack(mine, dtype=np.float64, casting="unsafe")))
    said = everyone.numpy()
    winners, places = said[:, 0].argmax(0), np.arange(len(columns))
    ids, values = said[winners, 1, places].astype(np.int64), said[winners, 2, places]
    normalisers = everyone[:, 3:].logsumexp(0).numpy()
    return _sampled(ids, values, normalisers[0], normalisers[1], task)


def _choose(logits: Tensor, task: _Task) -> tuple[_View, Ints, Doubles]:
    """The scores that decide, the column picked for each of k rows, and the value by which it won."""
    most, picked, normalisers = task.summarise(logits)
    best, columns = most.astype(np.float64), picked
    chosen = np.flatnonzero(~task.parameters["is_plain"])
    processed: Tensor | None = None
    if len(chosen):
        processed = _widened(logits[torch.from_numpy(chosen)])
        columns[chosen], best[chosen] = _process_and_pick(processed, task.of(chosen))
    return _View(logits, normalisers, processed, chosen, task.parameters), columns, best


def _widened(scores: Tensor) -> Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _process_and_pick(scores: Tensor, task: _Task) -> tuple[Ints, Doubles]:
    """Run all processors on `scores` in place; returns the columns picked and the values by which they won."""
    parameters = task.parameters
    _hold_back_stops(scores, task)
    _penalise(scores, task)
    samples = np.flatnonzero(parameters["samples"])
    most, picked = scores.max(-1)
    best, columns = most.double().numpy(), picked.numpy()
    if len(samples):
        warped = scores[torch.from_numpy(samples)]
        warp(warped, parameters[samples])
        scores[torch.from_numpy(samples)] = warped
        indices, first_id = task.output_indices[samples], task.ids.start
        columns[samples], best[samples] = pick(warped, parameters["seed"][samples], indices, first_id)
    return columns, best


def _hold_back_stops(scores: Tensor, task: _Task) -> None:
    members = np.flatnonzero(task.output_indices < task.parameters["min_tokens"])
    if not len(members):
        return
    stop_ids = [task.stop_ids[row] for row in task.rows[members].tolist()]
    ids, owners = np.concatenate(stop_ids), np.repeat(members, [len(each) for each in stop_ids])
    is_here = is_among(ids, task.ids)
    scores[torch.from_numpy(owners[is_here]), torch.from_numpy(ids[is_here] - task.ids.start)] = -torch.inf


def _penalise(scores: Tensor, task: _Task) -> None:
    if task.counts is None:
        return
    members = np.flatnonzero(task.parameters["needs_counts"])
    mine = task.parameters[members]
    lengths = mine["num_prompt"] + task.output_indices[members]
    penalised = penalise(scores[torch.from_numpy(members)], mine, task.counts, lengths)
    scores[torch.from_numpy(members)] = penalised


def penalise(scores: Tensor, parameters: Parameters, counts: Tensor, lengths: Ints) -> Tensor:
    """Repetition (Keskar et al., arXiv 1909.05858, over prompt and output), then frequency and presence penalties.

    `scores` [m, vocab]; `counts` int32 [m, 2, vocab] as in TokenCounts; `lengths` [m] tokens so far. TGI's frequency
    penalty is of the share of a token in prompt and output; OpenAI's of its number in the output, and presence of its
    being there at all. A TGI row's presence penalty counts occurrences in prompt and output.
    """
    everywhere, output = counts[:, 0], counts[:, 1]
    repetition = _column(parameters["repetition"], scores)
    scores = torch.where(everywhere > 0, torch.where(scores < 0, scores * repetition, scores / repetition), scores)
    is_openai = torch.from_numpy(parameters["is_openai"])[:, None]
    number = torch.where(is_openai, output, everywhere).to(scores.dtype)
    divisor = _column(np.where(parameters["is_openai"], 1, np.maximum(lengths, 1)), scores)
    scores = scores - _column(parameters["frequency"], scores) * (number / divisor)
    return scores - _column(parameters["presence"], scores) * (number > 0)


def warp(scores: Tensor, parameters: Parameters) -> None:
    """Temperature and truncations of sampled rows, in place. `scores` [m, vocab]; what is cut becomes -inf."""
    vocab_size = scores.shape[1]
    temperature = parameters["temperature"]
    if (temperature != 1.0).any():
        scores /= _column(temperature, scores)
    _cut(scores, (parameters["top_k"] > 0) & (parameters["top_k"] < vocab_size), parameters["top_k"], keep_top_k)
    _cut(scores, parameters["top_p"] < 1.0, parameters["top_p"], keep_top_p)
    _cut(scores, parameters["typical_p"] < 1.0, parameters["typical_p"], keep_typical)
    _cut(scores, parameters["min_p"] > 0.0, parameters["min_p"], keep_min_p)


def _cut(scores: Tensor, asks: Flags, values: npt.NDArray[np.generic], keep: KeepRule) -> None:
    """Apply the rule `keep` to the rows that ask for it."""
    if not asks.any():
        return
    members = torch.from_numpy(np.flatnonzero(asks))
    mine = scores[members]
    scores[members] = mine.masked_fill_(~keep(mine, torch.from_numpy(values[asks])[:, None]), -torch.inf)


def keep_top_k(scores: Tensor, k: Tensor) -> Tensor:
    """The k best of each row and whatever ties with the last of them; `k` int64 [m, 1]."""
    best = scores.topk(int(k.max()), -1).values
    return scores >= best.gather(1, k - 1)


def keep_top_p(scores: Tensor, p: Tensor) -> Tensor:
    """The smallest set of best tokens with mass `p` [m, 1], at least one (Holtzman et al., arXiv 1904.09751).

    Tokens are ordered by value, then by id, and the sum is float64 in that order: what is kept depends on nothing else.
    """
    wide = scores.double()
    normalisers = wide.logsumexp(-1, keepdim=True)
    boundary, is_found = _boundary_in_head(wide, normalisers, p)
    for row in torch.nonzero(~is_found)[:, 0].tolist():
        values, ids = wide[row : row + 1].sort(stable=True, descending=True)
        last = _last_kept(values, normalisers[row : row + 1], p[row : row + 1])
        boundary[0][row], boundary[1][row] = values[0, last[0]], ids[0, last[0]]
    ids = torch.arange(scores.shape[1])
    return (wide > boundary[0]) | ((wide == boundary[0]) & (ids <= boundary[1]))


def _boundary_in_head(wide: Tensor, normalisers: Tensor, p: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Value and id ([m, 1] each) of the last token kept, and whether the head of the vocabulary decides it ([m])."""
    vocab_size = wide.shape[1]
    values, ids = wide.topk(min(NUCLEUS_HEAD, vocab_size), -1)
    # of the tokens that tie with the head's last one an arbitrary part is in the head
    is_certain = values > values[:, -1:] if values.shape[1] < vocab_size else torch.ones_like(values, dtype=torch.bool)
    ids, order = ids.sort(-1)
    values, is_certain = values.gather(1, order), is_certain.gather(1, order)
    values, order = values.sort(stable=True, descending=True)
    ids, is_certain = ids.gather(1, order), is_certain.gather(1, order)
    last = _last_kept(values, normalisers, p)
    return (values.gather(1, last), ids.gather(1, last)), is_certain.gather(1, last)[:, 0]


def _last_kept(values: Tensor, normalisers: Tensor, p: Tensor) -> Tensor:
    """Index of the last token, in descending order, before which the mass is still below `p`; [m, 1]."""
    until = (values - normalisers).exp().cumsum(-1)
    # the token after the one that reaches the mass is the first to go
    return (until < p).sum(-1, keepdim=True).clamp(max=values.shape[1] - 1)


def keep_typical(scores: Tensor, mass: Tensor) -> Tensor:
    """Locally typical tokens (Meister et al., arXiv 2202.00666): those whose surprise is closest to the entropy.

    Ties with the last one are kept, as transformers and TGI do. `mass` [m, 1].
    """
    logprobs = scores.double().log_softmax(-1)
    probabilities = logprobs.exp()
    entropy = -(logprobs * probabilities).nansum(-1, keepdim=True)
    distances = (-logprobs - entropy).abs()
    ordered, order = distances.sort(stable=True)
    num_below = (probabilities.gather(1, order).cumsum(-1) < mass).sum(-1, keepdim=True)
    return distances <= ordered.gather(1, num_below.clamp(max=scores.shape[1] - 1))


def keep_min_p(scores: Tensor, p: Tensor) -> Tensor:
    """Tokens at least `p` [m, 1] times as likely as the likeliest (Nguyen et al., arXiv 2407.01082)."""
    return scores.double() >= scores.double().amax(-1, keepdim=True) + p.log()


def pick(
    scores: Tensor, seeds: npt.NDArray[np.uint64], output_indices: Ints, first_id: int = 0
) -> tuple[Ints, Doubles]:
    """Sample each row by the Gumbel-max trick: the argmax of score plus noise, the lowest id on ties.

    Exact although noise is computed only for candidates that can win. `scores` [m, columns] of the token ids from
    `first_id` on; returns the columns picked and their score plus noise, int64 and float64 [m].
    """
    limits = scores.double().amax(-1, keepdim=True).nan_to_num(nan=0.0, neginf=0.0) - NOISE_MARGIN
    places = torch.nonzero(scores >= limits)
    members, columns = places[:, 0].numpy(), places[:, 1].numpy()
    ids = (columns + first_id).astype(np.uint64)
    gumbels = noise.gumbel(seeds[members], output_indices[members].astype(np.uint64), ids)
    keyed = scores[places[:, 0], places[:, 1]].double().numpy() + gumbels
    return _first_best(keyed, members, columns, len(scores))


def _first_best(values: Doubles, members: Ints, columns: Ints, num_rows: int) -> tuple[Ints, Doubles]:
    """Of each row the column with the largest value, the first one on ties, and that value; `members` ascends. Rows
    without any get column 0."""
    best = np.full(num_rows, -np.inf)
    np.maximum.at(best, members, values)
    picks = np.zeros(num_rows, dtype=np.int64)
    winners = np.flatnonzero(values == best[members])[::-1]
    picks[members[winners]] = columns[winners]
    return picks, best


class _View:
    """The distributions of k rows that log-probabilities are read from: raw ones, and processed ones of rows `chosen`.

    `raw_normalisers` and `processed_normalisers` [k] are their log-sum-exps; the same where nothing is processed.
    """

    def __init__(
        self, raw: Tensor, normalisers: Floats, processed: Tensor | None, chosen: Ints, parameters: Parameters
    ) -> None:
        self._raw, self._processed = raw, processed
        self.raw_normalisers = self.processed_normalisers = normalisers
        self._place = np.full(len(parameters), -1)
        if processed is not None:
            self._place[chosen] = np.arange(len(chosen))
            self.processed_normalisers = self.raw_normalisers.copy()
            self.processed_normalisers[chosen] = processed.logsumexp(-1).numpy()
        self._reads_processed = ~parameters["is_raw"] & (self._place >= 0)

    def values(self, columns: Ints) -> Floats:
        """The scores at one column of each row, of the kind the row wants, [k]."""
        values: Floats = _widened(self._raw.gather(1, torch.from_numpy(columns)[:, None])[:, 0]).numpy()
        if self._processed is not None:
            members = np.flatnonzero(self._reads_processed)
            places = torch.from_numpy(self._place[members])
            values[members] = self._processed[places, torch.from_numpy(columns[members])].numpy()
        return values

    def logprobs(self, row: int) -> Tensor:
        """[columns] of the kind the row wants."""
        if self._processed is not None and self._reads_processed[row]:
            return self._processed[self._place[row]] - float(self.processed_normalisers[row])
        return _widened(self._raw[row]) - float(self.raw_normalisers[row])


def _sampled(ids: Ints, values: Floats, raw_normalisers: Floats, processed_normalisers: Floats, task: _Task) -> Sampled:
    """`values` [k] are scores of `ids` of the kind that each row wants, normalisers [k] log-sum-exps over all ids."""
    normalisers = np.where(task.parameters["is_raw"], raw_normalisers, processed_normalisers)
    is_usable = np.isfinite(raw_normalisers) & np.isfinite(processed_normalisers)
    errors = dict.fromkeys(np.flatnonzero(~is_usable).tolist(), UNUSABLE)
    with np.errstate(over="ignore", invalid="ignore"):
        # where that matters the row has an error
        logprobs = (values - normalisers).astype(np.float32)
    return Sampled(ids, logprobs, errors=errors)


def _top_tokens(view: _View, parameters: Parameters, errors: dict[int, str]) -> list[list[tuple[int, float]]]:
    wanted = parameters["num_top"].tolist()
    return [
        top_tokens(view.logprobs(row), number, with_ties=not parameters["is_raw"][row])
        if number and row not in errors
        else []
        for row, number in enumerate(wanted)
    ]


def top_tokens(logprobs: Tensor, number: int, *, with_ties: bool) -> list[tuple[int, float]]:
    """The best tokens of one position, best first, lower ids first on ties; impossible tokens are left out.

    `with_ties` is TGI's rule: whatever ties with the last place is reported as well, so there may be more than asked.
    """
    values = logprobs.topk(min(number, len(logprobs))).values
    ids = torch.nonzero((logprobs >= values[-1]) & torch.isfinite(logprobs))[:, 0]
    order = logprobs[ids].argsort(descending=True, stable=True)
    ids = ids[order[: MAX_TIES if with_ties else number]]
    return list(zip(ids.tolist(), logprobs[ids].tolist(), strict=True))


def _column(values: npt.NDArray[np.generic], like: Tensor) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.float64))[:, None].to(like.dtype)
