"""Memory and time of loading weights, rank by rank, on a dummy checkpoint in several files.

python -m ops.bench.load [--gigabytes 2] [--shards 2] [--rounds 3]

Memory: the peak of RssAnon + RssShmem of each rank above what its imports took, sampled every 20 ms; the bar is 1.15
times its share of the weights + the largest tensor + 100 MB. Time, on one rank: a cold load (the files dropped from the
page cache before) over a cold read of the files + the copying of all weights from memory to memory; the bar is 1.4.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_TIME_RATIO = 1.4
SHARE_FACTOR, ALLOWANCE_BYTES = 1.15, 100_000_000
SAMPLE_S = 0.02
NUM_FILES = 4
READ_BYTES = 16 << 20
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 16,
    "vocab_size": 8000,
    "max_position_embeddings": 2048,
}
LAYER_BYTES = 2 * (4 * 2048 * 2048 + 3 * 2048 * 8192)


@dataclass(frozen=True)
class Loaded:
    """What one rank took: seconds of its `what`, and bytes at its peak above the baseline."""

    seconds: float
    peak_bytes: int


def write_checkpoint(folder: Path, gigabytes: float) -> int:
    """A Llama of so many gigabytes in four files; the bytes of its largest tensor."""
    import torch
    from safetensors.torch import save_file

    config = CONFIG | {"num_hidden_layers": max(round(gigabytes * 1e9 / LAYER_BYTES), 1)}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = tensor_shapes(config)
    names, places = list(shapes), {}
    for number in range(NUM_FILES):
        file = f"model-{number + 1:05}-of-{NUM_FILES:05}.safetensors"
        mine = names[len(names) * number // NUM_FILES : len(names) * (number + 1) // NUM_FILES]
        # a head like the embedding would be shared with it
        values = {name: 0.02 if name == "lm_head.weight" else 0.01 for name in mine}
        save_file({name: torch.full(shapes[name], values[name], dtype=torch.bfloat16) for name in mine}, folder / file)
        places.update(dict.fromkeys(mine, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return max(2 * math.prod(shape) for shape in shapes.values())


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Llama of this configuration."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (config["vocab_size"], hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{prefix}mlp.{name}_proj.weight": (ffn, hidden) for name in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, ffn)
        shapes |= {f"{prefix}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    return shapes


def drop_from_cache(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cold_read_s(folder: Path) -> float:
    drop_from_cache(folder)
    start = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.read(READ_BYTES):
                pass
    return time.perf_counter() - start


def memory_of(pid: int) -> int:
    """RssAnon + RssShmem in bytes; what is mapped from files can be dropped at any time and does not count."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def run_ranks(folder: Path, what: str, num_shards: int) -> list[Loaded]:
    """One process a rank, all at once, each measured from the end of its imports to the end of its load."""
    with ExitStack() as stack:
        children = [stack.enter_context(start_child(folder, what, rank, num_shards)) for rank in range(num_shards)]
        for child in children:
            wait_for(child, "ready")
        baselines = [memory_of(child.pid) for child in children]
        for child in children:
            assert child.stdin is not None
            child.stdin.write("go\n")
            child.stdin.flush()
        peaks = watch(children, baselines)
        seconds = [float(wait_for(child, "seconds")) for child in children]
    taken = [peak - baseline for peak, baseline in zip(peaks, baselines, strict=True)]
    return [Loaded(*row) for row in zip(seconds, taken, strict=True)]


def watch(children: Sequence[subprocess.Popen[str]], baselines: Sequence[int]) -> list[int]:
    """The most memory that each had until all have ended."""
    peaks = list(baselines)
    while any(child.poll() is None for child in children):
        for index, child in enumerate(children):
            if child.poll() is None:
                peaks[index] = max(peaks[index], memory_of(child.pid))
        time.sleep(SAMPLE_S)
    return peaks


def start_child(folder: Path, what: str, rank: int, num_shards: int) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "ops.bench.load", "--child", what, "--folder", str(folder)]
    words += ["--rank", str(rank), "--shards", str(num_shards)]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wait_for(child: subprocess.Popen[str], word: str) -> str:
    """What the child says after `word`."""
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith(word):
            return line.removeprefix(word).strip() or word
    raise RuntimeError(f"a rank ended with status {child.wait()} before it said {word!r}")


def child_main(folder: Path, what: str, rank: int, num_shards: int) -> None:
    from ops.bench import load_child

    work = load_child.prepare(folder, what, rank, num_shards)
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    kept = work()
    print("seconds", time.perf_counter() - start, flush=True)
    # a last look at what remains
    time.sleep(2 * SAMPLE_S)
    del kept


def memory_bar(share_bytes: int, largest_bytes: int) -> int:
    return int(SHARE_FACTOR * share_bytes) + largest_bytes + ALLOWANCE_BYTES


def report_memory(folder: Path, largest_bytes: int, num_shards: int) -> bool:
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    bar, is_within = memory_bar(total // num_shards, largest_bytes), True
    for rank, loaded in enumerate(run_ranks(folder, "load", num_shards)):
        is_within &= loaded.peak_bytes <= bar
        print(f"{num_shards} shards, rank {rank}: peak {loaded.peak_bytes / 1e6:.0f} MB, bar {bar / 1e6:.0f} MB")
    return is_within


def report_time(folder: Path, rounds: int) -> bool:
    ratios = []
    for number in range(rounds):
        read_s = cold_read_s(folder)
        (packed,) = run_ranks(folder, "pack", 1)
        drop_from_cache(folder)
        (loaded,) = run_ranks(folder, "load", 1)
        ratios.append(loaded.seconds / (read_s + packed.seconds))
        parts = f"read {read_s:.2f} s, packing {packed.seconds:.2f} s, load {loaded.seconds:.2f} s"
        print(f"round {number + 1}: {parts}, ratio {ratios[-1]:.2f}")
    print(f"median ratio {statistics.median(ratios):.2f}, bar {MAX_TIME_RATIO}")
    return statistics.median(ratios) <= MAX_TIME_RATIO


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        child_main(options.folder, options.child, options.rank, options.shards)
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        largest_bytes = write_checkpoint(folder, options.gigabytes)
        results = [report_memory(folder, largest_bytes, shards) for shards in sorted({1, options.shards})]
        results.append(report_time(folder, options.rounds))
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
