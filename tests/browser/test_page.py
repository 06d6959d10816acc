"""The page at /, in a real browser: ask, watch, stop, reload in the middle, with a key, on a phone."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.routes.health import page
from tests.browser.chromium import Chromium
from tests.gateway.conftest import StartGateway, start_gateway, worker
from tests.support.live_gateway import LiveGateway
from tests.support.protocol import eventually
from tests.support.scripted_worker import ScriptedWorker, text_of

__all__ = ["start_gateway", "worker"]
ANSWER = "document.getElementById('answer').textContent"
STATUS = "document.getElementById('status').textContent"


@pytest.fixture()
async def browser(tmp_path: Path) -> AsyncIterator[Chromium]:
    async with Chromium(tmp_path / "chromium") as running:
        yield running


async def ask(browser: Chromium, gateway: LiveGateway, num_tokens: int) -> None:
    await browser.open(gateway.url)
    await browser.run(f"document.getElementById('tokens').value = {num_tokens}")
    await browser.type_into("#prompt", "Count")
    await browser.click("#send")


def num_streams(browser: Chromium) -> int:
    return sum("/stream" in url for url in browser.requested)


def test_the_page_is_small_and_needs_nothing_from_elsewhere() -> None:
    text = page().decode()
    assert len(text.splitlines()) < 200
    assert "http://" not in text and "https://" not in text and " src=" not in text


async def test_an_answer_streams_survives_reloads_and_stops(
    browser: Chromium, start_gateway: StartGateway, worker: ScriptedWorker
) -> None:
    gateway = await start_gateway()
    worker.hold_at = 5
    await ask(browser, gateway, 300)
    await browser.until(f"{ANSWER} === '{text_of(5)}'")
    address = await browser.run("location.hash")
    assert address.startswith("#job_")
    worker.hold_at = 12
    await browser.reload()
    assert await browser.run("location.hash") == address
    await browser.until(f"{ANSWER} === '{text_of(12)}'")
    worker.hold_at = 20
    await browser.until(f"{ANSWER} === '{text_of(20)}'")
    assert not await browser.run("document.getElementById('stop').disabled")
    await browser.click("#stop")
    await browser.until(f"{STATUS}.startsWith('cancelled')")
    assert await browser.run(ANSWER) == text_of(20)
    assert await browser.run("document.getElementById('stop').disabled")
    assert all(url.startswith((gateway.url, "about:", "data:")) for url in browser.requested)
    assert any("/stream" in url for url in browser.requested)


async def test_an_answer_survives_its_gateways_restart(
    browser: Chromium, start_gateway: StartGateway, worker: ScriptedWorker
) -> None:
    gateway = await start_gateway()
    worker.hold_at = 5
    await ask(browser, gateway, 30)
    await browser.until(f"{ANSWER} === '{text_of(5)}'")
    gateway.services.hub.stop_followers()
    await eventually(lambda: num_streams(browser) > 1, what="the page came back after its stream was ended")
    gateway.services.hub.is_stopping = False
    worker.hold_at = 1000
    await browser.until(f"{STATUS}.startsWith('completed')")
    assert await browser.run(ANSWER) == text_of(30)


async def test_a_key_is_asked_for_and_kept_for_the_tab(
    browser: Chromium, start_gateway: StartGateway, worker: ScriptedWorker
) -> None:
    gateway = await start_gateway(api_key="right")
    await ask(browser, gateway, 10)
    await browser.until(f"{STATUS}.includes('key')")
    await browser.run("document.querySelector('details').open = true")
    await browser.type_into("#key", "right")
    await browser.click("#send")
    await browser.until(f"{STATUS}.startsWith('completed')")
    await browser.reload()
    await browser.until(f"{ANSWER} === '{text_of(10)}'")
    assert "right" not in await browser.run("location.href")


async def test_the_page_fits_a_phone(browser: Chromium, start_gateway: StartGateway, worker: ScriptedWorker) -> None:
    gateway = await start_gateway()
    await browser.be_a_phone()
    await ask(browser, gateway, 200)
    await browser.until(f"{STATUS}.startsWith('completed')")
    assert await browser.run("document.documentElement.scrollWidth <= window.innerWidth")
    assert await browser.run("parseFloat(getComputedStyle(document.getElementById('answer')).fontSize) >= 16")
    assert await browser.run("document.getElementById('send').getBoundingClientRect().height >= 30")
