"""What the processes of a worker do alike: die with their parent, leave signals to it, keep pauses short."""

from __future__ import annotations

import ctypes
import gc
import signal
import sys
from contextlib import suppress

from common.errors import InferfleetError

PR_SET_PDEATHSIG = 1
SWITCH_INTERVAL_S = 0.0005
GC_THRESHOLDS = (10_000, 50, 50)


def die_with_parent() -> None:
    """The kernel kills this process when the thread that started it is gone, however that happened."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def leave_signals_to_parent() -> None:
    """On Ctrl-C the agent drains while the processes below it go on computing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def keep_pauses_short() -> None:
    """The loaded model is never garbage, and no other thread must hold up a step for five milliseconds."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    sys.setswitchinterval(SWITCH_INTERVAL_S)


def sentence_of(error: Exception) -> str:
    """What is said of `error` to others: one line, and its kind unless it was raised for them to read."""
    text = " ".join(str(error).split())
    if isinstance(error, InferfleetError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def ending_of(status: int) -> str:
    """How a process of that exit status went, as the end of a sentence about it."""
    return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
