"""How the time of a decoding step grows with the batch, the context and the ranks, beside its roofline.

python -m ops.bench.scaling [--rounds 5] [--ranks 1,2] [--json FILE] [--plots FOLDER]

A Llama of 125 million parameters with random weights in bfloat16 decodes batches of 1 to 256 behind 128 tokens, and a
batch of 8 behind 128 to 8,192; once on one rank with all cores, once on two that share them. Each number of ranks has a
process with an engine of its own. They are asked in turn, a point after the other, so many rounds; a figure is the
median over rounds of a round's median step. What the machine can read and compute is measured between the points, and
the best that was seen makes the roofline (ops/bench/roofline.py).

A doubling of batch or context must not let the step grow more than MAX_EXCESS times as much as its roofline does, which
grows by the larger of two parts. A step that did one after the other would exceed that by 4/3 at most, where both are
equal: a bar of 1.5 leaves a little for noise, and no room for a cliff. Status 1 if there is one.

`--short` is a dry run of seconds on a tiny model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.settings import WorkerSettings
from ops.bench.about import about, caption
from ops.bench.load import wait_for
from ops.bench.quant import order
from ops.bench.roofline import Machine, RateMeter, best, decode_work
from ops.bench.speculation import CONFIG, TINY, submit
from ops.loadgen.svg import Chart, Series, draw

if TYPE_CHECKING:
    from ops.bench.offline import OfflineEngine

MAX_EXCESS = 1.5
NUM_WARM = 3
MIN_ADMITTED = 16
KEPT_TOKENS = 64
"""Room of each request behind its context."""

Point = tuple[int, int]
"""(batch, context)"""


@dataclass(frozen=True)
class Sweep:
    """One of batch and context is `varied`, in doublings, and the other one fixed."""

    varied: str
    values: tuple[int, ...]
    fixed: int

    @property
    def points(self) -> list[Point]:
        return [(value, self.fixed) if self.varied == "batch" else (self.fixed, value) for value in self.values]


@dataclass(frozen=True)
class Sizes:
    config: dict[str, Any]
    sweeps: tuple[Sweep, ...]
    num_steps: int

    @property
    def points(self) -> list[Point]:
        return list(dict.fromkeys(point for sweep in self.sweeps for point in sweep.points))

    @property
    def most_tokens(self) -> int:
        return max(context for _, context in self.points) + KEPT_TOKENS

    @property
    def kv_tokens(self) -> int:
        """Enough to keep the prompts of all points, which so are computed in the first round only: shorter ones are
        the beginnings of longer ones."""
        largest = [sweep.points[-1] for sweep in self.sweeps]
        return sum(batch * (context + KEPT_TOKENS) for batch, context in largest)


FULL = Sizes(
    CONFIG | {"max_position_embeddings": 16384},
    (
        Sweep("batch", (1, 2, 4, 8, 16, 32, 64, 128, 256), fixed=128),
        Sweep("context", (128, 256, 512, 1024, 2048, 4096, 8192), fixed=8),
    ),
    num_steps=16,
)
SHORT = Sizes(CONFIG | TINY, (Sweep("batch", (1, 2, 4), fixed=16), Sweep("context", (16, 32), fixed=2)), num_steps=4)


# An engine, in a process of its own.


def child_main(folder: Path, num_ranks: int, sizes: Sizes) -> None:
    """Says the seconds of a step for each line with a batch and a context."""
    settings = WorkerSettings(
        model_id=str(folder),
        load_format="dummy",
        dtype="bfloat16",
        num_shard=num_ranks,
        kv_tokens=sizes.kv_tokens,
        max_total_tokens=sizes.most_tokens,
        max_num_seqs=max(batch for batch, _ in sizes.points),
        # a slow step would let the next requests in one by one, and their batch would never be whole
        prefill_step=0,
    )
    with engine_of(settings) as engine:
        print("ready", flush=True)
        for line in sys.stdin:
            batch, context = map(int, line.split())
            print("seconds", step_seconds(engine, sizes, batch, context), flush=True)


@contextmanager
def engine_of(settings: WorkerSettings) -> Iterator[OfflineEngine]:
    """Of one rank, or as rank 0 of several."""
    from ops.bench.offline import OfflineEngine, wait_as_workers_do

    if settings.num_shard == 1:
        yield OfflineEngine(settings)
        return
    wait_as_workers_do(settings.threads, settings.num_shard)
    from worker.parallel.leader import Leader
    from worker.parallel.loading import load_torch_device

    leader = Leader(settings, lambda message: None)
    try:
        own, ready = load_torch_device(settings, leader.on_progress, leader.meeting)
        device: Any = leader.lead(own, ready)
        yield OfflineEngine(settings, (device, ready))
    finally:
        leader.stop()


def step_seconds(engine: OfflineEngine, sizes: Sizes, batch: int, context: int) -> float:
    """The median over steps in which the whole batch decodes."""
    vocab_size = sizes.config["vocab_size"]
    prompts = [random.Random(row).choices(range(vocab_size), k=context) for row in range(batch)]

    def asked(num_tokens: int) -> list[Any]:
        return [submit(str(row), ids, num_tokens, {"ignore_eos": True}) for row, ids in enumerate(prompts)]

    # prompts go into the prefix cache, so that answers then begin in a few steps, which each let some requests in
    engine.run(asked(1))
    for request in asked(NUM_WARM + sizes.num_steps + 1 + batch // MIN_ADMITTED):
        engine.send(request)
    seconds, num_left, begun = list[float](), batch, set[str]()
    while num_left:
        is_whole = len(begun) == batch
        started = time.perf_counter()
        runs = engine.turn()
        seconds += [time.perf_counter() - started] if is_whole and len(runs) == batch else []
        begun |= {run.request_id for run in runs}
        num_left -= sum(bool(run.finish) for run in runs)
    if len(seconds) < sizes.num_steps:
        raise RuntimeError(f"{batch} requests decoded together in {len(seconds)} steps only")
    return statistics.median(seconds[NUM_WARM:])


# All of them in turn.


def measure(folder: Path, sizes: Sizes, ranks: Sequence[int], rounds: int, short: Sequence[str]) -> dict[str, Any]:
    from ops.bench.offline import wait_as_workers_do

    wait_as_workers_do()
    (folder / "config.json").write_text(json.dumps(sizes.config))
    with ExitStack() as stack:
        # leaving it closes their input, which ends them
        children = {count: stack.enter_context(start_child(folder, count, short)) for count in ranks}
        for child in children.values():
            wait_for(child, "ready")
        meter, machines = RateMeter(is_short=bool(short)), list[Machine]()
        found: dict[tuple[int, Point], list[float]] = {(count, point): [] for count in ranks for point in sizes.points}
        for number in range(rounds):
            for batch, context in sizes.points:
                machines.append(meter())
                for count in ranks[:: 1 if number % 2 else -1]:
                    said = order(children[count], f"{batch} {context}", "seconds")
                    found[count, (batch, context)].append(float(said))
    points = [
        {"ranks": count, "batch": batch, "context": context, "step_s": seconds}
        for (count, (batch, context)), seconds in found.items()
    ]
    sweeps = [asdict(sweep) for sweep in sizes.sweeps]
    machine = asdict(best(machines))
    return {"about": about(rounds), "config": sizes.config, "machine": machine, "sweeps": sweeps, "points": points}


def start_child(folder: Path, num_ranks: int, short: Sequence[str]) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "ops.bench.scaling", "--child", str(num_ranks), "--folder", str(folder), *short]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


# What is printed and drawn.


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds of a step at the points of a sweep."""

    name: str
    seconds: list[float]

    @property
    def growth(self) -> list[float]:
        """Of each step by the one before it."""
        return [after / before for before, after in itertools.pairwise(self.seconds)]


def sweeps_of(found: dict[str, Any]) -> Iterator[tuple[Sweep, list[Curve]]]:
    """Of what `--json` has written: a curve for each number of ranks, then the roofline's."""
    for each in found["sweeps"]:
        sweep = Sweep(each["varied"], tuple(each["values"]), each["fixed"])
        measured = [
            Curve(f"{count} rank{'s' * (count > 1)}", [_median_step(found, count, point) for point in sweep.points])
            for count in sorted({point["ranks"] for point in found["points"]})
        ]
        yield sweep, [*measured, Curve("roofline", [_least_step(found, point) for point in sweep.points])]


def _median_step(found: dict[str, Any], num_ranks: int, point: Point) -> float:
    by_place = {(row["ranks"], row["batch"], row["context"]): row["step_s"] for row in found["points"]}
    seconds: list[float] = by_place[num_ranks, *point]
    return statistics.median(seconds)


def _least_step(found: dict[str, Any], point: Point) -> float:
    batch, context = point
    return decode_work(found["config"], batch, context).seconds(Machine(**found["machine"]))


def table(found: dict[str, Any]) -> str:
    parts = [caption(found["about"])]
    for sweep, curves in sweeps_of(found):
        names = [curve.name for curve in curves]
        titles = [sweep.varied, *(f"{name}, ms" for name in names), *(f"{name}, tokens/s" for name in names)]
        titles += [f"growth: {name}" for name in names]
        lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
        lines += [_row(sweep, curves, place) for place in range(len(sweep.points))]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _row(sweep: Sweep, curves: Sequence[Curve], place: int) -> str:
    batch, _ = sweep.points[place]
    seconds = [curve.seconds[place] for curve in curves]
    cells = [str(sweep.values[place]), *(f"{1e3 * each:.2f}" for each in seconds)]
    cells += [f"{batch / each:.0f}" for each in seconds]
    cells += [f"{curve.growth[place - 1]:.2f}" if place else "" for curve in curves]
    return "| " + " | ".join(cells) + " |"


def cliffs(found: dict[str, Any]) -> list[str]:
    """The doublings that cost more than they may."""
    steep = []
    for sweep, curves in sweeps_of(found):
        *measured, least = curves
        for curve, place in itertools.product(measured, range(len(sweep.points) - 1)):
            own, other = curve.growth[place], least.growth[place]
            if own > MAX_EXCESS * other:
                step = f"{sweep.varied} {sweep.values[place]} to {sweep.values[place + 1]} on {curve.name}"
                steep.append(f"{step}: {own:.2f} times the time, bar {MAX_EXCESS} x {other:.2f} of the roofline")
    return steep


def plot(found: dict[str, Any], varied: str) -> str:
    """Tokens per second and milliseconds of a step against what is `varied`, as SVG."""
    sweep, curves = next(each for each in sweeps_of(found) if each[0].varied == varied)
    fixed = f"context {sweep.fixed}" if varied == "batch" else f"batch {sweep.fixed}"
    batches = [batch for batch, _ in sweep.points]
    rates = [[batch / each for batch, each in zip(batches, curve.seconds, strict=True)] for curve in curves]
    times = [[1e3 * each for each in curve.seconds] for curve in curves]
    charts = [
        Chart(
            title=f"{title}, {fixed}",
            x_label=varied,
            y_label=label,
            series=[Series(curve.name, sweep.values, each) for curve, each in zip(curves, ys, strict=True)],
            x_ticks=sweep.values,
            log_y=True,
        )
        for title, label, ys in (
            ("Throughput", "tokens per second", rates),
            ("Latency", "milliseconds of a step", times),
        )
    ]
    return draw(charts)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plots", type=Path, help="folder for the plots as SVG")
    parser.add_argument("--short", action="store_true", help="a dry run; its figures mean nothing")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    sizes = SHORT if options.short else FULL
    if options.child:
        child_main(options.folder, options.child, sizes)
        return 0
    ranks = [int(count) for count in options.ranks.split(",")]
    with tempfile.TemporaryDirectory(prefix="inferfleet-bench-") as name:
        found = measure(Path(name), sizes, ranks, options.rounds, ["--short"] * options.short)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    if options.plots:
        options.plots.mkdir(parents=True, exist_ok=True)
        for sweep in sizes.sweeps:
            (options.plots / f"scaling-{sweep.varied}.svg").write_text(plot(found, sweep.varied))
    steep = cliffs(found)
    sys.stdout.write("\n".join([table(found), *steep]) + "\n")
    return 1 if steep and not options.short else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
