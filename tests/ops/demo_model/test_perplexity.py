"""What 8 bits of keys and values cost on text that the demo model has not seen."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import replace

import pytest
import torch

from common.settings import WorkerSettings
from ops.demo_model import perplexity as command
from ops.demo_model.corpus import HELD_OUT_SEED, PARTS, corpus, held_out
from ops.demo_model.evaluate import CHECKPOINT
from ops.demo_model.perplexity import examples, logits_of, perplexity
from tests.support.kv_types import (
    KV_TYPES,
    spoil_what_is_written,
    with_larger_scales,
    with_scales_of_other_heads,
)
from worker.runner.load import load_device

NUM_DOCUMENTS = 50
BARS = {"int8": 2.0**-7, "fp8_e4m3fn": 2.0**-5, "fp8_e5m2": 2.0**-4}
"""Root mean square of the errors of logits, as a share of that of logits: no more than what keys and values themselves
are off by, which are 2**-7.5, 2**-5.3 and 2**-4.3 when they are drawn from a normal distribution. The whole text may
become half as much more or less likely per token, the answers, of which the model is sure, an eighth."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Run:
    """The logits of all texts, and their perplexity, for one type of the KV cache."""

    def __init__(self, kv_cache_dtype: str) -> None:
        settings = WorkerSettings(
            model_id=str(CHECKPOINT), kv_cache_dtype=kv_cache_dtype, kv_tokens=2048, max_total_tokens=1024, threads=1
        )
        device, ready = load_device(settings, lambda *_: None)
        assert ready.dtype == "bfloat16"
        assert kv_cache_dtype == "auto" or device.pages.dtype is KV_TYPES[kv_cache_dtype]
        texts = examples(NUM_DOCUMENTS)
        self.perplexity = perplexity(device, texts)
        self.logits = torch.cat([logits_of(device, text.ids) for text in texts])

    def is_near(self, other: Run, bar: float) -> bool:
        error = float((self.logits - other.logits).square().mean() / other.logits.square().mean()) ** 0.5
        answers = abs(math.log(self.perplexity.answers / other.perplexity.answers))
        text = abs(math.log(self.perplexity.text / other.perplexity.text))
        return error <= bar and answers <= bar / 8 and text <= bar / 2


@pytest.fixture(scope="module")
def whole() -> Run:
    return Run("auto")


def test_no_question_of_the_held_out_texts_was_trained_with_its_answer():
    trained = {turn for document in corpus(PARTS[1], 20_000) for turn in document.turns}
    drawn = corpus(replace(PARTS[1], seed=HELD_OUT_SEED), NUM_DOCUMENTS)
    assert any(not trained.isdisjoint(document.turns) for document in drawn), "there was nothing to leave out"
    texts = held_out(NUM_DOCUMENTS)
    assert len(texts) == NUM_DOCUMENTS
    assert all(trained.isdisjoint(document.turns) for document in texts)


@pytest.mark.parametrize("kv_cache_dtype", KV_TYPES)
def test_8_bits_stay_within_their_error_bar(whole, kv_cache_dtype):
    run = Run(kv_cache_dtype)
    assert not torch.equal(run.logits, whole.logits)
    assert run.is_near(whole, BARS[kv_cache_dtype])


@pytest.mark.parametrize("spoil", [with_scales_of_other_heads, with_larger_scales])
def test_wrong_scales_are_beyond_the_bar_of_int8(whole, monkeypatch, spoil):
    spoil_what_is_written(monkeypatch, spoil)
    assert not Run("int8").is_near(whole, BARS["int8"])


def test_the_command_says_both_perplexities(capsys, monkeypatch):
    arguments = ["--kv-cache-dtype", "fp8", "--kv-tokens", "2048", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["perplexity", *arguments])
    monkeypatch.setattr(command, "NUM_DOCUMENTS", NUM_DOCUMENTS)
    command.main()
    said = capsys.readouterr().out
    assert "dtype bfloat16, quantize none, kv_cache_dtype fp8_e4m3fn" in said
    answers, text = map(float, re.findall(r"(\d+\.\d+) for", said))
    assert 1.0 < answers < 1.1 < text
