"""The device of the engine core on a GPU: two batches in flight, and nobody waits but where the host reads.

One copy (▒) brings all numbers of a step, one takes its results away. Each → is a wait, and there are no others:
computing waits for the numbers, the copy back for the sampler, and the host for that copy.

    host      schedule  forward   collect, apply,  sample │ schedule  forward   collect, apply,  sample │
              N+1       N+1    ┌→ send N           N+1    │ N+2       N+2    ┌→ send N+1         N+2    │
    copy in             ▒─┐    │                          │           ▒─┐    │                          │
    compute   ░ sample N ░└→░░░│░░░ forward N+1 ░░░░░░░░░░│ sample N+1 ░└→░░░│░░░ forward N+2 ░░░░░░░░░░│
                         └┐    │                          │            └┐    │                          │
    copy out              └→▒──┘                          │             └→▒──┘                          │

Memory for a step's numbers and results, on both sides, is used again when the host has its results: by then all that
the step launched is done. What it reads and writes besides, rows, pages and graphs' memory, belongs to the compute
stream, which has an order: the next step finds what was sampled in `last_ids`, read by the host or not, and a late
token of a request that left is written before whoever follows moves in.

With depth 0 the same calls come in another order, and every step is waited for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from worker.attention.pages import page_width
from worker.engine.device import TOKEN_ON_DEVICE, StepPlan, StepResult, StepTooLarge
from worker.model.lora import LoraSlots
from worker.model.t5 import T5
from worker.parallel.group import agree_on_minimum
from worker.pipe import AdapterChecked
from worker.runner.adapters import RowAdapters
from worker.runner.device_rows import Changes, DeviceRows, Words
from worker.runner.device_step import HostStep, Sections, inputs_of, pack, padded, slots_of, whole_input
from worker.runner.gpu_sampler import Sampler, TorchSampler, ask, read
from worker.runner.graphs import MAX_CAPTURE_S, Columns, DecodeGraphs
from worker.runner.places import Places
from worker.runner.rows import AnyInts, Ints
from worker.runner.streams import Event, Stream, Streams, is_out_of_memory
from worker.runner.torch_device import NOT_IN_VOCABULARY, Model, unfilled_blocks
from worker.runner.vocabulary import Vocabulary

FIRST_WORDS = 1 << 14
NONE: Ints = np.zeros(0, np.int64)


class Buffers:
    """Numbers and results of one step in flight, int32, on the host and on the device. They grow when nobody uses
    them."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._make(FIRST_WORDS)

    def hold(self, numbers: Words, num_results: int) -> None:
        """Put `numbers` into the host's memory, and have room for results."""
        if max(len(numbers), num_results) > len(self.numbers):
            self._make(2 * max(len(numbers), num_results))
        self.numbers_here[: len(numbers)].numpy()[:] = numbers

    def _make(self, size: int) -> None:
        self.numbers_here, self.results_here = (self._streams.host_buffer(size) for _ in range(2))
        # not zeros: nothing would order them and what is copied there
        self.numbers, self.results = torch.empty((2, size), dtype=torch.int32, device=self._streams.device).unbind()


@dataclass(slots=True, eq=False)
class Flight:
    """A launched step."""

    step: HostStep
    buffers: Buffers
    sections: Sections | None = None
    logits: Tensor | None = None
    is_done: Event | None = None


class GpuDevice:
    """`pages` as those of TorchDevice. Attention gets a DeviceBatch of every step. Work that is handed to `streams`
    depends on nothing that changes afterwards: a stream may be late."""

    def __init__(
        self,
        model: Model,
        kv_type: torch.dtype,
        adapters: LoraSlots,
        streams: Streams,
        make_sampler: Callable[[DeviceRows, Vocabulary], Sampler] = TorchSampler,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_total_tokens: int,
        max_lora_rank: int,
        max_lora_bytes: int,
        depth: int = 1,
    ) -> None:
        self.depth, self._model, self._streams, self._block_size = depth, model, streams, block_size
        self._max_total_tokens, self._has_encoder = max_total_tokens, isinstance(model, T5)
        self._adapters = RowAdapters(
            adapters, model.group, num_rows=max_num_seqs, max_rank=max_lora_rank, max_bytes=max_lora_bytes
        )
        num_layers, num_heads, head_dim = model.page_shape
        shape = (num_layers, 2, num_blocks + 1, block_size, num_heads, page_width(head_dim, kv_type))
        self.pages = torch.zeros(shape, dtype=kv_type, device=streams.device)
        vocabulary = Vocabulary(model.spec.vocab_size, model.group)
        max_blocks = -(-max_total_tokens // block_size) + 1
        self.rows = DeviceRows(max_num_seqs, max_blocks, vocabulary.size, streams.device, has_encoder=self._has_encoder)
        self._sampler = make_sampler(self.rows, vocabulary)
        self._row_errors: dict[int, str] = {}
        self._graphs: DecodeGraphs | None = None
        self._free = [Buffers(streams) for _ in range(depth + 1)]
        self._newest: Flight | None = None
        streams.drain()

    @property
    def model(self) -> Model:
        return self._model

    def capture(
        self,
        sizes: Sequence[int],
        limit_s: float = MAX_CAPTURE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> str:
        """Have graphs of decoding steps of `sizes` rows; the reason that goes with it. Before the first step."""
        if not self._model.can_be_captured:
            return "cuda_graphs off: each quantised expert is a product of its own, whose rows the host must know"
        shape = max(sizes), len(self._model.vocabulary)
        logits = torch.zeros(shape, dtype=self._model.dtype, device=self._streams.device)
        spare_row = self.rows.spare_row
        graphs = DecodeGraphs(
            self._streams, self._decode, self._sampler, logits, spare_row, has_encoder=self._has_encoder
        )
        began_at = clock()

        def has_time() -> bool:
            """All ranks go by the slowest: a graph's collectives need every one of them."""
            return bool(agree_on_minimum(self._model.group, int(clock() - began_at <= limit_s)))

        graphs.capture(sizes, has_time)
        self._graphs = graphs
        if len(graphs.sizes) == len(sizes):
            return f"cuda_graphs of {len(sizes)} sizes up to {max(sizes)} rows"
        return (
            f"cuda_graphs from {graphs.sizes[0]} to {max(sizes)} rows: to capture all {len(sizes)} sizes takes longer "
            f"than {limit_s:.0f} s"
        )

    # Calls of the engine core.

    def forward(self, plan: StepPlan) -> None:
        assert not plan.num_drafts.any(), "nobody compares drafts here"
        flight = self._newest = Flight(self._host_step(plan), self._free.pop())
        self._try(flight, partial(self._launch_forward, flight))

    def sample(self, plan: StepPlan) -> Flight:
        flight = self._newest
        assert flight is not None and flight.step.plan is plan
        self._try(flight, partial(self._launch_sampling, flight))
        return flight

    def collect(self, handle: Flight) -> StepResult:
        assert handle.is_done is not None
        handle.is_done.synchronize()
        step, vocab_size = handle.step, self.rows.vocab_size
        words = handle.buffers.results_here[: step.num_results(vocab_size)].numpy()
        sampled = read(words, step.asked, vocab_size)
        self._free.append(handle.buffers)
        places = np.flatnonzero(step.plan.samples).tolist()
        return StepResult(
            ids=sampled.ids.astype(np.int32),
            logprobs=sampled.logprobs,
            top_tokens=sampled.top_tokens,
            errors={places[index]: error for index, error in sampled.errors.items()} | step.errors,
        )

    def check_adapter(self, name: str, source: str) -> AdapterChecked:
        return self._adapters.check(name, source)

    def _try(self, flight: Flight, launch: Callable[[], None]) -> None:
        """Several ranks cannot go on without one of them: there the error ends them all."""
        message = ""
        try:
            launch()
        except RuntimeError as error:
            if self._model.group.shard.size > 1 or not is_out_of_memory(error):
                raise
            message = str(error).partition(". ")[0]
        if message:
            self._streams.drain()
            # not above, where the error holds what the step had taken until then
            flight.logits = flight.sections = None
            self._streams.tidy()
            self._free.append(flight.buffers)
            raise StepTooLarge(f"the GPU has no memory for the step: {message}")

    # What the host knows of a step.

    def _host_step(self, plan: StepPlan) -> HostStep:
        changes, (encoder, encoder_ids) = self._move_in(plan), self._encoder_of(plan)
        rows, starts, num_tokens = (each.astype(np.int64) for each in (plan.rows, plan.starts, plan.num_tokens))
        owners = np.repeat(rows, num_tokens)
        adapter_slots, places = self._adapters.slots_of(owners), Places(plan)
        size = self._graph_size(plan, adapter_slots)
        columns = [rows, starts, self.rows.cross_lengths[rows] if self._has_encoder else NONE]
        columns.append(self._known(plan.tokens, owners))
        if size is None:
            columns += [np.concatenate(([0], np.cumsum(num_tokens))), places.tokens]
        else:
            columns = [padded(each, size, filling) for each, filling in zip(columns, self._spare_row(), strict=True)]
            columns += [NONE, NONE]
        output_indices = places.positions + 1 - self.rows.host["num_prompt"][places.rows]
        asked = ask(self.rows, places.rows, output_indices, size)
        cleared = unfilled_blocks(plan, self._block_size) if self._model.attention.reads_whole_pages else NONE
        words, sizes = pack([*columns, asked.words, changes.words, cleared, encoder_ids, adapter_slots])
        return HostStep(
            plan=plan,
            words=words,
            sizes=sizes,
            max_queries=int(num_tokens.max()),
            max_keys=int((starts + num_tokens).max()),
            is_fresh=not starts.any(),
            changes=changes,
            asked=asked,
            graph_size=size,
            encoder_row=encoder,
            adapter_slots=adapter_slots,
            encoder_slots=self._adapters.slots_of(np.full(len(encoder_ids), encoder)),
            errors=self._errors_of(plan),
        )

    def _move_in(self, plan: StepPlan) -> Changes:
        for row in [*plan.freed_rows.tolist(), *(init.row for init in plan.new_rows)]:
            self._row_errors.pop(row, None)
        changes = self.rows.changes(plan)
        self._row_errors |= changes.errors
        for init in plan.new_rows:
            with self._streams.at_once(Stream.COMPUTE):
                error = self._adapters.move_in(init)
            if error:
                self._row_errors[init.row] = error
        return changes

    def _encoder_of(self, plan: StepPlan) -> tuple[int, Ints]:
        """The row that brings encoder ids, and these."""
        for init in plan.new_rows:
            if len(init.encoder_ids):
                return init.row, self._known(init.encoder_ids, np.full(len(init.encoder_ids), init.row))
        return self.rows.spare_row, NONE

    def _known(self, tokens: AnyInts, owners: Ints) -> Ints:
        """`tokens`, or 0 where the model has no such; the rows that own those have an error."""
        is_unknown = (tokens < TOKEN_ON_DEVICE) | (tokens >= self.rows.vocab_size)
        if is_unknown.any():
            self._row_errors |= dict.fromkeys(owners[is_unknown].tolist(), NOT_IN_VOCABULARY)
        return np.where(is_unknown, 0, tokens).astype(np.int64)

    def _graph_size(self, plan: StepPlan, adapter_slots: Ints) -> int | None:
        """Of graphs for steps in which each row decodes one token, without adapters."""
        is_decoding = len(plan.tokens) == len(plan.rows) and bool(plan.samples.all())
        if self._graphs is None or not is_decoding or len(adapter_slots):
            return None
        return self._graphs.size_for(len(plan.rows))

    def _spare_row(self) -> tuple[int, int, int, int]:
        """Its columns."""
        return self.rows.spare_row, 0, 1, 0

    def _errors_of(self, plan: StepPlan) -> dict[int, str]:
        errors = self._row_errors
        return {place: errors[row] for place, row in enumerate(plan.rows.tolist()) if row in errors} if errors else {}

    # What streams do.

    def _launch_forward(self, flight: Flight) -> None:
        step, buffers, streams = flight.step, flight.buffers, self._streams
        buffers.hold(step.words, step.num_results(self.rows.vocab_size))
        words = buffers.numbers[: len(step.words)]
        streams.run(Stream.COPY_IN, partial(words.copy_, buffers.numbers_here[: len(words)], non_blocking=True))
        streams.wait(Stream.COMPUTE, streams.record(Stream.COPY_IN))
        streams.run(Stream.COMPUTE, partial(self._run_forward, flight, words))

    def _launch_sampling(self, flight: Flight) -> None:
        buffers, streams = flight.buffers, self._streams
        number = flight.step.num_results(self.rows.vocab_size)
        results, here = buffers.results[:number], buffers.results_here[:number]
        if number:
            streams.run(Stream.COMPUTE, partial(self._run_sampling, flight, results))
        streams.wait(Stream.COPY_OUT, streams.record(Stream.COMPUTE))
        streams.run(Stream.COPY_OUT, partial(here.copy_, results, non_blocking=True))
        flight.is_done = streams.record(Stream.COPY_OUT)

    @torch.inference_mode()
    def _run_forward(self, flight: Flight, words: Tensor) -> None:
        step = flight.step
        sections = flight.sections = step.split(words)
        self.rows.apply(step.changes, sections.changes)
        if len(sections.unfilled):
            self.pages.view(torch.uint8).index_fill_(2, sections.unfilled.long(), 0)
        if isinstance(self._model, T5) and len(sections.encoder_ids):
            self._encode(self._model, step, sections.encoder_ids)
        self._adapters.begin(step.adapter_slots, sections.adapter_slots)
        if step.graph_size is None:
            bounds = step.max_queries, step.max_keys, step.is_fresh
            flight.logits = self._forward(sections[:4], sections.query_starts, sections.wanted, *bounds)
        else:
            assert self._graphs is not None
            flight.logits = self._graphs.forward(step.graph_size, words)

    @torch.inference_mode()
    def _run_sampling(self, flight: Flight, results: Tensor) -> None:
        step, logits, sections = flight.step, flight.logits, flight.sections
        assert logits is not None and sections is not None
        # whose memory the next step may take
        flight.logits = flight.sections = None
        if step.graph_size is None:
            results.copy_(self._sampler(logits, sections.asked, step.asked.processors))
        else:
            assert self._graphs is not None
            results.copy_(self._graphs.sample(step.graph_size, sections.asked, step.asked.processors))

    def _forward(
        self,
        columns: Columns,
        query_starts: Tensor,
        wanted: Tensor,
        max_queries: int,
        max_keys: int,
        is_fresh: bool = False,
    ) -> Tensor:
        inputs = inputs_of(columns, query_starts, max_queries, max_keys, self.rows, self._block_size, is_fresh)
        step = inputs.tokens, inputs.positions, inputs.batch, self.pages, wanted.long()
        if isinstance(self._model, T5):
            assert inputs.cross is not None
            return self._model.forward(*step, inputs.cross)
        return self._model.forward(*step)

    def _decode(self, columns: Columns, query_starts: Tensor) -> Tensor:
        return self._forward(columns, query_starts, query_starts[:-1], 1, self._max_total_tokens)

    def _encode(self, model: T5, step: HostStep, ids: Tensor) -> None:
        positions = torch.arange(len(ids), device=ids.device)
        owners = torch.full_like(positions, step.encoder_row)
        self._adapters.begin(step.encoder_slots, ids)
        slots = slots_of(self.rows.cross_tables, owners, positions, self._block_size)
        model.encode(ids.long(), slots, self.pages, whole_input(ids, self._block_size))
