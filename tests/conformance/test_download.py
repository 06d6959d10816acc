"""`inferfleet up` with the id of a model that is not here yet: what a stranger sees meanwhile, and Ctrl-C."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import httpx

from tests.conformance.conftest import Served, up
from tests.support.fleet import ROOT, wait_for
from tests.support.hub_server import HubServer

MODEL = "owner/big"
NUM_BYTES, NUM_HELD_BYTES = 48_000_000, 24_000_000
PROMPT = {"inputs": "Count to 10"}


def ctl_workers(served: Served, *options: str) -> str:
    command = [sys.executable, "-m", "ops.cli", "ctl", "workers", *options]
    environment = served.environment() | {"COLUMNS": "200"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout


def progress(served: Served) -> dict[str, int | str]:
    """Of the worker that downloads, as soon as it has some of it."""

    def has_begun() -> dict[str, int | str] | None:
        try:
            workers = httpx.get(f"{served.url}/v1/fleet/workers").json()["data"]
        except httpx.TransportError:
            return None
        found = [worker["progress"] for worker in workers if worker["state"] == "loading"]
        return found[0] if found and found[0]["done"] else None

    return wait_for(has_begun, "a download in the list of workers")


def test_a_download_is_seen_and_ctrl_c_ends_it(tmp_path: Path) -> None:
    files = {"config.json": b"{}", "model.safetensors": bytes(NUM_BYTES)}
    with (
        HubServer({MODEL: files}, hold_after=NUM_HELD_BYTES) as hub,
        up(tmp_path, "--model-id", MODEL, wait=False, **hub.environment(str(tmp_path / "cache"))) as served,
    ):
        wait_for(hub.is_holding.is_set, "the download is under way")
        found = progress(served)
        assert (found["phase"], found["total"]) == ("download", NUM_BYTES + 2)
        assert NUM_HELD_BYTES / 2 < int(found["done"]) <= NUM_HELD_BYTES + 2
        (shown,) = json.loads(ctl_workers(served, "--json"))
        assert (shown["state"], shown["progress"]) == ("loading", found)
        assert f"download: {found['done']} of {found['total']}, 44%" in ctl_workers(served)
        assert httpx.get(f"{served.url}/health").status_code == httpx.codes.SERVICE_UNAVAILABLE
        assert httpx.post(f"{served.url}/generate", json=PROMPT).status_code == httpx.codes.SERVICE_UNAVAILABLE
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(30) == 0
        assert not hub.release.is_set(), "it did not wait for the network"
    lines = [line for line in served.log.read_text().splitlines() if line.startswith("w1")]
    assert ["stopped while the model was fetched" in line for line in lines] == [False, True], lines
    assert "Traceback" not in served.log.read_text()
