"""What a token costs Redis: calls and CPU time, with many running streams, and how evenly clients see them.

    python -m ops.bench.redis_cost [--streams 32] [--tokens 256]

It starts a Redis, a gateway and a worker with the demo model of its own. Two passes: one under MONITOR, which tells
commands of clients from those that functions issue, and one without it, for CPU time and gaps.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
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

from ops.cli.demo import fleet
from ops.redis_server import start_embedded

PROMPT = "Count to 100"


@dataclass(frozen=True, slots=True)
class Pass:
    """One round of all streams. Gaps and the step are in milliseconds, CPU in seconds."""

    num_tokens: int
    gaps_ms: list[float]
    step_ms: float
    redis_cpu_s: float


async def one_stream(client: httpx.AsyncClient, index: int, num_tokens: int) -> tuple[int, list[float]]:
    """Tokens received and the gaps between events."""
    messages = [{"role": "user", "content": f"{PROMPT} {index}"}]
    body: dict[str, Any] = {"messages": messages, "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
    moments: list[float] = []
    last = 0
    async with client.stream("POST", "/v1/chat/completions", json=body | {"temperature": 0}) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("id: "):
                last = int(line.removeprefix("id: "))
            elif line.startswith("data: {") and json.loads(line.removeprefix("data: "))["choices"]:
                moments.append(time.perf_counter())
    return last, [1000 * (after - before) for before, after in itertools.pairwise(moments[1:])]


async def all_streams(url: str, num_streams: int, num_tokens: int) -> list[tuple[int, list[float]]]:
    limits = httpx.Limits(max_connections=num_streams)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        return list(await asyncio.gather(*(one_stream(client, index, num_tokens) for index in range(num_streams))))


def cpu_seconds(server: redis.Redis) -> float:
    info: dict[str, Any] = server.info("cpu")
    return float(info["used_cpu_user"]) + float(info["used_cpu_sys"])


def engine_steps(url: str) -> float:
    workers = httpx.get(f"{url}/v1/fleet/workers").json()["data"]
    return float(sum(worker["stats"].get("steps", 0) for worker in workers))


def run_pass(url: str, server: redis.Redis, num_streams: int, num_tokens: int) -> Pass:
    steps, cpu, start = engine_steps(url), cpu_seconds(server), time.perf_counter()
    streams = asyncio.run(all_streams(url, num_streams, num_tokens))
    elapsed_ms = 1000 * (time.perf_counter() - start)
    used_cpu = cpu_seconds(server) - cpu
    # heartbeats carry the newest counters
    time.sleep(2)
    gaps = [gap for _, found in streams for gap in found]
    return Pass(sum(count for count, _ in streams), gaps, elapsed_ms / (engine_steps(url) - steps), used_cpu)


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
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="inferfleet-bench-") as folder:
        server = start_embedded(Path(folder))
        try:
            with fleet(folder, num_workers=1, redis_url=server.url) as client:
                return measure(str(client.base_url), server.url, options.streams, options.tokens)
        finally:
            server.stop()


def measure(url: str, redis_url: str, num_streams: int, num_tokens: int) -> int:
    client = redis.Redis.from_url(redis_url)
    run_pass(url, client, num_streams, 16)
    with monitored(redis_url) as counts:
        first = run_pass(url, client, num_streams, num_tokens)
    second = run_pass(url, client, num_streams, num_tokens)
    calls = sum(counts.values()) / first.num_tokens
    gap = statistics.median(second.gaps_ms)
    rows = [
        ("streams x tokens", f"{num_streams} x {num_tokens}", ""),
        ("calls to Redis per token", f"{calls:.4f}", "at most 0.06"),
        ("Redis CPU per token, µs", f"{1e6 * second.redis_cpu_s / second.num_tokens:.2f}", "at most 5"),
        ("engine step, ms", f"{second.step_ms:.2f}", ""),
        ("median gap between events, ms", f"{gap:.2f}", f"below {1.5 * second.step_ms:.2f}"),
    ]
    sys.stdout.write("| measure | value | bar |\n|---|---|---|\n")
    sys.stdout.writelines(f"| {name} | {value} | {bar} |\n" for name, value, bar in rows)
    sys.stdout.write(f"\ncalls by command: {dict(counts.most_common(8))}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
