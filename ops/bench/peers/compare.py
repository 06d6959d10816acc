"""The measurements: engines loaded side by side, one of them awake at a time."""

from __future__ import annotations

import datetime
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from ops.bench.about import cpu_name
from ops.bench.peers.agreement import NUM_POSITIONS, NUM_TOP, difference, tolerance
from ops.bench.peers.checkpoints import DTYPES, SHAPES
from ops.bench.peers.children import Child, ChildFailed
from ops.bench.peers.engines import CANDIDATES, EXACT, OURS, RATES, Settings, Site, start
from ops.bench.peers.pipe import Request
from ops.bench.peers.results import Found, best_settings, merge
from ops.bench.peers.workloads import least_seconds, requests_of, warming
from ops.bench.roofline import Machine, best
from worker.kernels.build import cpu_flags

SWEEP_ROUNDS = 2
NUM_STARTS = 3
REST_S = 3.0
"""For what engines do in the background once they have loaded, before others are measured."""
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16")
"""Of the processor: those that products are written for."""


class Plan(NamedTuple):
    """What to measure. `save` is called whenever there is something new in `found`."""

    folder: Path
    shapes: Sequence[str]
    dtypes: Sequence[str]
    workloads: Sequence[str]
    engines: Sequence[str]
    repeats: int
    found: Found
    save: Callable[[], None]

    @property
    def sites(self) -> Iterator[Site]:
        for shape, dtype in itertools.product(self.shapes, self.dtypes):
            yield Site(shape, dtype, self.folder)

    def note(self, kind: str, entry: dict[str, Any]) -> None:
        merge(self.found, kind, entry)
        self.save()


class Awake:
    """Children of one site that sleep until they are asked for, at most one of each engine."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._children: dict[str, tuple[Settings, Child]] = {}

    def get(self, engine: str, settings: Settings) -> Child:
        """Asleep. Other settings mean another process."""
        if engine in self._children and self._children[engine][0] == settings:
            return self._children[engine][1]
        self.end(engine)
        say(f"start {engine} {json.dumps(settings)}")
        child = start(engine, self._site, settings)
        self._children[engine] = (settings, child)
        time.sleep(REST_S)
        child.pause()
        return child

    def end(self, engine: str) -> None:
        if engine in self._children:
            self._children.pop(engine)[1].close()

    def close(self) -> None:
        for engine in list(self._children):
            self.end(engine)


@contextmanager
def children_of(site: Site) -> Iterator[Awake]:
    children = Awake(site)
    try:
        yield children
    finally:
        children.close()


@contextmanager
def awake(child: Child) -> Iterator[Child]:
    child.resume()
    yield child
    child.pause()


def timed(child: Child, requests: list[Request], seed: str) -> float:
    with awake(child):
        child.run(warming(seed))
        return child.run(requests)


# What is measured.


def compare(plan: Plan) -> None:
    for site in plan.sites:
        with children_of(site) as children:
            if site.dtype == "float32":
                plan.note("agreements", agreement(plan, site, children))
            for workload in plan.workloads:
                plan.note("runs", compared(plan, site, workload, children))


def compared(plan: Plan, site: Site, workload: str, children: Awake) -> dict[str, Any]:
    """All engines in turn, each first in one round after the other; the same prompts for all of a round."""
    settings = {engine: best_settings(plan.found, site, workload, engine) for engine in plan.engines}
    running = {engine: children.get(engine, settings[engine]) for engine in plan.engines}
    meter = children.get(RATES, {})
    seconds: dict[str, list[float]] = {engine: [] for engine in plan.engines}
    rounds, rates = [], []
    for number in range(plan.repeats):
        rounds.append(requests_of(workload, f"round {number}"))
        shift = number % len(plan.engines)
        for engine in [*plan.engines[shift:], *plan.engines[:shift]]:
            seed = f"{workload} {number}"
            seconds[engine].append(timed(running[engine], rounds[-1], seed))
            say(f"{site.shape} {site.dtype} {workload} {number + 1}: {engine} {seconds[engine][-1]:.2f} s")
        with awake(meter):
            rates.append(Machine(**meter.ask("measure")))
    least = [least_seconds(SHAPES[site.shape], each, best(rates), DTYPES[site.dtype]) for each in rounds]
    return {
        **key_of(site, workload),
        **origin(),
        "settings": settings,
        "num_output": [sum(request.num_output for request in each) for each in rounds],
        "seconds": seconds,
        "rates": [asdict(rate) for rate in rates],
        "least_seconds": least,
        "versions": {engine: _versions(child) for engine, child in running.items()},
        "memory": {engine: child.memory()._asdict() for engine, child in running.items()},
    }


def sweep(plan: Plan) -> None:
    """Every candidate of every peer on every workload, a process for each of the candidates."""
    for site, engine in itertools.product(plan.sites, plan.engines):
        if engine == OURS:
            continue
        tried = [_tried(plan, site, engine, settings) for settings in CANDIDATES[engine]]
        for workload in plan.workloads:
            of_this = [{"settings": row["settings"], **row["found"][workload]} for row in tried]
            working = [row for row in of_this if "tokens_per_s" in row]
            if not working:
                raise ChildFailed(of_this[0]["error"])
            fastest = max(working, key=lambda row: row["tokens_per_s"])
            entry = {**key_of(site, workload), "engine": engine, **origin(), "tried": of_this}
            plan.note("sweeps", entry | {"best": fastest["settings"]})


def _tried(plan: Plan, site: Site, engine: str, settings: Settings) -> dict[str, Any]:
    """By workload: the median rate and that of each round, or why there is none."""
    found: dict[str, Any] = {}
    with children_of(site) as children:
        for workload in plan.workloads:
            try:
                rates = _swept(children.get(engine, settings), workload)
                found[workload] = {"tokens_per_s": statistics.median(rates), "rounds": rates}
            except ChildFailed as error:
                children.end(engine)
                found[workload] = {"error": str(error)}
            say(f"{site.shape} {site.dtype} {workload}: {engine} {json.dumps(settings)} {found[workload]}")
    return {"settings": settings, "found": found}


def _swept(child: Child, workload: str) -> list[float]:
    rates = []
    for number in range(SWEEP_ROUNDS):
        requests = requests_of(workload, f"sweep {number}")
        seconds = timed(child, requests, f"sweep {workload} {number}")
        rates.append(sum(request.num_output for request in requests) / seconds)
    return rates


def starts(plan: Plan) -> None:
    """Seconds from the start of a process to its first token, again and again; nothing else is loaded meanwhile."""
    for site in plan.sites:
        seconds: dict[str, list[float]] = {}
        for _, engine in itertools.product(range(NUM_STARTS), plan.engines):
            settings = best_settings(plan.found, site, "single", engine)
            child = start(engine, site, settings)
            try:
                child.run([requests_of("single", "start")[0]._replace(num_output=1)])
                seconds.setdefault(engine, []).append(child.age())
            finally:
                child.close()
            say(f"{site.shape} {site.dtype}: {engine} has its first token after {seconds[engine][-1]:.2f} s")
        plan.note("starts", {"shape": site.shape, "dtype": site.dtype, **origin(), "seconds": seconds})


def agreement(plan: Plan, site: Site, children: Awake) -> dict[str, Any]:
    """How far the engines are from ours, on a prompt of each of two workloads."""
    differences: dict[str, float] = {}
    tops = {engine: _tops(children, site, plan, engine) for engine in plan.engines}
    for engine, rows in tops.items():
        if engine != OURS and OURS in tops and all(rows):
            differences[engine] = max(map(difference, tops[OURS], rows))
    allowed = tolerance(SHAPES[site.shape])
    say(f"{site.shape} {site.dtype}: log-probabilities differ from ours by {differences}, allowed {allowed:.1e}")
    entry = {"shape": site.shape, "dtype": site.dtype, **origin()}
    return entry | {"differences": differences, "tolerance": allowed}


def _tops(children: Awake, site: Site, plan: Plan, engine: str) -> list[Any]:
    settings = EXACT.get(engine) or best_settings(plan.found, site, "single", engine)
    with awake(children.get(engine, settings)) as child:
        prompts = [requests_of(workload, "agreement")[0].prompt for workload in ("single", "prefill")]
        return [child.ask("top", prompt, NUM_POSITIONS, NUM_TOP) for prompt in prompts]


def _versions(child: Child) -> dict[str, str]:
    with awake(child):
        found: dict[str, str] = child.ask("versions")
        return found


def key_of(site: Site, workload: str) -> dict[str, str]:
    return {"shape": site.shape, "dtype": site.dtype, "workload": workload}


def origin() -> dict[str, Any]:
    """When and where."""
    flags = cpu_flags()
    return {
        "date": datetime.date.today().isoformat(),
        "machine": {
            "processor": cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "flags": [flag for flag in FLAGS if flag in flags],
        },
    }


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
