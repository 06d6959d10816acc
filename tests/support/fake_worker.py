"""A worker process with the fake engine: `python -m tests.support.fake_worker [worker options] -- [engine options]`."""

from __future__ import annotations

import sys

from common.errors import ConfigurationError
from common.settings import WorkerSettings, parse
from common.telemetry import set_up_logging
from worker.main import run

FAKE_ENGINE = (sys.executable, "-m", "tests.support.fake_engine")


def main(arguments: list[str]) -> int:
    split = arguments.index("--") if "--" in arguments else len(arguments)
    settings = parse(WorkerSettings, arguments[:split], program="fake worker")
    set_up_logging(settings.log_level, json_output=settings.json_output)
    try:
        return run(settings, (*FAKE_ENGINE, *arguments[split + 1 :]))
    except ConfigurationError as error:
        sys.stderr.write(f"fake worker: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
