"""A rank above 0: `python -m worker.parallel.rank_process`, child of the process that leads its machine.

The main thread loads this rank's part of the model and runs the plans that come; a second one waits for the end of the
leader, so that not even a collective operation outlives it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from common.errors import ConfigurationError
from common.settings import WorkerSettings
from common.telemetry import set_up_logging
from worker.parallel.device import obey
from worker.parallel.group import LAST_WORDS_S, Meeting, RankLost
from worker.parallel.loading import LoadDevice, load_torch_device
from worker.parallel.plans import PlanMemory, PlanReader
from worker.parallel.reports import Reporter
from worker.parallel.shard import Shard
from worker.pipe import Failed, Progress
from worker.process import die_with_parent, keep_pauses_short, leave_signals_to_parent, sentence_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankOptions:
    """The command line of a rank process."""

    connection: socket.socket
    memory_fd: int
    reader: int
    meeting: Meeting
    settings: WorkerSettings

    @classmethod
    def parse(cls, arguments: Sequence[str] | None = None) -> RankOptions:
        parser = argparse.ArgumentParser(prog="worker.parallel.rank_process")
        parser.add_argument("--rank", type=int, required=True, help="number of this rank")
        parser.add_argument("--reader", type=int, required=True, help="which reader of the shared memory it is")
        parser.add_argument("--fd", type=int, required=True, help="the inherited end of a socket pair to the leader")
        parser.add_argument("--memory-fd", type=int, required=True, help="the inherited memory that plans come in")
        parser.add_argument("--exchange-fd", type=int, help="inherited memory of all ranks, if they are on one machine")
        parser.add_argument("--meet", required=True, help="HOST:PORT of the store that rank 0 keeps")
        parser.add_argument("--settings", required=True, help="WorkerSettings as JSON")
        options = parser.parse_args(arguments)
        settings = WorkerSettings(**json.loads(options.settings))
        host, _, port = options.meet.rpartition(":")
        return cls(
            connection=socket.socket(fileno=options.fd),
            memory_fd=options.memory_fd,
            reader=options.reader,
            meeting=Meeting(Shard(options.rank, settings.num_shard), host, int(port), None, options.exchange_fd),
            settings=settings,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    options = RankOptions.parse(arguments)
    set_up_logging(options.settings.log_level, json_output=options.settings.json_output)
    return serve_rank(options, load_torch_device)


def serve_rank(options: RankOptions, load: LoadDevice) -> int:
    """Load this rank's part and run plans until rank 0 stops or is gone. Returns the exit status."""
    die_with_parent()
    leave_signals_to_parent()
    threading.Thread(target=_end_with, args=(options.connection,), daemon=True).start()
    rank, reporter = options.meeting.shard.rank, Reporter(options.connection)
    try:
        _load_and_obey(options, load, reporter)
    except Exception as error:
        # Whatever it is, the leader must hear of it, or the other ranks would wait for this one in a collective.
        if isinstance(error, RankLost):
            # the process that knows why ends this one, unless nobody does
            time.sleep(LAST_WORDS_S)
        if not isinstance(error, ConfigurationError):
            logger.exception("rank %d cannot go on", rank)
        with suppress(OSError):
            reporter.send(rank, Failed(_sentence(rank, error)))
        return 1
    return 0


def _load_and_obey(options: RankOptions, load: LoadDevice, reporter: Reporter) -> None:
    rank = options.meeting.shard.rank
    plans = PlanReader(options.connection.makefile("rb"), PlanMemory(options.memory_fd), options.reader)

    def on_progress(phase: str, done: int, total: int) -> None:
        reporter.send(rank, Progress(phase, done, total))

    device, ready = load(options.settings, on_progress, options.meeting)
    keep_pauses_short()
    reporter.send(rank, ready)
    obey(device, plans)


def _sentence(rank: int, error: Exception) -> str:
    """What is wrong with model or options is wrong on every rank."""
    return sentence_of(error) if isinstance(error, ConfigurationError) else f"rank {rank}: {sentence_of(error)}"


def _end_with(leader: socket.socket) -> None:
    watcher = select.poll()
    # no events: that the other side has hung up is always told
    watcher.register(leader, 0)
    watcher.poll()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
