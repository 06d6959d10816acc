"""An engine in this process waits as one of a worker does: torch finds the environment when it is imported."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ops.bench.lora import SHORT
from ops.bench.offline import WAIT_POLICY, wait_as_workers_do
from worker.engine_client import engine_environment

PROGRAM = """
import importlib, os, sys
from common.settings import WorkerSettings
for name in ("lora", "prefix", "quant", "scaling", "speculation", "tables"):
    importlib.import_module(f"ops.bench.{name}")
from ops.bench.offline import OfflineEngine
assert "torch" not in sys.modules
sys.addaudithook(lambda event, found: event == "import" and found[0] == "torch" and print(os.environ.get("%s")))
OfflineEngine(WorkerSettings(model_id=sys.argv[1], load_format="dummy", kv_tokens=1024, max_total_tokens=64))
"""


def test_no_bench_imports_torch_before_its_environment_is_there(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHORT.config))
    environment = {name: value for name, value in os.environ.items() if name != WAIT_POLICY}
    words = [sys.executable, "-c", PROGRAM % WAIT_POLICY, str(tmp_path)]
    said = subprocess.check_output(words, env=environment, text=True).split()
    assert said and set(said) == {str(engine_environment(0).get(WAIT_POLICY))}


def test_where_torch_came_first_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert torch is sys.modules["torch"]
    for policy, num_warnings in (("PASSIVE", 0), ("ACTIVE", 1)):
        monkeypatch.setenv(WAIT_POLICY, policy)
        with caplog.at_level(logging.WARNING):
            wait_as_workers_do()
        assert (len(caplog.records), os.environ[WAIT_POLICY]) == (num_warnings, policy)
