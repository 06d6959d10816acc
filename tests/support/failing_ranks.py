"""A worker of two ranks of which the second raises in the middle of a step once a file named in FAIL_FILE exists.

`python -m tests.support.failing_ranks` is the agent; it starts this module again, with `--fd`, as its engine, and that
one again, with `--rank`, as the other rank.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from torch import Tensor

from common.settings import WorkerSettings, parse
from common.telemetry import set_up_logging
from ops.cli.worker import default_model
from worker import engine_process
from worker.engine.device import Device
from worker.main import run
from worker.parallel import rank_process
from worker.parallel.group import Group, Meeting
from worker.parallel.loading import OnProgress
from worker.parallel.torch_group import join
from worker.pipe import Ready
from worker.runner.load import load_device

THIS = (sys.executable, "-m", "tests.support.failing_ranks")
SENTENCE = "the second half of a step went wrong"


class FailingGroup:
    """Raises in the second sum of a step, when the other rank has begun to wait for it."""

    def __init__(self, group: Group, signal: Path) -> None:
        self.shard, self.all_gather, self.exchange = group.shard, group.all_gather, None
        self._group, self._signal, self._num_left = group, signal, 2

    def all_reduce(self, x: Tensor) -> Tensor:
        if self._signal.exists():
            self._num_left -= 1
            if not self._num_left:
                # who fails once fails once only: the next engine is to serve
                self._signal.unlink()
                raise RuntimeError(SENTENCE)
        return self._group.all_reduce(x)


def load_failing(settings: WorkerSettings, on_progress: OnProgress, meeting: Meeting) -> tuple[Device, Ready]:
    group = FailingGroup(join(meeting), Path(os.environ["FAIL_FILE"]))
    return load_device(settings.model_copy(update={"threads": 1}), on_progress, group)


def main(arguments: list[str]) -> int:
    if "--rank" in arguments:
        return rank_process.serve_rank(rank_process.RankOptions.parse(arguments), load_failing)
    if "--fd" in arguments:
        return engine_process.main(arguments, rank_command=THIS)
    settings = parse(WorkerSettings, arguments, program="failing ranks")
    model_id, names = default_model(settings.model_id, settings.served_model_name)
    settings = settings.model_copy(update={"model_id": model_id, "served_model_name": names})
    set_up_logging(settings.log_level, json_output=settings.json_output)
    return run(settings, THIS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
