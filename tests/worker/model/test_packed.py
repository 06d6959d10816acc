from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from tests.support.paged import load_decoder, paged_logits, relative_error, run_step, used_pages
from tests.support.ranks import ranks
from worker.attention.native import NativeAttention
from worker.kernels.build import load_library
from worker.kernels.elementwise import CpuOperations
from worker.kernels.products import PackedEmbedding, PackedLinear, pack
from worker.model.decoder import Decoder
from worker.model.weights import DenseEmbedding, DenseLinear

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.05}


NAMES = ["llama_biases_llama3", "qwen3", "bloom_12_heads", "gpt2"]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_models_with_kernels_agree_with_those_of_torch(tiny, name, dtype):
    model = tiny(name)
    decoder = load_decoder(model.folder, dtype=dtype)
    expected = paged_logits(decoder, model.sequences)[0]
    was_tied = isinstance(decoder.weights.head, DenseLinear) and (
        decoder.weights.embed.weight.data_ptr() == decoder.weights.head.weight.data_ptr()
    )
    decoder = with_kernels(decoder)
    assert isinstance(decoder.weights.layers[-1].qkv, PackedLinear)
    assert isinstance(decoder.weights.embed, PackedEmbedding if was_tied else DenseEmbedding)
    assert relative_error(paged_logits(decoder, model.sequences)[0], expected) <= TOLERANCES[dtype]


STACKED = ["llama_biases_llama3", "qwen3", "gpt2"]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", STACKED)
def test_layers_in_one_call_are_those_one_by_one_to_the_last_bit(tiny, name, dtype):
    model = tiny(name)
    decoder = with_kernels(load_decoder(model.folder, dtype=dtype))
    calls = counted(decoder)
    together = paged_logits(decoder, model.sequences)[0]
    assert calls, "the layers are to go together"
    decoder._stack = None
    one_by_one = paged_logits(decoder, model.sequences)[0]
    assert all(torch.equal(*pair) for pair in zip(together, one_by_one, strict=True))
    layers = decoder.weights.layers
    layers[0], layers[1] = layers[1], layers[0]
    swapped = paged_logits(decoder, model.sequences)[0]
    assert not any(torch.equal(*pair) for pair in zip(together, swapped, strict=True))


@pytest.fixture
def library():
    """With a thread for every core, and callers that would rest for as long as they may."""
    library = load_library()
    library.inferfleet_set_threads(len(os.sched_getaffinity(0)))
    library.inferfleet_set_rest(10**9)
    yield library
    library.inferfleet_set_rest(0)
    library.inferfleet_set_threads(3)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_while_the_caller_rests_a_helper_leads_and_changes_nothing(tiny, library, dtype):
    model = tiny("qwen3")
    decoder = with_kernels(load_decoder(model.folder, dtype=dtype))
    before, found = library.inferfleet_num_led(), []
    while library.inferfleet_num_led() < before + 20:
        found.append(paged_logits(decoder, model.sequences)[0])
    library.inferfleet_set_rest(0)
    num_led = library.inferfleet_num_led()
    expected = paged_logits(decoder, model.sequences)[0]
    assert library.inferfleet_num_led() == num_led, "nobody rests now"
    assert all(torch.equal(*pair) for each in found for pair in zip(each, expected, strict=True))


def test_callers_rest_only_where_each_thread_has_a_core(tiny, library):
    model = tiny("qwen3")
    decoder = with_kernels(load_decoder(model.folder))
    library.inferfleet_set_threads(len(os.sched_getaffinity(0)) + 1)
    before = library.inferfleet_num_led()
    for _ in range(20):
        paged_logits(decoder, model.sequences)
    assert library.inferfleet_num_led() == before


SIZES = [5, 1, 13, 4]
"""Tokens of each row in one step: 0 to 4, 5, 6 to 18, 19 to 22."""
WANTED = {
    "behind each row": [4, 5, 18, 22],
    "behind some": [5, 22],
    "behind drafts": [3, 4, 5, 18, 20, 21, 22],
    "none": [],
    "all of one": [5, 19, 20, 21, 22],
    "not the last": [2, 5, 18, 22],
    "with a gap": [1, 4, 18],
}
ENDS_EARLY = set(WANTED) - {"not the last", "with a gap"}


@torch.inference_mode()
def run_wanted(decoder, sequences, wanted):
    """Logits of a step behind one that computed as many tokens, and all pages."""
    tables = np.arange(1, 1 + 2 * len(SIZES)).reshape(len(SIZES), 2)
    rows, pages = range(len(SIZES)), used_pages(decoder, tables.size + 1)
    sequences = [(sequence * 26)[:26] for sequence in sequences[: len(SIZES)]]
    run_step(decoder, sequences, tables, pages, [0] * len(SIZES), rows, SIZES)
    return run_step(decoder, sequences, tables, pages, SIZES, rows, SIZES, wanted), pages


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", STACKED)
def test_tokens_that_nobody_samples_behind_change_nothing(tiny, name, dtype):
    model = tiny(name)
    decoder = with_kernels(load_decoder(model.folder, dtype=dtype))
    everything, all_pages = run_wanted(decoder, model.sequences, None)
    everything = everything.clone()
    for case, wanted in WANTED.items():
        logits, pages = run_wanted(decoder, model.sequences, wanted)
        assert torch.equal(logits, everything[wanted]) and torch.equal(pages, all_pages), case
        assert not wanted or not torch.equal(logits, everything[[each - 1 for each in wanted]]), case


def test_what_is_summarised_by_the_way_is_of_these_logits_alone(tiny):
    model = tiny("qwen3")
    decoder = with_kernels(load_decoder(model.folder))
    earlier = run_wanted(decoder, model.sequences, [4, 5])[0].clone()
    logits, _ = run_wanted(decoder, model.sequences, [18, 22])
    assert decoder._stack.summary_of(logits) is not None
    for each in (logits, earlier, logits + 1.0):
        found, expected = decoder.summarise(each), decoder.operations.summarise(each)
        assert all(np.array_equal(*pair) for pair in zip(found, expected, strict=True))
    assert not np.array_equal(decoder.summarise(logits)[2], decoder.summarise(earlier)[2])


def test_a_step_writes_its_logits_over_those_before(tiny):
    model = tiny("qwen3")
    decoder = with_kernels(load_decoder(model.folder))
    one, _ = run_wanted(decoder, model.sequences, [4])
    kept = one.clone()
    logits, _ = run_wanted(decoder, model.sequences, [18, 22])
    assert logits.data_ptr() == one.data_ptr() and not torch.equal(one, kept)
    again, _ = run_wanted(decoder, model.sequences, [4])
    assert torch.equal(again, kept)


def test_more_rows_than_logits_were_promised_room(tiny, monkeypatch):
    monkeypatch.setattr("worker.kernels.stack.NUM_ROWS", 1)
    model = tiny("qwen3")
    decoder = with_kernels(load_decoder(model.folder))
    one = run_wanted(decoder, model.sequences, [4])[0].clone()
    more, _ = run_wanted(decoder, model.sequences, [4, 22])
    assert len(one) == 1 and torch.equal(more[:1], one) and not torch.equal(more[1:], one)


@pytest.mark.parametrize("case", WANTED)
def test_the_last_layer_takes_only_what_is_sampled_behind(tiny, monkeypatch, case):
    # of learned positions, so that we see what becomes of the memory of x
    model, given = tiny("gpt2"), []

    def watched(self, *arguments):
        given.append(embed(self, *arguments))
        return given[-1]

    embed = Decoder.embed
    monkeypatch.setattr(Decoder, "embed", watched)
    decoder = with_kernels(load_decoder(model.folder))
    run_wanted(decoder, model.sequences, [0])
    finished, first_spared = given[-1], max(len(WANTED[case]), 1)
    run_wanted(decoder, model.sequences, WANTED[case])
    assert torch.equal(given[-1][first_spared:], finished[first_spared:]) == (case not in ENDS_EARLY)


def with_kernels(plain):
    library = load_library()
    return Decoder(
        plain.spec, pack(plain.weights, library), NativeAttention(library), operations=CpuOperations(library)
    )


@pytest.fixture(scope="module")
def group():
    with ranks(2) as started:
        yield started


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", STACKED)
def test_layers_of_ranks_in_one_call_are_those_one_by_one_to_the_last_bit(group, tiny, tmp_path, name, dtype):
    model = tiny(name)

    def logits(layers):
        type_name = str(dtype).removeprefix("torch.")
        return group.logits(model.folder, model.sequences, tmp_path / "logits", dtype=type_name, layers=layers)

    together, one_by_one, unsummed = logits("together"), logits("one by one"), logits("without sums")
    assert all(torch.equal(*pair) for pair in zip(together, one_by_one, strict=True))
    assert not any(torch.equal(*pair) for pair in zip(together, unsummed, strict=True))
    expected = paged_logits(load_decoder(model.folder, dtype=dtype), model.sequences)[0]
    assert relative_error(together, expected) <= TOLERANCES[dtype] < relative_error(unsummed, expected)


def test_a_rank_that_others_wait_for_in_the_middle_of_layers_is_lost(tiny, tmp_path):
    model = tiny("qwen3")
    with ranks(2) as started, pytest.raises(RuntimeError, match="RankLost: another rank .* has ended; a rank died"):
        started.logits(model.folder, model.sequences, tmp_path / "logits", layers="leaves")


def counted(decoder):
    stack, calls = decoder._stack, []
    assert stack is not None

    class Counted:
        is_ready, summary_of = stack.is_ready, stack.summary_of

        def __call__(self, *arguments):
            calls.append(len(arguments))
            return stack(*arguments)

    decoder._stack = Counted()
    return calls


def test_a_layer_that_has_more_than_kernels_goes_alone(tiny):
    library = load_library()
    for name in ("bloom_12_heads", "llama_biases_llama3"):
        decoder = load_decoder(tiny(name).folder)
        packed = pack(decoder.weights, library) if name == "bloom_12_heads" else decoder.weights
        decoder = Decoder(decoder.spec, packed, NativeAttention(library), operations=CpuOperations(library))
        assert (decoder._stack is None) == (name == "llama_biases_llama3"), name
