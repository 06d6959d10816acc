"""A stand-in for a model hub: the few routes that its client asks for a download, over HTTP on this machine."""

from __future__ import annotations

import hashlib
import json
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

COMMIT = hashlib.sha1(b"the only commit").hexdigest()
MAIN = ("main", COMMIT)


@dataclass
class HubServer:
    """`with HubServer() as hub:`; `models` are files by path by name of the model. A huge one is never sent.

    `gated` models show their list of files only. With `hold_after` the next file that is larger stops after so many
    bytes until `release` is set, and with `breaks` the connection ends there; `is_holding` says that it has come to
    that. `requested` lists path and Range of each GET.
    """

    models: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    huge: dict[str, int] = field(default_factory=dict)
    hold_after: int | None = None
    breaks: bool = False
    is_holding: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)
    requested: list[tuple[str, str]] = field(default_factory=list)

    def __enter__(self) -> HubServer:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def use(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        """Let the client in this process find this hub; it reads its environment only when it is imported."""
        from huggingface_hub import constants

        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def environment(self, cache: str) -> dict[str, str]:
        """What a process needs to find this hub."""
        own = {"HF_ENDPOINT": self.url, "HF_HUB_CACHE": cache, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        return own | {"HF_HUB_OFFLINE": "0", "HF_TOKEN": "", "HUGGINGFACE_HUB_CACHE": ""}


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """The tests look at `requested`."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self.hub.requested.append((urlsplit(self.path).path, self.headers.get("Range", "")))
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        parts = urlsplit(self.path).path.strip("/").split("/")
        is_listing = parts[:2] == ["api", "models"]
        owner, name, route, *rest = [*(parts[2:] if is_listing else parts), "revision", "main"][:5]
        model = f"{owner}/{name}"
        if model not in self.hub.models:
            self._refuse(404, "RepoNotFound")
        elif not rest or rest[0] not in MAIN:
            self._refuse(404, "RevisionNotFound")
        elif is_listing:
            self._list(model, route)
        elif model in self.hub.gated:
            self._refuse(403, "GatedRepo")
        else:
            self._send_file(model, rest[-1], with_body=with_body)

    def _refuse(self, status: int, code: str) -> None:
        self._send_headers(status, 0, {"X-Error-Code": code, "X-Error-Message": code})

    def _list(self, model: str, route: str) -> None:
        sizes = {path: len(data) for path, data in self.hub.models[model].items()} | self.hub.huge
        listed: Any = [{"type": "file", "path": path, "size": size, "oid": path} for path, size in sizes.items()]
        if route == "revision":
            listed = {"id": model, "sha": COMMIT, "siblings": [{"rfilename": path} for path in sizes]}
        body = json.dumps(listed).encode()
        self._send_headers(200, len(body), {"Content-Type": "application/json"})
        self.wfile.write(body)

    def _send_file(self, model: str, path: str, *, with_body: bool) -> None:
        data = self.hub.models[model].get(path, b"")
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        size = self.hub.huge.get(path, len(data)) - start
        self._send_headers(206 if start else 200, size, headers)
        if with_body:
            self._send_body(data[start:])

    def _send_body(self, data: bytes) -> None:
        first = self.hub.hold_after
        # a client that is killed, as tests do, just goes
        with suppress(ConnectionError):
            if first is None or len(data) <= first:
                self.wfile.write(data)
                return
            self.hub.hold_after = None
            self.wfile.write(data[:first])
            self.hub.is_holding.set()
            self.hub.release.wait()
            self.close_connection = self.hub.breaks
            self.wfile.write(b"" if self.hub.breaks else data[first:])

    def _send_headers(self, status: int, size: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(size)}).items():
            self.send_header(name, value)
        self.end_headers()
