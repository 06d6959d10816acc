"""What people expect in the first hour with `inferfleet up`: restarts, privacy, loading, limits, disconnects."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis as redis_client

from ops.cli.worker import DEMO_MODEL
from ops.redis_server import start_embedded
from tests.conformance.conftest import Served, up
from tests.support.fleet import wait_for

LONG = {"inputs": "Count to 100", "parameters": {"max_new_tokens": 3900, "ignore_eos": True}}


def submit(served: Served, body: dict[str, Any], **fields: Any) -> str:
    with served.client() as client:
        return str(client.post("/v1/jobs", json={"input": body, **fields}).raise_for_status().json()["id"])


def job(served: Served, job_id: str, wait_s: int = 0) -> dict[str, Any]:
    with served.client() as client:
        answer: dict[str, Any] = client.get(f"/v1/jobs/{job_id}?wait={wait_s}").raise_for_status().json()
    return answer


def test_jobs_of_the_last_run_go_on_and_fresh_drops_them(tmp_path: Path) -> None:
    with up(tmp_path, GRACEFUL_TERMINATION_TIMEOUT="0") as first:
        resumed, dropped = submit(first, LONG), ""
        wait_for(lambda: job(first, resumed)["num_tokens"] > 5, "the job runs")
    with up(tmp_path, GRACEFUL_TERMINATION_TIMEOUT="0") as second:
        assert "1 jobs of the last run: resumed (`--fresh` drops them)" in second.log.read_text()
        assert job(second, resumed, 60)["status"] == "completed"
        dropped = submit(second, LONG)
        wait_for(lambda: job(second, dropped)["num_tokens"] > 5, "the job runs")
    with up(tmp_path, "--fresh") as third:
        assert "1 jobs of the last run dropped" in third.log.read_text()
        with third.client() as client:
            assert client.get(f"/v1/jobs/{dropped}").status_code == httpx.codes.NOT_FOUND
            assert client.get(f"/v1/jobs/{resumed}").status_code == httpx.codes.OK


def test_ephemeral_keeps_nothing_on_disk_and_little_in_memory(tmp_path: Path) -> None:
    with up(tmp_path, "--ephemeral") as served:
        job_id = submit(served, {"inputs": "Count to 10"}, result_ttl=3600)
        finished = job(served, job_id, 30)
        assert finished["status"] == "completed"
        assert finished["expires_at"] - finished["finished_at"] <= 60
        assert list((tmp_path / "redis").rglob("*.aof")) == []


def test_delete_erases_prompt_and_answer(served: Served) -> None:
    job_id = submit(served, {"inputs": "Count to 10"})
    assert job(served, job_id, 30)["status"] == "completed"
    with served.client() as client:
        assert client.delete(f"/v1/jobs/{job_id}").status_code == httpx.codes.NO_CONTENT
        assert client.get(f"/v1/jobs/{job_id}").status_code == httpx.codes.NOT_FOUND


def test_health_while_loading(tmp_path: Path) -> None:
    """Alive at once, healthy only when a model is served; requests get 503 and not a hang."""
    with up(tmp_path, wait=False) as served:
        live = f"{served.url}/health/live"
        wait_for(lambda: status(live) == httpx.codes.OK, "the gateway is alive")
        seen = {status(f"{served.url}/health")}
        wait_for(lambda: (seen.add(status(f"{served.url}/health")), 200 in seen)[1], "the model is served", 60)
        assert httpx.codes.SERVICE_UNAVAILABLE in seen


def status(url: str) -> int:
    try:
        return httpx.get(url).status_code
    except httpx.TransportError:
        return 0


def test_the_start_says_what_fits(served: Served) -> None:
    wait_for(lambda: f"http://localhost:{served.port}" in served.log.read_text(), "the banner")
    text = served.log.read_text()
    assert "kv_tokens 16384 (" in text
    assert re.search(r"max_num_seqs \d+: .* the KV cache holds 3 of the longest requests", text)
    assert "max_total_tokens 4096: " in text
    assert "max_input_tokens 4095: " in text
    assert "open it in a browser" in text
    assert f"curl http://localhost:{served.port}/generate" in text


def test_disconnect_cancels(tmp_path: Path) -> None:
    with up(tmp_path, "--disconnect-grace", "0.5") as served:
        with served.client() as client, client.stream("POST", "/generate_stream", json=LONG) as response:
            job_id = response.headers["x-job-id"]
            lines = response.iter_lines()  # kept: httpx hangs up when its iterator is collected
            next(lines)
            assert job(served, job_id)["status"] == "in_progress"
        ended = wait_for(lambda: (found := job(served, job_id))["finished_at"] and found, "the job was cancelled")
        assert ended["status"] == "cancelled"
        assert 0 < ended["num_tokens"] < 3900


def test_a_managed_redis_without_config(tmp_path: Path) -> None:
    server = start_embedded(tmp_path / "managed", ephemeral=True, options=("--rename-command", "CONFIG", ""))
    try:
        with pytest.raises(redis_client.ResponseError):
            redis_client.Redis.from_url(server.url).config_get("maxmemory")
        with up(tmp_path, REDIS_URL=server.url) as served:
            assert job(served, submit(served, {"inputs": "Count to 10"}), 30)["status"] == "completed"
    finally:
        server.stop()


@pytest.fixture(scope="module")
def changed_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with a list of EOS ids, the last of which is the comma and space of its counting."""
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    shutil.copytree(DEMO_MODEL, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    comma = tokenizer["model"]["vocab"][",\u0120"]
    path = folder / "generation_config.json"
    config = json.loads(path.read_text())
    ids = config["eos_token_id"] if isinstance(config["eos_token_id"], list) else [config["eos_token_id"]]
    path.write_text(json.dumps(config | {"eos_token_id": [*ids, comma]}))
    return folder


def test_eos_lists_and_chat_template_file(tmp_path: Path, changed_model: Path) -> None:
    """Every id of the list ends an answer, a template file replaces the model's, and BOS comes once."""
    template = tmp_path / "template.jinja"
    template.write_text("{{ bos_token }}{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    with up(tmp_path, "--model-id", str(changed_model), "--chat-template", str(template)) as served:
        with served.client() as client:
            body = {"messages": [{"role": "user", "content": "count to 10"}], "temperature": 0, "max_tokens": 50}
            answer = client.post("/v1/chat/completions", json=body).raise_for_status().json()
            plain = client.post("/tokenize", json={"inputs": "COUNT TO 10"}).raise_for_status().json()
            counting = {"inputs": "Count to 10", "parameters": {"max_new_tokens": 50, "details": True}}
            counted = client.post("/generate", json=counting).raise_for_status().json()
    assert [token["text"] for token in plain[:1]] == [""], "the tokenizer adds BOS"
    assert answer["usage"]["prompt_tokens"] == len(plain)
    assert counted["details"]["finish_reason"] == "eos_token"
    assert counted["generated_text"].strip() == "1,"
