"""What a token costs Redis: calls and CPU time, with many running streams, and how evenly clients see them.

    python -m ops.bench.redis_cost [--streams 32] [--tokens 256] [--rounds 10]

It starts a Redis, a gateway and a worker with the demo model of its own. One round under MONITOR tells the commands of
clients (among them the calls of functions) from those that functions issue; rounds without it give CPU time and gaps.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import redis

from common.settings import CommonSettings
from ops.cli.demo import fleet
from ops.redis_server import start_embedded

PROMPT = "Count to 100"
MAX_CALLS, MAX_CPU_US, MAX_GAP_STEPS = 0.06, 5.0, 1.5
WARM_UP_TOKENS = 16
BEAT_S = 2.0


@dataclass(frozen=True, slots=True)
class Stream:
    """What one client saw. Gaps in milliseconds: between events, and between the writes that brought one or more."""

    num_tokens: int
    event_gaps: list[float]
    write_gaps: list[float]


@dataclass(frozen=True, slots=True)
class Round:
    """One round of all streams. `step_ms` is the wall time of one engine step."""

    streams: list[Stream]
    step_ms: float
    redis_cpu_s: float

    @property
    def num_tokens(self) -> int:
        return sum(stream.num_tokens for stream in self.streams)

    @property
    def cpu_us(self) -> float:
        """Redis CPU per token in microseconds."""
        return 1e6 * self.redis_cpu_s / self.num_tokens

    @property
    def event_gap_ms(self) -> float:
        return statistics.median(gap for stream in self.streams for gap in stream.event_gaps)

    @property
    def write_gap_ms(self) -> float:
        return statistics.median(gap for stream in self.streams for gap in stream.write_gaps)


def gaps_ms(moments: list[float]) -> list[float]:
    """The first token comes before the batch is complete, so its gap does not count."""
    return [1000 * (after - before) for before, after in itertools.pairwise(moments[1:])]


async def one_stream(client: httpx.AsyncClient, index: int, num_tokens: int) -> Stream:
    messages = [{"role": "user", "content": f"{PROMPT} {index}"}]
    body: dict[str, Any] = {"messages": messages, "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
    events: list[float] = []
    writes: list[float] = []
    data = b""
    async with client.stream("POST", "/v1/chat/completions", json=body | {"temperature": 0}) as response:
        response.raise_for_status()
        async for part in response.aiter_raw():
            now = time.perf_counter()
            events += [now] * part.count(b'"content":')
            writes += [now] if b'"content":' in part else []
            data = (data + part)[-4096:]
    ids = [int(line.removeprefix(b"id: ")) for line in data.splitlines() if line.startswith(b"id: ")]
    return Stream(max(ids), gaps_ms(events), gaps_ms(writes))


async def all_streams(url: str, num_streams: int, num_tokens: int) -> list[Stream]:
    limits = httpx.Limits(max_connections=num_streams)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        return list(await asyncio.gather(*(one_stream(client, index, num_tokens) for index in range(num_streams))))


def cpu_seconds(server: redis.Redis) -> float:
    info: dict[str, Any] = server.info("cpu")
    return float(info["used_cpu_user"]) + float(info["used_cpu_sys"])


def engine_steps(url: str) -> float:
    workers = httpx.get(f"{url}/v1/fleet/workers").json()["data"]
    return float(sum(worker["stats"].get("steps", 0) for worker in workers))


def run_round(url: str, server: redis.Redis, num_streams: int, num_tokens: int) -> Round:
    steps, cpu, start = engine_steps(url), cpu_seconds(server), time.perf_counter()
    streams = asyncio.run(all_streams(url, num_streams, num_tokens))
    elapsed_ms = 1000 * (time.perf_counter() - start)
    used_cpu = cpu_seconds(server) - cpu
    # the counters of workers come with their heartbeats
    time.sleep(BEAT_S)
    return Round(streams, elapsed_ms / (engine_steps(url) - steps), used_cpu)


@contextmanager
def monitored(url: str) -> Iterator[Counter[str]]:
    """Counts the commands that clients send, as MONITOR shows them; those of functions are marked `lua` there."""
    counts: Counter[str] = Counter()
    stop = threading.Event()

    def read() -> None:
        with redis.Redis.from_url(url).monitor() as monitor:  # type: ignore[no-untyped-call]
            while not stop.is_set():
                event = monitor.next_command()
                if event["client_type"] != "lua":
                    counts[str(event["command"]).split(" ", 1)[0].lower()] += 1

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    time.sleep(0.3)
    yield counts
    stop.set()
    redis.Redis.from_url(url).ping()
    thread.join(5)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args(arguments)
    lease_s = CommonSettings.model_fields["lease"].default
    with tempfile.TemporaryDirectory(prefix="inferfleet-bench-") as folder:
        server = start_embedded(Path(folder))
        try:
            with fleet(folder, num_workers=1, redis_url=server.url, lease_s=lease_s) as client:
                measure(str(client.base_url), server.url, options.streams, options.tokens, options.rounds)
        finally:
            server.stop()
    return 0


def measure(url: str, redis_url: str, num_streams: int, num_tokens: int, num_rounds: int) -> None:
    client = redis.Redis.from_url(redis_url)
    run_round(url, client, num_streams, WARM_UP_TOKENS)
    with monitored(redis_url) as counts:
        first = run_round(url, client, num_streams, num_tokens)
    rounds = [run_round(url, client, num_streams, num_tokens) for _ in range(num_rounds)]
    sys.stdout.write(table(counts, first, rounds, num_tokens))


def table(counts: Counter[str], first: Round, rounds: list[Round], num_tokens: int) -> str:
    """Costs and gaps of the round with the shortest engine step, which was disturbed least; the range of all rounds."""
    calls = sum(counts.values()) / first.num_tokens
    others = sum(counts.values()) - counts["fcall"]
    best = min(rounds, key=lambda one: one.step_ms)
    costs, steps = [one.cpu_us for one in rounds], [one.step_ms for one in rounds]
    gaps, writes = [one.event_gap_ms / one.step_ms for one in rounds], [one.write_gap_ms for one in rounds]
    rows = [
        ("streams x tokens", f"{len(first.streams)} x {num_tokens}", ""),
        ("calls to Redis per token", f"{calls:.4f}", f"at most {MAX_CALLS}"),
        ("of these: calls of functions, other commands", f"{counts['fcall']}, {others}", ""),
        ("engine step, ms", spread(best.step_ms, steps), ""),
        ("Redis CPU per token, µs", spread(best.cpu_us, costs), f"at most {MAX_CPU_US:g}"),
        (
            "median gap between events, in engine steps",
            spread(best.event_gap_ms / best.step_ms, gaps),
            f"below {MAX_GAP_STEPS}",
        ),
        ("median gap between writes, ms", spread(best.write_gap_ms, writes), ""),
    ]
    lines = [f"| {name} | {value} | {bar} |\n" for name, value, bar in rows]
    return "| measure | least disturbed round (all rounds) | bar |\n|---|---|---|\n" + "".join(lines)


def spread(chosen: float, values: list[float]) -> str:
    return f"{chosen:.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
