"""What the machine can do, behind `ops.bench.peers.pipe`: the rates of `ops.bench.roofline` in a process of its own."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ops.bench.offline import wait_as_workers_do
from ops.bench.peers.pipe import serve


class Rates:
    def __init__(self, order: dict[str, Any]) -> None:
        wait_as_workers_do()
        # not above: torch is to find that environment
        from ops.bench.roofline import RateMeter

        self._meter = RateMeter(order["dtype"])

    def measure(self) -> dict[str, float]:
        return asdict(self._meter())


if __name__ == "__main__":
    serve(Rates)
