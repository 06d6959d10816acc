"""The leader of a node other than 0: `inferfleet worker --node-rank 1 …`. No Redis, no scheduler, no torch.

It starts the ranks of its machine, gives them the plans that node 0 sends, and passes on what they report. When the
group ends in any other way than by node 0's word, it comes to node 0 again, whose agent starts its engine again.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from common.errors import ConfigurationError, WireError
from common.settings import WorkerSettings
from worker.announce import find_model
from worker.engine_client import engine_environment
from worker.parallel.group import Meeting, RankLost
from worker.parallel.local_ranks import REAL_RANK, LocalRanks
from worker.parallel.plans import PlanReader
from worker.parallel.rendezvous import come_to_node_0, host_and_port
from worker.parallel.reports import Reporter
from worker.pipe import Failed, Message, Ready

logger = logging.getLogger(__name__)


def run(settings: WorkerSettings) -> int:
    """Serve until node 0 stops or a signal comes; the exit status.

    Raises:
        ConfigurationError: model, options or network cannot work; starting again would not help.
    """
    _leave_on_signals()
    folder = str(find_model(settings))
    return serve_node(settings.model_copy(update={"model_id": folder}))


def serve_node(settings: WorkerSettings, rank_command: Sequence[str] = REAL_RANK) -> int:
    """As `run`, with the model's folder known."""
    _leave_on_signals()
    was_ever_ready = False
    while True:
        connection, port = come_to_node_0(settings)
        logger.info("node %d is part of the model of node 0", settings.node_rank)
        with connection:
            life = NodeLeader(settings, connection, port, rank_command)
            if life.run():
                return 0
        was_ever_ready |= life.is_ready
        if life.misfit and not was_ever_ready:
            raise ConfigurationError(life.misfit)
        logger.error("the group of node 0 ended; coming to it again")


def _leave_on_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)


def _leave(number: int, frame: object) -> NoReturn:
    """At once, also in the middle of a download: the ranks die with it, and node 0 hands the jobs to others."""
    os._exit(0)


class NodeLeader:
    """One life of the group, from this node's side. `misfit`: why a rank here could not load."""

    def __init__(
        self, settings: WorkerSettings, connection: socket.socket, port: int, rank_command: Sequence[str]
    ) -> None:
        self._connection, self._reporter = connection, Reporter(connection)
        self._plans = PlanReader(connection.makefile("rb"))
        self._loading = set(settings.local_ranks)
        self.misfit = ""
        self._local = LocalRanks(
            settings.local_ranks,
            settings,
            Meeting(host=host_and_port(settings.rendezvous)[0], port=port),
            self._on_report,
            self._on_end,
            command=rank_command,
            environment=engine_environment(settings.threads, settings.ranks_per_node),
        )

    @property
    def is_ready(self) -> bool:
        return not self._loading

    def run(self) -> bool:
        """Pass plans on until node 0 says that there are no more (True) or is gone."""
        try:
            while (data := self._plans.next()) is not None:
                with suppress(RankLost):
                    # whoever watches the lost rank tells node 0, which then ends this connection
                    self._local.publish(data)
        except (RankLost, WireError) as error:
            logger.error("%s", error)
            self._hang_up()
            self._local.kill()
            return False
        self._local.stop()
        return True

    def _on_report(self, rank: int, message: Message) -> None:
        if isinstance(message, Ready):
            self._loading.discard(rank)
        elif isinstance(message, Failed) and rank in self._loading:
            self.misfit = message.message
        self._tell(rank, message)

    def _on_end(self, sentence: str) -> None:
        """A rank is gone without a word: while it loads that may be an accident, which node 0 takes as such."""
        logger.error("%s", sentence)
        if self.is_ready:
            self._tell(0, Failed(sentence))
        else:
            self._hang_up()

    def _tell(self, rank: int, message: Message) -> None:
        with suppress(OSError):
            self._reporter.send(rank, message)

    def _hang_up(self) -> None:
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
