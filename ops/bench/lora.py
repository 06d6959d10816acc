"""What adapters cost: tokens per second of the engine with the base alone, and with 8 of 64 adapters in the batch.

python -m ops.bench.lora [--rounds 5] [--targets all|attention] [--json FILE]

A Llama of 443 million parameters with random weights in bfloat16 answers 32 requests at once, among which adapters of
rank 8 are dealt out, or none: in turn, in one process. All 64 are checked against the model before; a round that loads
those in use comes first and does not count. The bar is for the median of the rounds' ratios. `--short` is a dry run of
seconds on a tiny model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.job import Adapter, SamplingParams
from common.settings import WorkerSettings
from ops.bench.quant import CONFIG
from worker.pipe import Submit

MIN_RATIO = 0.85
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
TARGETS = {"attention": ATTENTION, "all": (*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")}


@dataclass(frozen=True)
class Sizes:
    """Of the adapters and of what is asked; `config` is the model's."""

    config: dict[str, Any]
    rank: int = 8
    num_registered: int = 64
    num_active: int = 8
    num_requests: int = 32
    num_prompt: int = 64
    num_tokens: int = 64


TINY = {"hidden_size": 64, "head_dim": 4, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 300}
SHORT = Sizes(
    config=CONFIG | TINY,
    rank=2,
    num_registered=6,
    num_active=3,
    num_requests=6,
    num_prompt=6,
    num_tokens=6,
)


@dataclass(frozen=True)
class Result:
    """Tokens per second of each round."""

    base: list[float]
    adapted: list[float]
    largest_batch: int

    @property
    def ratio(self) -> float:
        return statistics.median(one / other for one, other in zip(self.adapted, self.base, strict=True))


def write_adapter(folder: Path, sizes: Sizes, targets: Sequence[str], seed: int) -> Path:
    import torch
    from safetensors.torch import save_file

    randomness, tensors = torch.Generator().manual_seed(seed), {}
    for layer in range(sizes.config["num_hidden_layers"]):
        for target in targets:
            num_out, num_in = shape_of(target, sizes.config)
            for side, shape in (("A", (sizes.rank, num_in)), ("B", (num_out, sizes.rank))):
                tensor = torch.randn(shape, generator=randomness, dtype=torch.bfloat16) * 0.02
                tensors[f"base_model.model.model.layers.{layer}.{target}.lora_{side}.weight"] = tensor
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": sizes.rank, "lora_alpha": 2 * sizes.rank, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def shape_of(target: str, config: dict[str, Any]) -> tuple[int, int]:
    """(out, in) of a matrix of the model."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    queries, keys = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": hidden, "down_proj": hidden}
    columns = {"o_proj": queries, "down_proj": ffn}
    name = target.rpartition(".")[2]
    return rows.get(name, ffn), columns.get(name, hidden)


def measure(sizes: Sizes, targets: str, rounds: int) -> Result:
    from ops.bench.offline import OfflineEngine

    with tempfile.TemporaryDirectory(prefix="inferfleet-bench-") as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(sizes.config))
        engine = OfflineEngine(_settings(folder, sizes))
        adapters = []
        for number in range(sizes.num_registered):
            source = str(write_adapter(folder / str(number), sizes, TARGETS[targets], number))
            checked = engine.device.check_adapter(str(number), source)
            if checked.error:
                raise RuntimeError(checked.error)
            adapters.append(Adapter(checked.name, source, checked.digest))
        active = adapters[:: sizes.num_registered // sizes.num_active][: sizes.num_active]
        none, some = requests(sizes, [None]), requests(sizes, active)
        runs = [(engine.run(none), engine.run(some)) for _ in range(rounds + 1)][1:]
    base, adapted = ([run.num_tokens / run.seconds for run in side] for side in zip(*runs, strict=True))
    return Result(base, adapted, runs[0][1].largest_batch)


def _settings(folder: Path, sizes: Sizes) -> WorkerSettings:
    return WorkerSettings(
        model_id=str(folder),
        load_format="dummy",
        max_num_seqs=sizes.num_requests,
        max_loras=sizes.num_active,
        kv_tokens=sizes.num_requests * (sizes.num_prompt + sizes.num_tokens + 64),
        # a prefix that was computed before would be measured as if it cost nothing
        prefix_caching=False,
    )


def requests(sizes: Sizes, adapters: Sequence[Adapter | None]) -> list[Submit]:
    """A batch among which `adapters` are dealt out in turn."""
    vocab_size = sizes.config["vocab_size"]
    return [
        Submit(
            request_id=str(number),
            epoch=1,
            prompt_ids=[(31 * number + 7 * place) % vocab_size for place in range(sizes.num_prompt)],
            output_ids=[],
            params=SamplingParams(max_new_tokens=sizes.num_tokens, ignore_eos=True),
            eos_token_ids=[],
            adapter=adapters[number % len(adapters)],
        )
        for number in range(sizes.num_requests)
    ]


def table(result: Result, sizes: Sizes, targets: str) -> str:
    rows = [
        ("tokens per second, base alone", _spread(result.base), ""),
        (f"the same, {sizes.num_active} adapters in the batch ({targets})", _spread(result.adapted), ""),
        ("ratio, median of the rounds", f"{result.ratio:.3f}", f"at least {MIN_RATIO}"),
    ]
    lines = [f"| {label} | {value} | {bar} |\n" for label, value, bar in rows]
    return "| measure | median (worst to best) | bar |\n|---|---|---|\n" + "".join(lines)


def table_of_file(found: dict[str, Any]) -> str:
    """Of what a run with the defaults has written."""
    return table(Result(found["base"], found["adapted"], found["largest_batch"]), Sizes(CONFIG), "all")


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--targets", choices=TARGETS, default="all", help="what of every layer the adapters change")
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"], help="fewer for a trial")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--short", action="store_true", help="a dry run; its figures mean nothing")
    options = parser.parse_args(arguments)
    sizes = SHORT if options.short else Sizes(CONFIG | {"num_hidden_layers": options.layers})
    result = measure(sizes, options.targets, options.rounds)
    if options.json:
        options.json.write_text(json.dumps(asdict(result) | {"ratio": result.ratio}, indent=2) + "\n")
    sys.stdout.write(table(result, sizes, options.targets))
    return 0 if options.short or result.ratio >= MIN_RATIO else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
