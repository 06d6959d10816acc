"""A worker whose prefix cache takes any block for any other at the same place: what a comparison must notice.

`python -m tests.support.wrong_worker` is the agent; it starts this module again, with `--fd`, as its engine.
"""

from __future__ import annotations

import sys
from array import array

from common.settings import WorkerSettings, parse
from common.telemetry import set_up_logging
from ops.cli.worker import default_model
from worker import engine_process
from worker.engine.blocks import BlockDigests
from worker.engine.scheduler import EngineLimits, Scheduler
from worker.main import run

WRONG_ENGINE = (sys.executable, "-m", "tests.support.wrong_worker")


class BlindDigests(BlockDigests):
    """Digests of how many tokens there are, not of which."""

    def extend(
        self, digests: list[bytes], tokens: array[int], salt: str, num_blocks: int, adapter_digest: str = ""
    ) -> None:
        nothing = array(tokens.typecode, bytes(len(tokens) * tokens.itemsize))
        super().extend(digests, nothing, salt, num_blocks, adapter_digest)


class WrongScheduler(Scheduler):
    def __init__(self, limits: EngineLimits) -> None:
        super().__init__(limits)
        self._digests = BlindDigests(limits.block_size)


def main(arguments: list[str]) -> int:
    if "--fd" in arguments:
        engine_process.Scheduler = WrongScheduler  # type: ignore[misc]
        return engine_process.main(arguments)
    settings = parse(WorkerSettings, arguments, program="wrong worker")
    model_id, names = default_model(settings.model_id, settings.served_model_name)
    settings = settings.model_copy(update={"model_id": model_id, "served_model_name": names})
    set_up_logging(settings.log_level, json_output=settings.json_output)
    return run(settings, WRONG_ENGINE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
