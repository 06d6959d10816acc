"""The Jobs API: submit, look, wait, list, cancel, erase and stream jobs under /v1/jobs."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response

from common.errors import BadRequest
from common.job import Job, JobRecord, JobState, TokenColumns
from common.keys import lane_of_job
from gateway.admission import hash_of
from gateway.auth import Tenant
from gateway.dependencies import (
    Services,
    access_entry,
    bare_id,
    idempotency_key,
    json_body,
    public_id,
    query_integer,
    services,
)
from gateway.formats import parse_input, renderer_for
from gateway.formats.base import Renderer, dump
from gateway.formats.jobs import JobEvents, JobRequest, finished_job, job_object, parse_job
from gateway.hub import unknown_job
from gateway.streaming import sse_response, wait_for_result

router = APIRouter()
LONGEST_WAIT_S = 60
MAX_LIST = 100
DEFAULT_LIST = 20
FINISHED = "end"
UsedServices = Annotated[Services, Depends(services)]
Body = Annotated[dict[str, Any], Depends(json_body)]


def special_ids_of(services: Services, job_id: str) -> frozenset[int]:
    """The ids that the job's model hides; none when its model is no longer served."""
    model = services.registry.models.get(job_id[:6])
    return frozenset() if model is None else frozenset(model.card.special_ids)


def _json(value: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(dump(value), status, media_type="application/json", headers=headers)


async def own_record(services: Services, job_id: str, tenant: str) -> JobRecord:
    """The record of a job of this tenant.

    Raises:
        NotFound: unknown, erased or another tenant's; the text is the same.
    """
    record = await services.jobs.record(job_id)
    if record is None or record.tenant != tenant:
        raise unknown_job(job_id)
    return record


async def job_body(services: Services, record: JobRecord, columns: TokenColumns | None = None) -> dict[str, Any]:
    """The job object with its text, read from the log unless given."""
    found = await _whole_log(services, record.job_id) if columns is None else columns
    return finished_job(record, found, special_ids_of(services, record.job_id))


async def _whole_log(services: Services, job_id: str) -> TokenColumns:
    columns = TokenColumns(0, [], [], [])
    while True:
        part = await services.jobs.log(job_id, columns.end)
        if not part.ids:
            return columns
        columns.extend(part)


@router.post("/v1/jobs")
async def submit(request: Request, services: UsedServices, tenant: Tenant, body: Body) -> Response:
    """202 and the job; 200 when it ended within `wait` seconds, or for a repeated Idempotency-Key."""
    wait_s = query_integer(request, "wait", 0, high=LONGEST_WAIT_S)
    job = await _new_job(request, services, tenant, parse_job(body))
    await services.hub.listen(lane_of_job(job.job_id))
    submission = await services.admission.submit(job, gateway_id=services.gateway_id if wait_s else None)
    submitted = None if submission.is_duplicate else job
    headers = {"location": f"/v1/jobs/{public_id(submission.job_id)}", "x-job-id": public_id(submission.job_id)}
    if submission.is_duplicate:
        headers["idempotent-replayed"] = "true"
    value, is_over = await _submitted(request, services, submission.job_id, tenant, submitted, wait_s)
    return _json(value, 200 if is_over or submission.is_duplicate else 202, headers)


async def _new_job(request: Request, services: Services, tenant: str, wish: JobRequest) -> Job:
    raw = await request.body()
    draft = await services.admission.parse(parse_input, wish.input, len(raw), _model_name(wish), tenant)
    view = draft.view | {"metadata": wish.metadata}
    return services.admission.job_of(
        dataclasses.replace(draft, view=view),
        tenant=tenant,
        priority=wish.priority,
        timeout_s=wish.timeout_s,
        result_ttl_s=wish.result_ttl_s,
        idempotency_key=idempotency_key(request),
        body_hash=hash_of(raw),
        via="job",
        request_id=access_entry(request).request_id,
    )


def _model_name(wish: JobRequest) -> str | None:
    name = wish.input.get("model")
    return name if isinstance(name, str) else None


async def _submitted(
    request: Request, services: Services, job_id: str, tenant: str, submitted: Job | None, wait_s: int
) -> tuple[dict[str, Any], bool]:
    """The job for the answer of a submission, and whether it has ended."""
    if wait_s:
        record, columns = await wait_for_result(
            request, services, job_id, timeout_s=wait_s, tenant=tenant, submitted=submitted
        )
        if record.state.is_terminal:
            return await job_body(services, record, columns), True
    record = await own_record(services, job_id, tenant)
    access_entry(request).record = record
    return await job_body(services, record), record.state.is_terminal


@router.get("/v1/jobs/{job_id}")
async def look(job_id: str, request: Request, services: UsedServices, tenant: Tenant) -> Response:
    """The job: at once when it has ended, else after at most `wait` seconds as it is then."""
    wait_s = query_integer(request, "wait", 0, high=LONGEST_WAIT_S)
    found = bare_id(job_id)
    record = await own_record(services, found, tenant)
    columns = None
    if wait_s and not record.state.is_terminal:
        record, columns = await wait_for_result(request, services, found, timeout_s=wait_s, tenant=tenant)
        if not record.state.is_terminal:
            record = await own_record(services, found, tenant)
    access_entry(request).record = record
    headers = {} if record.state.is_terminal else {"retry-after": "1"}
    return _json(await job_body(services, record, columns), headers=headers)


@router.get("/v1/jobs")
async def list_jobs(request: Request, services: UsedServices, tenant: Tenant) -> Response:
    """The tenant's jobs, newest first."""
    limit = query_integer(request, "limit", DEFAULT_LIST, low=1, high=MAX_LIST)
    after = request.query_params.get("after")
    records, has_more = await services.jobs.list_jobs(
        await services.fleet.lanes(),
        tenant,
        status=_status(request),
        limit=limit,
        after=None if after is None else bare_id(after),
    )
    data = [job_object(record, None, frozenset()) for record in records]
    last_id = data[-1]["id"] if data else None
    return _json({"object": "list", "data": data, "has_more": has_more, "last_id": last_id})


def _status(request: Request) -> JobState | None:
    word = request.query_params.get("status")
    if word is None:
        return None
    if word not in tuple(JobState):
        message = f"`status` must be one of {', '.join(JobState)}"
        raise BadRequest(message, code="invalid_query", param="status")
    return JobState(word)


@router.post("/v1/jobs/{job_id}/cancel")
async def cancel(job_id: str, services: UsedServices, tenant: Tenant) -> Response:
    """Ask the job to end; again and again if one likes. What it has written stays readable."""
    found = bare_id(job_id)
    await own_record(services, found, tenant)
    record = await services.jobs.cancel(found)
    if record is None:
        raise unknown_job(found)
    services.hub.note(record)
    return _json(await job_body(services, record))


@router.delete("/v1/jobs/{job_id}")
async def erase(job_id: str, services: UsedServices, tenant: Tenant) -> Response:
    """Cancel the job if it still runs, and forget everything of it."""
    found = bare_id(job_id)
    if not await services.jobs.erase(found, tenant):
        raise unknown_job(found)
    return Response(status_code=204)


@router.get("/v1/jobs/{job_id}/stream")
async def stream(job_id: str, request: Request, services: UsedServices, tenant: Tenant) -> Response:
    """The job's events from an offset on, as this API's own or as those of the route it came by."""
    found = bare_id(job_id)
    shape = _format(request)
    last_id = request.headers.get("last-event-id")
    if last_id == FINISHED:
        await own_record(services, found, tenant)
        return Response(status_code=204)
    start = query_integer(request, "from", 0) if last_id is None else _offset(last_id)
    special_ids = special_ids_of(services, found)

    def renderer(record: JobRecord) -> Renderer | JobEvents:
        return JobEvents(record, special_ids) if shape == "job" else renderer_for(record, special_ids)

    return await sse_response(request, services, found, renderer, start=start, tenant=tenant)


def _format(connection: HTTPConnection) -> Literal["job", "native"]:
    match connection.query_params.get("format", "job"):
        case "job":
            return "job"
        case "native":
            return "native"
    raise BadRequest("`format` must be job or native", code="invalid_query", param="format")


def _offset(last_id: str) -> int:
    if not (last_id.isascii() and last_id.isdigit() and len(last_id) < 14):
        raise BadRequest(
            "Last-Event-ID must be an offset or `end`", code="invalid_last_event_id", param="Last-Event-ID"
        )
    return int(last_id)
