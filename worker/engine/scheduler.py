"""Decides what the next step computes, and does the books when a step is applied. Ints and lists, no tensors, no clock.

One rule instead of phases (as in vLLM's v1 engine): every request has `computed < total`, and a step hands out tokens,
running requests first, then waiting ones; long prompts take what the prompt budget leaves, in chunks. The encoder of an
encoder-decoder model runs whole, in the step that admits its request, and for one request of a step at most.

    add ──▶ waiting ──admit──▶ running ──finish, abort──▶ releasing ──last step applied──▶ row and blocks are free
               ▲                  │
               └── last step applied ── releasing ◀──preempt, step taken back

`running` and `waiting` are sorted by arrival. The youngest running request is preempted when blocks run out, the oldest
never: together with a pool larger than the longest request, somebody always gets to the end.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from worker.engine.adapters import NO_SLOT, AdapterSlots, Entrance
from worker.engine.admission import OutputForecast, peak_blocks
from worker.engine.blocks import BlockDigests, BlockPool
from worker.engine.device import StepResult, fitting_total_tokens
from worker.engine.plan import Entry, Launch, PlanBuilder
from worker.engine.request import Request, RequestState, Residency, end_without_token
from worker.engine.speculation import Speculator
from worker.engine.stats import EngineStats
from worker.pipe import Ready, TokenRun

MAX_LOOKAHEAD = 32
FEWEST_PROMPT_TOKENS = 32
"""A step that is too large with fewer has too many rows."""
STEPS_UNTIL_REGROWTH = 1000
MAX_STUCK = 3
"""Times that a step which is as small as can be finds no memory, before it is given up."""
BY_ARRIVAL = attrgetter("arrival")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """Sizes the scheduler lives in; tokens unless the name says otherwise.

    `decoder_start_id` as in `Ready`: None for all but encoder-decoder models. Keys and values of those depend on what
    their encoder read, so equal beginnings of outputs are not shared. `max_loras` counts the slots for adapters, and
    `max_drafts` the guesses of one request in a step.
    """

    vocab_size: int
    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_total_tokens: int
    max_batch_prefill_tokens: int
    prefix_caching: bool = True
    decoder_start_id: int | None = None
    max_loras: int = 1
    max_drafts: int = 0

    def __post_init__(self) -> None:
        wanted, kv_tokens = self.max_total_tokens, self.num_blocks * self.block_size
        if fitting_total_tokens(wanted, kv_tokens, self.block_size, has_encoder=self.has_encoder) < wanted:
            raise ValueError(f"{self.num_blocks} blocks cannot hold {wanted} tokens and a block more")
        if self.has_encoder and self.prefix_caching:
            raise ValueError("an encoder-decoder model has no prefixes to share")
        if min(self.max_num_seqs, self.max_batch_prefill_tokens, self.max_loras) < 1:
            raise ValueError("a step needs at least one row, one token and one slot for adapters")

    @property
    def has_encoder(self) -> bool:
        return self.decoder_start_id is not None


def limits_of(ready: Ready, *, prefix_caching: bool, max_loras: int = 1, max_drafts: int = 0) -> EngineLimits:
    """The limits that a loaded device announced, and those that nobody but the options knows."""
    return EngineLimits(
        vocab_size=ready.vocab_size,
        block_size=ready.block_size,
        num_blocks=ready.kv_tokens // ready.block_size,
        max_num_seqs=ready.max_num_seqs,
        max_total_tokens=ready.max_total_tokens,
        max_batch_prefill_tokens=ready.max_batch_prefill_tokens,
        prefix_caching=prefix_caching and ready.decoder_start_id is None,
        decoder_start_id=ready.decoder_start_id,
        max_loras=max_loras,
        max_drafts=max_drafts if ready.can_speculate else 0,
    )


class Picks(NamedTuple):
    """What one row sampled, as in StepResult."""

    ids: list[int]
    logprobs: list[float]
    top_tokens: list[list[tuple[int, float]]]


class Scheduler:
    """Owner of all requests, rows and blocks. `schedule` launches, `apply` settles; both in order of steps."""

    def __init__(self, limits: EngineLimits) -> None:
        self.limits = limits
        self.stats = EngineStats()
        self.pool = BlockPool(limits.num_blocks)
        self.slots = AdapterSlots(limits.max_loras)
        self.speculator = Speculator(limits.max_drafts) if limits.max_drafts else None
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.requests: dict[str, Request] = {}
        self._digests = BlockDigests(limits.block_size)
        self._forecast = OutputForecast()
        self._releasing: list[tuple[Request, Residency]] = []
        self._computing: dict[bytes, Request] = {}
        self._free_rows = list(range(limits.max_num_seqs))
        self._freed_rows: list[int] = []
        self._last_launched = 0
        self._last_applied = 0
        self._last_arrival = 0
        self._most_prompt_tokens = limits.max_batch_prefill_tokens
        self._most_rows = limits.max_num_seqs
        self._regrows_at = STEPS_UNTIL_REGROWTH
        self._num_stuck = 0

    @property
    def has_requests(self) -> bool:
        return bool(self.requests)

    @property
    def num_decoding(self) -> int:
        return sum(map(_decodes, self.running))

    @property
    def has_seniors(self) -> bool:
        """Whether somebody who decodes had begun before the prompt came that is next."""
        prompts = [request.arrival for request in self.running if not _decodes(request)]
        prompts += [request.arrival for request in self.waiting[:1]]
        return bool(prompts) and any(_decodes(each) and each.began_after < min(prompts) for each in self.running)

    def snapshot(self) -> dict[str, float]:
        """The counters and gauges of a `Step` message, all but the time."""
        gauges = {
            "running": len(self.running),
            "waiting": len(self.waiting),
            "waiting_for_slot": self._num_waiting_for_slot,
            "blocks_free": self.pool.num_free,
            "blocks_total": self.pool.num_blocks,
        }
        return self.stats.counters() | gauges

    @property
    def _num_waiting_for_slot(self) -> int:
        entrance = Entrance(self.slots)
        return sum(not entrance.may_pass(request.adapter_digest) for request in self.waiting)

    # What comes from outside.

    def add(self, request: Request) -> TokenRun | None:
        """Take a new request, or answer at once: it cannot run here, or its tokens are complete already.

        Of two runs of a job the later epoch wins.
        """
        known = self.requests.get(request.request_id)
        if known is not None and known.epoch >= request.epoch:
            return None
        self.abort(request.request_id)
        error = self._fault_of(request)
        finish = "error" if error else _finish_of_log(request)
        if finish:
            return end_without_token(request, finish, error)
        self.requests[request.request_id] = request
        self.waiting.append(request)
        self._last_arrival = request.arrival
        return None

    def abort(self, request_id: str) -> None:
        """Drop a request, unless it has ended. Tokens of its launched steps will be ignored."""
        request = self.requests.get(request_id)
        if request is not None:
            self._end(request)

    def _fault_of(self, request: Request) -> str:
        limits, tokens = self.limits, np.frombuffer(request.encoder_ids + request.tokens, np.int32)
        if request.num_input < 1:
            return "the prompt is empty"
        if tokens.min() < 0 or tokens.max() >= limits.vocab_size:
            return f"token ids must be below {limits.vocab_size}"
        num_total = request.num_input + request.params.max_new_tokens
        if num_total > limits.max_total_tokens:
            return f"{num_total} tokens are more than the {limits.max_total_tokens} this worker can hold"
        if len(request.encoder_ids) > limits.max_batch_prefill_tokens:
            most = limits.max_batch_prefill_tokens
            return f"{request.num_input} tokens are more than the {most} that the encoder reads at once"
        return ""

    # Launching a step.

    def schedule(self, prompt_budget: int) -> Launch | None:
        """The next step, or None if nobody can compute anything now.

        At most `prompt_budget` tokens are of prompts, unless a longer one is alone in the encoder.
        """
        budget = min(prompt_budget, self._most_prompt_tokens)
        builder = PlanBuilder(self._last_launched + 1, budget, self._freed_rows)
        drafts = self.speculator.drafts(self.running) if self.speculator else {}
        for request in list(self.running):
            self._continue(request, builder, drafts.get(request.request_id, []))
        if not builder.has_preempted:
            self._admit_waiting(builder)
        if not builder.entries:
            return None
        self._last_launched, self._freed_rows = builder.step, []
        return self._counted(builder.build())

    def _continue(self, request: Request, builder: PlanBuilder, drafts: list[int]) -> None:
        residency = request.residency
        if residency is None:
            return
        num_tokens = request.num_uncomputed(residency.num_computed)
        if num_tokens > 1:
            num_tokens = min(num_tokens, builder.prompt_budget)
        if drafts:
            drafts = drafts[: self._num_draft_places(residency)]
        if num_tokens > 0 and self._grow(request, residency, num_tokens + len(drafts), builder):
            self._add(request, residency, num_tokens, builder, drafts)

    def _num_draft_places(self, residency: Residency) -> int:
        """Places behind the next token, without blocks that others could need in this step."""
        num_spare = max(self.pool.num_free - len(self.running), 0)
        return max((len(residency.blocks) + num_spare) * self.limits.block_size - residency.num_computed - 1, 0)

    def _add(
        self,
        request: Request,
        residency: Residency,
        num_tokens: int,
        builder: PlanBuilder,
        drafts: Sequence[int] = (),
    ) -> None:
        if residency.num_computed + num_tokens < request.num_total:
            self.stats.chunked_prompts += not request.was_chunked
            request.was_chunked = True
        builder.add(request, residency, num_tokens, drafts)

    def _grow(self, request: Request, residency: Residency, num_tokens: int, builder: PlanBuilder) -> bool:
        """Give the request blocks for its next tokens, if need be at the cost of younger ones."""
        num_held = len(residency.blocks)
        num_missing = self._blocks_for(residency.num_computed + num_tokens) - num_held
        if num_missing <= 0:
            return True
        while num_missing > self.pool.num_free:
            if not self._preempt_youngest(request, builder):
                return False
        blocks = self.pool.allocate(num_missing, behind=residency.blocks[-1] if residency.blocks else 0)
        residency.blocks += blocks
        builder.grow(residency.row, num_held, blocks)
        return True

    def _preempt_youngest(self, needy: Request, builder: PlanBuilder) -> bool:
        """Returns whether `needy` may look again at once.

        While launched steps still name blocks on their way back, the needy one sits this step out instead of
        driving out another one.
        """
        victim = self.running[-1]
        if self._releasing or victim is self.running[0] or victim.residency is None:
            return False
        builder.has_preempted = True
        self.stats.preemptions += 1
        self._leave(victim, victim.residency)
        self._release_drained()
        return victim is not needy and not self._releasing

    # Admission.

    def _admit_waiting(self, builder: PlanBuilder) -> None:
        """Newcomers in order of arrival, until one does not fit or the encoder has its one input. Who waits for a slot
        for its adapter is passed over.

        A request that saw a worker die computes its first token without other newcomers: should it kill this worker
        too, it takes nobody along but those who ran already.
        """
        if not self.waiting or any(request.is_suspect for request in self.running):
            return
        for request in self._let_in():
            if not self._free_rows or len(self.running) >= self._most_rows or builder.prompt_budget < 1:
                return
            if request.is_suspect and builder.num_admitted:
                return
            if not builder.can_encode(len(request.encoder_ids)):
                return
            hits = self._find_prefix(request)
            if hits is None:
                continue
            if not self._admit(request, hits, builder) or request.is_suspect or request.encoder_ids:
                return

    def _let_in(self) -> Iterator[Request]:
        """The first of those who wait, without those for whose adapters there is no slot."""
        entrance, num_left = Entrance(self.slots), MAX_LOOKAHEAD
        for request in list(self.waiting):
            if num_left and entrance.may_pass(request.adapter_digest):
                num_left -= 1
                yield request

    def _find_prefix(self, request: Request) -> list[int] | None:
        """Blocks that hold the beginning of the request; None while a running one computes the block that comes next.

        Never the whole request: its last token must be computed, or there would be nothing to sample from.
        """
        if not self.limits.prefix_caching:
            return []
        self._extend_digests(request)
        num_usable = (len(request.tokens) - 1) // self.limits.block_size
        hits = self.pool.lookup(request.digests[:num_usable])
        if len(hits) < num_usable and request.digests[len(hits)] in self._computing:
            return None
        return hits

    def _admit(self, request: Request, hits: list[int], builder: PlanBuilder) -> bool:
        num_hit_tokens = len(hits) * self.limits.block_size
        num_tokens = min(len(request.tokens) - num_hit_tokens, builder.first_chunk(len(request.encoder_ids)))
        num_missing = self._blocks_for(num_hit_tokens + num_tokens) - len(hits) + self._num_cross_blocks(request)
        num_borrowed = self.pool.num_in_use(hits) * self.limits.block_size
        if not self.pool.can_hold(hits, num_missing) or not self._fits_later(request, num_borrowed):
            return False
        residency = self._move_in(request, hits, num_borrowed, builder)
        self._grow(request, residency, num_tokens, builder)
        self._add(request, residency, num_tokens, builder)
        return True

    def _fits_later(self, newcomer: Request, num_borrowed: int) -> bool:
        """Whether the predicted peak with the newcomer stays within the pool. Alone it always fits."""
        if not self.running:
            return True
        everyone, size = [*self.running, newcomer], self.limits.block_size
        num_own = [
            r.num_total - (r.residency.num_borrowed if r.residency else num_borrowed) + self._num_cross_blocks(r) * size
            for r in everyone
        ]
        remaining = [self._forecast.remaining(r.num_output, r.params.max_new_tokens) for r in everyone]
        peak = peak_blocks(np.array(num_own, np.int32), np.array(remaining, np.int32), size)
        return peak <= self.pool.num_blocks

    def _move_in(self, request: Request, hits: list[int], num_borrowed: int, builder: PlanBuilder) -> Residency:
        self.pool.share(hits)
        num_hit_tokens = len(hits) * self.limits.block_size
        row, cross_blocks = heapq.heappop(self._free_rows), self.pool.allocate(self._num_cross_blocks(request))
        slot = self.slots.take(request.adapter_digest) if request.adapter else NO_SLOT
        residency = Residency(
            row, list(hits), cross_blocks, num_hit_tokens, num_hit_tokens, len(hits), num_borrowed, slot
        )
        request.residency = residency
        if request.state is RequestState.WAITING:
            self.stats.prefix_hits += bool(hits)
            self.stats.prefix_hit_tokens += num_hit_tokens
        request.advance(RequestState.ACTIVE)
        self.waiting.remove(request)
        insort(self.running, request, key=BY_ARRIVAL)
        for digest in request.digests[len(hits) :]:
            self._computing.setdefault(digest, request)
        builder.admit(request, residency)
        return residency

    # Applying a step.

    def apply(self, launch: Launch, result: StepResult) -> list[TokenRun]:
        """Settle a launched step: keys and values written, tokens known, ends found. Returns what is new."""
        self._last_applied, self._num_stuck = launch.plan.step, 0
        if self._last_applied == self._regrows_at:
            self._regrow()
        ids, logprobs, tops = result.ids.tolist(), result.logprobs.tolist(), result.top_tokens
        num_ids = iter(result.num_ids.tolist() or repeat(1))
        runs: list[TokenRun] = []
        first = 0
        for place, entry in enumerate(launch.entries):
            end = first + next(num_ids) if entry.samples else first
            if place in result.errors:
                runs += self._fail(entry, result.errors[place])
            elif entry.samples:
                runs += self._apply_sample(entry, Picks(ids[first:end], logprobs[first:end], tops[first:end]))
            else:
                self._note_written(entry, entry.num_tokens)
            first = end
        self._release_drained()
        return runs

    def _apply_sample(self, entry: Entry, picks: Picks) -> list[TokenRun]:
        """Tokens of a request that has ended meanwhile are dropped here: before registration, usage and frames."""
        request = entry.request
        self._land(entry)
        if request.is_ended:
            return []
        if not request.num_output:
            request.began_after = self._last_arrival
        num_ids, finish = _append(request, picks.ids)
        self._note_written(entry, entry.num_tokens - 1 + num_ids)
        if not num_ids:
            request.may_guess = False
            return []
        self.stats.accepted_tokens += min(num_ids, len(picks.ids) - 1)
        request.is_suspect = False
        if finish:
            self._end(request)
        run = TokenRun(
            request_id=request.request_id,
            epoch=request.epoch,
            ids=picks.ids[:num_ids],
            logprobs=picks.logprobs[:num_ids],
            top_tokens=picks.top_tokens[:num_ids] if request.params.num_top_logprobs else [],
            finish=finish,
        )
        return [run]

    def _fail(self, entry: Entry, error: str) -> list[TokenRun]:
        """End the request of a row that could not compute; what it has written is never found again."""
        request = entry.request
        self._land(entry)
        if request.is_ended:
            return []
        self.pool.forget(entry.residency.blocks)
        self._end(request)
        return [end_without_token(request, "error", error)]

    def _land(self, entry: Entry) -> None:
        """What the entry was to bring is known."""
        entry.request.num_in_flight -= entry.num_sampled
        if entry.num_drafts:
            entry.request.is_guessing = False

    def _note_written(self, entry: Entry, num_tokens: int) -> None:
        """Keys and values of the entry's first `num_tokens` are written and right; behind them were drafts that were
        not. Remember the blocks that are full now. A closed stay registers nothing any more."""
        request, residency = entry.request, entry.residency
        if residency.is_closed:
            return
        residency.num_written = entry.start + num_tokens
        if entry.num_drafts:
            residency.num_computed = residency.num_written
        num_full = residency.num_written // self.limits.block_size
        if num_full == residency.num_registered or not self.limits.prefix_caching:
            return
        self._extend_digests(request)
        for index in range(residency.num_registered, num_full):
            digest = request.digests[index]
            self.pool.register(residency.blocks[index], digest)
            if self._computing.get(digest) is request:
                del self._computing[digest]
        residency.num_registered = num_full

    def _end(self, request: Request) -> None:
        """The one way out, for finished, failed and aborted requests alike."""
        if request.residency is not None:
            self._leave(request, request.residency)
        elif request in self.waiting:
            self.waiting.remove(request)
        if request.state is RequestState.ACTIVE:
            self._forecast.note(request.num_output)
        request.advance(RequestState.ENDED)
        del self.requests[request.request_id]
        self._release_drained()

    def _leave(self, request: Request, residency: Residency) -> None:
        """Close the stay of a running request; row and blocks go back when no launched step names them."""
        residency.is_closed = True
        request.residency = None
        self.running.remove(request)
        for digest in request.digests[residency.num_registered :]:
            if self._computing.get(digest) is request:
                del self._computing[digest]
        self._releasing.append((request, residency))

    def _release_drained(self) -> None:
        drained = [pair for pair in self._releasing if pair[1].last_step <= self._last_applied]
        if not drained:
            return
        self._releasing = [pair for pair in self._releasing if pair[1].last_step > self._last_applied]
        for request, residency in drained:
            self.pool.release(residency.all_blocks)
            if residency.adapter_slot != NO_SLOT:
                self.slots.release(residency.adapter_slot)
            heapq.heappush(self._free_rows, residency.row)
            self._freed_rows.append(residency.row)
            if not request.is_ended:
                insort(self.waiting, request, key=BY_ARRIVAL)

    # Taking a step back.

    def take_back(self, launch: Launch) -> bool:
        """Undo the last launched step, which the device could not run; all before it are applied. Steps have half as
        much from now on of what it had most: tokens of prompts, or rows. False if the smallest found no memory either,
        again and again.

        Whoever took part leaves its row, whatever the device did to that, and comes back to those of its blocks that
        are registered: no step has changed them since.
        """
        self.stats.steps_too_large += 1
        if not self._shrink(launch):
            return False
        self._last_launched = self._last_applied
        for entry in launch.entries:
            self._land(entry)
            entry.residency.last_step = self._last_applied
            if not entry.residency.is_closed:
                self.stats.preemptions += 1
                self._leave(entry.request, entry.residency)
        self._release_drained()
        self._freed_rows = sorted({*self._freed_rows, *launch.plan.freed_rows.tolist()})
        return True

    def _shrink(self, launch: Launch) -> bool:
        num_tokens, num_rows = min(launch.num_prompt_tokens, self._most_prompt_tokens), len(launch.entries)
        if num_tokens > max(FEWEST_PROMPT_TOKENS, num_rows):
            self._most_prompt_tokens = num_tokens // 2
        elif num_rows > 1:
            self._most_rows = num_rows // 2
        else:
            self._num_stuck += 1
        self._regrows_at = self._last_applied + STEPS_UNTIL_REGROWTH
        return self._num_stuck < MAX_STUCK

    def _regrow(self) -> None:
        """Try twice as much: what took the memory may be gone."""
        limits, self._regrows_at = self.limits, self._last_applied + STEPS_UNTIL_REGROWTH
        self._most_prompt_tokens = min(2 * self._most_prompt_tokens, limits.max_batch_prefill_tokens)
        self._most_rows = min(2 * self._most_rows, limits.max_num_seqs)

    # Small things.

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.limits.block_size)

    def _num_cross_blocks(self, request: Request) -> int:
        return self._blocks_for(len(request.encoder_ids))

    def _extend_digests(self, request: Request) -> None:
        num_full = len(request.tokens) // self.limits.block_size
        salt, adapter_digest = request.cache_salt, request.adapter_digest
        self._digests.extend(request.digests, request.tokens, salt, num_full, adapter_digest)

    def note_time(self, launch: Launch, seconds: float) -> None:
        """How long a step took, from which the price of drafts is learned."""
        if self.speculator and not launch.num_prompt_tokens:
            self.speculator.times.note(len(launch.entries), launch.num_drafts, seconds)

    def _counted(self, launch: Launch) -> Launch:
        stats = self.stats
        stats.steps += 1
        stats.batch_max = max(stats.batch_max, len(launch.entries))
        stats.prefill_tokens += launch.num_prompt_tokens
        stats.encoder_passes += launch.num_encoder_tokens > 0
        stats.encoder_tokens += launch.num_encoder_tokens
        stats.decode_tokens += launch.num_decodes
        stats.draft_tokens += launch.num_drafts
        return launch

    def check(self) -> None:
        """Compare all books with one another; for tests, after every operation.

        Raises:
            ValueError: naming the first thing that does not add up.
        """
        pairs = [(request, request.residency) for request in self.running if request.residency] + self._releasing
        stays = [stay for _, stay in pairs]
        self.pool.check([stay.all_blocks for stay in stays])
        self._check_slots(pairs)
        rows = sorted([stay.row for stay in stays] + self._free_rows)
        if rows != list(range(self.limits.max_num_seqs)):
            raise ValueError(f"rows in use and free are {rows}")
        for requests in (self.running, self.waiting):
            if requests != sorted(requests, key=BY_ARRIVAL):
                raise ValueError("requests are out of the order of their arrival")
        preempted = [request for request, _ in self._releasing if not request.is_ended]
        places = [*self.running, *self.waiting, *preempted]
        if sorted(r.request_id for r in places) != sorted(self.requests):
            raise ValueError("a request is in no place or in two")
        self._check_computing()

    def _check_slots(self, pairs: list[tuple[Request, Residency]]) -> None:
        for request, stay in pairs:
            if (stay.adapter_slot == NO_SLOT) != (request.adapter is None):
                raise ValueError(f"{request.request_id} has an adapter without a slot, or a slot without an adapter")
        self.slots.check(
            (request.adapter_digest, stay.adapter_slot) for request, stay in pairs if stay.adapter_slot != NO_SLOT
        )

    def _check_computing(self) -> None:
        for request in self._computing.values():
            if request.residency is None:
                raise ValueError(f"{request.request_id} computes nothing, yet others wait for its blocks")


def _append(request: Request, ids: Sequence[int]) -> tuple[int, str]:
    """Give the request its new tokens up to the one that ends it; how many, and how it ends ("": it goes on)."""
    for count, token_id in enumerate(ids, start=1):
        request.tokens.append(token_id)
        if finish := request.finish():
            return count, finish
    return len(ids), ""


def _decodes(request: Request) -> bool:
    return request.num_output + request.num_in_flight > 0


def _finish_of_log(request: Request) -> str:
    """A job whose worker died between its last token and its end comes with complete output."""
    return request.finish() if request.num_output or request.params.max_new_tokens < 1 else ""
