"""The engine process: `python -m worker.engine_process --fd N --settings JSON`, child of the agent.

The main thread loads the model and runs the engine loop; a second one reads the socket, so that the loop never polls.
Whatever goes wrong becomes one `Failed` message and the end of the process: the agent gives the jobs back to the queue.
Of a model on several ranks this is rank 0, which decides for all of them and ends with any of them.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import BinaryIO

from common.errors import ConfigurationError, WireError
from common.settings import WorkerSettings
from common.telemetry import set_up_logging
from worker.engine.device import Device
from worker.engine.loop import EngineLoop, Inbox
from worker.engine.pacing import PrefillPacer
from worker.engine.scheduler import Scheduler, limits_of
from worker.parallel.group import Meeting, RankLost
from worker.parallel.leader import Leader
from worker.parallel.loading import LoadDevice, load_torch_device
from worker.parallel.local_ranks import REAL_RANK
from worker.pipe import Failed, Message, Progress, Ready, encode, read_message
from worker.process import die_with_parent, keep_pauses_short, leave_signals_to_parent, sentence_of

GRACE_AFTER_END_S = 5.0

Send = Callable[[Message], None]

logger = logging.getLogger(__name__)


def main(arguments: list[str] | None = None, rank_command: Sequence[str] = REAL_RANK) -> int:
    parser = argparse.ArgumentParser(prog="worker.engine_process")
    parser.add_argument("--fd", type=int, required=True, help="the inherited end of a socket pair to the agent")
    parser.add_argument("--settings", required=True, help="WorkerSettings as JSON")
    options = parser.parse_args(arguments)
    settings = WorkerSettings(**json.loads(options.settings))
    set_up_logging(settings.log_level, json_output=settings.json_output)
    return serve(socket.socket(fileno=options.fd), settings, load_torch_device, rank_command)


def serve(
    connection: socket.socket, settings: WorkerSettings, load: LoadDevice, rank_command: Sequence[str] = REAL_RANK
) -> int:
    """Load a device and run it until the agent says Stop or is gone. Returns the exit status."""
    die_with_parent()
    leave_signals_to_parent()
    inbox: Inbox = SimpleQueue()
    threading.Thread(target=_receive, args=(connection.makefile("rb"), inbox), daemon=True).start()
    lock = threading.Lock()

    def send(message: Message) -> None:
        with lock:
            connection.sendall(encode(message))

    try:
        if settings.num_shard == 1:
            _serve_alone(settings, load, inbox, send)
        else:
            _serve_as_rank_0(settings, load, inbox, send, rank_command)
    except (BrokenPipeError, ConnectionResetError):
        return 0
    except Exception as error:
        # Whatever it is, the agent must hear of it, or the jobs would wait for ever. A sentence for people gets there.
        if not isinstance(error, ConfigurationError):
            logger.exception("the engine cannot go on")
        with suppress(OSError):
            send(Failed(sentence_of(error)))
        return 1
    return 0


def _serve_alone(settings: WorkerSettings, load: LoadDevice, inbox: Inbox, send: Send) -> None:
    device, ready = load(settings, lambda phase, done, total: send(Progress(phase, done, total)), Meeting())
    _run(device, ready, settings, inbox, send)


def _serve_as_rank_0(
    settings: WorkerSettings, load: LoadDevice, inbox: Inbox, send: Send, rank_command: Sequence[str]
) -> None:
    leader = Leader(settings, send, command=rank_command)
    try:
        own, ready = load(settings, leader.on_progress, leader.meeting)
        _run(leader.lead(own, ready), ready, settings, inbox, send)
    except (BrokenPipeError, ConnectionResetError):
        raise
    except RankLost as error:
        leader.fail_later(sentence_of(error))
    except Exception as error:
        # Nor must the other ranks wait for this one in a collective.
        if not isinstance(error, ConfigurationError):
            logger.exception("rank 0 cannot go on")
        leader.fail(sentence_of(error))
    finally:
        leader.stop()


def _run(device: Device, ready: Ready, settings: WorkerSettings, inbox: Inbox, send: Send) -> None:
    limits = limits_of(
        ready,
        prefix_caching=settings.prefix_caching,
        max_loras=settings.max_loras,
        max_drafts=settings.speculate,
    )
    scheduler = Scheduler(limits)
    pacer = PrefillPacer(ready.max_batch_prefill_tokens, settings.prefill_step)
    keep_pauses_short()
    send(ready)
    EngineLoop(device, scheduler, pacer, inbox, send).run()


def _receive(stream: BinaryIO, inbox: Inbox) -> None:
    """Fill the inbox until the agent closes its end; then see to it that not even a hung device outlives the agent."""
    try:
        while (message := read_message(stream)) is not None:
            inbox.put(message)
    except (OSError, WireError) as error:
        logger.warning("the connection to the agent broke: %s", error)
    inbox.put(None)
    time.sleep(GRACE_AFTER_END_S)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
