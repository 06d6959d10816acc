"""From a request body to a durable job: parsing off the event loop, the limit on open requests, submission."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

from common.errors import Overloaded
from common.job import Job, Priority
from common.settings import GatewaySettings
from common.store.jobs import JobStore, new_job_id
from common.store.replies import Submission
from gateway.formats import adapter_id_of
from gateway.formats.base import JobDraft, Limits
from gateway.models import ModelRegistry, ServedModel

Draft = TypeVar("Draft")
Parser = Callable[[dict[str, Any], ServedModel, Limits], Draft]

LONG_BODY = 16_384
"""Bytes above which a body is parsed and tokenised in a thread, so that other streams do not stall."""
RETRY_AFTER_S = 1.0
REQUEST_TTL_S = 120
"""Seconds that the result of a request-response route outlives its end: long enough to resume a broken stream."""
EPHEMERAL_TTL_S = 60
REQUEST_TIMEOUT_S = 3600.0


class Admission:
    """Every generating request of a gateway passes here. `registry` knows the models, `jobs` takes the job."""

    def __init__(self, settings: GatewaySettings, jobs: JobStore, registry: ModelRegistry) -> None:
        self._settings, self._jobs, self._registry = settings, jobs, registry
        self.limits = Limits.of(settings)
        self.num_open = 0

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Hold one of the gateway's places for open requests, from before validation until the answer is out.

        Raises:
            Overloaded: all places are taken.
        """
        if self.num_open >= self._settings.max_concurrent_requests:
            raise Overloaded("Model is overloaded", retry_after_s=RETRY_AFTER_S)
        self.num_open += 1
        try:
            yield
        finally:
            self.num_open -= 1

    async def parse(
        self, parser: Parser[Draft], body: dict[str, Any], num_bytes: int, model: str | None, tenant: str
    ) -> Draft:
        """Run a format's parser with the model and the adapter the client names.

        Raises:
            RequestError: unknown model, or whatever the parser refuses.
        """
        served = (await self._registry.find(model, adapter_id_of(body))).asked_by(tenant)
        if num_bytes < LONG_BODY:
            return parser(body, served, self.limits)
        return await asyncio.to_thread(parser, body, served, self.limits)

    def job_of(
        self,
        draft: JobDraft,
        *,
        tenant: str,
        priority: Priority = Priority.INTERACTIVE,
        timeout_s: float = REQUEST_TIMEOUT_S,
        result_ttl_s: int = REQUEST_TTL_S,
        orphan_grace_s: float | None = None,
        idempotency_key: str = "",
        body_hash: str = "",
        via: Literal["request", "job"] = "request",
        request_id: str = "",
        job_id: str | None = None,
    ) -> Job:
        """The job that a draft becomes under these terms.

        `timeout_s` counts from now, `result_ttl_s` from the job's end; without `orphan_grace_s` it needs no follower.
        """
        adapter = {} if draft.adapter is None else {"adapter": draft.adapter.name}
        return Job(
            job_id=job_id or new_job_id(draft.lane),
            tenant=tenant,
            dialect=draft.dialect,
            prompt_ids=draft.prompt_ids,
            params=draft.params,
            cost=draft.cost,
            priority=priority,
            timeout_s=timeout_s,
            result_ttl_s=min(result_ttl_s, EPHEMERAL_TTL_S) if self._settings.ephemeral else result_ttl_s,
            orphan_grace_s=orphan_grace_s,
            idempotency_key=idempotency_key,
            body_hash=body_hash,
            cache_salt=tenant,
            adapter=draft.adapter,
            view={"metadata": {}} | draft.view | adapter | {"via": via, "request_id": request_id},
        )

    async def submit(self, job: Job, *, gateway_id: str | None = None) -> Submission:
        """Make the job durable and queue it; `gateway_id`, if given, follows it from the start.

        Raises:
            RequestError: as `JobStore.submit`.
            StoreError: Redis is away or full.
        """
        return await self._jobs.submit(
            job,
            gateway=gateway_id,
            max_queued_tokens=self._settings.max_queued_tokens,
            tenant_max_jobs=self._settings.max_jobs_per_tenant,
        )

    async def admit(self, draft: JobDraft, *, gateway_id: str | None = None, **terms: Any) -> Submission:
        """`job_of` and `submit` in one."""
        return await self.submit(self.job_of(draft, **terms), gateway_id=gateway_id)


def hash_of(body: bytes) -> str:
    """Of the body as the client sent it: a retry must not conflict with itself through defaults drawn at random."""
    return hashlib.sha256(body).hexdigest()
