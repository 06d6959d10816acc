"""One engine in a process of its own, asked over its stdin and answering on its stdout, a line of JSON each.

Runs in the environments of peers: needs nothing but Python.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol


class Request(NamedTuple):
    prompt: list[int]
    num_output: int


class Engine(Protocol):
    """An engine with its model. Choices are greedy, an end-of-sequence token ends nothing."""

    def versions(self) -> dict[str, str]: ...

    def run(self, requests: list[Request]) -> list[int]:
        """All at once, to their ends; the number of tokens that each got."""

    def top(self, prompt: list[int], num_output: int, num_top: int) -> list[list[tuple[int, float]]]:
        """Of each token that follows: the likeliest ids with the logs of their probabilities, the likeliest first.
        Empty where the engine cannot tell."""


def serve(load: Callable[[dict[str, Any]], object]) -> None:
    """Answer the lines of stdin. The first is what `load` needs; of what that gives, others name a method and its
    arguments. What an engine prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    engine = load(json.loads(sys.stdin.readline()))
    answers.write(json.dumps({"loaded": True}) + "\n")
    for line in sys.stdin:
        name, arguments = json.loads(line)
        if name == "run":
            arguments = [[Request(*row) for row in arguments[0]]]
        started = time.perf_counter()
        result = getattr(engine, name)(*arguments)
        answers.write(json.dumps({"seconds": time.perf_counter() - started, "result": result}) + "\n")
