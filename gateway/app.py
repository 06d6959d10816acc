"""The application of one gateway: its services, middleware, errors and routes."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import secrets
import signal
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from types import FrameType
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import Response

from common.background import end
from common.errors import (
    BadRequest,
    ConfigurationError,
    MethodNotAllowed,
    NotFound,
    OffsetBeyondEnd,
    RequestError,
    StoreError,
    StoreFull,
    Unavailable,
)
from common.settings import GatewaySettings
from common.store.connection import Connection
from common.store.fleet import FleetStore
from common.store.jobs import JobStore
from common.store.reaper import Reaper
from gateway.access import AccessLog, BodyLimit
from gateway.admission import Admission
from gateway.auth import KeyRing
from gateway.dependencies import Services, access_entry
from gateway.formats.base import dump, native_error, openai_error
from gateway.hub import Hub
from gateway.metrics import Metrics
from gateway.models import ModelRegistry
from gateway.routes import fleet, health, jobs, openai, tgi, websocket

EXPOSED_HEADERS = [
    "x-job-id",
    "x-request-id",
    "x-inferfleet-gateway",
    "retry-after",
    "location",
    "idempotent-replayed",
]
CLIENT_CLOSED = 499
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
STORE_RETRY_S = 2.0

logger = logging.getLogger(__name__)


class InternalError(RequestError):
    """500: our fault; the log says what."""


def create_app(settings: GatewaySettings) -> FastAPI:
    """A gateway as an ASGI application. Redis is opened when the server starts it."""
    app = FastAPI(
        title="inferfleet", lifespan=_lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    app.state.settings = settings
    app.state.metrics = Metrics()
    for module in (health, tgi, openai, jobs, websocket, fleet):
        app.include_router(module.router)
    _handle_errors(app)
    app.add_middleware(BodyLimit, limit=settings.payload_limit)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=settings.cors_allow_origin,
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"],
        expose_headers=EXPOSED_HEADERS,
    )
    app.add_middleware(AccessLog, metrics=app.state.metrics)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    settings: GatewaySettings = app.state.settings
    if settings.redis_url is None:
        raise ConfigurationError("a gateway needs --redis-url or REDIS_URL")
    connection = await Connection.open(settings.redis_url.get_secret_value())
    services = _services(settings, connection, app.state.metrics)
    app.state.services = services
    await services.registry.start()
    await services.hub.start()
    reaper = Reaper(connection, lease_s=settings.lease, max_attempts=settings.max_attempts)
    reaping = asyncio.create_task(reaper.run())
    try:
        with _on_stop_signal(services.hub.stop_followers):
            yield
    finally:
        await end(reaping)
        await services.hub.close()
        await services.registry.close()
        await connection.close()


def _services(settings: GatewaySettings, connection: Connection, metrics: Metrics) -> Services:
    store, fleet_store = JobStore(connection), FleetStore(connection)
    registry = ModelRegistry(fleet_store)
    gateway_id = settings.gateway_id or _own_name()
    return Services(
        settings=settings,
        gateway_id=gateway_id,
        connection=connection,
        jobs=store,
        fleet=fleet_store,
        hub=Hub(store, gateway_id, lanes=lambda: registry.models),
        registry=registry,
        admission=Admission(settings, store, registry),
        keys=KeyRing(fleet_store, settings.api_key),
        metrics=metrics,
    )


def _own_name() -> str:
    """The host's name, so that an operator finds the process, and enough chance for several on one host."""
    host = re.sub("[^A-Za-z0-9_-]", "-", socket.gethostname())[:40]
    return f"{host}-{secrets.token_hex(4)}"


@contextmanager
def _on_stop_signal(callback: Any) -> Iterator[None]:
    """Call back when the process is told to stop, before the server's own handler: that one waits for streams to end
    by themselves, and they only do when they are told to."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def handle(number: int, frame: FrameType | None) -> None:
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(callback)
        then = previous[signal.Signals(number)]
        if callable(then):
            then(number, frame)

    for number in STOP_SIGNALS:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def is_native(path: str) -> bool:
    """Whether a route answers errors in TGI's shape; all others answer in OpenAI's."""
    return not path.startswith("/v1/")


def error_body(error: RequestError, path: str) -> dict[str, Any]:
    """The body of a refusal in the shape of the route at `path`."""
    if is_native(path):
        return native_error(error)
    body = openai_error(error)
    if isinstance(error, OffsetBeyondEnd):
        body["error"]["num_tokens"] = error.num_tokens
    return body


def error_response(connection: HTTPConnection, error: RequestError, headers: dict[str, str] | None = None) -> Response:
    access_entry(connection).error = error.code or error.error_type
    found = dict(headers or {})
    if error.retry_after_s is not None:
        found["retry-after"] = str(math.ceil(error.retry_after_s))
    if error.status == 401:
        found["www-authenticate"] = "Bearer"
    body = dump(error_body(error, connection.url.path))
    return Response(body, error.status, media_type="application/json", headers=found)


def store_refusal(error: StoreError) -> Unavailable:
    """What a client hears when Redis is away or full."""
    if isinstance(error, StoreFull):
        return Unavailable("the queue is out of memory", code="queue_full", retry_after_s=STORE_RETRY_S)
    return Unavailable("the queue is not available now", code="redis_unavailable", retry_after_s=STORE_RETRY_S)


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return error_response(request, error)

    @app.exception_handler(StoreError)
    async def without_store(request: Request, error: StoreError) -> Response:
        logger.warning("request refused: %s", error)
        return error_response(request, store_refusal(error))

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        access_entry(request).error = "client disconnected"
        return Response(status_code=CLIENT_CLOSED)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return error_response(request, _refusal(request, error), dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def wrong_argument(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return error_response(request, BadRequest(f"{first['loc'][-1]}: {first['msg']}", code="invalid_query"))

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return error_response(request, InternalError("internal error"))


def _refusal(request: Request, error: HTTPException) -> RequestError:
    route = f"{request.method} {request.url.path[:200]}"
    if error.status_code == MethodNotAllowed.status:
        return MethodNotAllowed(f"no route {route}")
    if error.status_code == NotFound.status:
        return NotFound(f"no route {route}", code="route_not_found")
    return BadRequest(str(error.detail)) if error.status_code < 500 else InternalError("internal error")
