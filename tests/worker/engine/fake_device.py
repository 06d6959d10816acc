"""A device without tensors whose keys and values can be told apart.

What attention would read is simulated: each slot of a page holds (position, digest of the whole prefix up to
there), and a forward pass checks that the pages of a row's block table spell exactly the row's history. The next
token is a function of (seed, output index, digest as read), so that anything wrong in the pages also changes the
output. Of an encoder-decoder model the prefix begins with what the encoder read, which lies in pages of its own. What
an adapter does to keys and values is another beginning of every digest.

Like a GPU it is late: what `forward` stages on the side (rows, tables) happens at the call, what it computes
happens only when the result is collected. Moving into a row or a block that an uncollected step still uses is
therefore an error, and so is going on with a row whose drafts are not compared yet.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from common.job import SamplingParams
from worker.engine.adapters import NO_SLOT
from worker.engine.device import RowInit, StepPlan, StepResult
from worker.engine.scheduler import EngineLimits
from worker.engine.speculation import MAX_DRAFTS_PER_STEP
from worker.pipe import AdapterChecked

MASK = (1 << 63) - 1


class DeviceMisuse(AssertionError):
    """The engine core did something no device could survive."""


def require(condition: object, message: str) -> None:
    if not condition:
        raise DeviceMisuse(message)


def chain(digest: int, token: int) -> int:
    """Digest of a prefix with one token more."""
    return ((digest ^ (token + 1)) * 6364136223846793005 + 1442695040888963407) & MASK


def root_of(adapter_digest: str) -> int:
    """Where the digests of a request with this adapter begin; 0 without one."""
    return chain(0, int(adapter_digest, 16)) if adapter_digest else 0


def encoder_digests(init: RowInit, root: int) -> list[int]:
    """One digest per token that the encoder reads, each of everything up to there."""
    return list(accumulate(init.encoder_ids.tolist(), chain, initial=root))[1:]


def token_of(seed: int, output_index: int, digest: int, vocab_size: int, forbidden: list[int]) -> int:
    """What a model would sample next, avoiding `forbidden`."""
    value = chain(chain(digest, seed), output_index) >> 17
    token = value % vocab_size
    while token in forbidden:
        token = (token + 1) % vocab_size
    return token


def logprob_of(token: int) -> float:
    return -1.0 / (token + 2)


@dataclass
class Oracle:
    """What a request gets when it runs alone; knows nothing of engines. With an encoder the decoder's start token comes
    between prompt and output."""

    vocab_size: int
    decoder_start_id: int | None = None

    def generate(
        self, prompt: list[int], output: list[int], params: SamplingParams, eos: list[int], adapter_digest: str = ""
    ) -> tuple[list[int], str]:
        """All output tokens, those given included, and how the last one ends the request."""
        output, digest = list(output), root_of(adapter_digest)
        start = [] if self.decoder_start_id is None else [self.decoder_start_id]
        for token in [*prompt, *start, *output]:
            digest = chain(digest, token)
        eos = [] if params.ignore_eos else eos
        while not (finish := self.finish(output, params, eos)):
            forbidden = [*eos, *params.stop_token_ids] if len(output) < params.min_tokens else []
            output.append(token_of(params.seed, len(output), digest, self.vocab_size, forbidden))
            digest = chain(digest, output[-1])
        return output, finish

    def finish(self, output: list[int], params: SamplingParams, eos: list[int]) -> str:
        if len(output) == params.max_new_tokens:
            return "length"
        if len(output) <= params.min_tokens:
            return ""
        return "eos_token" if output[-1] in eos else "stop_sequence" if output[-1] in params.stop_token_ids else ""


@dataclass
class Row:
    """The truth about one row, kept apart from tables and pages. `root` is what the adapter in its slot begins with,
    `encoder` are the digests of what the encoder read."""

    init: RowInit
    tokens: list[int]
    digests: list[int]
    root: int = 0
    encoder: list[int] = field(default_factory=list)
    num_launched: int = -1
    is_guessing: bool = False

    def push(self, token: int) -> None:
        self.tokens.append(token)
        self.digests.append(chain([self.root, *self.encoder, *self.digests][-1], token))


@dataclass
class Staged:
    plan: StepPlan
    rows: list[Row]
    blocks: set[int]
    is_sampled: bool = False


class FakeDevice:
    """`broken` maps a request id to the sentence that its sampling fails with."""

    def __init__(self, limits: EngineLimits, depth: int = 0, broken: dict[str, str] | None = None) -> None:
        self.limits, self.depth = limits, depth
        self.broken = broken or {}
        size = limits.block_size
        self.positions = np.full((limits.num_blocks + 1, size), -1, np.int64)
        self.digests = np.zeros((limits.num_blocks + 1, size), np.int64)
        self.tables = np.zeros((limits.max_num_seqs, -(-limits.max_total_tokens // size)), np.int32)
        self.rows: dict[int, Row] = {}
        self.adapters = [""] * limits.max_loras
        self.num_adapter_loads = self.most_adapters = 0
        self.staged: deque[Staged] = deque()
        self.last_step = 0
        self.num_passes_beside_others = 0
        self.num_rejected_blocks = self.num_steps_lost = 0

    def forward(self, plan: StepPlan) -> None:
        self._check_shape(plan)
        require(len(self.staged) <= self.depth, "more steps in flight than the device is deep")
        require(
            all(step.is_sampled for step in self.staged), "a forward pass was launched before the sampling of the last"
        )
        for row in plan.freed_rows.tolist():
            require(not self._is_in_flight(row), f"row {row} was freed while in flight")
            require(row in self.rows or self.num_steps_lost, f"row {row} was freed twice")
            self.rows.pop(row, None)
            self.tables[row] = 0
        self._check_budget(plan)
        for init in plan.new_rows:
            self._move_in(init)
        self._grow_tables(plan)
        columns = (plan.rows, plan.starts, plan.num_tokens, plan.num_drafts)
        for row, start, count, num_drafts in zip(*(column.tolist() for column in columns)):
            self._launch_row(self.rows[row], start, count, num_drafts)
        blocks = {block for row in plan.rows.tolist() for block in self._blocks_of(row)}
        self.staged.append(Staged(plan, [self.rows[row] for row in plan.rows.tolist()], blocks))
        used = {row.init.adapter_slot for row in self.staged[-1].rows} - {NO_SLOT}
        self.most_adapters = max(self.most_adapters, len(used))

    def sample(self, plan: StepPlan) -> Staged:
        require(self.staged and self.staged[-1].plan is plan and not self.staged[-1].is_sampled, "sampled out of order")
        self.staged[-1].is_sampled = True
        return self.staged[-1]

    def collect(self, handle: Staged) -> StepResult:
        require(self.staged and self.staged[0] is handle and handle.is_sampled, "collected out of order")
        self._run_encoder(handle)
        reads = self._read_all(handle)
        picks = self._write_and_sample(handle, reads)
        self.staged.popleft()
        sampling = [row for row, samples in zip(handle.rows, handle.plan.samples.tolist()) if samples]
        wanted = [row.init.params.num_top_logprobs for row, picked in zip(sampling, picks) for _ in picked]
        ids = [token for picked in picks for token in picked]
        return StepResult(
            ids=np.array(ids, np.int32),
            num_ids=np.array([len(picked) for picked in picks], np.int32),
            logprobs=np.array([logprob_of(token) for token in ids], np.float32),
            top_tokens=[[(token, -float(rank)) for rank in range(count)] for token, count in zip(ids, wanted)]
            if any(wanted)
            else [],
            errors={
                place: self.broken[row.init.request_id]
                for place, row in enumerate(handle.rows)
                if row.init.request_id in self.broken
            },
        )

    def check_adapter(self, name: str, source: str) -> AdapterChecked:
        return AdapterChecked(name, source, "", 0, f"adapter {name}: this device has no model that it could fit")

    # Staged at the call.

    def _check_shape(self, plan: StepPlan) -> None:
        limits = self.limits
        num_rows, num_tokens = len(plan.rows), int(plan.num_tokens.sum())
        require(plan.step == self.last_step + 1, f"step {plan.step} after {self.last_step}")
        self.last_step = plan.step
        require(num_rows > 0 and len(set(plan.rows.tolist())) == num_rows, "no rows, or one twice")
        columns = (plan.num_tokens, plan.num_drafts, plan.starts, plan.samples)
        require(all(len(column) == num_rows for column in columns), "columns differ in length")
        num_drafts = plan.num_drafts
        require(num_drafts.max() <= limits.max_drafts and num_drafts.sum() <= MAX_DRAFTS_PER_STEP, "too many drafts")
        require(plan.samples[num_drafts > 0].all(), "drafts of a row that does not sample")
        num_tokens -= int(num_drafts.sum())
        require(plan.num_tokens.min() >= 1 and len(plan.tokens) == plan.num_tokens.sum(), "token counts are wrong")
        require((num_drafts < plan.num_tokens).all(), "drafts behind nothing")
        require(num_tokens <= limits.max_batch_prefill_tokens + limits.max_num_seqs, "the step is too large")
        require(
            (plan.starts + plan.num_tokens).max() <= limits.max_total_tokens, "a row grew beyond the longest request"
        )
        for array in (plan.rows, plan.num_tokens, plan.starts, plan.tokens, plan.block_ids, plan.freed_rows):
            require(array.dtype == np.int32, "not int32")

    def _check_budget(self, plan: StepPlan) -> None:
        passes = [len(init.encoder_ids) for init in plan.new_rows if len(init.encoder_ids)]
        num_paid = int((plan.num_tokens - plan.num_drafts - 1).sum()) + sum(passes)
        require(len(passes) <= 1, "two encoder passes in one step")
        require(num_paid <= self.limits.max_batch_prefill_tokens, f"{num_paid} tokens of prompts in one step")
        self.num_passes_beside_others += bool(passes) and len(plan.rows) > 1

    def _is_in_flight(self, row: int) -> bool:
        return any(row in step.plan.rows for step in self.staged)

    def _move_in(self, init: RowInit) -> None:
        require(0 <= init.row < self.limits.max_num_seqs and init.row not in self.rows, f"row {init.row} is occupied")
        require(not self._is_in_flight(init.row), f"row {init.row} is reused while in flight")
        self._check_encoder_part(init)
        root = self._adapt(init)
        row = Row(init, [], [], root, encoder_digests(init, root))
        for token in [*init.prompt_ids.tolist(), *init.output_ids.tolist()]:
            row.push(token)
        self.rows[init.row] = row
        self.tables[init.row] = 0

    def _adapt(self, init: RowInit) -> int:
        """Put the adapter of a row into its slot if need be, and say what it begins with."""
        if init.adapter is None:
            require(init.adapter_slot == NO_SLOT, "a slot without an adapter")
            return 0
        slot, digest = init.adapter_slot, init.adapter.digest
        require(0 <= slot < self.limits.max_loras, f"slot {slot} does not exist")
        if self.adapters[slot] != digest:
            users = [*self.rows.values(), *(row for step in self.staged for row in step.rows)]
            require(all(row.init.adapter_slot != slot for row in users), f"slot {slot} changes under a row")
            require(digest not in self.adapters, f"adapter {digest} is in another slot already")
            self.adapters[slot], self.num_adapter_loads = digest, self.num_adapter_loads + 1
        return root_of(digest)

    def _check_encoder_part(self, init: RowInit) -> None:
        limits, blocks = self.limits, init.cross_blocks.tolist()
        require((len(init.encoder_ids) > 0) == limits.has_encoder, "encoder ids are missing, or given without encoder")
        require(len(blocks) == -(-len(init.encoder_ids) // limits.block_size), "too few or too many cross blocks")
        require(len(set(blocks)) == len(blocks), "a cross block twice in one row")
        require(all(1 <= block <= limits.num_blocks for block in blocks), "a cross block does not exist")
        taken = {block for row in self.rows for block in self._blocks_of(row)}
        require(not taken & set(blocks), f"cross blocks {taken & set(blocks)} are others' already")
        in_flight = set().union(*(step.blocks for step in self.staged))
        require(not in_flight & set(blocks), "a cross block is reused while in flight")
        if limits.has_encoder:
            require(init.prompt_ids.tolist() == [limits.decoder_start_id], "a decoder begins with its start token")

    def _grow_tables(self, plan: StepPlan) -> None:
        starts = dict(zip(plan.rows.tolist(), plan.starts.tolist()))
        in_flight = set().union(*(step.blocks for step in self.staged))
        crossed = {block for row in self.rows.values() for block in row.init.cross_blocks.tolist()}
        for row, offset, block in zip(plan.block_rows.tolist(), plan.block_offsets.tolist(), plan.block_ids.tolist()):
            require(1 <= block <= self.limits.num_blocks, f"block {block} does not exist")
            require(self.tables[row, offset] == 0 and (offset == 0 or self.tables[row, offset - 1]), "a table has gaps")
            require(block not in crossed, f"block {block} holds what an encoder read")
            is_fresh = (offset + 1) * self.limits.block_size > starts[row]
            require(not (is_fresh and block in in_flight), f"block {block} is reused while in flight")
            self.tables[row, offset] = block

    def _launch_row(self, row: Row, start: int, count: int, num_drafts: int) -> None:
        if row.num_launched < 0:
            require(start % self.limits.block_size == 0, "a prefix hit is not of whole blocks")
            require(start == 0 or not self.limits.has_encoder, "a prefix hit behind an encoder")
        else:
            require(start == row.num_launched, f"a row jumps from {row.num_launched} to {start}")
            require(not row.is_guessing, "a row goes on before its drafts are compared")
        row.num_launched, row.is_guessing = start + count, num_drafts > 0

    def _blocks_of(self, row: int) -> list[int]:
        return [block for block in self.tables[row].tolist() if block] + self.rows[row].init.cross_blocks.tolist()

    # Computed late, in order of steps.

    def _run_encoder(self, step: Staged) -> None:
        for init in step.plan.new_rows:
            root = root_of(init.adapter.digest if init.adapter else "")
            for position, digest in enumerate(encoder_digests(init, root)):
                index, slot = divmod(position, self.limits.block_size)
                block = init.cross_blocks[index]
                self.positions[block, slot], self.digests[block, slot] = position, digest

    def _read_cross(self, truth: Row) -> int:
        """The digest of what the encoder read, as the cross pages have it; without an encoder that of nothing."""
        init, num_ids = truth.init, len(truth.init.encoder_ids)
        if not num_ids:
            return truth.root
        positions = self.positions[init.cross_blocks].ravel()[:num_ids]
        digests = self.digests[init.cross_blocks].ravel()[:num_ids]
        require(np.array_equal(positions, np.arange(num_ids)), f"{init.request_id}: cross pages hold other positions")
        require(np.array_equal(digests, truth.encoder), f"{init.request_id}: cross pages hold another input")
        return int(digests[-1])

    def _read_all(self, step: Staged) -> list[int]:
        """The digest of each row's history as its pages have it; all rows read before one of them writes."""
        reads = []
        for index, row in enumerate(step.plan.rows.tolist()):
            reads.append(self._read(step.rows[index], row, int(step.plan.starts[index])))
        return reads

    def _read(self, truth: Row, row: int, start: int) -> int:
        require(self.rows.get(row) is truth, f"row {row} belongs to another request by now")
        root = self._read_cross(truth)
        blocks = self.tables[row, : -(-start // self.limits.block_size)]
        positions, digests = self.positions[blocks].ravel()[:start], self.digests[blocks].ravel()[:start]
        require(np.array_equal(positions, np.arange(start)), f"{truth.init.request_id}: pages hold other positions")
        require(np.array_equal(digests, truth.digests[:start]), f"{truth.init.request_id}: pages hold another history")
        return int(digests[-1]) if start else root

    def _write_and_sample(self, step: Staged, reads: list[int]) -> list[list[int]]:
        """What each sampling row picks."""
        plan, picks, offset = step.plan, [], 0
        for index, row in enumerate(plan.rows.tolist()):
            truth, count, start = step.rows[index], int(plan.num_tokens[index]), int(plan.starts[index])
            num_own = count - int(plan.num_drafts[index])
            tokens = plan.tokens[offset : offset + count].tolist()
            self._check_input(truth, start, tokens[:num_own], num_own == count)
            digests = self._write(truth, row, start, tokens, reads[index])
            offset += count
            require(
                bool(plan.samples[index]) == (start + num_own == len(truth.tokens)), "sampled in the middle of a prompt"
            )
            if plan.samples[index]:
                picks.append(self._sample_all(truth, tokens[num_own:], digests[num_own - 1 :]))
        return picks

    def _check_input(self, truth: Row, start: int, tokens: list[int], may_be_late: bool) -> None:
        for position, token in enumerate(tokens, start):
            if token == -1:
                is_last = position == start + len(tokens) - 1
                require(is_last and may_be_late, "a token on the device is not the last of its row")
            else:
                require(token == truth.tokens[position], f"{truth.init.request_id}: input {position} is another token")

    def _write(self, truth: Row, row: int, start: int, tokens: list[int], digest: int) -> list[int]:
        """Digests of the prefixes that end with each of the tokens; drafts are written like any other."""
        digests = []
        for position, token in enumerate(tokens, start):
            digest = chain(digest, truth.tokens[position] if token == -1 else token)
            digests.append(digest)
            block, slot = self.tables[row, position // self.limits.block_size], position % self.limits.block_size
            require(block > 0, f"{truth.init.request_id}: position {position} has no block")
            self.positions[block, slot], self.digests[block, slot] = position, digest
        return digests

    def _sample_all(self, truth: Row, drafts: list[int], digests: list[int]) -> list[int]:
        """What is sampled behind the last token, and behind drafts as long as they are right."""
        start, picks = len(truth.tokens) - 1, []
        for digest, draft in zip(digests, [*drafts, None]):
            picks.append(self._sample(truth, digest))
            if not self._is_right(picks[-1], draft):
                break
        if drafts:
            truth.num_launched, truth.is_guessing = start + len(picks), False
        last_block = (start + len(drafts)) // self.limits.block_size
        self.num_rejected_blocks += start + len(picks) <= last_block * self.limits.block_size
        return picks

    def _is_right(self, pick: int, draft: int | None) -> bool:
        return pick == draft

    def _sample(self, truth: Row, digest: int) -> int:
        params, index = truth.init.params, len(truth.tokens) - len(truth.init.prompt_ids)
        forbidden = truth.init.stop_ids.tolist() if index < params.min_tokens else []
        token = token_of(params.seed, index, digest, self.limits.vocab_size, forbidden)
        truth.push(token)
        return token
