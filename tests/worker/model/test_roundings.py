"""Where models were trained with a certain rounding, 16 bits round alike."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.support import tiny_models
from tests.support.paged import load_decoder
from worker.model.spec import Norm

# a square root that bfloat16 does not hold
WIDTH = 72


def test_the_factor_on_embeddings_is_rounded_as_it_was_in_training(tmp_path):
    reference = tiny_models.build_from("Gemma", hidden_size=WIDTH, head_dim=16, tie_word_embeddings=True).bfloat16()
    reference.save_pretrained(tmp_path)
    decoder, tokens = load_decoder(tmp_path, torch.bfloat16), torch.arange(tiny_models.VOCAB_SIZE)
    with torch.no_grad():
        table = reference.model.embed_tokens
        expected, unrounded = table(tokens), table.weight * WIDTH**0.5
    assert torch.equal(decoder.embed(tokens, tokens), expected)
    assert not torch.equal(unrounded, expected)


BY_RMS = [
    *("llama", "mistral_no_window", "ministral", "qwen2", "qwen3", "phi3", "granite", "smollm3", "seed_oss"),
    *("ernie4_5", "glm", "glm4", "gemma", "gemma2", "gemma3", "olmo2", "olmo3", "exaone4", "mixtral"),
    *("qwen2_moe", "qwen3_moe", "olmoe"),
]


@pytest.mark.parametrize("name", BY_RMS)
def test_rms_norms_round_as_those_of_transformers(tmp_path, name):
    reference = tiny_models.build(name).bfloat16()
    reference.save_pretrained(tmp_path)
    decoder = load_decoder(tmp_path, torch.bfloat16)
    assert decoder.spec.norm is Norm.RMS
    x = torch.randn((50, decoder.spec.hidden_size), generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad():
        expected = reference.model.norm(x)
    assert torch.equal(decoder._norm(x, decoder.weights.final_norm), expected)
    other = load_decoder(tmp_path, torch.bfloat16, replace(decoder.spec, wide_norm=not decoder.spec.wide_norm))
    assert not torch.equal(other._norm(x, other.weights.final_norm), expected)
