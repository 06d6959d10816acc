"""Perplexity of models on a text, and how far from the first of them the others are.

python -m ops.bench.perplexity --text FILE --model DIR [--quantize int8,int4] [--model DIR] [--json FILE]

The first row is the first model, the next ones are the same with each --quantize, then come the other models; all are
loaded at once, and run on pages as when they serve. A text is cut into windows, of which all tokens but the first
count. Of a file `.jsonl` each line is a list of strings, and every second one, from the second on, counts: what a model
has to write of a chat. Divergence is that of Kullback and Leibler, in nats a token: unlike perplexity it cannot be
better by luck.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from common.errors import ConfigurationError
from common.settings import WorkerSettings
from ops.demo_model.perplexity import logits_of
from worker.model.config import read_config
from worker.model.families import read_spec
from worker.model.quant.choice import MADE
from worker.model.spec import Spec
from worker.runner.load import load_on_cpu
from worker.runner.torch_device import TorchDevice

WINDOW_TOKENS, BLOCK_SIZE = 2048, 16


@dataclass(frozen=True, slots=True)
class Score:
    """`surprise` and `divergence` are sums over `num_tokens` tokens, in nats."""

    num_tokens: int = 0
    surprise: float = 0.0
    divergence: float = 0.0

    @property
    def perplexity(self) -> float:
        return math.exp(self.surprise / self.num_tokens)

    def with_tokens(self, own: Tensor, first: Tensor, tokens: Tensor) -> Score:
        """`own` and `first` float32 [n, vocabulary] are log-probabilities of this model and of the first one."""
        return replace(
            self,
            num_tokens=self.num_tokens + len(tokens),
            surprise=self.surprise - float(own.gather(1, tokens[:, None]).sum()),
            divergence=self.divergence + float((first.exp() * (first - own)).sum()),
        )


@dataclass(frozen=True, slots=True)
class Passage:
    """`is_counted` bool [n - 1]: those of the tokens after the first that a model has to write."""

    ids: Tensor
    is_counted: Tensor


def load(folder: Path, scheme: str | None = None, window: int = WINDOW_TOKENS) -> TorchDevice:
    """As a worker loads it, `scheme` being its --quantize, with room for one window.

    Raises:
        ConfigurationError: it cannot, or the model has an encoder.
    """
    spec, _ = read_spec(read_config(folder))
    if not isinstance(spec, Spec):
        raise ConfigurationError(f"{folder} has an encoder; this measures decoders")
    length = min(window, spec.max_positions)
    settings = WorkerSettings.model_validate(
        {"model_id": str(folder), "quantize": scheme, "max_total_tokens": length, "kv_tokens": length + BLOCK_SIZE}
    )
    device, _ = load_on_cpu(settings)
    return device


def passages(path: Path, tokenizer: Tokenizer, window: int) -> Iterator[Passage]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        for line in text.splitlines():
            yield passage(json.loads(line), tokenizer, window)
        return
    ids = torch.tensor(tokenizer.encode(text).ids)
    for start in range(0, len(ids) - 1, window):
        part = ids[start : start + window]
        yield Passage(part, torch.ones(len(part) - 1, dtype=torch.bool))


def passage(texts: Sequence[str], tokenizer: Tokenizer, window: int = WINDOW_TOKENS) -> Passage:
    """Of texts every second one counts, from the second on; what is beyond the window is left out."""
    parts = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    is_counted = [bool(number % 2) for number, part in enumerate(parts) for _ in part]
    ids = [token for part in parts for token in part]
    return Passage(torch.tensor(ids[:window]), torch.tensor(is_counted[1:window]))


@torch.inference_mode()
def measure(devices: Sequence[TorchDevice], given: Iterable[Passage]) -> list[Score]:
    """Of all models, and against the first."""
    scores = [Score() for _ in devices]
    for each in given:
        tokens = each.ids[1:][each.is_counted]
        found = [logits_of(device, each.ids.tolist())[:-1][each.is_counted].log_softmax(-1) for device in devices]
        scores = [score.with_tokens(own, found[0], tokens) for score, own in zip(scores, found, strict=True)]
    return scores


def rows(names: Sequence[str], scores: Sequence[Score]) -> list[dict[str, Any]]:
    first = scores[0].perplexity
    return [
        {
            "model": name,
            "tokens": score.num_tokens,
            "perplexity": score.perplexity,
            "of the first": score.perplexity / first,
            "divergence": score.divergence / score.num_tokens,
        }
        for name, score in zip(names, scores, strict=True)
    ]


def table(found: Sequence[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(found[0]) + " |", "|---" * len(found[0]) + "|"]
    for model, tokens, perplexity, share, divergence in (row.values() for row in found):
        lines.append(f"| {model} | {tokens} | {perplexity:.5f} | {share:.5f} | {divergence:.2g} |")
    return "\n".join(lines)


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--model", type=Path, action="append", required=True, help="folder; may come again")
    parser.add_argument("--quantize", default="", help=f"of the first model: {', '.join(MADE)}")
    parser.add_argument("--window", type=int, default=WINDOW_TOKENS)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    options = parsed(arguments)
    first, *others = options.model
    schemes = [scheme for scheme in options.quantize.split(",") if scheme]
    wanted = [(first, None), *((first, scheme) for scheme in schemes), *((other, None) for other in others)]
    try:
        devices = [load(*each, options.window) for each in wanted]
    except ConfigurationError as error:
        sys.exit(str(error))
    window = min(options.window, *(device.model.spec.max_positions for device in devices))
    scores = measure(devices, passages(options.text, Tokenizer.from_file(str(first / "tokenizer.json")), window))
    found = rows([" ".join(filter(None, (str(folder), scheme))) for folder, scheme in wanted], scores)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
