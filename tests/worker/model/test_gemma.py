from __future__ import annotations

import torch

from tests.support import tiny_models
from tests.support.paged import load_decoder

# a square root that bfloat16 does not hold
WIDTH = 72


def test_the_factor_on_embeddings_is_rounded_as_it_was_in_training(tmp_path):
    reference = tiny_models.build_from("Gemma", hidden_size=WIDTH, head_dim=16, tie_word_embeddings=True).bfloat16()
    reference.save_pretrained(tmp_path)
    decoder, tokens = load_decoder(tmp_path, torch.bfloat16), torch.arange(tiny_models.VOCAB_SIZE)
    with torch.no_grad():
        table = reference.model.embed_tokens
        expected, unrounded = table(tokens), table.weight * WIDTH**0.5
    assert torch.equal(decoder._embed(tokens, tokens), expected)
    assert not torch.equal(unrounded, expected)
