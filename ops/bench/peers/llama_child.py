"""llama.cpp behind `ops.bench.peers.pipe`, by the low-level bindings of llama-cpp-python.

Batches as its server makes them: one token of every sequence that runs, then prompts up to `n_batch` tokens. A prefix
that all requests share is computed once, and its cache entries are given to all sequences.
"""

from __future__ import annotations

import ctypes
import importlib
from collections import deque
from collections.abc import Sequence as Several
from dataclasses import dataclass
from typing import Any

import numpy as np

from ops.bench.peers.pipe import Request, serve
from ops.bench.peers.workloads import shared_length

cpp: Any = importlib.import_module("llama_cpp")

MIN_SHARED = 64
MIN_BATCH = 2048
TYPES = {"float32": 0, "float16": 1, "bfloat16": 30}


@dataclass
class Sequence:
    """A request that runs, the `index`-th. `place` counts tokens in the cache, `todo` those of its prompt that are
    not."""

    number: int
    index: int
    todo: list[int]
    num_left: int
    place: int = 0
    last: int = -1


class Batch:
    """Tokens of one llama_decode, up to `capacity`; `owners` are the sequences whose last token gets logits."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.size = capacity, 0
        self.owners: list[Sequence] = []
        self.token, self.pos, self.number = (np.zeros(capacity, np.int32) for _ in range(3))
        self.one, self.wanted = np.ones(capacity, np.int32), np.zeros(capacity, np.int8)
        self.number_pointers = (self.number.ctypes.data + 4 * np.arange(capacity)).astype(np.uint64)

    def clear(self) -> None:
        self.size, self.owners = 0, []

    def add(self, sequence: Sequence, tokens: list[int], *, is_wanted: bool) -> None:
        first, last = self.size, self.size + len(tokens)
        self.token[first:last], self.number[first:last] = tokens, sequence.number
        self.pos[first:last] = np.arange(sequence.place, sequence.place + len(tokens))
        self.wanted[first:last] = 0
        if is_wanted:
            self.wanted[last - 1] = 1
            self.owners.append(sequence)
        sequence.place += len(tokens)
        self.size = last

    def native(self) -> Any:
        def pointer(array: Any, kind: Any) -> Any:
            return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))

        return cpp.llama_batch(
            n_tokens=self.size,
            token=pointer(self.token, ctypes.c_int32),
            embd=None,
            pos=pointer(self.pos, ctypes.c_int32),
            n_seq_id=pointer(self.one, ctypes.c_int32),
            seq_id=pointer(self.number_pointers, ctypes.POINTER(ctypes.c_int32)),
            logits=pointer(self.wanted, ctypes.c_int8),
        )


class LlamaCpp:
    """`settings` are those of its context, by their names; `kv_type` one of `TYPES`."""

    def __init__(self, order: dict[str, Any]) -> None:
        settings = order["settings"]
        cpp.llama_backend_init()
        model_params = cpp.llama_model_default_params()
        # weights that are mapped do not get large pages
        model_params.load_mode = cpp.llama_load_mode_from_str(b"none")
        self._model = cpp.llama_model_load_from_file(order["gguf"].encode(), model_params)
        params = self._context_params(settings, order["kv_tokens"], order["num_threads"])
        self._context = cpp.llama_init_from_model(self._model, params)
        assert self._context, "llama.cpp made no context"
        self._memory = cpp.llama_get_memory(self._context)
        self._num_vocab = cpp.llama_vocab_n_tokens(cpp.llama_model_get_vocab(self._model))
        self._num_sequences = settings["n_seq_max"]
        self._num_cells = order["kv_tokens"] if settings["kv_unified"] else 0
        self._batch = Batch(params.n_batch)

    @staticmethod
    def _context_params(settings: dict[str, Any], kv_tokens: int, num_threads: int) -> Any:
        params = cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = kv_tokens, settings["n_seq_max"], settings["kv_unified"]
        params.n_ubatch = settings["n_ubatch"]
        params.n_batch = max(MIN_BATCH, settings["n_ubatch"])
        params.n_threads = params.n_threads_batch = num_threads
        params.flash_attn_type = int(settings["flash_attn"])
        params.type_k = params.type_v = TYPES[settings["kv_type"]]
        params.no_perf = True
        return params

    def versions(self) -> dict[str, str]:
        return {"llama-cpp-python": cpp.__version__, "llama.cpp": cpp.llama_print_system_info().decode().strip()}

    def run(self, requests: list[Request]) -> list[int]:
        waiting, numbers = deque(enumerate(requests)), deque(range(self._num_sequences))
        running: list[Sequence] = []
        counts, shared = [0] * len(requests), self._shared(requests)
        while waiting or running:
            while waiting and numbers and self._has_room(requests, [*(s.index for s in running), waiting[0][0]]):
                running.append(self._admitted(*waiting.popleft(), numbers.popleft(), shared))
            for sequence in self._step(running):
                counts[sequence.index] += 1
                sequence.num_left -= 1
            for sequence in [sequence for sequence in running if not sequence.num_left]:
                running.remove(sequence)
                numbers.append(sequence.number)
                cpp.llama_memory_seq_rm(self._memory, sequence.number, -1, -1)
        return counts

    def top(self, prompt: list[int], num_output: int, num_top: int) -> list[list[tuple[int, float]]]:
        sequence = Sequence(0, 0, list(prompt), num_output)
        rows: list[list[tuple[int, float]]] = []
        while len(rows) < num_output:
            if self._step([sequence]):
                logits = self._logits(1)[0].astype(np.float64)
                logprobs = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
                best = np.argsort(-logprobs)[:num_top]
                rows.append([(int(number), float(logprobs[number])) for number in best])
        cpp.llama_memory_seq_rm(self._memory, 0, -1, -1)
        return rows

    def _shared(self, requests: list[Request]) -> int:
        """How many first tokens all have, if all of them run at once."""
        if not 1 < len(requests) <= self._num_sequences or not self._has_room(requests, range(len(requests))):
            return 0
        num = min(shared_length(requests), *(len(request.prompt) - 1 for request in requests))
        return num if num >= MIN_SHARED else 0

    def _has_room(self, requests: list[Request], indices: Several[int]) -> bool:
        """In a cache that all share; else every sequence has a part of its own."""
        sizes = [len(requests[index].prompt) + requests[index].num_output for index in indices]
        return not self._num_cells or sum(sizes) <= self._num_cells

    def _admitted(self, index: int, request: Request, number: int, shared: int) -> Sequence:
        sequence = Sequence(number, index, list(request.prompt), request.num_output)
        if shared and index == 0:
            self._compute_prefix(sequence, shared)
        elif shared:
            # at this moment the first sequence has the prefix and nothing else
            cpp.llama_memory_seq_cp(self._memory, 0, number, -1, -1)
            sequence.place, sequence.todo = shared, sequence.todo[shared:]
        return sequence

    def _compute_prefix(self, sequence: Sequence, shared: int) -> None:
        rest, sequence.todo = sequence.todo[shared:], sequence.todo[:shared]
        while sequence.todo:
            self._step([sequence], is_prefix=True)
        sequence.todo = rest

    def _step(self, running: Several[Sequence], *, is_prefix: bool = False) -> list[Sequence]:
        """One llama_decode; the sequences that got a token."""
        batch = self._batch
        batch.clear()
        for sequence in running:
            if not sequence.todo:
                batch.add(sequence, [sequence.last], is_wanted=True)
        for sequence in running:
            num = min(batch.capacity - batch.size, len(sequence.todo))
            if num:
                tokens, sequence.todo = sequence.todo[:num], sequence.todo[num:]
                batch.add(sequence, tokens, is_wanted=not is_prefix and not sequence.todo)
        status = cpp.llama_decode(self._context, batch.native())
        assert status == 0, f"llama_decode gave {status}"
        self._choose(batch.owners)
        return batch.owners

    def _choose(self, owners: list[Sequence]) -> None:
        if owners:
            for sequence, token in zip(owners, self._logits(len(owners)).argmax(axis=1).tolist(), strict=True):
                sequence.last = token

    def _logits(self, num_rows: int) -> Any:
        return np.ctypeslib.as_array(cpp.llama_get_logits(self._context), shape=(num_rows, self._num_vocab))


if __name__ == "__main__":
    serve(LlamaCpp)
