"""From logits to tokens: processors in a fixed order, keyed noise, log-probabilities.

Order: minimum length, repetition, frequency and presence penalties, temperature, top-k, top-p, typical-p, min-p, then
the choice. Each processor sees only the rows that ask for it, and what it does to a row depends on that row alone. Sums
that decide what is kept are float64 in a fixed order, so that company in the batch cannot move a boundary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worker.runner import noise
from worker.runner.rows import Ints, Rows

Flags = npt.NDArray[np.bool_]
KeepRule = Callable[[Tensor, Tensor], Tensor]
Parameters = npt.NDArray[np.void]

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


def sample(logits: Tensor, rows: Ints, output_indices: Ints, state: Rows) -> Sampled:
    """Pick one token for each of k rows.

    `logits` [k, vocab] of any floating type; `rows` [k] where each one's parameters are in `state`; `output_indices`
    [k] index of the token to pick within the row's output. `state` is only read.
    """
    scores = logits if logits.dtype is torch.float64 else logits.to(torch.float32)
    parameters = state.parameters[rows]
    ids = scores.argmax(-1).numpy()
    normalisers = scores.logsumexp(-1)
    chosen = np.flatnonzero(~parameters["is_plain"])
    processed: Tensor | None = None
    if len(chosen):
        processed = scores[torch.from_numpy(chosen)]
        processed_ids = _process_and_pick(processed, parameters[chosen], rows[chosen], output_indices[chosen], state)
        ids[chosen] = processed_ids
    view = _View(scores, normalisers, processed, chosen, parameters)
    return _result(view, ids)


def _process_and_pick(scores: Tensor, parameters: Parameters, rows: Ints, output_indices: Ints, state: Rows) -> Ints:
    """Run all processors on `scores` in place; returns the picks."""
    _hold_back_stops(scores, np.flatnonzero(output_indices < parameters["min_tokens"]), rows, state)
    _penalise(scores, parameters, rows, output_indices, state)
    samples = np.flatnonzero(parameters["samples"])
    ids = scores.argmax(-1).numpy()
    if len(samples):
        warped = scores[torch.from_numpy(samples)]
        warp(warped, parameters[samples])
        scores[torch.from_numpy(samples)] = warped
        ids[samples] = pick(warped, parameters["seed"][samples], output_indices[samples])
    return ids


def _hold_back_stops(scores: Tensor, members: Ints, rows: Ints, state: Rows) -> None:
    for member in members.tolist():
        scores[member, torch.from_numpy(state.stop_ids[rows[member]])] = -torch.inf


def _penalise(scores: Tensor, parameters: Parameters, rows: Ints, output_indices: Ints, state: Rows) -> None:
    members = np.flatnonzero(parameters["needs_counts"])
    if not len(members):
        return
    counts, mine = state.counts.table[state.counts.slots(rows[members])], parameters[members]
    lengths = mine["num_prompt"] + output_indices[members]
    penalised = penalise(scores[torch.from_numpy(members)], mine, counts, lengths)
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


def pick(scores: Tensor, seeds: npt.NDArray[np.uint64], output_indices: Ints) -> Ints:
    """Sample each row by the Gumbel-max trick: the argmax of score plus noise, the lowest id on ties.

    Exact although noise is computed only for candidates that can win. `scores` [m, vocab]; returns int64 [m].
    """
    limits = scores.double().amax(-1, keepdim=True).nan_to_num(nan=0.0, neginf=0.0) - NOISE_MARGIN
    places = torch.nonzero(scores >= limits)
    members, ids = places[:, 0].numpy(), places[:, 1].numpy()
    gumbels = noise.gumbel(seeds[members], output_indices[members].astype(np.uint64), ids.astype(np.uint64))
    keyed = scores[places[:, 0], places[:, 1]].double().numpy() + gumbels
    return _first_best(keyed, members, ids, len(scores))


def _first_best(values: npt.NDArray[np.float64], members: Ints, ids: Ints, num_rows: int) -> Ints:
    """Of each row the id with the largest value, the first one on ties; `members` ascends. Rows without any get 0."""
    best = np.full(num_rows, -np.inf)
    np.maximum.at(best, members, values)
    picks = np.zeros(num_rows, dtype=np.int64)
    winners = np.flatnonzero(values == best[members])[::-1]
    picks[members[winners]] = ids[winners]
    return picks


class _View:
    """The distributions that log-probabilities are read from: raw ones, and processed ones where they differ."""

    def __init__(
        self, raw: Tensor, normalisers: Tensor, processed: Tensor | None, chosen: Ints, parameters: Parameters
    ) -> None:
        self.raw, self.raw_normalisers, self.parameters = raw, normalisers, parameters
        self.processed = processed
        self.place = np.full(len(parameters), -1)
        self.place[chosen] = np.arange(len(chosen))
        self.processed_normalisers = None if processed is None else processed.logsumexp(-1)

    def logprobs(self, row: int) -> Tensor:
        """[vocab] of the kind the row wants."""
        place = int(self.place[row])
        if self.processed is None or self.processed_normalisers is None or place < 0 or self.parameters["is_raw"][row]:
            return self.raw[row] - self.raw_normalisers[row]
        return self.processed[place] - self.processed_normalisers[place]


def _result(view: _View, ids: Ints) -> Sampled:
    columns = torch.from_numpy(ids)[:, None]
    logprobs = view.raw.gather(1, columns)[:, 0] - view.raw_normalisers
    is_usable = torch.isfinite(view.raw_normalisers)
    if view.processed is not None and view.processed_normalisers is not None:
        chosen = torch.from_numpy(np.flatnonzero(view.place >= 0))
        is_usable[chosen] &= torch.isfinite(view.processed_normalisers)
        mine = view.processed.gather(1, columns[chosen])[:, 0] - view.processed_normalisers
        is_processed = torch.from_numpy(~view.parameters["is_raw"])[chosen]
        logprobs[chosen[is_processed]] = mine[is_processed]
    errors = dict.fromkeys(torch.nonzero(~is_usable)[:, 0].tolist(), UNUSABLE)
    tops = _top_tokens(view, errors) if view.parameters["num_top"].any() else []
    return Sampled(ids, logprobs.to(torch.float32).numpy(), tops, errors)


def _top_tokens(view: _View, errors: dict[int, str]) -> list[list[tuple[int, float]]]:
    wanted = view.parameters["num_top"].tolist()
    return [
        top_tokens(view.logprobs(row), number, with_ties=not view.parameters["is_raw"][row])
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
