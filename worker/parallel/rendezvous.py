"""How the machines of one model find each other: the leaders of nodes 1 and up come to node 0, at an address all know.

    node k ──▶ node 0   [version, node rank, options]              the same command line but for --node-rank
    node 0 ──▶ node k   [port, ""] when all have come: where the ranks meet, at the same host; or [0, refusal]

The connection stays. Node 0 sends plans over it and hears what the ranks there report; its end is the end of the group.
Peers are trusted, as those of torch.distributed are: the network between the nodes must be theirs alone.
"""

from __future__ import annotations

import logging
import socket
import struct
import time
from contextlib import suppress
from importlib.metadata import version
from typing import Any

from common import wire
from common.errors import ConfigurationError, WireError
from common.settings import CommonSettings, WorkerSettings

JOIN_LIMIT_S = 600.0
HANDSHAKE_LIMIT_S = 10.0
RETRY_S = 0.5
LENGTH = struct.Struct("<I")
MAX_HANDSHAKE_BYTES = 1 << 16
KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 25_000}
"""A machine without power closes no connection; after 25 s of silence its peers take it for gone."""

OF_ONE_NODE = {
    *CommonSettings.model_fields,
    "model_id",
    "revision",
    "served_model_name",
    "node_rank",
    "worker_id",
    "threads",
    "prefill_step",
    "step_limit",
    "graceful_termination_timeout",
    "chat_template",
    "tokenizer_config_path",
    "huggingface_hub_cache",
    "metrics_port",
}
"""Options that may differ from node to node. Whether the model is the same is known when it is loaded."""

logger = logging.getLogger(__name__)


def host_and_port(text: str) -> tuple[str, int]:
    """Of "HOST:PORT"; an IPv6 address stands in brackets."""
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def listen(host: str, port: int = 0) -> socket.socket:
    """Raises OSError if `host` is no address of this machine or the port is taken."""
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    return socket.create_server((host, port), family=family)


def gather_nodes(settings: WorkerSettings) -> dict[int, socket.socket]:
    """On node 0: wait for the leaders of all other nodes; their connections by node rank, not yet answered.

    Raises:
        ConfigurationError: if they cannot come, or do not come within ten minutes.
    """
    try:
        server = listen(*host_and_port(settings.rendezvous))
    except OSError as error:
        raise ConfigurationError(
            f"cannot listen on --rendezvous {settings.rendezvous}: {error.strerror}; it must be an address of this "
            "machine and a free port"
        ) from error
    nodes: dict[int, socket.socket] = {}
    deadline = time.monotonic() + JOIN_LIMIT_S
    with server:
        while missing := [str(node) for node in range(1, settings.num_nodes) if node not in nodes]:
            server.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                message = f"node {', '.join(missing)} did not come to {settings.rendezvous} within {JOIN_LIMIT_S:g} s"
                raise ConfigurationError(f"{message}; start it with --node-rank") from None
            _greet(connection, settings, nodes)
    return nodes


def _greet(connection: socket.socket, settings: WorkerSettings, nodes: dict[int, socket.socket]) -> None:
    """Keep a connection that comes from a node like us; strangers go, and others hear why."""
    with suppress(OSError, WireError, TypeError, ValueError):
        connection.settimeout(HANDSHAKE_LIMIT_S)
        node_version, node, options = _receive(connection)
        refusal = _refusal(settings, node_version, node, options)
        if not refusal:
            if node in nodes:
                nodes[node].close()
            nodes[node] = connection
            return
        logger.warning("%s", refusal)
        _send(connection, [0, refusal])
    connection.close()


def _refusal(settings: WorkerSettings, node_version: str, node: int, options: dict[str, Any]) -> str:
    """Why the two cannot work together; "" if they can."""
    if node_version != version("inferfleet"):
        return f"node {node} runs version {node_version} but node 0 runs {version('inferfleet')}"
    for name, ours in _options(settings).items():
        if (theirs := options.get(name)) != ours:
            flag = name.replace("_", "-")
            return f"--{flag} is {theirs} on node {node} but {ours} on node 0; give all nodes the same options"
    return "" if 0 < node < settings.num_nodes else f"there is no node {node} of {settings.num_nodes}"


def _options(settings: WorkerSettings) -> dict[str, Any]:
    return settings.model_dump(mode="json", exclude=OF_ONE_NODE)


def welcome(connection: socket.socket, port: int) -> None:
    """On node 0: tell a node that all are there. Raises OSError if it has left."""
    _send(connection, [port, ""])
    _keep(connection)


def come_to_node_0(settings: WorkerSettings) -> tuple[socket.socket, int]:
    """On the other nodes: the connection to node 0, and the port where the ranks meet.

    Raises:
        ConfigurationError: if node 0 refuses, or is not there within ten minutes.
    """
    deadline = time.monotonic() + JOIN_LIMIT_S
    while True:
        try:
            return _come(settings)
        except (OSError, WireError, TypeError, ValueError) as error:
            if time.monotonic() > deadline:
                message = f"node 0 does not answer at {settings.rendezvous}: {error}; check --rendezvous"
                raise ConfigurationError(message) from error
        time.sleep(RETRY_S)


def _come(settings: WorkerSettings) -> tuple[socket.socket, int]:
    connection = socket.create_connection(host_and_port(settings.rendezvous), timeout=HANDSHAKE_LIMIT_S)
    try:
        _send(connection, [version("inferfleet"), settings.node_rank, _options(settings)])
        # node 0 may still wait for others
        connection.settimeout(JOIN_LIMIT_S + HANDSHAKE_LIMIT_S)
        port, refusal = _receive(connection)
        if refusal:
            raise ConfigurationError(str(refusal))
        _keep(connection)
    except BaseException:
        connection.close()
        raise
    return connection, int(port)


def _keep(connection: socket.socket) -> None:
    """Wait on this connection without a limit from now on, but notice that the other machine is gone."""
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEP_ALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _send(connection: socket.socket, value: list[Any]) -> None:
    body = wire.pack(value)
    connection.sendall(LENGTH.pack(len(body)) + body)


def _receive(connection: socket.socket) -> Any:
    (size,) = LENGTH.unpack(_receive_exactly(connection, LENGTH.size))
    if size > MAX_HANDSHAKE_BYTES:
        raise WireError(f"a greeting of {size} bytes")
    return wire.unpack(_receive_exactly(connection, size))


def _receive_exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = connection.recv(size - len(data))
        if not piece:
            raise WireError("it closed the connection")
        data += piece
    return data
