"""Routes of operators, for `inferfleet ctl`: workers, queues, all tenants' jobs, dead letters, adapters and keys."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from common.adapters import MAX_NAME, check_name, check_source
from common.errors import Conflict, NotFound, Unavailable, ValidationError
from common.job import JobRecord
from common.store.fleet import digest_of_key, new_token
from common.store.replies import AdapterEntry, WorkerInfo
from gateway.auth import DEFAULT_TENANT, admin
from gateway.dependencies import Services, bare_id, json_body, query_integer, services
from gateway.formats.base import dump
from gateway.formats.fields import Fields
from gateway.formats.jobs import job_object
from gateway.formats.openai import refuse_unread
from gateway.hub import unknown_job
from gateway.models import ServedModel, listed

router = APIRouter(prefix="/v1/fleet", dependencies=[Depends(admin)])
TENANT = re.compile(r"[A-Za-z0-9_-]{1,64}")
MAX_LIST = 1000
DEFAULT_LIST = 20
ADAPTER_WAIT_S, ADAPTER_LOOK_S = 60.0, 0.05
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


def adapter_object(entry: AdapterEntry, lane: str, model: str | None) -> dict[str, Any]:
    return {
        "name": entry.name,
        "object": "adapter",
        "model": model,
        "lane": lane,
        "state": entry.state,
        "rank": entry.found.rank or None,
        "source": entry.source,
        "digest": entry.found.digest or None,
        "error": entry.found.error or None,
        "created_at": entry.created_ms // 1000,
    }


@router.get("/adapters")
async def adapters(services: UsedServices) -> Response:
    rows = []
    for lane in await services.fleet.lanes():
        model = services.registry.models.get(lane)
        name = model.card.served_name if model else None
        rows += [adapter_object(entry, lane, name) for entry in await services.fleet.adapters(lane)]
    return _list(rows)


@router.post("/adapters")
async def load_adapter(services: UsedServices, body: Body) -> Response:
    """Register an adapter and wait until a worker has looked at it; one that does not fit is forgotten again."""
    served, name, source = await _wanted_adapter(services, body)
    lane, token = served.card.lane, new_token()
    registered = await services.fleet.put_adapter(lane, name, source, token=token)
    entry = await _settled(services, lane, registered)
    if entry.state == "failed":
        await services.fleet.drop_adapter(lane, entry)
        raise ValidationError(entry.found.error, code="adapter_error", param="source")
    await services.registry.try_refresh()
    is_new = registered.token == token
    return _json(adapter_object(entry, lane, served.card.served_name), 201 if is_new else 200)


async def _wanted_adapter(services: Services, body: dict[str, Any]) -> tuple[ServedModel, str, str]:
    fields = Fields(body)
    values = {name: fields.text(name) or "" for name in ("name", "source")}
    model = fields.text("model")
    refuse_unread(fields)
    for param, check in (("name", check_name), ("source", check_source)):
        try:
            check(values[param])
        except ValueError as error:
            raise ValidationError(str(error), param=param) from None
    served = await services.registry.find(model)
    name = values["name"]
    if any(name in other.names for other in services.registry.models.values()):
        raise ValidationError(f"{name!r} is the name of a model; give the adapter another one", param="name")
    return served, name, values["source"]


async def _settled(services: Services, lane: str, registered: AdapterEntry) -> AdapterEntry:
    """The registration as a worker left it.

    Raises:
        Conflict: it was dropped or replaced meanwhile.
        Unavailable: no worker has said anything for a minute, or this gateway stops; it stays registered.
    """
    name, limit = registered.name, time.monotonic() + ADAPTER_WAIT_S
    while not services.hub.is_stopping and time.monotonic() < limit:
        entry = await services.fleet.adapter(lane, name)
        if entry is None or entry.token != registered.token:
            raise Conflict(f"adapter {name!r} was unloaded while it was loading", code="adapter_unloaded", param="name")
        if entry.state != "loading":
            return entry
        await asyncio.sleep(ADAPTER_LOOK_S)
    message = (
        f"no worker has looked at adapter {name!r} yet; it stays registered, and "
        "`inferfleet ctl adapter list` shows when it is ready"
    )
    raise Unavailable(message, code="adapter_loading", retry_after_s=ADAPTER_WAIT_S)


@router.delete("/adapters/{name:path}")
async def unload_adapter(name: str, request: Request, services: UsedServices) -> Response:
    """No new jobs with this adapter; those that have it go on."""
    served = await services.registry.find(request.query_params.get("model"), name)
    lane = served.card.lane
    entry = await services.fleet.adapter(lane, name)
    if entry is None:
        known = listed(one.name for one in await services.fleet.adapters(lane))
        message = f"no adapter {name[:MAX_NAME]!r} of {served.card.served_name}; adapters here: {known}"
        raise NotFound(message, code="adapter_not_found", param="name")
    if not await services.fleet.drop_adapter(lane, entry):
        raise Conflict(f"adapter {name!r} was loaded anew meanwhile", code="adapter_exists", param="name")
    await services.registry.try_refresh()
    return Response(status_code=204)


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
