"""What adapters cost: tokens per second of the engine with the base alone, and with some of many adapters in the batch.

python -m ops.bench.lora [--rounds 5] [--targets all|attention] [--json]

A Llama of 443 M parameters with random weights in bfloat16 answers 32 requests at once, 8 of 64 adapters of rank 8
dealt out among them, or none: in turn, in one process, without gateway and Redis. All 64 adapters are checked against
the model before. The bar is the median of the rounds' ratios. `--short` is a dry run of seconds on a tiny model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from common.job import Adapter, SamplingParams
from common.settings import WorkerSettings
from worker.engine.loop import EngineLoop, Inbox
from worker.engine.pacing import PrefillPacer
from worker.engine.scheduler import Scheduler, limits_of
from worker.pipe import AdapterChecked, Commit, Step, Submit

MIN_RATIO = 0.85
TARGETS = {"attention": ("q", "k", "v", "o"), "all": ("q", "k", "v", "o", "gate", "up", "down")}


@dataclass(frozen=True)
class Sizes:
    """Of the model, of its adapters, and of what is asked."""

    num_layers: int = 24
    hidden: int = 1024
    ffn: int = 4096
    vocab: int = 20_000
    rank: int = 8
    num_registered: int = 64
    num_active: int = 8
    num_requests: int = 32
    num_prompt: int = 32
    num_tokens: int = 96


SHORT = Sizes(
    num_layers=2, hidden=64, ffn=96, vocab=300, rank=2, num_registered=6, num_active=3, num_requests=6, num_tokens=6
)


@dataclass(frozen=True)
class Result:
    """Tokens per second of each round, and by how much adapters slowed it down. `most_adapters` were in one batch."""

    base: list[float]
    adapted: list[float]
    most_adapters: int
    largest_batch: int

    @property
    def ratio(self) -> float:
        return statistics.median(one / other for one, other in zip(self.adapted, self.base, strict=True))


def write_model(folder: Path, sizes: Sizes) -> Path:
    """A configuration; weights are made up when it is loaded."""
    config = {
        "model_type": "llama",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.ffn,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": 16,
        "vocab_size": sizes.vocab,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_adapter(folder: Path, sizes: Sizes, targets: Sequence[str], seed: int) -> Path:
    import torch
    from safetensors.torch import save_file

    randomness = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(sizes.num_layers):
        for target in targets:
            block = "self_attn" if target in TARGETS["attention"] else "mlp"
            name = f"base_model.model.model.layers.{layer}.{block}.{target}_proj"
            num_in = sizes.ffn if target == "down" else sizes.hidden
            num_out = sizes.ffn if target in ("gate", "up") else sizes.hidden
            for side, shape in (("A", (sizes.rank, num_in)), ("B", (num_out, sizes.rank))):
                tensor = torch.randn(shape, generator=randomness, dtype=torch.bfloat16)
                tensors[f"{name}.lora_{side}.weight"] = tensor * 0.02
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": sizes.rank, "lora_alpha": 2 * sizes.rank, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


class Engine:
    """Scheduler, loop and a loaded device, run until nothing is left to do."""

    def __init__(self, model: Path, sizes: Sizes) -> None:
        from worker.runner.load import load_device

        self.sizes = sizes
        settings = WorkerSettings(
            model_id=str(model),
            load_format="dummy",
            dtype="bfloat16",
            max_num_seqs=sizes.num_requests,
            max_loras=sizes.num_active,
            kv_tokens=sizes.num_requests * (sizes.num_prompt + sizes.num_tokens + 64),
        )
        device, ready = load_device(settings, lambda phase, done, total: None)
        self.device = device
        # a prefix that was computed before would be measured as if it cost nothing
        limits = limits_of(ready, prefix_caching=False, max_loras=settings.max_loras)
        self.scheduler, self.inbox = Scheduler(limits), Inbox()
        pacer = PrefillPacer(ready.max_batch_prefill_tokens, settings.prefill_step)
        self.loop = EngineLoop(device, self.scheduler, pacer, self.inbox, self._receive)
        self.num_answered = self.most_adapters = 0

    def check(self, name: str, folder: Path) -> Adapter:
        checked = self.device.check_adapter(name, str(folder))
        if checked.error:
            raise RuntimeError(checked.error)
        return Adapter(name, str(folder), checked.digest)

    def tokens_per_s(self, adapters: Sequence[Adapter | None]) -> float:
        """Of one batch, whose requests have these adapters."""
        self.num_answered, start = 0, time.perf_counter()
        for number, adapter in enumerate(adapters):
            self.inbox.put(self._request(number, adapter))
        while self.scheduler.has_requests or not self.inbox.empty():
            self.loop.take_messages()
            self.loop.run_pass()
            digests = {request.adapter_digest for request in self.scheduler.running}
            self.most_adapters = max(self.most_adapters, len(digests - {""}))
        if self.num_answered != len(adapters) * self.sizes.num_tokens:
            raise RuntimeError(f"only {self.num_answered} tokens came")
        return self.num_answered / (time.perf_counter() - start)

    def _request(self, number: int, adapter: Adapter | None) -> Submit:
        ids = [(number * 31 + place * 7) % self.sizes.vocab for place in range(self.sizes.num_prompt)]
        params = SamplingParams(max_new_tokens=self.sizes.num_tokens, ignore_eos=True)
        return Submit(
            request_id=str(number),
            epoch=1,
            prompt_ids=ids,
            output_ids=[],
            params=params,
            eos_token_ids=[],
            adapter=adapter,
        )

    def _receive(self, message: Step | AdapterChecked) -> None:
        if isinstance(message, Step):
            self.num_answered += sum(len(run.ids) for run in message.runs)
            self.inbox.put(Commit(message.step))


def measure(sizes: Sizes, targets: str, rounds: int) -> Result:
    with tempfile.TemporaryDirectory(prefix="inferfleet-bench-") as name:
        folder = Path(name)
        engine = Engine(write_model(folder / "model", sizes), sizes)
        adapters = [
            engine.check(f"a{number}", write_adapter(folder / f"a{number}", sizes, TARGETS[targets], number))
            for number in range(sizes.num_registered)
        ]
        # spread over all of them, and loaded by a round that does not count
        active = adapters[:: max(sizes.num_registered // sizes.num_active, 1)][: sizes.num_active]
        none: list[Adapter | None] = [None] * sizes.num_requests
        some: list[Adapter | None] = [active[number % len(active)] for number in range(sizes.num_requests)]
        engine.sizes = replace(sizes, num_tokens=min(sizes.num_tokens, 8))
        for requests in (none, some):
            engine.tokens_per_s(requests)
        engine.sizes = sizes
        pairs = [(engine.tokens_per_s(none), engine.tokens_per_s(some)) for _ in range(rounds)]
    base, adapted = ([pair[side] for pair in pairs] for side in (0, 1))
    return Result(base, adapted, engine.most_adapters, int(engine.scheduler.stats.batch_max))


def table(result: Result, targets: str) -> str:
    rows = [
        ("tokens per second, base alone", _spread(result.base), ""),
        (f"the same with {result.most_adapters} adapters in the batch ({targets})", _spread(result.adapted), ""),
        ("ratio, median of the rounds'", f"{result.ratio:.3f}", f"at least {MIN_RATIO}"),
    ]
    lines = [f"| {label} | {value} | {bar} |\n" for label, value, bar in rows]
    return "| measure | median (worst to best) | bar |\n|---|---|---|\n" + "".join(lines)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--targets", choices=TARGETS, default="all", help="what of every layer the adapters change")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--short", action="store_true", help="a dry run; its figures mean nothing")
    for name in ("num_layers", "num_tokens"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    options = parser.parse_args(arguments)
    changed = {name: getattr(options, name) for name in ("num_layers", "num_tokens") if getattr(options, name)}
    sizes = replace(SHORT if options.short else Sizes(), **changed)
    result = measure(sizes, options.targets, options.rounds)
    fields: dict[str, Any] = {"targets": options.targets, "ratio": result.ratio} | asdict(result)
    sys.stdout.write(json.dumps(fields) + "\n" if options.json else table(result, options.targets))
    return 0 if options.short or result.ratio >= MIN_RATIO else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
