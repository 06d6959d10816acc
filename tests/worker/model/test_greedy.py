"""48 greedy tokens of every tiny model, decoded one by one through pages, against transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch

from tests.support import tiny_models
from tests.support.paged import BLOCK_SIZE, load_decoder
from worker.attention import Batch
from worker.model.decoder import Decoder

NUM_PROMPT, NUM_TOKENS = 8, 48
MIN_MARGIN = 1e-3
"""Distance between the reference's best and second logit, over the largest, from which on the best one is certain."""


@dataclass(frozen=True)
class Answer:
    """Tokens that a decoder chose, and where the reference, given those before, is certain and where it differs."""

    tokens: list[int]
    is_certain: list[bool]
    is_other: list[bool]

    @property
    def num_mistakes(self) -> int:
        return sum(certain and other for certain, other in zip(self.is_certain, self.is_other, strict=True))


@torch.inference_mode()
def greedy(decoder: Decoder, prompt: list[int]) -> list[int]:
    """The tokens that follow: the prompt in one chunk, then one token a step."""
    num_blocks = -(-(NUM_PROMPT + NUM_TOKENS) // BLOCK_SIZE)
    num_layers, *head_shape = decoder.page_shape
    # the last page first, and what a page held before must not matter
    table = np.arange(num_blocks, 0, -1)
    pages = torch.full((num_layers, 2, num_blocks + 1, BLOCK_SIZE, *head_shape), 7.0, dtype=decoder.dtype)
    tokens, num_done = list(prompt), 0
    while len(tokens) < NUM_PROMPT + NUM_TOKENS:
        positions = np.arange(num_done, len(tokens))
        slots = torch.from_numpy(table[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE)
        batch = Batch(np.array([len(positions)]), np.array([num_done]), table[None], slots)
        new, last = torch.tensor(tokens[num_done:]), torch.tensor([len(positions) - 1])
        logits = decoder.forward(new, torch.from_numpy(positions), batch, pages, last)
        num_done = len(tokens)
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


def judged(reference, prompt: list[int], tokens: list[int]) -> Answer:
    with torch.no_grad():
        logits = reference(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    best = logits.topk(2)
    margins = (best.values[:, 0] - best.values[:, 1]) / logits.abs().amax(-1)
    is_other = best.indices[:, 0] != torch.tensor(tokens)
    return Answer(tokens, (margins >= MIN_MARGIN).tolist(), is_other.tolist())


@pytest.fixture(scope="module")
def answer(tiny) -> Callable[..., Answer]:
    """What a tiny model says, or one whose attention and norms are off."""

    @cache
    def get(name: str, *, is_wrong: bool = False) -> Answer:
        model, decoder = tiny(name), load_decoder(tiny(name).folder)
        if is_wrong:
            spec = replace(decoder.spec, scale=4 * decoder.spec.scale, norm_eps=1.0)
            decoder = load_decoder(model.folder, spec=spec)
        prompt = model.sequences[0][:NUM_PROMPT]
        return judged(model.reference, prompt, greedy(decoder, prompt))

    return get


@pytest.mark.parametrize("name", tiny_models.CASES)
def test_greedy_tokens_are_those_of_transformers(answer, name):
    found = answer(name)
    assert len(found.tokens) == NUM_TOKENS
    assert found.num_mistakes == 0
    assert answer(name, is_wrong=True).num_mistakes > 0


def test_most_tokens_were_certain_and_most_answers_varied(answer):
    answers = [answer(name) for name in tiny_models.CASES]
    assert sum(all(found.is_certain) for found in answers) > 0.6 * len(answers)
    assert sum(sum(found.is_certain) for found in answers) > 0.98 * NUM_TOKENS * len(answers)
    assert sum(len(set(found.tokens)) >= 8 for found in answers) > 0.8 * len(answers)
