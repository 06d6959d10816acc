"""The real engine process around the fake device: `python -m tests.worker.engine.fake_process MODE FD`."""

from __future__ import annotations

import socket
import sys
import threading

from common.errors import ConfigurationError
from common.settings import WorkerSettings
from tests.worker.engine.fake_device import FakeDevice, Staged
from tests.worker.engine.harness import limits
from worker import engine_process
from worker.engine.device import StepResult
from worker.parallel.loading import OnProgress
from worker.pipe import Ready

LIMITS = limits(max_total_tokens=120, num_blocks=40)


class BreakingDevice(FakeDevice):
    def collect(self, handle: Staged) -> StepResult:
        raise RuntimeError("the device\nfell over")


class HangingDevice(FakeDevice):
    def collect(self, handle: Staged) -> StepResult:
        sys.stdout.write("hanging\n")
        sys.stdout.flush()
        threading.Event().wait()
        raise AssertionError


DEVICES = {"good": FakeDevice, "breaks": BreakingDevice, "hangs": HangingDevice}


def load(mode: str, on_progress: OnProgress) -> tuple[FakeDevice, Ready]:
    on_progress("weights", 1, 2)
    on_progress("weights", 2, 2)
    if mode == "refuses":
        raise ConfigurationError("the folder holds no model; name another one")
    ready = Ready(
        vocab_size=LIMITS.vocab_size,
        dtype="float32",
        quantize="",
        weights_digest="fake",
        kv_tokens=LIMITS.num_blocks * LIMITS.block_size,
        block_size=LIMITS.block_size,
        max_num_seqs=LIMITS.max_num_seqs,
        max_input_tokens=LIMITS.max_total_tokens - 1,
        max_total_tokens=LIMITS.max_total_tokens,
        max_batch_prefill_tokens=LIMITS.max_batch_prefill_tokens,
        step_limit_s=60.0,
        reasons=[],
    )
    return DEVICES[mode](LIMITS, depth=1), ready


def main(mode: str, fd: int) -> int:
    if mode == "hangs":
        engine_process.GRACE_AFTER_END_S = 0.2
    connection = socket.socket(fileno=fd)
    return engine_process.serve(connection, WorkerSettings(), lambda _, on_progress, __: load(mode, on_progress))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
