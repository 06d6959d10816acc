"""Over HTTP with streaming: tokens per second and latencies of this server beside vLLM's and llama.cpp's.

python -m ops.bench.serving_peers [--folder FOLDER] [--peers vllm,llama.cpp] [--clients 1,8,32,128] [--rounds 5]
                                  [--json FILE]

All serve the same random weights of a Llama of 125 million parameters in bfloat16 with room for 32,768 tokens of KV,
ours with Redis, gateway and worker, on the cores that the load client uses too. Clients ask for completions of 128
tokens for prompts of 64 random ones, each the next when it has its answer. Servers take turns, and in turn are first;
the others are stopped meanwhile, and each is warmed up before it is measured.

A number of clients that is measured again replaces its figures in the file and leaves the others. Exit status 1: a bar
is missed, and which. `--short` is a dry run of seconds with the demo model.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ops.bench.about import about, caption
from ops.bench.servers import (
    OURS,
    PEERS,
    Server,
    add_options,
    demo_serving,
    serving_of,
    standing,
    starters_of,
    vocabulary_of,
)
from ops.bench.serving_cost import PARTS
from ops.loadgen.answer import Answer
from ops.loadgen.prompts import MadeUp, Vocabulary
from ops.loadgen.result import LoadResult
from ops.loadgen.run import run_load
from ops.loadgen.workload import Workload

CLIENTS = (1, 8, 32, 128)
KV_TOKENS = 32_768
MIN_WARMING = 4
SETTLE_S = 0.3
MIN_SPEED, MIN_SPEED_ALONE, MANY_CLIENTS = 1.2, 1.0, 8
MAX_LATENCY = 1.0
LATENCIES = {"ttft_ms": "TTFT p50", "gap_p99_ms": "p99 between arrivals"}

Row = dict[str, Any]
Rounds = Mapping[str, Sequence[Row]]


@dataclass(frozen=True)
class Sizes:
    num_input: int = 64
    num_output: int = 128
    waves_of_one: int = 12
    min_waves: int = 2

    def num_requests(self, clients: int) -> int:
        """Whole waves, more of them where they are small."""
        return clients * max(self.min_waves, round(self.waves_of_one / math.sqrt(clients)))


SHORT = Sizes(num_input=8, num_output=16, waves_of_one=2, min_waves=1)


def measured(server: Server, vocabulary: Vocabulary, sizes: Sizes, clients: int, seed: str) -> Row:
    """One round at one server. CPU is in seconds for 1,000 tokens, by part and of the load client itself.

    Raises:
        RuntimeError: not every request was answered with its full length.
    """
    prompts = made_up(vocabulary, sizes.num_input, sizes.num_output, seed)
    warming = [prompts.ask_of(-1 - place) for place in range(max(clients, MIN_WARMING))]
    put(server, Workload.of(warming, clients=clients))
    before, num_requests = server.cpu_s(), sizes.num_requests(clients)
    result = put(server, Workload(ask_of=prompts.ask_of, num_requests=num_requests, clients=clients))
    time.sleep(SETTLE_S)
    after, row = server.cpu_s(), figures(result)
    per = 1000 / result.output_tokens
    return row | {
        "cpu_s": {part: per * (after[part] - before[part]) for part in before},
        "client_cpu_s": per * result.cpu_s,
    }


def made_up(vocabulary: Vocabulary, num_input: int, num_output: int, seed: str) -> MadeUp:
    lengths = [range(length, length + 1) for length in (num_input, num_output)]
    return MadeUp(vocabulary=vocabulary, input_range=lengths[0], output_range=lengths[1], seed=seed)


def put(server: Server, workload: Workload) -> LoadResult:
    result = run_load(server.target, workload)
    if result.is_interrupted:
        raise KeyboardInterrupt
    checked(result.answers)
    return result


def checked(answers: Iterable[Answer]) -> list[Answer]:
    """Raises RuntimeError if one of them is not as long as it was asked for, by the server's own count."""
    found = list(answers)
    for answer in found:
        if answer.error:
            raise RuntimeError(f"no answer: {answer.error}, {answer.message}")
        if answer.output_tokens != answer.max_tokens or not answer.times:
            raise RuntimeError(f"an answer has {answer.output_tokens} tokens instead of {answer.max_tokens}")
    return found


def figures(result: LoadResult) -> Row:
    """A gap lies between two arrivals of an answer: tokens that come in one read are one arrival, however many."""
    summary = result.summary()
    num_arrivals = sum(len(answer.times) for answer in result.good)
    return {
        "tokens_per_s": summary["output_tokens_per_s"],
        "ttft_ms": summary["ttft_ms"]["p50"],
        "gap_ms": summary["itl_ms"]["p50"],
        "gap_p99_ms": summary["itl_ms"]["p99"],
        "tpot_ms": summary["tpot_ms"]["p50"],
        "tokens_per_arrival": result.output_tokens / num_arrivals,
    }


def compare(
    servers: Mapping[str, Server], vocabulary: Vocabulary, sizes: Sizes, clients: int, num_rounds: int
) -> dict[str, list[Row]]:
    """Rows of every server, round by round; in a round all get the same prompts."""
    found: dict[str, list[Row]] = {name: [] for name in servers}
    for number in range(num_rounds):
        for name in in_turn(list(servers), number):
            sys.stderr.write(f"round {number + 1} of {num_rounds}, {clients} clients: {name}\n")
            with servers[name].at_work():
                found[name].append(measured(servers[name], vocabulary, sizes, clients, f"{clients} {number}"))
    return found


def measured_with(servers: Mapping[str, Server], num_rounds: int) -> Row:
    return {"about": about(num_rounds), "servers": {name: dict(server.about) for name, server in servers.items()}}


def in_turn(names: Sequence[str], number: int) -> list[str]:
    """Another one begins in each round."""
    first = number % len(names)
    return [*names[first:], *names[:first]]


# What it amounts to.


def ratio(rounds: Rounds, peer: str, figure: str) -> float:
    """Ours by the peer's: the median over rounds, since a machine may change its speed from one round to the next."""
    return ratio_of([row[figure] for row in rounds[OURS]], [row[figure] for row in rounds[peer]])


def ratio_of(ones: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(one / other for one, other in zip(ones, others, strict=True))


def peers_in(rounds: Rounds) -> list[str]:
    return [name for name in rounds if name != OURS]


def missed(found: Row) -> list[str]:
    """Bars that do not hold against every peer, in sentences."""
    levels = found["levels"].items()
    return [line for clients, level in levels for line in _missed_at(int(clients), level["rounds"])]


def _missed_at(clients: int, rounds: Rounds) -> Iterator[str]:
    bar = MIN_SPEED if clients >= MANY_CLIENTS else MIN_SPEED_ALONE
    for peer in peers_in(rounds):
        if (speed := ratio(rounds, peer, "tokens_per_s")) < bar:
            yield f"{clients} clients: {speed:.2f} times the tokens/s of {peer}, bar {bar}"
        for figure, name in LATENCIES.items():
            if (slowness := ratio(rounds, peer, figure)) > MAX_LATENCY:
                yield f"{clients} clients: {slowness:.2f} times the {name} of {peer}, bar {MAX_LATENCY}"


def table(found: Row) -> str:
    """When and with what it was measured, and two tables: speed, and the CPU time of every process."""
    levels = {int(clients): level["rounds"] for clients, level in found["levels"].items()}
    captions = "\n".join(_captions(found["levels"]))
    return "\n\n".join([captions, _speed_table(levels), _cpu_table(levels)])


def _captions(levels: Mapping[str, Row]) -> list[str]:
    """A line for each day and versions, with the numbers of clients that they hold for."""
    by_caption: dict[str, list[str]] = {}
    for clients, level in levels.items():
        by_caption.setdefault(caption_of(level), []).append(clients)
    return [f"- With {', '.join(clients)} clients: {text}" for text, clients in by_caption.items()]


def caption_of(found: Row) -> str:
    versions = [f"{name} {about['version']}" for name, about in found["servers"].items()]
    return f"{caption(found['about'])} Servers: {'; '.join(versions)}."


def _speed_table(levels: Mapping[int, Rounds]) -> str:
    titles = ["clients", "server", "tokens/s (range)", "TTFT p50, ms", "between arrivals p50, ms", "p99, ms"]
    titles += ["tokens an arrival", "ours to it: tokens/s", "TTFT", "p99"]
    rows = (_speed_row(clients, name, rounds) for clients, rounds in sorted(levels.items()) for name in rounds)
    return markdown(titles, rows)


def _speed_row(clients: int, name: str, rounds: Rounds) -> list[str]:
    rows = rounds[name]
    speeds = [row["tokens_per_s"] for row in rows]
    cells = [str(clients), name, f"{statistics.median(speeds):.0f} ({min(speeds):.0f} to {max(speeds):.0f})"]
    cells += [f"{median_of(rows, figure):.1f}" for figure in ("ttft_ms", "gap_ms", "gap_p99_ms")]
    cells += [f"{median_of(rows, 'tokens_per_arrival'):.2f}"]
    ratios = [f"{ratio(rounds, name, figure):.2f}" for figure in ("tokens_per_s", *LATENCIES)]
    return cells + (ratios if name != OURS else [""] * len(ratios))


def median_of(rows: Sequence[Row], figure: str) -> float:
    values: list[float] = [row[figure] for row in rows]
    return statistics.median(values)


def _cpu_table(levels: Mapping[int, Rounds]) -> str:
    peers = list(dict.fromkeys(name for rounds in levels.values() for name in peers_in(rounds)))
    titles = ["clients", *PARTS, f"{OURS}, all", *peers, "load client"]
    return markdown(titles, (_cpu_row(clients, rounds, peers) for clients, rounds in sorted(levels.items())))


def _cpu_row(clients: int, rounds: Rounds, peers: Sequence[str]) -> list[str]:
    parts = [statistics.median(row["cpu_s"][part] for row in rounds[OURS]) for part in PARTS]
    sums = {name: statistics.median(sum(row["cpu_s"].values()) for row in rows) for name, rows in rounds.items()}
    cells = [str(clients), *(f"{seconds:.3f}" for seconds in (*parts, sums[OURS]))]
    cells += [f"{sums[peer]:.3f}" if peer in sums else "" for peer in peers]
    return [*cells, f"{median_of(rounds[OURS], 'client_cpu_s'):.3f}"]


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, *rows]
    heads = ["| " + " | ".join(cells) + " |" for cells in lines]
    return "\n".join([heads[0], "|---" * len(titles) + "|", *heads[1:]])


def merged(known: Row, clients: int, level: Row) -> Row:
    """What a file has, with the figures for this number of clients."""
    levels = {**known.get("levels", {}), str(clients): level}
    return {"levels": {key: levels[key] for key in sorted(levels, key=int)}}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, PEERS)
    parser.add_argument("--clients", default=",".join(map(str, CLIENTS)))
    options = parser.parse_args(arguments)
    sizes, levels = SHORT if options.short else Sizes(), [int(count) for count in options.clients.split(",")]
    found = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    starters = starters_of(options)
    with tempfile.TemporaryDirectory(prefix="inferfleet-bench-") as name:
        room: Any = {"kv_tokens": KV_TOKENS, "num_slots": max(levels)}
        serving = demo_serving(**room) if options.short else serving_of(options.folder, **room)
        with standing(starters, Path(name), serving) as servers:
            for clients in levels:
                rounds = compare(servers, vocabulary_of(serving.model), sizes, clients, options.rounds)
                found = merged(found, clients, {**measured_with(servers, options.rounds), "rounds": rounds})
                if options.json:
                    options.json.write_text(json.dumps(found, indent=2) + "\n")
    return concluded(table(found), missed(found), is_short=options.short)


def concluded(text: str, misses: Sequence[str], *, is_short: bool) -> int:
    """Say what was found and which bars are missed; the exit status. A dry run misses none."""
    sys.stdout.write("\n".join([text, *misses]) + "\n")
    return 1 if misses and not is_short else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
