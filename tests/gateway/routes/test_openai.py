"""OpenAI's routes from HTTP to Redis and back, with a scripted worker."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from common.job import JobState
from gateway.streaming import COMMENT, RETRY_LINE
from tests.gateway.routes.conftest import Event, House, OpenHouse, eventually
from tests.gateway.scripted_worker import ANSWER, POISON

NUM_TOKENS = len(ANSWER.encode()) + 1


def chat(content: str = "hi", **more: Any) -> dict[str, Any]:
    return {"model": "tgi", "messages": [{"role": "user", "content": content}]} | more


def completion(prompt: Any = "hi", **more: Any) -> dict[str, Any]:
    return {"model": "demo", "prompt": prompt, "max_tokens": 50} | more


def contents(events: list[Event]) -> str:
    choices = [choice for event in events if event.data != "[DONE]" for choice in event.data["choices"]]
    return "".join(choice["delta"].get("content", "") for choice in choices)


async def test_a_chat_answer(house: House) -> None:
    response = await house.client.post("/v1/chat/completions", json=chat())
    body = response.json()
    job_id = house.worker.seen[0].job.job_id
    assert (response.status_code, body["id"]) == (200, f"chatcmpl-{job_id}")
    assert response.headers["x-job-id"] == f"job_{job_id}" and response.headers["x-prompt-tokens"] == "6"
    assert body["choices"][0]["message"]["content"] == ANSWER and body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"] == {"prompt_tokens": 6, "completion_tokens": NUM_TOKENS, "total_tokens": NUM_TOKENS + 6}
    assert body["model"] == "tgi" and body["system_fingerprint"] == "fp_abcdef"


async def test_a_chat_stream(house: House) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    response, events = await house.events("/v1/chat/completions", chat(**options))
    assert response.headers["content-type"].startswith("text/event-stream")
    assert contents(events) == ANSWER
    assert events[0].data["choices"][0]["delta"] == {"role": "assistant", "content": ""} and events[0].id == "0"
    assert events[-3].data["choices"][0]["finish_reason"] == "stop"
    assert events[-2].data["choices"] == [] and events[-2].data["usage"]["completion_tokens"] == NUM_TOKENS
    assert events[-1].data == "[DONE]"
    assert len({event.data["id"] for event in events[:-1]}) == 1
    offsets = [int(event.id or -1) for event in events]
    assert offsets == sorted(offsets) and offsets[-1] == NUM_TOKENS


async def test_stop_text_is_cut_from_openai_answers(house: House) -> None:
    response = await house.client.post("/v1/chat/completions", json=chat(stop=", a"))
    choice = response.json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Hé", "stop")
    _, events = await house.events("/v1/chat/completions", chat(stop=", a", stream=True))
    assert contents(events) == "Hé"
    response = await house.client.post("/v1/chat/completions", json=chat(stop=", a", include_stop_str_in_output=True))
    assert response.json()["choices"][0]["message"]["content"] == "Hé, a"


async def test_length_is_told(house: House) -> None:
    response = await house.client.post("/v1/chat/completions", json=chat(max_tokens=3))
    assert response.json()["choices"][0]["finish_reason"] == "length"


async def test_a_completion_and_its_stream(house: House) -> None:
    response = await house.client.post("/v1/completions", json=completion(echo=True))
    body = response.json()
    assert body["choices"] == [{"index": 0, "text": "hi" + ANSWER, "logprobs": None, "finish_reason": "stop"}]
    assert body["id"] == f"cmpl-{house.worker.seen[0].job.job_id}" and body["object"] == "text_completion"
    _, events = await house.events("/v1/completions", completion(stream=True))
    assert "".join(event.data["choices"][0]["text"] for event in events[:-1]) == ANSWER
    assert events[-1].data == "[DONE]"


async def test_several_prompts_are_children_of_one_answer(house: House) -> None:
    response = await house.client.post("/v1/completions", json=completion(["a", "bc", "d"]))
    body = response.json()
    ids = sorted(taken.job.job_id for taken in house.worker.seen)
    assert [job_id[-2:] for job_id in ids] == [".0", ".1", ".2"] and len({job_id[:28] for job_id in ids}) == 1
    assert response.headers["x-job-id"] == ", ".join(f"job_{job_id}" for job_id in ids)
    assert body["id"] == f"cmpl-{ids[0][:28]}"
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [(n, ANSWER) for n in range(3)]
    assert body["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 3 * NUM_TOKENS,
        "total_tokens": 3 * NUM_TOKENS + 4,
    }
    assert response.headers["x-prompt-tokens"] == "4"


async def test_several_prompts_stream_together(house: House) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    response, events = await house.events("/v1/completions", completion([[97], [98, 99]], **options))
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = [event.data for event in events[:-1]]
    for index in (0, 1):
        own = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert "".join(choice["text"] for choice in own) == ANSWER
        assert [choice["finish_reason"] for choice in own if choice["finish_reason"]] == ["stop"]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["prompt_tokens"] == 3
    assert chunks[-1]["usage"]["completion_tokens"] == 2 * NUM_TOKENS
    assert [event.data for event in events].count("[DONE]") == 1 and events[-1].id == f"{NUM_TOKENS}.{NUM_TOKENS}"


async def test_several_prompts_under_one_key_are_the_same_jobs(house: House) -> None:
    headers = {"idempotency-key": "once"}
    sent = completion(["a", "b"], temperature=1)
    first = await house.client.post("/v1/completions", json=sent, headers=headers)
    again = await house.client.post("/v1/completions", json=sent, headers=headers)
    assert again.headers["idempotent-replayed"] == "true" and first.json() == again.json()
    assert first.headers["x-job-id"] == again.headers["x-job-id"] and len(house.worker.seen) == 2


async def test_one_bad_prompt_fails_the_call_and_frees_the_others(open_house: OpenHouse) -> None:
    house = await open_house(card_changes={"max_total_tokens": 100_000})
    response = await house.client.post(
        "/v1/completions", json=completion(["a", POISON], ignore_eos=True, max_tokens=90_000)
    )
    assert response.status_code == 424
    assert response.json()["error"]["code"] == "engine"

    async def are_over() -> bool:
        return len(house.worker.ended) == 2

    await eventually(are_over, "both jobs have ended")
    assert sorted(house.worker.ended.values()) == sorted([JobState.CANCELLED, JobState.FAILED])


async def test_one_bad_prompt_in_a_stream_is_an_event(house: House) -> None:
    _, events = await house.events("/v1/completions", completion(["a", POISON], stream=True))
    errors = [event.data["error"] for event in events[:-1] if "error" in event.data]
    assert [error["code"] for error in errors] == ["engine"] and events[-1].data == "[DONE]"
    texts = [c["text"] for event in events[:-1] for c in event.data.get("choices", []) if c["index"] == 0]
    assert "".join(texts) == ANSWER


async def test_a_failure_in_a_chat_stream_is_an_event_and_then_done(house: House) -> None:
    response, events = await house.events("/v1/chat/completions", chat(POISON, stream=True))
    assert response.status_code == 200
    error = {"message": "the script says so", "type": "server_error", "param": None, "code": "engine"}
    assert [event.data for event in events[-2:]] == [{"error": error}, "[DONE]"]


async def test_refused_streams_have_their_status_and_openais_shape(house: House) -> None:
    response = await house.client.post("/v1/chat/completions", json=chat(stream=True, n=2))
    assert response.status_code == 422
    assert response.json()["error"]["code"] == "unsupported_parameter" and response.json()["error"]["param"] == "n"
    response = await house.client.post("/v1/chat/completions", json=chat() | {"model": "gpt"})
    message = "unknown model 'gpt'; served here: demo, alias/of-demo"
    expected = {"message": message, "type": "not_found_error", "param": "model", "code": "model_not_found"}
    assert (response.status_code, response.json()["error"]) == (404, expected)


async def test_a_client_that_leaves_a_common_stream_lets_go_of_all_its_jobs(house: House) -> None:
    house.worker.may_go_on.clear()
    waiting = asyncio.create_task(house.client.post("/v1/completions", json=completion(["a", "b"], stream=True)))

    async def are_taken() -> bool:
        return len(house.worker.seen) == 2

    await eventually(are_taken, "the worker has both")

    async def are_followed() -> bool:
        return house.services.hub.num_followers == 2

    await eventually(are_followed, "both are followed")
    waiting.cancel()

    async def is_unfollowed() -> bool:
        return not house.services.hub.num_followers and not house.services.admission.num_open

    await eventually(is_unfollowed, "nobody follows the jobs")


async def test_a_quiet_stream_of_several_prompts_is_kept_alive(open_house: OpenHouse) -> None:
    house = await open_house(keep_alive=0.05)
    house.worker.may_go_on.clear()
    waiting = asyncio.create_task(house.client.post("/v1/completions", json=completion(["a", "b"], stream=True)))

    async def is_commented() -> bool:
        return COMMENT in house.sent

    await eventually(is_commented, "a comment was sent before any token")
    house.worker.may_go_on.set()
    text = (await waiting).text
    assert text.startswith((RETRY_LINE + COMMENT).decode()) and text.endswith("data: [DONE]\n\n")


async def test_models_lists_names_and_aliases(house: House) -> None:
    found = (await house.client.get("/v1/models")).json()
    assert found["object"] == "list" and [model["id"] for model in found["data"]] == ["demo", "alias/of-demo"]
    model = {"object": "model", "created": 1_700_000_000, "owned_by": "inferfleet/demo", "max_model_len": 100}
    model |= {"root": "inferfleet/demo", "parent": None}
    assert found["data"][0] == {"id": "demo"} | model
    assert (await house.client.get("/v1/models/alias/of-demo")).json() == {"id": "alias/of-demo"} | model
    assert (await house.client.get("/v1/models/tgi")).json() == {"id": "tgi"} | model
    assert (await house.client.get("/v1/models/gpt")).status_code == 404


@pytest.mark.parametrize("url", ["/v1/chat/completions", "/v1/completions"])
async def test_keys_guard_the_routes_that_cost(open_house: OpenHouse, url: str) -> None:
    house = await open_house(api_key="secret")
    body = chat() if "chat" in url else completion()
    response = await house.client.post(url, json=body)
    assert (response.status_code, response.json()["error"]["type"]) == (401, "authentication_error")
    assert (await house.client.post(url, json=body, headers={"authorization": "Bearer secret"})).status_code == 200
