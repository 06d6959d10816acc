"""`python -m ops.bench`: every measurement in turn, with its default settings."""

from __future__ import annotations

import sys

from ops.bench import load, lora, prefix, quant, redis_cost, scaling, speculation, start
from ops.bench.offline import wait_as_workers_do

if __name__ == "__main__":
    wait_as_workers_do()
    for measurement in (redis_cost, start, load, quant, lora, speculation, prefix, scaling):
        measurement.main(sys.argv[1:])
