"""What all request-response routes do: read the body, admit it as a job that lives as long as its client, answer."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request
from starlette.responses import Response

from common.job import Job, JobRecord, TokenColumns
from gateway.admission import Parser, hash_of
from gateway.auth import tenant_of
from gateway.dependencies import Services, access_entry, idempotency_key, json_body, public_id, services
from gateway.formats import renderer_for
from gateway.formats.base import JobDraft, Renderer, end_error
from gateway.streaming import sse_response, wait_for_result

KEY_SEPARATOR = "\n"
"""Not printable, so it cannot be part of a client's idempotency key."""


@dataclass(frozen=True, slots=True)
class Admitted:
    """A job that is durable now. `is_replay`: an earlier request with the same idempotency key made it."""

    job: Job
    job_id: str
    is_replay: bool

    @property
    def submitted(self) -> Job | None:
        """What the hub may submit again: a job that this request made."""
        return None if self.is_replay else self.job


@dataclass(slots=True)
class Call:
    """One request to a generating route, past authentication and the limit on open requests."""

    request: Request
    services: Services
    tenant: str
    body: dict[str, Any]
    raw: bytes
    started: float
    validation_s: float = 0.0

    async def parse(self, parser: Parser[Any]) -> Any:
        """Run a format's parser on the body, for the model that the body names."""
        model = self.body.get("model")
        name = model if isinstance(model, str) else None
        draft = await self.services.admission.parse(parser, self.body, len(self.raw), name, self.tenant)
        self.validation_s = time.monotonic() - self.started
        return draft

    async def admit(self, draft: JobDraft, *, job_id: str | None = None, child: int | None = None) -> Admitted:
        """Submit the draft. Children of one request have keys of their own under the client's key."""
        key = idempotency_key(self.request)
        job = self.services.admission.job_of(
            draft,
            tenant=self.tenant,
            orphan_grace_s=self.services.settings.disconnect_grace,
            idempotency_key=f"{key}{KEY_SEPARATOR}{child}" if key and child is not None else key,
            body_hash=hash_of(self.raw),
            request_id=access_entry(self.request).request_id,
            job_id=job_id,
        )
        await self.services.hub.listen(draft.lane)
        submission = await self.services.admission.submit(job, gateway_id=self.services.gateway_id)
        return Admitted(job, submission.job_id, submission.is_duplicate)

    def special_ids(self, lane: str) -> tuple[int, ...]:
        model = self.services.registry.models.get(lane)
        return () if model is None else model.card.special_ids

    def headers(self, admitted: Admitted) -> dict[str, str]:
        found = {"x-job-id": public_id(admitted.job_id)}
        return found | ({"idempotent-replayed": "true"} if admitted.is_replay else {})

    async def stream(self, draft: JobDraft) -> Response:
        """Admit the draft and stream its events."""
        admitted = await self.admit(draft)
        special_ids = self.special_ids(draft.lane)

        def renderer(record: JobRecord) -> Renderer:
            return renderer_for(record, special_ids)

        return await sse_response(
            self.request,
            self.services,
            admitted.job_id,
            renderer,
            tenant=self.tenant,
            submitted=admitted.submitted,
            headers=self.headers(admitted),
        )

    async def result(self, admitted: Admitted) -> tuple[JobRecord, TokenColumns]:
        """Wait for the end of the job.

        Raises:
            RequestError: it ended without a complete answer.
        """
        record, columns = await wait_for_result(
            self.request, self.services, admitted.job_id, tenant=self.tenant, submitted=admitted.submitted
        )
        error = end_error(record)
        if error is not None:
            raise error
        return record, columns


async def open_call(request: Request) -> AsyncIterator[Call]:
    """Dependency of generating routes. The place among the open requests is held until the last byte of the answer.

    What it depends on itself is called here: through FastAPI that takes longer than all of it does.
    """
    found = await services(request)
    tenant = await tenant_of(request, found)
    body = await json_body(request)
    with found.admission.slot():
        yield Call(request, found, tenant, body, await request.body(), time.monotonic())


OpenCall = Annotated[Call, Depends(open_call)]
