"""A headless Chromium, driven over its DevTools protocol: open a page, run JavaScript in it, be on a phone."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import time
from pathlib import Path
from typing import Any

from websockets.asyncio.client import ClientConnection, connect

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-port=0",
)
START_LIMIT_S = 30.0


class Chromium:
    """`async with Chromium(folder) as browser: page = await browser.open(url)`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: asyncio.subprocess.Process | None = None
        self.socket: ClientConnection | None = None
        self.session = ""
        self.requested: list[str] = []
        self._numbers = itertools.count(1)
        self._replies: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._reader: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Chromium:
        path = shutil.which("chromium")
        assert path is not None, "the page is tested in Chromium, which must be on PATH"
        none = asyncio.subprocess.DEVNULL
        self.process = await asyncio.create_subprocess_exec(
            path, *FLAGS, f"--user-data-dir={self.folder}", "about:blank", stdout=none, stderr=none
        )
        port_file = self.folder / "DevToolsActivePort"
        limit = time.monotonic() + START_LIMIT_S
        while not (port_file.exists() and len(port_file.read_text().split()) == 2):
            assert time.monotonic() < limit and self.process.returncode is None, "Chromium did not start"
            await asyncio.sleep(0.05)
        port, path = port_file.read_text().split()
        self.socket = await connect(f"ws://127.0.0.1:{port}{path}", max_size=None)
        self._reader = asyncio.create_task(self._read())
        target = await self.call("Target.createTarget", url="about:blank")
        attached = await self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self.session = attached["sessionId"]
        await self.call("Page.enable")
        await self.call("Network.enable")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        if self.socket is not None:
            await self.socket.close()
        if self.process is not None and self.process.returncode is None:
            self.process.terminate()
            await self.process.wait()

    async def _read(self) -> None:
        assert self.socket is not None
        async for text in self.socket:
            message = json.loads(text)
            if "id" in message:
                self._replies.pop(message["id"]).set_result(message)
            elif message["method"] == "Network.requestWillBeSent":
                self.requested.append(message["params"]["request"]["url"])

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the DevTools protocol."""
        assert self.socket is not None
        number = next(self._numbers)
        reply = self._replies[number] = asyncio.get_running_loop().create_future()
        command = {"id": number, "method": method, "params": params}
        await self.socket.send(json.dumps(command | ({"sessionId": self.session} if self.session else {})))
        async with asyncio.timeout(20):
            message = await reply
        assert "error" not in message, message
        result: dict[str, Any] = message["result"]
        return result

    async def open(self, url: str) -> None:
        await self.call("Page.navigate", url=url)
        await self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    async def reload(self) -> None:
        await self.run("window.isOld = true")
        await self.call("Page.reload")
        await self.until("document.readyState === 'complete' && !window.isOld")

    async def run(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        reply = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    async def until(self, condition: str, limit_s: float = 15.0) -> None:
        """Poll until a JavaScript expression is true."""
        limit = time.monotonic() + limit_s
        while not await self.run(f"Boolean({condition})"):
            assert time.monotonic() < limit, (
                f"never true: {condition}; page: {await self.run('document.body.innerText')}"
            )
            await asyncio.sleep(0.03)

    async def type_into(self, selector: str, text: str) -> None:
        await self.run(f"document.querySelector({json.dumps(selector)}).focus()")
        await self.call("Input.insertText", text=text)

    async def click(self, selector: str) -> None:
        """A real click in the middle of an element."""
        place = await self.run(
            f"(() => {{ const r = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
            " return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            where = {"x": place[0], "y": place[1], "button": "left", "clickCount": 1}
            await self.call("Input.dispatchMouseEvent", type=kind, **where)

    async def be_a_phone(self) -> None:
        size = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
        await self.call("Emulation.setDeviceMetricsOverride", **size)
