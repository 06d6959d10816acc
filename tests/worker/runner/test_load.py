from __future__ import annotations

import json
import os

import pytest
import torch

from common.errors import ConfigurationError
from common.settings import WorkerSettings
from tests.support import tiny_models
from worker.attention.reference import ReferenceAttention
from worker.runner import load as loading
from worker.runner.load import choose_dtype, load_device


def refusal(load, **options) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load(**options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_ready_says_what_was_chosen(load):
    device, ready = load(kv_tokens=2050, max_num_seqs=7, step_limit=33.0, block_size=32)
    assert ready.vocab_size == tiny_models.VOCAB_SIZE
    assert (ready.dtype, ready.quantize) == ("float32", "none")
    assert (ready.kv_tokens, ready.block_size, ready.max_num_seqs) == (2048, 32, 7)
    assert (ready.max_total_tokens, ready.max_input_tokens) == (512, 511)
    assert ready.max_batch_prefill_tokens == loading.DEFAULT_PREFILL_TOKENS
    assert ready.step_limit_s == 33.0
    assert device.pages.shape == (3, 2, 65, 32, 2, 8)
    assert device.rows.block_tables.shape[0] == 7
    assert device.rows.block_tables.shape[1] >= 512 // 32
    assert len(ready.weights_digest) == 64
    assert ready.reasons == []


def test_threads_are_as_asked_or_all_cores(load):
    before = torch.get_num_threads()
    try:
        load(threads=3)
        assert torch.get_num_threads() == 3
        load(threads=0)
        assert torch.get_num_threads() == len(os.sched_getaffinity(0))
    finally:
        torch.set_num_threads(before)


def test_a_small_pool_lowers_the_limits_and_says_why(load):
    _, ready = load(kv_tokens=256)
    assert (ready.max_total_tokens, ready.max_input_tokens) == (240, 239)
    assert any("max_total_tokens 240 instead of 512" in reason for reason in ready.reasons)
    _, ready = load(kv_tokens=256, max_input_tokens=300)
    assert ready.max_input_tokens == 239
    assert any("max_input_tokens 239 instead of 300" in reason for reason in ready.reasons)
    assert load(kv_tokens=32)[1].max_total_tokens == 16
    assert "--kv-tokens 16 is too small: it must be at least 32" in refusal(load, kv_tokens=16)


def test_the_model_knows_no_more_positions_than_it_does(load):
    _, ready = load(max_total_tokens=9999, max_input_tokens=100)
    assert (ready.max_total_tokens, ready.max_input_tokens) == (512, 100)
    assert any("no more positions" in reason for reason in ready.reasons)


def test_a_rope_stretched_by_option_reaches_further_and_is_another_model(load):
    _, plain = load(max_total_tokens=1000)
    _, linear = load(max_total_tokens=1000, rope_factor=2.0)
    _, dynamic = load(max_total_tokens=1000, rope_scaling="dynamic", rope_factor=2.0)
    assert [ready.max_total_tokens for ready in (plain, linear, dynamic)] == [512, 1000, 1000]
    # jobs must not move between workers that turn differently
    assert len({ready.weights_digest for ready in (plain, linear, dynamic)}) == 3


@pytest.mark.parametrize("name", ["falcon_rw", "bloom"])
def test_a_rope_that_is_not_there_cannot_be_stretched(load, name):
    assert "rope" in refusal(load, name=name, rope_factor=2.0)


def test_contradicting_limits_are_refused(load):
    text = refusal(load, max_total_tokens=100, max_input_tokens=100)
    assert "--max-input-tokens 100 must be smaller than --max-total-tokens 100" in text


def test_the_default_pool_follows_the_free_memory(load, monkeypatch):
    bytes_per_token = 2 * 3 * 2 * 8 * 4
    monkeypatch.setattr(loading, "available_bytes", lambda: 4000 * bytes_per_token)
    _, ready = load(kv_tokens=None)
    assert ready.kv_tokens == 1000 // 16 * 16
    assert any("25% of the free memory" in reason and "--kv-tokens" in reason for reason in ready.reasons)
    monkeypatch.setattr(loading, "available_bytes", lambda: 1 << 40)
    _, ready = load(kv_tokens=None, max_num_seqs=4)
    assert ready.kv_tokens == 4 * (512 + 16)
    assert any("all that the largest batch can use" in reason for reason in ready.reasons)
    monkeypatch.setattr(loading, "DEFAULT_KV_BYTES", 3200 * bytes_per_token)
    _, ready = load(kv_tokens=None)
    assert ready.kv_tokens == 3200
    assert any("the default of" in reason for reason in ready.reasons)


def test_too_little_memory_is_one_sentence(load, monkeypatch):
    monkeypatch.setattr(loading, "available_bytes", lambda: 1000)
    assert "only 1000 B of memory is free" in refusal(load)
    monkeypatch.setattr(loading, "available_bytes", lambda: 10_000_000)
    assert "at most 26041 fit" in refusal(load, kv_tokens=100_000)
    monkeypatch.setattr(loading, "available_bytes", lambda: 1 << 60)
    assert "no memory for a KV cache" in refusal(load, kv_tokens=1 << 46)


def test_types(load, tiny_folder, tmp_path):
    for name in ("float64", "float32", "bfloat16", "float16"):
        device, ready = load(dtype=name)
        assert ready.dtype == name
        assert device.pages.dtype is getattr(torch, name)
    reasons: list[str] = []
    assert choose_dtype("auto", torch.bfloat16, reasons) is torch.bfloat16
    assert reasons == []
    assert choose_dtype("auto", torch.float16, reasons) is torch.bfloat16
    assert "float16" in reasons[0]
    tiny_models.build("llama").half().save_pretrained(tmp_path)
    _, ready = load_device(WorkerSettings(model_id=str(tmp_path), threads=1, kv_tokens=1024), lambda *_: None)
    assert ready.dtype == "bfloat16"
    assert any("float16" in reason for reason in ready.reasons)


def test_dummy_weights_need_a_config_only(tiny_folder, tmp_path):
    config = json.loads((tiny_folder("llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = WorkerSettings(model_id=str(tmp_path), load_format="dummy", threads=1, kv_tokens=1024)
    seen = []
    device, ready = load_device(settings, lambda *progress: seen.append(progress))
    assert ready.weights_digest.startswith("dummy-")
    assert ready.dtype == "bfloat16"
    assert seen[-1][0] == "weights"
    assert seen[-1][1] == seen[-1][2] > 0
    with pytest.raises(ConfigurationError, match="load-format dummy"):
        load_device(settings.model_copy(update=dict(load_format="auto")), lambda *_: None)


def test_the_attention_can_be_chosen(load):
    device, _ = load(attention="reference")
    assert isinstance(device._model._attention, ReferenceAttention)
    device, _ = load()
    assert not isinstance(device._model._attention, ReferenceAttention)


def test_a_missing_model_is_one_sentence(load):
    assert "not a model folder" in refusal(load, model_id="/nowhere/at-all")
