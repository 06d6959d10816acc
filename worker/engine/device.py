"""What the engine core and a device say to each other: the plan of a step, its result and the protocol between them.

Memory of a device, as the engine core addresses it:

- KV pages 0 .. num_blocks, `block_size` tokens each. Page 0 is the null block: never allocated, legal to read and
  write for padding. `num_blocks = kv_tokens // block_size` real ones follow.
- adapter slots 0 .. max_loras - 1, each of which holds one LoRA adapter or none.
- rows 0 .. max_num_seqs - 1, one per resident request: sampling parameters, token counts for penalties, the last
  sampled id, and a block table of at least ceil(max_total_tokens / block_size) entries. A device may add rows of
  its own for padding.

A step holds at most max_batch_prefill_tokens tokens of prompts, one token of every other row, and
MAX_DRAFTS_PER_STEP drafts behind those: guesses of what the row will sample, see `worker.engine.speculation`. No plan
is larger than all that. An encoder's input cannot be cut; it comes out of the same budget as prompts, and is never
longer than all of it. The start token of its decoder is the one token of its row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from common.errors import InferfleetError
from common.job import Adapter, SamplingParams
from worker.engine.adapters import NO_SLOT
from worker.pipe import AdapterChecked

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]

TOKEN_ON_DEVICE = -1
NO_IDS: Ints = np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowInit:
    """Everything a row must know when a request moves in; whatever the row held before is void.

    `prompt_ids` int32 [p] is the original prompt and `output_ids` int32 [o] what was generated before (on another
    worker, or before a preemption): penalties count them apart, and the output index of the next sampled token,
    which keys its noise, is `position of its last input + 1 - p`. While that index is below `params.min_tokens`,
    the sampler must never pick one of `stop_ids` int32 [s] (end-of-sequence ids unless ignored, and the stop token
    ids).

    Encoder-decoder models only: `encoder_ids` int32 [e] run through the encoder before the step's forward pass, and the
    keys and values they leave for the decoder go to the pages `cross_blocks` int32 [ceil(e / block size)], which stay
    as they are until the row is freed. Prompt and output are the decoder's then: the prompt is its start token. At
    most one row of a plan brings encoder ids.

    With an `adapter` the row's tokens go through what lies in `adapter_slot`. The device loads it there, unless an
    adapter of that digest is there already; no row that the device still runs uses the slot with another one. One that
    cannot be loaded is an error of this row.
    """

    row: int
    request_id: str
    params: SamplingParams
    prompt_ids: Ints
    output_ids: Ints
    stop_ids: Ints
    encoder_ids: Ints = field(default_factory=lambda: NO_IDS)
    cross_blocks: Ints = field(default_factory=lambda: NO_IDS)
    adapter: Adapter | None = None
    adapter_slot: int = NO_SLOT


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One mixed step over n rows, t tokens and m block-table changes. Everything needed is in here; the order of
    rows is the order of results.

    To be applied in this order: `freed_rows`, `new_rows`, block-table changes, forward pass.

    step          number of the step, counting from 1 without gaps
    rows          int32 [n], no row twice
    num_tokens    int32 [n], tokens of each row in this step, >= 1
    num_drafts    int32 [n], how many of them, the last ones, are drafts; 0 for rows that do not sample
    starts        int32 [n], tokens of each row whose keys and values are in its pages already, hence the position of
                  its first token in this step
    tokens        int32 [t], the input ids of all rows one after another; TOKEN_ON_DEVICE (only ever as the last token
                  of a row) means the id which that row sampled last
    samples       bool [n], whether the row's prompt is complete in this step so that its last position is sampled, and
                  with drafts the one before them and that of each
    block_rows, block_offsets, block_ids
                  int32 [m] each: table[block_rows[i], block_offsets[i]] = block_ids[i]; a table only grows, and its
                  entries behind the ones set for the present request are garbage
    new_rows      requests that moved into a row
    freed_rows    int32 [f], rows whose request left; they come back only with a RowInit. After a step that was too
                  large some may be given once more, or never have been moved into
    """

    step: int
    rows: Ints
    num_tokens: Ints
    num_drafts: Ints
    starts: Ints
    tokens: Ints
    samples: Flags
    block_rows: Ints
    block_offsets: Ints
    block_ids: Ints
    new_rows: list[RowInit]
    freed_rows: Ints


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What the sampling rows of a plan picked, k ids in the order of the plan's rows.

    `ids` int32 [k]; `logprobs` float32 [k]; `top_tokens` has for each of the k ids a list of (id, logprob), best
    first, empty when the row did not ask (an empty outer list says that nobody asked). `errors` maps the place of a row
    among all rows of the plan to one sentence: what the row computed is unusable, its request ends, the others go on.

    `num_ids` int32 [sampling rows]: each has one id, and one more for every draft that equals the id before it, up to
    the first draft that does not. A row whose drafts may have spoilt what comes before them has none: it is to try
    again without. Empty where no row had drafts: one each.
    """

    ids: Ints
    logprobs: Floats
    top_tokens: list[list[tuple[int, float]]] = field(default_factory=list)
    errors: dict[int, str] = field(default_factory=dict)
    num_ids: Ints = field(default_factory=lambda: NO_IDS)


class StepTooLarge(InferfleetError):
    """The device had no memory for a step. It computes nothing any more when this is raised; what it holds of rows that
    the step names, in or out, is garbage, and so are their pages from the step's tokens on."""


class Device(Protocol):
    """Runs plans in the order given. `depth` is the number of launched steps whose results the host has not applied
    while it launches another: 0 where calls are synchronous (CPU), 1 on a GPU.

    Out of `forward` and `sample` may come StepTooLarge: that step is over, those before it can be collected, and the
    next plan has the same number. Any other exception out of these methods ends the engine process: what concerns one
    row only belongs in `StepResult.errors`.
    """

    @property
    def depth(self) -> int: ...

    def forward(self, plan: StepPlan) -> None:
        """Launch the forward pass of `plan`; on a GPU without waiting for it. The plan's arrays may be kept, not
        changed."""

    def sample(self, plan: StepPlan) -> Any:
        """Launch sampling of the plan given to the last `forward`, also when no row samples. Returns a handle for
        `collect`."""

    def collect(self, handle: Any) -> StepResult:
        """Wait for the step of `handle`. Called once per handle, in order of launch."""

    def check_adapter(self, name: str, source: str) -> AdapterChecked:
        """Whether the adapter in the folder `source` fits the model; called between steps, loads nothing."""


def fitting_total_tokens(max_total_tokens: int, kv_tokens: int, block_size: int, *, has_encoder: bool = False) -> int:
    """The largest limit not above `max_total_tokens` with which the pool holds one request of that size and a block
    more.

    With it the oldest request can always run to its end, whatever the others hold. Zero or less: the pool is too small.

    `has_encoder` (an encoder-decoder model) costs another block: input and output, which begins with the start token,
    lie in tables of their own, and for e + o tokens of whole blocks ceil(e / size) + ceil((1 + o) / size) is one block
    more at most.
    """
    num_spare = 2 if has_encoder else 1
    return min(max_total_tokens, (kv_tokens // block_size - num_spare) * block_size)
