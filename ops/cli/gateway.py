"""`inferfleet gateway`: one HTTP process."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress

from common.errors import ConfigurationError
from common.settings import GatewaySettings, parse
from common.store.connection import Connection
from common.telemetry import set_up_logging


def listen(hostname: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        ConfigurationError: if the address is not ours or the port is taken.
    """
    family = socket.AF_INET6 if ":" in hostname else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((hostname, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ConfigurationError(
            f"cannot listen on {hostname}:{port}: {error.strerror}; choose another --port"
        ) from None
    listener.set_inheritable(True)
    return listener


async def _check_redis(url: str) -> None:
    """Wait until Redis answers, and refuse one that cannot serve, before the server would show a traceback for it."""
    await (await Connection.open_patiently(url)).close()


def main(arguments: list[str]) -> int:
    settings = parse(GatewaySettings, arguments, program="inferfleet gateway")
    if settings.redis_url is None:
        raise ConfigurationError("a gateway needs --redis-url or REDIS_URL; `inferfleet up` starts a Redis of its own")
    set_up_logging(settings.log_level, json_output=settings.json_output)
    listener = listen(settings.hostname, settings.port)
    asyncio.run(_check_redis(settings.redis_url.get_secret_value()))

    import uvicorn

    from gateway.app import create_app

    server = uvicorn.Server(
        uvicorn.Config(
            create_app(settings),
            log_config=None,
            access_log=False,
            ws_max_size=settings.payload_limit,
            ws_ping_interval=20,
            ws_ping_timeout=70,
            timeout_graceful_shutdown=10,
        )
    )
    with suppress(KeyboardInterrupt):
        server.run(sockets=[listener])
    return 0 if server.started else 1
