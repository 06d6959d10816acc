"""What /metrics says after requests of every outcome."""

from __future__ import annotations

from common.store.connection import Connection
from tests.gateway.conftest import StartGateway
from tests.support.live_gateway import LiveGateway
from tests.support.protocol import eventually
from tests.support.scripted_worker import STATS, ScriptedWorker


async def samples(gateway: LiveGateway) -> dict[str, float]:
    """Every sample by name and labels."""
    response = await gateway.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = [line for line in response.text.splitlines() if not line.startswith("#")]
    rows = [line.rpartition(" ") for line in lines]
    return {name.replace('"', ""): float(value) for name, _, value in rows}


async def test_requests_are_counted_by_tgis_names(gateway: LiveGateway, worker: ScriptedWorker) -> None:
    body = {"inputs": "hello", "parameters": {"max_new_tokens": 4}}
    for path in ("/generate", "/generate_stream"):
        assert (await gateway.client.post(path, json=body)).status_code == 200
    assert (await gateway.client.post("/generate", json={"inputs": ""})).status_code == 422
    seen = await samples(gateway)
    assert seen["tgi_request_count"] == 3 and seen["tgi_request_success"] == 2
    assert seen["tgi_request_failure{err=validation}"] == 1
    assert seen["tgi_request_generated_tokens_sum"] == 8 and seen["tgi_request_generated_tokens_count"] == 2
    assert seen["tgi_request_input_length_sum"] == 10
    for name in ("duration", "queue_duration", "inference_duration", "mean_time_per_token_duration"):
        assert seen[f"tgi_request_{name}_count"] == 2, name
    assert seen["inferfleet_time_to_first_token_count"] == 2
    assert seen["inferfleet_http_responses_total{status=200}"] == 2
    text = (await gateway.client.get("/metrics")).text
    assert "tgi_request_count_total" not in text and "# TYPE tgi_request_count counter" in text


async def test_failures_and_dropped_clients_have_their_reason(gateway: LiveGateway, worker: ScriptedWorker) -> None:
    worker.fail_with = "broken"
    body = {"inputs": "hello", "parameters": {"max_new_tokens": 4}}
    assert (await gateway.client.post("/generate", json=body)).status_code == 424
    worker.fail_with = ""
    worker.hold_at = 2
    async with gateway.stream("POST", "/generate_stream", json=body):
        await eventually(lambda: gateway.services.hub.num_followers == 1)
    await eventually(lambda: gateway.services.hub.num_followers == 0)
    seen = await samples(gateway)
    assert seen["tgi_request_failure{err=generation}"] == 1
    assert seen["tgi_request_failure{err=dropped}"] == 1


async def test_gauges_tell_of_fleet_and_hub(gateway: LiveGateway, worker: ScriptedWorker) -> None:
    worker.hold_at = 2
    job_id = await gateway.submit()
    await eventually(lambda: worker.running)
    worker.may_take = False
    await gateway.submit()
    async with gateway.stream("GET", f"/v1/jobs/{job_id}/stream"):
        seen = await samples(gateway)
    assert (seen["tgi_queue_size"], seen["tgi_batch_current_size"]) == (1, 1)
    assert seen["inferfleet_queued{model=demo}"] == 1 and seen["inferfleet_workers{model=demo}"] == 1
    assert seen["inferfleet_worker_running{model=demo,worker=w1}"] == 1
    assert (seen["inferfleet_followers"], seen["inferfleet_followed_jobs"], seen["inferfleet_redis_up"]) == (1, 1, 1)
    assert seen["inferfleet_worker_draft_tokens{model=demo,worker=w1}"] == STATS["draft_tokens"]
    assert seen["inferfleet_worker_accepted_tokens{model=demo,worker=w1}"] == STATS["accepted_tokens"]
    assert seen["tgi_request_skipped_tokens_sum"] == STATS["accepted_tokens"]
    assert seen["tgi_request_skipped_tokens_count"] == STATS["decode_tokens"]
    for name in ("gaps_healed", "rewinds", "resubscribed", "resubmitted", "log_reads"):
        assert f"inferfleet_hub_{name}_total" in seen


async def test_without_workers_the_gauges_are_zero(start_gateway: StartGateway, connection: Connection) -> None:
    seen = await samples(await start_gateway())
    assert (seen["tgi_queue_size"], seen["tgi_batch_current_size"], seen["tgi_request_count"]) == (0, 0, 0)
