from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch

from common.errors import ConfigurationError
from common.settings import WorkerSettings
from tests.support import tiny_models
from worker.attention.reference import ReferenceAttention
from worker.engine.admission import peak_blocks
from worker.model.checkpoint import Checkpoint
from worker.model.families import read_spec
from worker.parallel.group import Alone
from worker.parallel.shard import Shard
from worker.runner import hardware, limits
from worker.runner import load as loading
from worker.runner.load import load_device
from worker.runner.memory import readable


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
    assert ready.max_batch_prefill_tokens == limits.DEFAULT_PREFILL_TOKENS
    assert ready.step_limit_s == 33.0
    assert device.pages.shape == (3, 2, 65, 32, 2, 8)
    assert device.rows.block_tables.shape[0] == 7
    assert device.rows.block_tables.shape[1] >= 512 // 32
    assert len(ready.weights_digest) == 64
    assert ready.reasons == [
        "kv_tokens 2048 (768.0 KiB) instead of 2050: whole blocks of 32",
        "max_num_seqs 7: as asked; the KV cache holds 3 of the longest requests",
        "max_total_tokens 512: as long as the model's config says; --max-total-tokens changes it",
        "max_input_tokens 511: all but one token for the answer; --max-input-tokens changes it",
    ]
    assert device.pages[:, :, 1:].nbytes == 768 * 1024, "the null page is extra"


def test_weights_in_few_bits_say_what_they_take_and_whether_that_costs_time(load):
    fast, slow = (load(quantize=scheme, kv_tokens=2048)[1] for scheme in ("int8", "bitsandbytes-nf4"))
    assert (fast.quantize, slow.quantize) == ("int8", "bitsandbytes-nf4")
    assert fast.weights_digest == slow.weights_digest, "the name of the scheme tells their lanes apart"
    said = [reason for reason in fast.reasons if reason.startswith("quantize")]
    assert len(said) == 1 and said[0].startswith("quantize int8: weights take ")
    said = [reason for reason in slow.reasons if reason.startswith("quantize")]
    assert len(said) == 2 and said[1].startswith("quantize bitsandbytes-nf4 saves memory, not time: ")


def test_a_contradiction_of_the_checkpoint_is_one_sentence(load):
    assert refusal(load, quantize="gptq").startswith("--quantize gptq needs a checkpoint in that format")


def test_every_limit_has_one_reason_whatever_was_asked(load):
    asked = dict(kv_tokens=2048, max_num_seqs=4, max_total_tokens=200, max_input_tokens=100)
    assert [reason.split(":")[1].split(";")[0] for reason in load(**asked)[1].reasons] == [" as asked"] * 4
    for options in ({}, asked, dict(kv_tokens=256, max_input_tokens=300), dict(max_total_tokens=9999)):
        _, ready = load(**options)
        names = [reason.split()[0] for reason in ready.reasons]
        assert names == ["kv_tokens", "max_num_seqs", "max_total_tokens", "max_input_tokens"]
        values = [int(reason.replace(":", "").split()[1]) for reason in ready.reasons]
        assert values == [getattr(ready, name) for name in names]


def test_so_many_of_the_longest_requests_fit_at_once(load):
    """What the start says is what the engine's admission does."""
    _, ready = load(kv_tokens=2048, max_total_tokens=250)
    (said,) = [int(reason.split()[-5]) for reason in ready.reasons if "longest" in reason]
    size, num_blocks = ready.block_size, ready.kv_tokens // ready.block_size

    def peak(num_requests: int) -> int:
        return peak_blocks(np.full(num_requests, 250, np.int32), np.zeros(num_requests, np.int32), size)

    assert peak(said) <= num_blocks < peak(said + 1)


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
    assert any("holds 1 of the longest requests" in reason for reason in ready.reasons)
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
    assert "--max-total-tokens 1 is too small" in refusal(load, max_total_tokens=1)


def test_the_default_pool_follows_the_free_memory(load, monkeypatch):
    bytes_per_token = 2 * 3 * 2 * 8 * 4
    monkeypatch.setattr(hardware, "available_bytes", lambda: 4000 * bytes_per_token)
    _, ready = load(kv_tokens=None)
    assert ready.kv_tokens == 1000 // 16 * 16
    assert any("25% of the free memory" in reason and "--kv-tokens" in reason for reason in ready.reasons)
    monkeypatch.setattr(hardware, "available_bytes", lambda: 1 << 40)
    _, ready = load(kv_tokens=None, max_num_seqs=4)
    assert ready.kv_tokens == 4 * (512 + 16)
    assert any("all that the largest batch can use" in reason for reason in ready.reasons)
    monkeypatch.setattr(limits, "DEFAULT_KV_BYTES", 3200 * bytes_per_token)
    _, ready = load(kv_tokens=None)
    assert ready.kv_tokens == 3200
    assert any("the default of" in reason for reason in ready.reasons)


@pytest.mark.parametrize(
    ("dtype", "option", "numerator", "denominator", "saving"),
    [
        ("bfloat16", "fp8_e5m2", 1, 2, "96 B instead of 192 B"),
        ("float32", "fp8_e4m3fn", 1, 4, "96 B instead of 384 B"),
        # two bytes more for the scale of eight numbers
        ("bfloat16", "int8", 10, 16, "120 B instead of 192 B"),
        ("float32", "int8", 10, 32, "120 B instead of 384 B"),
    ],
)
def test_a_cache_of_8_bits_takes_its_share_of_the_memory(
    load, monkeypatch, dtype, option, numerator, denominator, saving
):
    whole, wide_ready = load(dtype=dtype, kv_tokens=2048)
    device, ready = load(dtype=dtype, kv_tokens=2048, kv_cache_dtype=option)
    assert denominator * device.pages.nbytes == numerator * whole.pages.nbytes
    assert ready.reasons[0] == f"kv_cache_dtype {option}: a token takes {saving}; a CPU reads it more slowly"
    assert f"({readable(device.pages[:, :, 1:].nbytes)})" in ready.reasons[1]
    assert "kv_cache_dtype" not in "".join(wide_ready.reasons)
    # so much more fits into what is free
    monkeypatch.setattr(hardware, "available_bytes", lambda: 1_000_000)
    num_tokens = [load(dtype=dtype, kv_tokens=None, kv_cache_dtype=each)[1].kv_tokens for each in ("auto", option)]
    assert num_tokens[1] == pytest.approx(num_tokens[0] * denominator / numerator, abs=3 * 16)


def test_too_little_memory_is_one_sentence(load, monkeypatch):
    monkeypatch.setattr(hardware, "available_bytes", lambda: 1000)
    assert "only 1000 B of memory is free" in refusal(load)
    monkeypatch.setattr(hardware, "available_bytes", lambda: 10_000_000)
    assert "at most 26041 fit" in refusal(load, kv_tokens=100_000)
    monkeypatch.setattr(hardware, "available_bytes", lambda: 1 << 60)
    assert "no memory for a KV cache" in refusal(load, kv_tokens=1 << 46)
    monkeypatch.setattr(limits, "KV_SHARE_OF_FREE_MEMORY", 1e-16)
    text = "a KV cache of 32 tokens at least needs 12.0 KiB but only 1048576.0 TiB of memory is free"
    assert refusal(load, kv_tokens=None).startswith(text)


class OneOfTwo(Alone):
    shard = Shard(1, 2)


def test_too_little_memory_of_a_rank_is_told_for_each(tiny_folder, monkeypatch):
    """All go by the rank that has least: here that is this one."""
    folder = tiny_folder("llama")
    spec, family = read_spec(json.loads((folder / "config.json").read_text()))

    def load_rank(**options):
        settings = WorkerSettings(model_id=str(folder), threads=1, num_shard=2, **options)
        return load_device(settings, lambda *_: None, OneOfTwo())

    monkeypatch.setattr(hardware, "available_bytes", lambda: 2000)
    num_bytes = loading.weight_bytes(spec, family, Checkpoint(folder), torch.float32, OneOfTwo.shard)
    needed = readable(num_bytes)
    assert num_bytes < loading.weight_bytes(spec, family, Checkpoint(folder), torch.float32, Alone.shard)
    expected = f"needs {needed} on each of 2 ranks for its weights but only 1000 B of memory is free for each; "
    assert expected in refusal(load_rank)
    monkeypatch.setattr(hardware, "available_bytes", lambda: 2 * num_bytes)
    expected = f"needs 18.3 MiB on each of 2 ranks but only {needed} of memory is free for each; at most"
    assert expected in refusal(load_rank, kv_tokens=100_000)
    monkeypatch.setattr(limits, "KV_SHARE_OF_FREE_MEMORY", 1e-9)
    expected = f"at least needs 6.0 KiB on each of 2 ranks but only {needed} of memory is free for each, of which"
    assert expected in refusal(load_rank)


def test_types(load, tiny_folder, tmp_path):
    for name in ("float64", "float32", "bfloat16", "float16"):
        device, ready = load(dtype=name)
        assert ready.dtype == name
        assert device.pages.dtype is getattr(torch, name)
    reasons: list[str] = []
    cpu = hardware.Cpu(WorkerSettings(), reasons)
    assert cpu.choose_dtype("auto", torch.bfloat16, reasons) is torch.bfloat16
    assert reasons == []
    assert cpu.choose_dtype("auto", torch.float16, reasons) is torch.bfloat16
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
    assert isinstance(device._model.attention, ReferenceAttention)
    device, _ = load()
    assert not isinstance(device._model.attention, ReferenceAttention)


def test_a_missing_model_is_one_sentence(load):
    assert "not a model folder" in refusal(load, model_id="/nowhere/at-all")
