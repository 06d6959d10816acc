"""The engine process: `python -m worker.engine_process --fd N --settings JSON`, child of the agent.

The main thread loads the model and runs the engine loop; a second one reads the socket, so that the loop never polls.
Whatever goes wrong becomes one `Failed` message and the end of the process: the agent gives the jobs back to the queue.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import BinaryIO

from common.errors import InferfleetError, WireError
from common.settings import WorkerSettings
from common.telemetry import set_up_logging
from worker.engine.device import Device
from worker.engine.loop import EngineLoop, Inbox
from worker.engine.pacing import PrefillPacer
from worker.engine.scheduler import Scheduler, limits_of
from worker.pipe import Failed, Message, Progress, Ready, encode, read_message

PR_SET_PDEATHSIG = 1
GRACE_AFTER_END_S = 5.0
SWITCH_INTERVAL_S = 0.0005
GC_THRESHOLDS = (10_000, 50, 50)

OnProgress = Callable[[str, int, int], None]
LoadDevice = Callable[[WorkerSettings, OnProgress], tuple[Device, Ready]]

logger = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="worker.engine_process")
    parser.add_argument("--fd", type=int, required=True, help="the inherited end of a socket pair to the agent")
    parser.add_argument("--settings", required=True, help="WorkerSettings as JSON")
    options = parser.parse_args(arguments)
    settings = WorkerSettings(**json.loads(options.settings))
    set_up_logging(settings.log_level, json_output=settings.json_output)
    return serve(socket.socket(fileno=options.fd), settings, _load_torch_device)


def serve(connection: socket.socket, settings: WorkerSettings, load: LoadDevice) -> int:
    """Load a device and run it until the agent says Stop or is gone. Returns the exit status."""
    _belong_to_agent()
    inbox: Inbox = SimpleQueue()
    threading.Thread(target=_receive, args=(connection.makefile("rb"), inbox), daemon=True).start()

    def send(message: Message) -> None:
        connection.sendall(encode(message))

    try:
        _load_and_run(settings, load, inbox, send)
    except (BrokenPipeError, ConnectionResetError):
        return 0
    except Exception as error:
        # Whatever it is, the agent must hear of it, or the jobs would wait for ever.
        logger.exception("the engine cannot go on")
        with suppress(OSError):
            send(Failed(_sentence(error)))
        return 1
    return 0


def _load_and_run(settings: WorkerSettings, load: LoadDevice, inbox: Inbox, send: Callable[[Message], None]) -> None:
    device, ready = load(settings, lambda phase, done, total: send(Progress(phase, done, total)))
    scheduler = Scheduler(limits_of(ready, prefix_caching=settings.prefix_caching))
    pacer = PrefillPacer(ready.max_batch_prefill_tokens, settings.prefill_step)
    _keep_pauses_short()
    send(ready)
    EngineLoop(device, scheduler, pacer, inbox, send).run()


def _load_torch_device(settings: WorkerSettings, on_progress: OnProgress) -> tuple[Device, Ready]:
    # Imported here: torch takes seconds, and the agent's first sign of life should not wait for it.
    from worker.runner.load import load_device

    return load_device(settings, on_progress)


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


def _belong_to_agent() -> None:
    """Die with the agent, and leave signals to it: on Ctrl-C it drains while this process goes on computing."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _keep_pauses_short() -> None:
    """The loaded model is never garbage, and the reader thread must not hold up a step for five milliseconds."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    sys.setswitchinterval(SWITCH_INTERVAL_S)


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, InferfleetError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
