"""Bad input against a real fleet: every row of the table gets its exact answer, and nobody comes to harm by it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from ops.redis_server import socket_path
from tests.conformance import bad_input_table as table
from tests.conformance.bad_input_table import BadRequest, BadSocket
from tests.conformance.conftest import Served, family, is_healthy
from tests.conformance.test_command_line import BAD as COMMAND_LINES
from tests.support.fleet import DEMO_MODEL, FleetProcess, free_port, wait_for

KEY = "the-right-key"
ENDLESS = {"input": {"inputs": "Count to 100", "parameters": {"max_new_tokens": 4000, "ignore_eos": True}}}
SHORT = {"input": {"inputs": "Count to 10", "parameters": {"max_new_tokens": 5, "ignore_eos": True}}}
GOOD = {"inputs": "Count to 10", "parameters": {"max_new_tokens": 1}}
NOBODY = "job_abcdef" + "2" * 22


@dataclass
class Target:
    """A door to the fleet: its client, what stands for the names in the table, and the processes that must live."""

    client: httpx.Client
    names: dict[str, str]
    roots: tuple[int, ...]

    def fill(self, text: str) -> str:
        for name, value in self.names.items():
            text = text.replace(f"{{{name}}}", value)
        return text

    def processes(self) -> dict[int, str]:
        return {pid: start for root in self.roots for pid, start in family(root).items()}


def names_of(client: httpx.Client) -> dict[str, str]:
    finished = client.post("/v1/jobs?wait=60", json=SHORT).raise_for_status().json()
    assert (finished["status"], finished["num_tokens"]) == ("completed", 5)
    tokenizer = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    num_tokens = len(tokenizer.encode(table.LONG_PROMPT).ids)
    assert num_tokens > 4096
    assert client.get(f"/v1/jobs/{NOBODY}").status_code == httpx.codes.NOT_FOUND
    return {"finished": finished["id"], "nobody": NOBODY, "long_tokens": str(num_tokens)}


@pytest.fixture(scope="module")
def open_door(served: Served) -> Iterator[Target]:
    with served.client() as client:
        yield Target(client, names_of(client), (served.process.pid,))


@pytest.fixture(scope="module")
def locked_door(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """A second gateway of the same fleet, which wants a key."""
    folder, port = tmp_path_factory.mktemp("locked"), free_port()
    url = f"unix://{socket_path(served.log.parent.resolve() / 'redis')}"
    environment = served.environment() | {"API_KEY": KEY, "REDIS_URL": url, "PORT": str(port), "HOSTNAME": "127.0.0.1"}
    gateway = FleetProcess("locked", ["gateway"], environment, folder / "gateway.log", port)
    gateway.start()
    try:
        wait_for(lambda: is_healthy(gateway.url), "a gateway with a key")
        headers = {"Authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=gateway.url, timeout=60, headers=headers) as client:
            yield Target(client, names_of(client), (served.process.pid, gateway.pid))
    finally:
        gateway.stop()


def request(target: Target, row: BadRequest) -> httpx.Request:
    headers = (
        row.headers
        if row.content_type is None or row.content is None
        else row.headers | {"Content-Type": row.content_type}
    )
    return httpx.Request(
        row.method, f"{target.client.base_url}{target.fill(row.path)}", content=row.content, headers=headers
    )


def send(target: Target, row: BadRequest) -> httpx.Response:
    """The row's request with the row's headers only; none of the client's own key."""
    with httpx.Client(timeout=60) as stranger:
        if row.before is not None:
            stranger.send(request(target, replace(row, body=row.before))).raise_for_status()
        return stranger.send(request(target, row))


def problems(target: Target, row: BadRequest, response: httpx.Response) -> list[str]:
    """How a response differs from the row."""
    expected = target.fill(row.answer_bytes.decode())
    headers = {name: response.headers.get(name) for name in ("content-type", *row.answer_headers)}
    wanted = {"content-type": table.JSON} | row.answer_headers
    compared = [(response.status_code, row.status), (response.text, expected), (headers, wanted)]
    return [f"{found!r} instead of {want!r}" for found, want in compared if found != want]


def assert_unharmed(target: Target, before: dict[int, str]) -> None:
    answer = target.client.post("/generate", json=GOOD)
    assert (answer.status_code, list(answer.json())) == (200, ["generated_text"])
    assert target.processes() == before


def check_request(target: Target, row: BadRequest) -> None:
    before = target.processes()
    assert len(before) >= 4, "launcher, gateway, agent, engine"
    assert problems(target, row, send(target, row)) == []
    assert_unharmed(target, before)


def named(rows: list[Any]) -> Any:
    return pytest.mark.parametrize("row", rows, ids=lambda row: row.name)


@named(table.NATIVE)
def test_native(open_door: Target, row: BadRequest) -> None:
    check_request(open_door, row)


@named(table.OPENAI)
def test_openai(open_door: Target, row: BadRequest) -> None:
    check_request(open_door, row)


@named(table.JOBS)
def test_jobs(open_door: Target, row: BadRequest) -> None:
    check_request(open_door, row)


@named(table.KEYS)
def test_keys(locked_door: Target, row: BadRequest) -> None:
    check_request(locked_door, row)


@pytest.fixture
def running(open_door: Target) -> Iterator[str]:
    """A job that still writes; it is erased at the end."""
    job_id = open_door.client.post("/v1/jobs", json=ENDLESS).raise_for_status().json()["id"]
    wait_for(lambda: open_door.client.get(f"/v1/jobs/{job_id}").json()["num_tokens"] > 0, "a running job")
    yield job_id
    assert open_door.client.delete(f"/v1/jobs/{job_id}").status_code == httpx.codes.NO_CONTENT


def converse(socket: ClientConnection, row: BadSocket) -> list[Any]:
    """Send the row's messages; all `error` events until the end."""
    events = []
    try:
        for message in row.messages:
            socket.send(message)
        if row.raw:
            socket.socket.sendall(row.raw)
        while True:
            events.append(json.loads(socket.recv(timeout=30)))
    except ConnectionClosed:
        return [event for event in events if event["type"] == "error"]


def check_socket(target: Target, row: BadSocket, job_id: str) -> None:
    before = target.processes()
    filled = replace(target, names=target.names | {"running": job_id})
    url = str(target.client.base_url).replace("http://", "ws://") + filled.fill(row.path)
    with connect(url, additional_headers=row.headers, max_size=None, ping_interval=None) as socket:
        errors = converse(socket, row)
    assert errors == json.loads(filled.fill(json.dumps(row.errors)))
    assert (socket.close_code, socket.close_reason) == (row.code, filled.fill(row.reason))
    assert_unharmed(target, before)


@named(table.SOCKETS)
def test_websocket(open_door: Target, running: str, row: BadSocket) -> None:
    check_socket(open_door, row, running)


@named(table.KEY_SOCKETS)
def test_websocket_keys(locked_door: Target, running: str, row: BadSocket) -> None:
    check_socket(locked_door, row, running)


def test_the_table_is_long_enough_and_its_names_differ() -> None:
    doors: dict[str, list[Any]] = {
        "native": [*table.NATIVE, *table.KEYS[:2]],
        "openai": [*table.OPENAI, *table.KEYS[2:5]],
        "jobs": [*table.JOBS, *table.KEYS[5:]],
        "websocket": [*table.SOCKETS, *table.KEY_SOCKETS],
        "command line": list(COMMAND_LINES),
    }
    for name, rows in doors.items():
        assert len(rows) >= 8, name
    for rows in (table.NATIVE, table.OPENAI, table.JOBS, table.KEYS, table.SOCKETS, table.KEY_SOCKETS):
        assert len({row.name for row in rows}) == len(rows)
    assert sum(map(len, doors.values())) >= 60


def test_the_comparison_notices_another_text_status_and_header(open_door: Target) -> None:
    row = table.NATIVE[0]
    response = send(open_door, row)
    assert problems(open_door, row, response) == []
    for wrong in (
        replace(row, answer=row.answer | {"error": "?"}),
        replace(row, status=400),
        replace(row, answer_headers={"allow": "POST"}),
    ):
        assert len(problems(open_door, wrong, response)) == 1
