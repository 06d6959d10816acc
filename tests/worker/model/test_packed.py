from __future__ import annotations

import pytest
import torch

from tests.support.paged import load_decoder, paged_logits, relative_error
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
    library = load_library()
    decoder = Decoder(
        decoder.spec, pack(decoder.weights, library), NativeAttention(library), operations=CpuOperations(library)
    )
    assert isinstance(decoder.weights.layers[-1].qkv, PackedLinear)
    assert isinstance(decoder.weights.embed, PackedEmbedding if was_tied else DenseEmbedding)
    assert relative_error(paged_logits(decoder, model.sequences)[0], expected) <= TOLERANCES[dtype]


STACKED = ["llama_biases_llama3", "qwen3", "gpt2"]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", STACKED)
def test_layers_in_one_call_are_those_one_by_one_to_the_last_bit(tiny, name, dtype):
    model, library = tiny(name), load_library()
    plain = load_decoder(model.folder, dtype=dtype)
    decoder = Decoder(
        plain.spec, pack(plain.weights, library), NativeAttention(library), operations=CpuOperations(library)
    )
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
        is_ready = stack.is_ready

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
