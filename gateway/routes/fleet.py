"""Routes of operators, for `inferfleet ctl`: workers, queues, all tenants' jobs, dead letters and keys."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from common.errors import NotFound, ValidationError
from common.job import JobRecord
from common.store.fleet import digest_of_key
from common.store.replies import WorkerInfo
from gateway.auth import DEFAULT_TENANT, admin
from gateway.dependencies import Services, bare_id, json_body, query_integer, services
from gateway.formats.base import dump
from gateway.formats.fields import Fields
from gateway.formats.jobs import job_object
from gateway.hub import unknown_job

router = APIRouter(prefix="/v1/fleet", dependencies=[Depends(admin)])
TENANT = re.compile(r"[A-Za-z0-9_-]{1,64}")
MAX_LIST = 1000
DEFAULT_LIST = 20
UsedServices = Annotated[Services, Depends(services)]
Body = Annotated[dict[str, Any], Depends(json_body)]


def _json(value: Any, status: int = 200) -> Response:
    return Response(dump(value), status, media_type="application/json")


def _list(rows: list[dict[str, Any]]) -> Response:
    return _json({"object": "list", "data": rows})


def worker_object(info: WorkerInfo) -> dict[str, Any]:
    fields = {
        name: value for name, value in asdict(info).items() if name not in ("started_ms", "phase", "done", "total")
    }
    fields["started_at"] = info.started_ms // 1000 or None
    if info.state == "loading":
        fields["progress"] = {"phase": info.phase, "done": info.done, "total": info.total}
    return fields


def admin_object(record: JobRecord) -> dict[str, Any]:
    """A job as operators see it: no text, but its tenant and worker."""
    return job_object(record, None, frozenset()) | {
        "tenant": record.tenant,
        "worker": record.worker or None,
        "epoch": record.epoch,
    }


@router.get("/workers")
async def workers(services: UsedServices) -> Response:
    return _list([worker_object(info) for info in await services.fleet.workers()])


@router.post("/workers/{worker_id}/drain")
async def drain(worker_id: str, services: UsedServices) -> Response:
    if not await services.fleet.drain(worker_id):
        raise NotFound(f"no worker {worker_id[:80]!r}", code="worker_not_found")
    return _json({"id": worker_id, "state": "draining"})


@router.get("/queue")
async def queue(services: UsedServices) -> Response:
    """Gauges and counters of each lane."""
    rows = []
    for lane in await services.fleet.lanes():
        model = services.registry.models.get(lane)
        rows.append(
            {"lane": lane, "model": model.card.served_name if model else None} | await services.fleet.queue(lane)
        )
    return _list(rows)


@router.get("/jobs")
async def jobs(request: Request, services: UsedServices) -> Response:
    """The newest jobs of all tenants."""
    limit = query_integer(request, "limit", DEFAULT_LIST, low=1, high=MAX_LIST)
    tenants = {DEFAULT_TENANT} | {key.tenant for key in await services.fleet.keys()}
    lanes = await services.fleet.lanes()
    records: list[JobRecord] = []
    for tenant in sorted(tenants):
        records += (await services.jobs.list_jobs(lanes, tenant, limit=limit))[0]
    records.sort(key=lambda record: (record.created_ms, record.job_id), reverse=True)
    return _list([admin_object(record) for record in records[:limit]])


@router.get("/jobs/{job_id}")
async def job(job_id: str, services: UsedServices) -> Response:
    record = await services.jobs.record(bare_id(job_id))
    if record is None:
        raise unknown_job(job_id)
    return _json(admin_object(record))


@router.post("/jobs/{job_id}/cancel")
async def cancel(job_id: str, services: UsedServices) -> Response:
    record = await services.jobs.cancel(bare_id(job_id))
    if record is None:
        raise unknown_job(job_id)
    services.hub.note(record)
    return _json(admin_object(record))


@router.get("/dead-letters")
async def dead_letters(services: UsedServices) -> Response:
    rows = [
        {"id": f"job_{letter.job_id}", "failed_at": letter.failed_ms // 1000, "lane": lane}
        | {"code": letter.error_code, "message": letter.error_message}
        for lane in await services.fleet.lanes()
        for letter in await services.fleet.dead_letters(lane)
    ]
    return _list(rows)


@router.post("/redrive")
async def redrive(services: UsedServices, body: Body) -> Response:
    """One dead letter, or all of them, get another chance."""
    name = Fields(body).text("job_id")
    if name is None:
        counts = [await services.fleet.redrive(lane) for lane in await services.fleet.lanes()]
        return _json({"redriven": sum(counts)})
    job_id = bare_id(name)
    if not (count := await services.fleet.redrive(job_id[:6], job_id)):
        raise NotFound(f"no dead letter {name[:80]!r}", code="job_not_found", param="job_id")
    return _json({"redriven": count})


@router.post("/keys")
async def create_key(services: UsedServices, body: Body) -> Response:
    """The only answer that ever shows the key."""
    fields = Fields(body)
    tenant, name = fields.text("tenant") or "", fields.text("name") or ""
    if not TENANT.fullmatch(tenant):
        raise ValidationError("`tenant` must be 1 to 64 of [A-Za-z0-9_-]", param="tenant")
    text = await services.fleet.create_key(tenant, name=name[:64])
    services.keys.forget()
    created = next(key for key in await services.fleet.keys() if key.digest == digest_of_key(text))
    return _json({"id": created.key_id, "tenant": tenant, "name": created.name, "key": text}, 201)


@router.get("/keys")
async def keys(services: UsedServices) -> Response:
    return _list(
        [
            {"id": key.key_id, "tenant": key.tenant, "name": key.name, "created_at": key.created_ms // 1000}
            for key in await services.fleet.keys()
        ]
    )


@router.delete("/keys/{key_id}")
async def revoke_key(key_id: str, services: UsedServices) -> Response:
    """Gateways that have just seen the key accept it for ten more seconds."""
    if not await services.fleet.revoke_key(key_id):
        raise NotFound(f"no key {key_id[:80]!r}", code="key_not_found")
    services.keys.forget()
    return Response(status_code=204)
