"""What a streamed token costs before and behind the model: CPU time of gateway, Redis, agent and engine process.

    python -m ops.bench.serving_cost [--clients 1,8,32,128] [--rounds 3] [--json FILE]

It starts a Redis, a gateway and a worker whose device only waits (see `ops.bench.paced`), and lets clients stream from
each of three doors, one request after the other. Of each process the kernel's own count of CPU time is read before and
after a round, submissions and ends included. Microseconds a token are milliseconds in 1,000 tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ops.bench.start import seconds_until
from ops.cli.demo import free_port
from ops.redis_server import start_embedded

CLIENTS = (1, 8, 32, 128)
MIN_REQUESTS, MIN_STREAMS = 2, 16
SHORTEST, LONGEST = 64, 192
IDLE_S = 10.0
SETTLE_S = 0.3
STRANGERS = ("REDIS_URL", "API_KEY", "MODEL_ID", "PORT", "HOSTNAME")
PROMPT = "Write about the sea, its islands and the people who live there, in plain words. " * 3
PARTS = ("gateway", "redis", "agent", "engine")
SEEN = {
    "events_per_write": "events a write",
    "first_token_ms": "first token, ms",
    "write_gap_ms": "between writes, ms",
    "write_gap_p99_ms": "its p99",
}

Body = dict[str, Any]


def completion_body(num_tokens: int) -> Body:
    return {"prompt": PROMPT, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, "stream": True}


def chat_body(num_tokens: int) -> Body:
    messages = [{"role": "user", "content": PROMPT}]
    return {"messages": messages, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, "stream": True}


def generate_body(num_tokens: int) -> Body:
    return {"inputs": PROMPT, "parameters": {"max_new_tokens": num_tokens}}


DOORS = {
    "completions": ("/v1/completions", completion_body),
    "chat": ("/v1/chat/completions", chat_body),
    "generate": ("/generate_stream", generate_body),
}


@dataclass(slots=True)
class Stream:
    """What one client saw. Moments are seconds of `perf_counter`, one for each read that brought events with text."""

    sent: float = 0.0
    reads: list[float] = field(default_factory=list)
    num_events: int = 0
    tail: bytes = b""

    @property
    def num_tokens(self) -> int:
        ids = [line.removeprefix(b"id: ") for line in self.tail.splitlines() if line.startswith(b"id: ")]
        return int(ids[-1]) if ids else 0


class Client(asyncio.Protocol):
    """One request over a connection of its own; does as little as it can with what comes."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.stream = Stream()
        self.ended: asyncio.Future[Stream] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self.stream.sent = time.perf_counter()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        stream, count = self.stream, data.count(b'"text":') + data.count(b'"content":')
        if count:
            stream.reads.append(time.perf_counter())
            stream.num_events += count
        stream.tail = (stream.tail + data)[-4096:]

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(self.stream)


def request_bytes(door: str, num_tokens: int) -> bytes:
    path, body_of = DOORS[door]
    body = json.dumps(body_of(num_tokens)).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: bench\r\nconnection: close\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def num_tokens_of(client: int, index: int) -> int:
    """Answers of different lengths, so that requests come while others are under way."""
    return SHORTEST + (37 * client + 61 * index) % (LONGEST - SHORTEST + 1)


async def one_client(port: int, door: str, number: int, num_requests: int) -> list[Stream]:
    loop, streams = asyncio.get_running_loop(), []
    for index in range(num_requests):
        request = request_bytes(door, num_tokens_of(number, index))
        _, client = await loop.create_connection(partial(Client, request), "127.0.0.1", port)
        streams.append(await client.ended)
    return streams


async def all_clients(port: int, door: str, num_clients: int, num_requests: int) -> list[Stream]:
    found = await asyncio.gather(*(one_client(port, door, number, num_requests) for number in range(num_clients)))
    return [stream for streams in found for stream in streams]


def cpu_seconds(pid: int) -> float:
    """User and system time of a process with all its threads, as clock_getcpuclockid(3) gives it: in nanoseconds,
    where /proc counts hundredths of seconds."""
    return time.clock_gettime((~pid << 3) | 2)


@dataclass(frozen=True, slots=True)
class Fleet:
    """`pids` by the names of PARTS."""

    port: int
    pids: dict[str, int]

    def cpu(self) -> dict[str, float]:
        return {name: cpu_seconds(pid) for name, pid in self.pids.items()}


@contextmanager
def process(folder: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    base = {key: value for key, value in os.environ.items() if key not in STRANGERS}
    with (folder / "log").open("ab") as log:
        started = subprocess.Popen([sys.executable, "-m", *words], stdout=log, stderr=log, env=base)
    try:
        yield started
    finally:
        started.send_signal(signal.SIGTERM)
        started.wait()


@contextmanager
def running_fleet(folder: Path, worker: Sequence[str]) -> Iterator[Fleet]:
    """Redis, a gateway and a worker: `worker` are the words of its command behind `python -m`."""
    port = free_port()
    with ExitStack() as stack:
        server = start_embedded(folder)
        stack.callback(server.stop)
        options = ("--redis-url", server.url)
        gateway = stack.enter_context(process(folder, "ops.cli", "gateway", "--port", str(port), *options))
        seconds_until(f"http://127.0.0.1:{port}", "/health/live")
        agent = stack.enter_context(process(folder, *worker, *options, "--graceful-termination-timeout", "1"))
        seconds_until(f"http://127.0.0.1:{port}", "/health", agent)
        (engine,) = children_of(agent.pid)
        yield Fleet(port, dict(zip(PARTS, (gateway.pid, server.process.pid, agent.pid, engine), strict=True)))


def children_of(pid: int) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        with suppress(OSError):
            status = (folder / "stat").read_text() if folder.name.isdigit() else ""
            if status and int(status.rpartition(")")[2].split()[1]) == pid:
                found.append(int(folder.name))
    return found


def run_round(fleet: Fleet, door: str, num_clients: int) -> dict[str, Any]:
    """CPU time of each part in microseconds a token; times that clients saw in milliseconds."""
    num_requests = max(MIN_REQUESTS, MIN_STREAMS // num_clients)
    before, own, began = fleet.cpu(), time.process_time(), time.perf_counter()
    streams = asyncio.run(all_clients(fleet.port, door, num_clients, num_requests))
    elapsed = time.perf_counter() - began
    own = time.process_time() - own
    time.sleep(SETTLE_S)
    after = fleet.cpu()
    num_tokens = sum(stream.num_tokens for stream in streams)
    wanted = sum(num_tokens_of(number, index) for number in range(num_clients) for index in range(num_requests))
    if num_tokens != wanted:
        raise RuntimeError(f"{num_tokens} tokens came instead of {wanted}")
    return {
        "cpu_us": {name: 1e6 * (after[name] - before[name]) / num_tokens for name in PARTS},
        "client_us": 1e6 * own / num_tokens,
        "tokens_per_s": num_tokens / elapsed,
        **seen_by(streams),
    }


def seen_by(streams: Sequence[Stream]) -> dict[str, float]:
    gaps = sorted(after - before for one in streams for before, after in itertools.pairwise(one.reads))
    num_events = sum(stream.num_events for stream in streams)
    return {
        "events_per_write": num_events / sum(len(stream.reads) for stream in streams),
        "first_token_ms": 1e3 * statistics.median(one.reads[0] - one.sent for one in streams),
        "write_gap_ms": 1e3 * statistics.median(gaps),
        "write_gap_p99_ms": 1e3 * gaps[99 * len(gaps) // 100],
    }


def run_idle(fleet: Fleet) -> dict[str, float]:
    """CPU time of each part in milliseconds a second while nothing is asked."""
    before = fleet.cpu()
    time.sleep(IDLE_S)
    return {name: 1e3 * (now - before[name]) / IDLE_S for name, now in fleet.cpu().items()}


def measure(fleet: Fleet, doors: Sequence[str], clients: Sequence[int], num_rounds: int) -> dict[str, Any]:
    """All doors and numbers of clients in turn, so many rounds; one round before them only warms up."""
    found: dict[str, Any] = {door: {str(count): [] for count in clients} for door in doors}
    for index in range(num_rounds + 1):
        for door in doors:
            for count in clients:
                row = run_round(fleet, door, count)
                found[door][str(count)] += [row] if index else []
    return found


def table(found: dict[str, Any]) -> str:
    titles = ["door", "clients", *PARTS, "all", *SEEN.values()]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for door, by_count in found.items():
        for count, rows in by_count.items():
            parts = [statistics.median(row["cpu_us"][name] for row in rows) for name in PARTS]
            seen = [statistics.median(row[name] for row in rows) for name in SEEN]
            cells = [door, count, *(f"{value:.1f}" for value in (*parts, sum(parts), *seen))]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def idle_table(idle: dict[str, float]) -> str:
    cells = " | ".join(f"{idle[name]:.2f}" for name in PARTS)
    return "| " + " | ".join(PARTS) + " |" + "\n" + "|---" * len(PARTS) + "|\n| " + cells + " |"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", default=",".join(map(str, CLIENTS)))
    parser.add_argument("--doors", default=",".join(DOORS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", default="ops.bench.paced", help="another worker: the words behind `python -m`")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    clients = [int(count) for count in options.clients.split(",")]
    with tempfile.TemporaryDirectory(prefix="inferfleet-bench-") as name:
        with running_fleet(Path(name), options.worker.split()) as fleet:
            streaming = measure(fleet, options.doors.split(","), clients, options.rounds)
            idle = run_idle(fleet)
    if options.json:
        options.json.write_text(json.dumps({"streaming": streaming, "idle_ms_per_s": idle}, indent=2) + "\n")
    print(table(streaming), idle_table(idle), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
