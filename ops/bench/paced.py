"""A worker whose model costs nothing: agent, pipe, engine loop and scheduler are the real ones, the device only waits.

    python -m ops.bench.paced [worker options]

Answers repeat one text, a token a step. A step lasts STEP_MS and ROW_MS for each row more, about what a model of 125
million parameters takes on two cores, and without the model's own CPU time what is left is the cost of serving.
"""

from __future__ import annotations

import socket
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from common.settings import WorkerSettings, parse
from common.telemetry import set_up_logging
from ops.cli.worker import default_model
from worker.engine.device import Floats, Ints, StepPlan, StepResult
from worker.engine_process import serve
from worker.main import run
from worker.parallel.group import Meeting
from worker.parallel.loading import OnProgress
from worker.pipe import AdapterChecked, Ready

STEP_MS, ROW_MS = 4.0, 0.3
TEXT_NAME = "README.md"
BLOCK_SIZE, MAX_SEQS, MAX_TOKENS = 16, 256, 2048


class PacedDevice:
    """A row's next token is the one of the text at the row's position."""

    depth = 0

    def __init__(self, text_ids: Ints) -> None:
        self._text_ids = text_ids
        self._until = 0.0

    def forward(self, plan: StepPlan) -> None:
        self._until = time.perf_counter() + (STEP_MS + ROW_MS * len(plan.rows)) / 1000

    def sample(self, plan: StepPlan) -> StepResult:
        positions = (plan.starts + plan.num_tokens)[plan.samples]
        ids: Ints = self._text_ids[positions % len(self._text_ids)]
        logprobs: Floats = np.full(len(ids), -0.53125, np.float32)
        return StepResult(ids=ids, logprobs=logprobs)

    def collect(self, handle: StepResult) -> StepResult:
        time.sleep(max(0.0, self._until - time.perf_counter()))
        return handle

    def check_adapter(self, name: str, source: str) -> AdapterChecked:
        return AdapterChecked(name, source, "", 0, "a paced engine has no adapters")


def load(settings: WorkerSettings, on_progress: OnProgress, meeting: Meeting) -> tuple[PacedDevice, Ready]:
    folder = Path(settings.model_id)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text_ids = tokenizer.encode((folder / TEXT_NAME).read_text(), add_special_tokens=False).ids
    ready = Ready(
        vocab_size=tokenizer.get_vocab_size(),
        dtype="float32",
        quantize="none",
        weights_digest="paced",
        kv_tokens=MAX_SEQS * MAX_TOKENS,
        block_size=BLOCK_SIZE,
        max_num_seqs=MAX_SEQS,
        max_input_tokens=MAX_TOKENS - 1,
        max_total_tokens=MAX_TOKENS,
        max_batch_prefill_tokens=4096,
        step_limit_s=60.0,
        reasons=["a paced engine has no limits of its own"],
    )
    return PacedDevice(np.array(text_ids, np.int32)), ready


def engine_main(arguments: list[str]) -> int:
    """`--fd N --settings JSON`, as `worker.engine_process` takes them."""
    options: dict[str, Any] = dict(zip(arguments[::2], arguments[1::2], strict=True))
    settings = WorkerSettings.model_validate_json(options["--settings"])
    return serve(socket.socket(fileno=int(options["--fd"])), settings, load)


def main(arguments: list[str]) -> int:
    if "--fd" in arguments:
        return engine_main(arguments)
    settings = parse(WorkerSettings, arguments, program="paced worker")
    model_id, names = default_model(settings.model_id, settings.served_model_name)
    settings = settings.model_copy(update={"model_id": model_id, "served_model_name": names})
    set_up_logging(settings.log_level, json_output=settings.json_output)
    return run(settings, (sys.executable, "-m", "ops.bench.paced"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
