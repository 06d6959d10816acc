"""One request in the engine: its tokens, its lengths, its state and the rules that end it. No policy, no memory."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import IntEnum

from common.job import Adapter, SamplingParams
from worker.engine.adapters import NO_SLOT
from worker.engine.speculation import Lookup
from worker.pipe import IDS, Submit, TokenRun


class RequestState(IntEnum):
    """Only ever moves forward. An active request may lose its residency (preemption) and find another one."""

    WAITING = 0
    ACTIVE = 1
    ENDED = 2


@dataclass(slots=True, eq=False)
class Residency:
    """One stay of a request on the device: its row, its blocks and how far its keys and values are.

    `num_computed` counts tokens of launched steps, `num_written` those of applied steps. `last_step` is the last
    launched step that names this stay: row and blocks go back when that step was applied. `num_registered` blocks
    are in the prefix cache; `num_borrowed` tokens lie in blocks that others held already at admission.
    `cross_blocks` hold what the encoder made of its input, from the first step of the stay to its end; in
    `adapter_slot` lies its adapter, if it has one, until row and blocks go back.
    """

    row: int
    blocks: list[int]
    cross_blocks: list[int]
    num_computed: int
    num_written: int
    num_registered: int
    num_borrowed: int
    adapter_slot: int = NO_SLOT
    last_step: int = 0
    is_closed: bool = False

    @property
    def all_blocks(self) -> list[int]:
        """Everything that goes back at the end of the stay."""
        return self.cross_blocks + self.blocks


@dataclass(slots=True, eq=False)
class Request:
    """`tokens` holds prompt and output as far as the host knows them; `num_in_flight` more, at most, were sampled by
    launched steps. While one of these `is_guessing`, with drafts, how many is open and nothing can follow.

    `computed < total` is what makes a request schedulable: there is no prefill phase and no decode phase.

    Of an encoder-decoder model `tokens` are the decoder's, and its start token is their whole prompt; what the client
    sent is `encoder_ids`. `num_input` counts the client's tokens for either kind. `began_after` is the last arrival
    before its first token, 0 for one that had begun elsewhere.
    """

    request_id: str
    epoch: int
    arrival: int
    params: SamplingParams
    tokens: array[int]
    num_prompt: int
    num_input: int
    encoder_ids: array[int]
    eos_ids: frozenset[int]
    stop_token_ids: frozenset[int]
    cache_salt: str
    is_suspect: bool
    adapter: Adapter | None = None
    num_in_flight: int = 0
    is_guessing: bool = False
    may_guess: bool = True
    lookup: Lookup | None = None
    state: RequestState = RequestState.WAITING
    residency: Residency | None = None
    was_chunked: bool = False
    began_after: int = 0
    digests: list[bytes] = field(default_factory=list)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_total(self) -> int:
        """Tokens the request has or will have once the launched steps are applied, if all drafts are right."""
        return len(self.tokens) + self.num_in_flight

    @property
    def adapter_digest(self) -> str:
        """That of no adapter is empty."""
        return self.adapter.digest if self.adapter else ""

    @property
    def stop_ids(self) -> list[int]:
        """Every id that ends the request, in ascending order."""
        return sorted(self.eos_ids | self.stop_token_ids)

    @property
    def is_ended(self) -> bool:
        return self.state is RequestState.ENDED

    def num_uncomputed(self, num_computed: int) -> int:
        """Tokens to compute next; 0 once the launched steps may bring the last token that `max_new_tokens` allows."""
        if self.is_guessing or self.num_output + self.num_in_flight >= self.params.max_new_tokens:
            return 0
        return self.num_total - num_computed

    def advance(self, state: RequestState) -> None:
        """Raises ValueError if the state would move backwards."""
        if state < self.state:
            raise ValueError(f"request {self.request_id} cannot go from {self.state.name} to {state.name}")
        self.state = state

    def finish(self) -> str:
        """How the last known token ends the request, in TGI's order: length, end, stop; "" when it goes on."""
        num_output = self.num_output
        if num_output >= self.params.max_new_tokens:
            return "length"
        if num_output <= self.params.min_tokens:
            return ""
        if self.tokens[-1] in self.eos_ids:
            return "eos_token"
        return "stop_sequence" if self.tokens[-1] in self.stop_token_ids else ""


def request_of(submit: Submit, arrival: int, decoder_start_id: int | None = None) -> Request:
    """The request of a message. `decoder_start_id` as in `Ready`: with one, the prompt is for the encoder.

    Raises:
        OverflowError: if a token id does not fit 32 bits.
        TypeError: if one is not an integer.
    """
    params, prompt_ids, encoder_ids = submit.params, array(IDS, submit.prompt_ids), array(IDS)
    if decoder_start_id is not None:
        prompt_ids, encoder_ids = array(IDS, [decoder_start_id]), prompt_ids
    return Request(
        request_id=submit.request_id,
        epoch=submit.epoch,
        arrival=arrival,
        params=params,
        tokens=prompt_ids + array(IDS, submit.output_ids),
        num_prompt=len(prompt_ids),
        num_input=len(submit.prompt_ids),
        encoder_ids=encoder_ids,
        eos_ids=frozenset() if params.ignore_eos else frozenset(submit.eos_token_ids),
        stop_token_ids=frozenset(params.stop_token_ids),
        cache_salt=submit.cache_salt,
        is_suspect=submit.is_suspect,
        adapter=submit.adapter,
    )


def end_without_token(request: Request | Submit, finish: str, error: str = "") -> TokenRun:
    """The last word on a request that gets no token any more."""
    return TokenRun(request_id=request.request_id, epoch=request.epoch, ids=[], logprobs=[], finish=finish, error=error)
