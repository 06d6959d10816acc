"""`inferfleet ctl`: look at and steer a running fleet through one of its gateways."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any
from urllib.parse import quote

import httpx
from rich.console import Console
from rich.table import Column, Table

from common.errors import ConfigurationError

FLEET = "/v1/fleet"
COLUMNS = {
    "workers": ("id", "state", "model", "host", "pid", "running", "waiting", "progress"),
    "jobs": ("id", "status", "worker", "num_tokens", "attempts"),
    "queue": ("model", "queued", "running", "queued_tokens", "workers", "dead_letters"),
    "keys": ("id", "tenant", "created_at"),
    "adapters": ("name", "model", "state", "rank", "source", "digest"),
}
LISTS = {"key": "keys", "adapter": "adapters"}
"""Commands whose answers are tables of another name."""
LOAD_LIMIT_S = 90.0


class Gateway:
    """The administration routes of one gateway. A refusal or an absent gateway is a ConfigurationError."""

    def __init__(self, url: str, api_key: str) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.url = url
        self.client = httpx.Client(base_url=url, headers=headers, timeout=30)

    def call(self, method: str, path: str, **arguments: Any) -> Any:
        try:
            response = self.client.request(method, FLEET + path, **arguments)
        except httpx.TransportError:
            raise ConfigurationError(f"no gateway at {self.url}; --url or INFERFLEET_URL names another") from None
        if response.is_error:
            raise ConfigurationError(_message(response))
        return response.json() if response.content else None


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the gateway answered {response.status_code}"


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", action="store_true", help="print JSON")
    shared.add_argument("--url", default=os.environ.get("INFERFLEET_URL", "http://localhost:8080"))
    parser = argparse.ArgumentParser(prog="inferfleet ctl", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str, *positional: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, parents=[shared])
        for argument in positional:
            command.add_argument(argument)
        return command

    add("workers", "every worker: loading, ready or draining")
    add("jobs", "the newest jobs of all tenants").add_argument("--limit", type=int, default=20)
    add("job", "one job", "job_id")
    add("cancel", "cancel a job", "job_id")
    add("drain", "let a worker finish what it runs and leave; `up` starts a fresh one in its place", "worker_id")
    add("redrive", "give dead letters another chance").add_argument("job_id", nargs="?", default="")
    add("queue", "what waits, per model")
    add("dead-letters", "jobs that killed their workers")
    adapter = add("adapter", "LoRA adapters of a model")
    adapter.add_argument("action", choices=["load", "unload", "list"])
    adapter.add_argument("name", nargs="?", default="", help="what clients say")
    adapter.add_argument(
        "source", nargs="?", default="", help="load: a folder on the workers, or owner/name[@revision]"
    )
    adapter.add_argument("--model", default=None, help="a served name; none: the only one")
    key = add("key", "API keys of tenants")
    key.add_argument("action", choices=["create", "list", "revoke"])
    key.add_argument("name", nargs="?", default="", help="create: the tenant; revoke: the key's id")
    return parser


def _key(gateway: Gateway, options: argparse.Namespace) -> Any:
    if options.action == "list":
        return gateway.call("GET", "/keys")
    if not options.name:
        raise ConfigurationError(f"key {options.action} needs a {'tenant' if options.action == 'create' else 'key id'}")
    if options.action == "create":
        return gateway.call("POST", "/keys", json={"tenant": options.name})
    return gateway.call("DELETE", f"/keys/{options.name}")


def _adapter(gateway: Gateway, options: argparse.Namespace) -> Any:
    name, source = options.name, options.source
    if options.action == "list":
        if name or options.model is not None:
            raise ConfigurationError("adapter list shows those of all models; it needs no name")
        return gateway.call("GET", "/adapters")
    if not name or bool(source) != (options.action == "load"):
        needs = "a name and a source" if options.action == "load" else "a name and nothing else"
        raise ConfigurationError(f"adapter {options.action} needs {needs}")
    model = {} if options.model is None else {"model": options.model}
    if options.action == "unload":
        return gateway.call("DELETE", f"/adapters/{quote(name)}", params=model)
    body = {"name": name, "source": _absolute(source)} | model
    return gateway.call("POST", "/adapters", json=body, timeout=LOAD_LIMIT_S)


def _absolute(source: str) -> str:
    """Workers do not know where we are."""
    is_relative = source.startswith((".", "~"))
    return os.path.abspath(os.path.expanduser(source)) if is_relative else source


def _answer(gateway: Gateway, options: argparse.Namespace) -> Any:
    match options.command:
        case "job":
            return gateway.call("GET", f"/jobs/{options.job_id}")
        case "jobs":
            return gateway.call("GET", "/jobs", params={"limit": options.limit})
        case "cancel":
            return gateway.call("POST", f"/jobs/{options.job_id}/cancel")
        case "drain":
            return gateway.call("POST", f"/workers/{options.worker_id}/drain")
        case "redrive":
            return gateway.call("POST", "/redrive", json={"job_id": options.job_id or None})
        case "adapter":
            return _adapter(gateway, options)
        case "key":
            return _key(gateway, options)
        case name:
            return gateway.call("GET", f"/{name}")


def _show(command: str, answer: Any) -> None:
    rows = answer.get("data", answer) if isinstance(answer, dict) else answer
    if not isinstance(rows, list):
        for name, value in (rows or {}).items():
            sys.stdout.write(f"{name}: {value}\n")
        return
    columns = COLUMNS.get(command, tuple(rows[0]) if rows else ())
    # ids are for copying: never cut
    table = Table(*(Column(name, no_wrap=name in ("id", "job_id"), overflow="fold") for name in columns))
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    Console().print(table if rows else "none")


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        # how far a worker has loaded, in bytes, or for how many machines it still waits
        done, total = value["done"], value["total"]
        return f"{value['phase']}: {done} of {total}, {done / total:.0%}" if total else str(value["phase"])
    return "-" if value is None else str(value)


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    gateway = Gateway(options.url, os.environ.get("INFERFLEET_API_KEY", ""))
    with gateway.client:
        answer = _answer(gateway, options)
    if isinstance(answer, dict) and isinstance(answer.get("data"), list):
        answer = answer["data"]
    if options.json:
        sys.stdout.write(json.dumps(answer, indent=2, ensure_ascii=False) + "\n")
    else:
        _show(LISTS.get(options.command, options.command), answer)
    return 0
