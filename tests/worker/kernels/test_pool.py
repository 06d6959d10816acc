"""Where the threads of the kernels' pool may run, as the kernel of the system says, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

CORES = sorted(os.sched_getaffinity(0))
CODE = """
import json, os, sys
import torch
from worker.kernels.build import load_library
from worker.kernels.elementwise import CpuOperations

def threads():
    return set(map(int, os.listdir("/proc/self/task")))

library, before = load_library("auto"), threads()
library.inferfleet_set_threads(int(sys.argv[1]))
helpers, found = threads() - before, []
for core in map(int, sys.argv[2].split(",")):
    os.sched_setaffinity(0, {core})
    CpuOperations(library).summarise(torch.ones(100, 1000))
    found.append([sorted(os.sched_getaffinity(helper)) for helper in helpers])
print(json.dumps(found))
"""


def cores_of_helpers(num_threads: int, caller_cores: list[int]) -> list[list[list[int]]]:
    """Where each helper may run after the caller has run a kernel on each of the given cores."""
    command = [sys.executable, "-c", CODE, str(num_threads), ",".join(map(str, caller_cores))]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)  # type: ignore[no-any-return]


def test_where_threads_take_every_core_each_has_its_own() -> None:
    assert len(CORES) >= 2, "there are cores to choose from"
    visited = [*CORES, CORES[0]]
    for caller, helpers in zip(visited, cores_of_helpers(len(CORES), visited), strict=True):
        assert len(helpers) == len(CORES) - 1
        assert sorted([[caller], *helpers]) == [[core] for core in CORES]


def test_more_threads_than_cores_are_the_systems_to_place() -> None:
    for helpers in cores_of_helpers(len(CORES) + 1, CORES):
        assert helpers == [CORES] * len(CORES)
