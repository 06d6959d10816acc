"""An engine behind `ops.bench.peers.pipe` that computes nothing. Its settings say how it behaves:

log      file where it notes the prompts of each run, a line of JSON
short    whether it leaves out a token of each request
says     what it prints before it ends instead of loading
shift    what it adds to log-probabilities
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from ops.bench.peers.pipe import Request, serve


class FakePeer:
    def __init__(self, order: dict[str, Any]) -> None:
        self._settings = order["settings"]
        if "says" in self._settings:
            sys.exit(self._settings["says"])
        sys.stdout.write("this is no answer\n")
        sys.stdout.flush()

    def versions(self) -> dict[str, str]:
        return {"fake": "1.0"}

    def run(self, requests: list[Request]) -> list[int]:
        if "log" in self._settings:
            with Path(self._settings["log"]).open("a") as file:
                file.write(json.dumps([request.prompt for request in requests]) + "\n")
        return [request.num_output - bool(self._settings.get("short")) for request in requests]

    def top(self, prompt: list[int], num_output: int, num_top: int) -> list[list[tuple[int, float]]]:
        shift = self._settings.get("shift", 0.0)
        return [[(7 + place, -2.0 - place + shift) for place in range(num_top)]] * num_output

    def measure(self) -> dict[str, float]:
        return {"read_bytes_per_s": 1e10, "flops_per_s": 1e12}

    def large_pages(self) -> str | None:
        return os.environ.get("THP_MEM_ALLOC_ENABLE")


if __name__ == "__main__":
    serve(FakePeer)
