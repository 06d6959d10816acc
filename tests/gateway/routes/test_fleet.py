"""Routes of operators: what `inferfleet ctl` shows and does, and who may."""

from __future__ import annotations

from tests.gateway.conftest import StartGateway
from tests.support.live_gateway import LiveGateway
from tests.support.protocol import eventually
from tests.support.scripted_worker import ScriptedWorker

UNKNOWN = "job_" + "abcdef" + "a" * 22


async def test_workers_and_queue(gateway: LiveGateway, worker: ScriptedWorker) -> None:
    worker.hold_at = 2
    await gateway.submit()
    await eventually(lambda: worker.running)
    [info] = (await gateway.client.get("/v1/fleet/workers")).json()["data"]
    assert {"id": "w1", "state": "ready", "model": "demo", "host": "here", "pid": 1}.items() <= info.items()
    assert info["running"] == 1
    worker.may_take = False
    await gateway.submit()
    [queue] = (await gateway.client.get("/v1/fleet/queue")).json()["data"]
    assert {"model": "demo", "queued": 1, "running": 1, "workers": 1, "dead_letters": 0}.items() <= queue.items()
    assert queue["queued_tokens"] > 0


async def test_jobs_and_cancel(gateway: LiveGateway, worker: ScriptedWorker) -> None:
    worker.hold_at = 2
    ids = [await gateway.submit() for _ in range(3)]
    await eventually(lambda: len(worker.running) == 3)
    rows = (await gateway.client.get("/v1/fleet/jobs?limit=2")).json()["data"]
    assert [row["id"] for row in rows] == ids[:0:-1]
    assert rows[0]["worker"] == "w1" and rows[0]["tenant"] == "default" and "output_text" not in rows[0]
    one = (await gateway.client.get(f"/v1/fleet/jobs/{ids[0]}")).json()
    assert (one["id"], one["status"]) == (ids[0], "in_progress")
    await gateway.client.post(f"/v1/fleet/jobs/{ids[0]}/cancel")
    assert (await gateway.finished(ids[0]))["status"] == "cancelled"
    for method, path in (("GET", ""), ("POST", "/cancel")):
        response = await gateway.client.request(method, f"/v1/fleet/jobs/{UNKNOWN}{path}")
        assert (response.status_code, response.json()["error"]["code"]) == (404, "job_not_found")


async def test_drain(gateway: LiveGateway, worker: ScriptedWorker) -> None:
    assert (await gateway.client.post("/v1/fleet/workers/w1/drain")).json() == {"id": "w1", "state": "draining"}
    [info] = (await gateway.client.get("/v1/fleet/workers")).json()["data"]
    assert info["state"] == "draining"
    response = await gateway.client.post("/v1/fleet/workers/w9/drain")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "worker_not_found")


async def test_dead_letters_get_another_chance(gateway: LiveGateway, worker: ScriptedWorker) -> None:
    worker.fail_with = "broken"
    ids = [await gateway.submit(max_new_tokens=3) for _ in range(2)]
    for job_id in ids:
        assert (await gateway.finished(job_id))["status"] == "failed"
    rows = (await gateway.client.get("/v1/fleet/dead-letters")).json()["data"]
    assert {row["id"] for row in rows} == set(ids)
    assert rows[0]["code"] == "engine" and rows[0]["message"] == "broken"
    worker.fail_with = ""
    response = await gateway.client.post("/v1/fleet/redrive", json={"job_id": ids[0]})
    assert response.json() == {"redriven": 1}
    assert (await gateway.finished(ids[0]))["status"] == "completed"
    assert (await gateway.client.post("/v1/fleet/redrive", json={})).json() == {"redriven": 1}
    assert (await gateway.finished(ids[1]))["status"] == "completed"
    response = await gateway.client.post("/v1/fleet/redrive", json={"job_id": ids[0]})
    assert response.status_code == 404


async def test_keys_and_who_may_administer(start_gateway: StartGateway, worker: ScriptedWorker) -> None:
    gateway = await start_gateway(api_key="root")
    root = {"authorization": "Bearer root"}
    assert (await gateway.client.get("/v1/fleet/keys")).status_code == 401
    created = await gateway.client.post("/v1/fleet/keys", json={"tenant": "acme", "name": "ci"}, headers=root)
    assert created.status_code == 201
    key = created.json()
    assert (key["tenant"], key["name"]) == ("acme", "ci")
    listed = await gateway.client.get("/v1/fleet/keys", headers=root)
    assert [row["id"] for row in listed.json()["data"]] == [key["id"]]
    assert key["key"] not in listed.text
    theirs = {"authorization": f"Bearer {key['key']}"}
    assert (await gateway.client.get("/v1/jobs", headers=theirs)).status_code == 200
    adapters = (("GET", "adapters"), ("POST", "adapters"), ("DELETE", "adapters/fr"))
    for method, path in (("GET", "workers"), ("GET", "jobs"), ("GET", "keys"), ("POST", "workers/w1/drain"), *adapters):
        response = await gateway.client.request(method, f"/v1/fleet/{path}", headers=theirs)
        assert (response.status_code, response.json()["error"]["code"]) == (403, "admin_only"), path
    assert (await gateway.client.delete(f"/v1/fleet/keys/{key['id']}", headers=root)).status_code == 204
    assert (await gateway.client.delete(f"/v1/fleet/keys/{key['id']}", headers=root)).status_code == 404
    assert (await gateway.client.get("/v1/jobs", headers=theirs)).status_code == 401
    response = await gateway.client.post("/v1/fleet/keys", json={"tenant": "a b"}, headers=root)
    assert (response.status_code, response.json()["error"]["param"]) == (422, "tenant")


async def test_a_key_in_redis_closes_an_open_gateway(start_gateway: StartGateway, worker: ScriptedWorker) -> None:
    gateway = await start_gateway()
    assert (await gateway.client.get("/v1/jobs")).status_code == 200
    key = (await gateway.client.post("/v1/fleet/keys", json={"tenant": "acme"})).json()["key"]
    assert (await gateway.client.get("/v1/jobs")).status_code == 401
    theirs = {"authorization": f"Bearer {key}"}
    assert (await gateway.client.get("/v1/jobs", headers=theirs)).status_code == 200
    assert (await gateway.client.get("/v1/fleet/keys", headers=theirs)).status_code == 403
