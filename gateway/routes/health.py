"""Health of process, gateway and fleet, metrics, and the page at /."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Annotated

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from common.errors import StoreError
from gateway.auth import tenant_of
from gateway.dependencies import Services, services
from gateway.formats.base import dump

router = APIRouter()
UNHEALTHY = dump({"error": "unhealthy", "error_type": "healthcheck"})
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@cache
def page() -> bytes:
    """The page that lets people try a model."""
    return resources.files("gateway").joinpath("console/index.html").read_bytes()


def _unhealthy() -> Response:
    return Response(UNHEALTHY, 503, media_type="application/json")


async def _serves(services: Services) -> bool:
    """Whether a live worker serves a model this gateway knows."""
    try:
        workers = await services.fleet.workers()
    except StoreError:
        return False
    return any(info.state == "ready" and info.lane in services.registry.models for info in workers)


@router.get("/health")
@router.get("/ping")
async def health(services: Annotated[Services, Depends(services)]) -> Response:
    """As TGI: 200 with an empty body, or 503 until a model is served."""
    return Response() if await _serves(services) else _unhealthy()


@router.get("/health/live")
async def live() -> Response:
    """The process answers."""
    return Response()


@router.get("/health/ready")
async def ready(services: Annotated[Services, Depends(services)]) -> Response:
    """Redis answers and a model is known: this gateway can take requests."""
    try:
        await services.connection.run("PING")
    except StoreError:
        return _unhealthy()
    return Response() if services.registry.models and not services.hub.is_stopping else _unhealthy()


@router.get("/")
async def index(request: Request, services: Annotated[Services, Depends(services)]) -> Response:
    """The page for browsers, health for everything else."""
    if "text/html" not in request.headers.get("accept", ""):
        return await health(services)
    headers = {"content-security-policy": PAGE_POLICY, "cache-control": "no-cache", "referrer-policy": "no-referrer"}
    return Response(page(), media_type="text/html; charset=utf-8", headers=headers)


@router.get("/metrics")
async def metrics(request: Request, services: Annotated[Services, Depends(services)]) -> Response:
    if services.settings.metrics_need_key:
        await tenant_of(request, services)
    return Response(await services.metrics.render(services), headers={"content-type": METRICS_TYPE})
