"""Perplexity of held-out text under the engine, as one command: `python -m ops.demo_model.perplexity`.

The options are those of a worker: `--kv-cache-dtype int8` tells what that costs, `--model-id` names another checkpoint
with the demo model's tokenizer.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from common.errors import ConfigurationError
from common.settings import WorkerSettings, parse
from ops.demo_model.corpus import held_out
from ops.demo_model.evaluate import CHECKPOINT
from ops.demo_model.train import Encoder, Example
from worker.attention import Batch
from worker.model.t5 import T5
from worker.runner.load import load_on_cpu
from worker.runner.torch_device import TorchDevice

NUM_DOCUMENTS = 150


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Of the answers, which the model was trained to write, and of the whole text, most of which it cannot know."""

    answers: float
    text: float


def examples(num_documents: int) -> list[Example]:
    encoder = Encoder(Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")))
    return [encoder.encode(document) for document in held_out(num_documents)]


@torch.inference_mode()
def logits_of(device: TorchDevice, ids: list[int]) -> Tensor:
    """float32 [tokens, vocabulary] of one text, through the first pages of the device."""
    assert not isinstance(device.model, T5)
    block_size, length = device.pages.shape[3], len(ids)
    table = np.arange(1, -(-length // block_size) + 1)[None]
    slots = torch.arange(block_size, block_size + length)
    batch, every = Batch(np.array([length]), np.array([0]), table, slots), torch.arange(length)
    return device.model.forward(torch.tensor(ids), every, batch, device.pages, every).float()


def perplexity(device: TorchDevice, texts: Sequence[Example]) -> Perplexity:
    logprobs, is_answer = [], []
    for example in texts:
        scores, following = logits_of(device, example.ids)[:-1].log_softmax(-1), torch.tensor(example.ids[1:])
        logprobs.append(scores.gather(1, following[:, None])[:, 0])
        is_answer += example.is_target[1:]
    every = torch.cat(logprobs).double()
    return Perplexity(*(math.exp(-float(part.mean())) for part in (every[torch.tensor(is_answer)], every)))


def main() -> None:
    try:
        settings = parse(WorkerSettings, sys.argv[1:], program="python -m ops.demo_model.perplexity")
        settings.model_id = settings.model_id or str(CHECKPOINT)
        device, ready = load_on_cpu(settings)
    except ConfigurationError as error:
        sys.exit(str(error))
    texts = examples(NUM_DOCUMENTS)
    found, num_tokens = perplexity(device, texts), sum(len(example.ids) for example in texts)
    print(f"dtype {ready.dtype}, quantize {ready.quantize}, kv_cache_dtype {settings.kv_cache_dtype}")
    print(f"{num_tokens} tokens: {found.answers:.5f} for the answers, {found.text:.3f} for the whole text")


if __name__ == "__main__":
    main()
