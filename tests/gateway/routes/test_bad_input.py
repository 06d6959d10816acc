"""A hand-written table of bad input against a gateway in this process. The whole fleet has a table of its own."""

from __future__ import annotations

from tests.gateway.routes.bad_input_table import MOST_INPUT, MOST_TOTAL, NATIVE, OPENAI
from tests.gateway.routes.conftest import House, OpenHouse


async def open_like_the_demo_model(open_house: OpenHouse) -> House:
    return await open_house(card_changes={"max_input_tokens": MOST_INPUT, "max_total_tokens": MOST_TOTAL})


async def test_every_row_is_answered_exactly_and_the_gateway_serves_on(open_house: OpenHouse) -> None:
    house = await open_like_the_demo_model(open_house)
    assert len(NATIVE) >= 12 and len(OPENAI) >= 12
    assert len({row.name for row in (*NATIVE, *OPENAI)}) == len(NATIVE) + len(OPENAI)
    for row in (*NATIVE, *OPENAI):
        sent = {"content": row.content} if row.content is not None else {"json": row.json}
        response = await house.client.request(row.method, row.path, headers=row.headers, **sent)
        assert (row.name, response.status_code, response.json()) == (row.name, row.status, row.expected)
    assert house.worker.seen == []
    good = await house.client.post("/generate", json={"inputs": "hi"})
    assert good.status_code == 200
