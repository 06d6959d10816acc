"""Memory and speed of weights in few bits, beside the same model in bfloat16.

python -m ops.bench.quant [--rounds 5] [--schemes int8,int4] [--json FILE]

A Llama of 443 million parameters with random weights, one process a scheme, all loaded before anything is timed.
Memory: RssAnon + RssShmem above what the imports took, once the weights are there. Speed: requests of 64 tokens that
get 33 more, the schemes in turn, so many rounds; a scheme's figure is the median over rounds of bfloat16's time by its
own. The bars are for batch 1; the larger batches are for information.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.job import SamplingParams
from common.settings import WorkerSettings
from ops.bench.load import memory_of, wait_for
from worker.pipe import Submit

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 4096,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
BASE = "none"
SCHEMES = ("int8", "int4")
MEMORY_BARS, SPEED_BARS = {"int8": 0.57, "int4": 0.32}, {"int8": 1.2, "int4": 1.3}
BATCHES = (1, 8, 32)
NUM_PROMPT, NUM_OUTPUT, NUM_WARM = 64, 33, 3


def start_child(folder: Path, scheme: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "ops.bench.quant", "--child", scheme, "--folder", str(folder)]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def child_main(folder: Path, scheme: str) -> None:
    from ops.bench.offline import OfflineEngine

    print("ready", flush=True)
    sys.stdin.readline()
    options: dict[str, Any] = {"quantize": scheme, "load_format": "dummy", "kv_tokens": 8192, "prefix_caching": False}
    engine = OfflineEngine(WorkerSettings(model_id=str(folder), **options))
    print("loaded", flush=True)
    for line in sys.stdin:
        # a machine may have taken back memory that was idle
        engine.run(requests(int(line), NUM_WARM))
        run = engine.run(requests(int(line), NUM_OUTPUT))
        print("seconds", run.decode_s / (run.num_decoded / int(line)), flush=True)


def requests(count: int, num_tokens: int) -> list[Submit]:
    params = SamplingParams(max_new_tokens=num_tokens, ignore_eos=True)
    prompts = [
        [(7 * number + 13 * place) % CONFIG["vocab_size"] for place in range(NUM_PROMPT)] for number in range(count)
    ]
    return [
        Submit(request_id=f"{number}", epoch=1, prompt_ids=ids, output_ids=[], params=params, eos_token_ids=[])
        for number, ids in enumerate(prompts)
    ]


def order(child: subprocess.Popen[str], line: str, word: str) -> str:
    assert child.stdin is not None
    child.stdin.write(line + "\n")
    child.stdin.flush()
    return wait_for(child, word)


def measure(folder: Path, schemes: Sequence[str], rounds: int, batches: Sequence[int]) -> dict[str, Any]:
    """Bytes by scheme; seconds of a step by batch and scheme, one for each round."""
    children = {scheme: start_child(folder, scheme) for scheme in (BASE, *schemes)}
    try:
        memory = {scheme: _loaded_bytes(child) for scheme, child in children.items()}
        seconds: dict[str, dict[str, list[float]]] = {}
        for batch in batches:
            rows = [
                {scheme: float(order(child, str(batch), "seconds")) for scheme, child in children.items()}
                for _ in range(rounds)
            ]
            seconds[str(batch)] = {scheme: [row[scheme] for row in rows] for scheme in children}
    finally:
        for child in children.values():
            child.kill()
            child.wait()
    return {"bytes": memory, "step_seconds": seconds}


def _loaded_bytes(child: subprocess.Popen[str]) -> int:
    wait_for(child, "ready")
    before = memory_of(child.pid)
    order(child, "go", "loaded")
    return memory_of(child.pid) - before


def speeds(found: dict[str, Any], batch: str, scheme: str) -> list[float]:
    """How many times as fast as bfloat16, by round."""
    rows = found["step_seconds"][batch]
    return [base / own for base, own in zip(rows[BASE], rows[scheme], strict=True)]


def table(found: dict[str, Any]) -> str:
    batches = list(found["step_seconds"])
    titles = ["scheme", "weights, MB", "of bfloat16", *(f"speed at batch {batch} (range)" for batch in batches)]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for scheme, size in found["bytes"].items():
        cells = [scheme, f"{size / 1e6:.0f}", f"{size / found['bytes'][BASE]:.3f}"]
        for batch in batches:
            ratios = speeds(found, batch, scheme)
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def misses(found: dict[str, Any]) -> list[str]:
    """The bars that were not met."""
    missed = []
    for scheme, size in found["bytes"].items():
        share, bar = size / found["bytes"][BASE], MEMORY_BARS.get(scheme)
        if bar is not None and share > bar:
            missed.append(f"{scheme}: {share:.3f} of the memory of bfloat16, bar {bar}")
        speed = statistics.median(speeds(found, "1", scheme))
        if speed < SPEED_BARS.get(scheme, 0.0):
            missed.append(f"{scheme}: {speed:.2f} times as fast as bfloat16, bar {SPEED_BARS[scheme]}")
    return missed


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"], help="fewer for a trial")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        child_main(options.folder, options.child)
        return 0
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": options.layers}))
        batches = [int(batch) for batch in options.batches.split(",")]
        found = measure(Path(name), options.schemes.split(","), options.rounds, batches)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    missed = misses(found)
    print("\n".join([table(found), *missed]))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
