from __future__ import annotations

import pytest
import torch

from tests.support.paged import load_decoder, paged_logits, relative_error
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
