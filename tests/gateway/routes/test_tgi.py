"""TGI's native routes from HTTP to Redis and back, with a scripted worker."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from common.job import JobState
from tests.gateway.routes.conftest import House, OpenHouse, eventually
from tests.gateway.scripted_worker import ANSWER, POISON

NUM_TOKENS = len(ANSWER.encode()) + 1


def body(inputs: str = "hello", **parameters: Any) -> dict[str, Any]:
    return {"inputs": inputs, "parameters": parameters}


async def test_generate_answers_an_object_and_says_which_job_it_was(house: House) -> None:
    response = await house.client.post("/generate", json=body())
    assert (response.status_code, response.json()) == (200, {"generated_text": ANSWER})
    [taken] = house.worker.seen
    assert response.headers["x-job-id"] == f"job_{taken.job.job_id}"
    assert taken.job.orphan_grace_s == 10.0


async def test_the_timing_headers_are_those_of_tgi(house: House) -> None:
    headers = (await house.client.post("/generate", json=body())).headers
    assert headers["x-prompt-tokens"] == "5" and headers["x-generated-tokens"] == str(NUM_TOKENS)
    assert headers["x-compute-characters"] == "5"
    names = ("total-time", "validation-time", "queue-time", "inference-time", "time-per-token")
    assert all(headers[f"x-{name}"].isdigit() for name in names)
    assert float(headers["x-compute-time"]) > 0 and headers["x-compute-type"]


async def test_details_come_with_tokens(house: House) -> None:
    response = await house.client.post("/generate", json=body(details=True, max_new_tokens=2, top_n_tokens=2))
    details = response.json()["details"]
    assert details["finish_reason"] == "length" and details["generated_tokens"] == 2
    assert [token["text"] for token in details["tokens"]] == ["H", "\ufffd"]
    assert [[top["id"] for top in row] for row in details["top_tokens"]] == [[97, 98], [97, 98]]


async def test_the_stream_is_the_answer_in_pieces(house: House) -> None:
    response, events = await house.events("/generate_stream", body(details=True))
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache" and response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-job-id"] == f"job_{house.worker.seen[0].job.job_id}"
    assert [event.id for event in events] == [str(n + 1) for n in range(NUM_TOKENS)]
    assert "".join(event.data["token"]["text"] for event in events) == ANSWER + "</s>"
    assert [event.data["generated_text"] for event in events] == [None] * (NUM_TOKENS - 1) + [ANSWER]
    assert events[-1].data["details"]["finish_reason"] == "eos_token"


async def test_stop_text_stays_in_native_answers(house: House) -> None:
    response = await house.client.post("/generate", json=body(stop=[", a"], details=True))
    assert response.json()["generated_text"] == "Hé, a"
    assert response.json()["details"]["finish_reason"] == "stop_sequence"


async def test_the_compat_route_answers_a_list_with_the_prompt_or_streams(house: House) -> None:
    response = await house.client.post("/", json=body())
    assert response.json() == [{"generated_text": "hello" + ANSWER}]
    response = await house.client.post("/", json=body(return_full_text=False) | {"stream": False})
    assert response.json() == [{"generated_text": ANSWER}]
    _, events = await house.events("/", body() | {"stream": True})
    assert events[-1].data["generated_text"] == "hello" + ANSWER


async def test_a_stream_that_is_refused_has_its_status(house: House) -> None:
    for url, sent in (("/generate_stream", body(temperature=0)), ("/", body(temperature=0) | {"stream": True})):
        response = await house.client.post(url, json=sent)
        expected = {
            "error": "Input validation error: `temperature` must be strictly positive",
            "error_type": "validation",
        }
        assert (response.status_code, response.json()) == (422, expected)
    assert house.worker.seen == []


async def test_a_failure_after_the_first_token_is_an_event(house: House) -> None:
    response, events = await house.events("/generate_stream", body(POISON))
    assert response.status_code == 200
    assert [event.id for event in events[:2]] == ["1", "2"]
    error = "Request failed during generation: Server error: the script says so"
    assert events[2:] and events[-1].data == {"error": error, "error_type": "generation"}


async def test_a_failure_without_a_stream_is_424(house: House) -> None:
    response = await house.client.post("/generate", json=body(POISON))
    error = "Request failed during generation: Server error: the script says so"
    assert (response.status_code, response.json()) == (424, {"error": error, "error_type": "generation"})


async def test_the_same_key_is_the_same_job(house: House) -> None:
    headers = {"idempotency-key": "once"}
    sent = body(do_sample=True)
    first = await house.client.post("/generate", json=sent, headers=headers)
    again = await house.client.post("/generate", json=sent, headers=headers)
    assert "idempotent-replayed" not in first.headers and again.headers["idempotent-replayed"] == "true"
    assert first.headers["x-job-id"] == again.headers["x-job-id"] and first.json() == again.json()
    assert len(house.worker.seen) == 1
    other = await house.client.post("/generate", json=body("other"), headers=headers)
    assert other.status_code == 422 and other.json()["error"].endswith(
        "this Idempotency-Key was used with another body"
    )


async def test_tokenize_answers_a_list(house: House) -> None:
    response = await house.client.post("/tokenize", json={"inputs": "hi"})
    assert response.json() == [
        {"id": 104, "text": "h", "start": 0, "stop": 1},
        {"id": 105, "text": "i", "start": 1, "stop": 2},
    ]
    response = await house.client.post("/tokenize", json={"inputs": ""})
    assert response.json()["error"] == "Input validation error: `inputs` cannot be empty"


async def test_info_has_tgis_fields(house: House) -> None:
    found = (await house.client.get("/info")).json()
    assert list(found) == [
        "model_id",
        "model_sha",
        "model_pipeline_tag",
        "max_concurrent_requests",
        "max_best_of",
        "max_stop_sequences",
        "max_input_tokens",
        "max_total_tokens",
        "validation_workers",
        "max_client_batch_size",
        "router",
        "version",
        "sha",
        "docker_label",
    ]
    assert (found["model_id"], found["max_input_tokens"], found["max_total_tokens"]) == ("inferfleet/demo", 99, 100)
    assert found["model_pipeline_tag"] == "text-generation"


async def test_an_encoder_decoder_has_another_task_and_answers_without_the_prompt(open_house: OpenHouse) -> None:
    house = await open_house(card_changes={"is_encoder_decoder": True})
    assert (await house.client.get("/info")).json()["model_pipeline_tag"] == "text2text-generation"
    body = {"inputs": "hi", "parameters": {"max_new_tokens": 4}}
    (alone,) = (await house.client.post("/", json=body)).json()
    body["parameters"] |= {"return_full_text": True}
    (full,) = (await house.client.post("/", json=body)).json()
    assert full["generated_text"] == "hi" + alone["generated_text"]


async def test_more_open_requests_than_allowed_are_overload(open_house: OpenHouse) -> None:
    house = await open_house(max_concurrent_requests=1)
    house.worker.may_go_on.clear()
    waiting = asyncio.create_task(house.client.post("/generate", json=body()))

    async def is_taken() -> bool:
        return len(house.worker.seen) == 1

    await eventually(is_taken, "the worker has the first request")
    assert house.services.admission.num_open == 1
    for url in ("/generate", "/generate_stream"):
        response = await house.client.post(url, json=body())
        assert (response.status_code, response.json()) == (
            429,
            {"error": "Model is overloaded", "error_type": "overloaded"},
        )
        assert int(response.headers["retry-after"]) >= 1
    house.worker.may_go_on.set()
    assert (await waiting).status_code == 200
    assert house.services.admission.num_open == 0
    assert (await house.client.post("/generate", json=body())).status_code == 200


async def test_a_request_that_is_cancelled_elsewhere_ends_with_409(house: House) -> None:
    house.worker.may_go_on.clear()
    waiting = asyncio.create_task(house.client.post("/generate", json=body()))

    async def is_taken() -> bool:
        return len(house.worker.seen) == 1

    await eventually(is_taken, "the worker has the request")
    await house.services.jobs.cancel(house.worker.seen[0].job.job_id)
    response = await waiting
    assert (response.status_code, response.json()) == (
        409,
        {"error": "The request was cancelled", "error_type": "cancelled"},
    )


async def test_a_client_that_leaves_lets_go_of_its_job(open_house: OpenHouse) -> None:
    house = await open_house(disconnect_grace=0.0)
    house.worker.may_go_on.clear()
    waiting = asyncio.create_task(house.client.post("/generate", json=body()))

    async def is_taken() -> bool:
        return len(house.worker.seen) == 1

    await eventually(is_taken, "the worker has the request")
    [taken] = house.worker.seen
    assert taken.gateways == [house.services.gateway_id]
    waiting.cancel()

    async def is_unfollowed() -> bool:
        return not house.services.hub.num_followers and not house.services.admission.num_open

    await eventually(is_unfollowed, "nobody follows the job")

    async def is_cancelled() -> bool:
        record = await house.services.jobs.record(taken.job.job_id)
        return record is not None and record.state is JobState.CANCELLED

    await eventually(is_cancelled, "a job without a grace is cancelled when nobody follows it")


async def test_long_prompts_are_tokenised_too(open_house: OpenHouse) -> None:
    house = await open_house(card_changes={"max_input_tokens": 39_999, "max_total_tokens": 40_000})
    response = await house.client.post("/generate", json=body("x" * 30_000, max_new_tokens=1, details=True))
    assert response.status_code == 200 and response.headers["x-prompt-tokens"] == "30000"


@pytest.mark.parametrize(
    ("content", "headers", "status", "error"),
    [
        (
            b"{",
            {"content-type": "application/json"},
            400,
            "Failed to parse the request body as JSON: error at line 1 column 2",
        ),
        (
            b'{"inputs": "\xff"}',
            {"content-type": "application/json"},
            400,
            "Failed to parse the request body as JSON: error at line 1 column 1",
        ),
        (b"{}", {}, 415, "Expected request with `Content-Type: application/json`"),
        (
            b"[]",
            {"content-type": "application/json"},
            422,
            "Input validation error: the request body must be a JSON object",
        ),
    ],
)
async def test_bodies_that_are_no_json(house: House, content: bytes, headers: dict, status: int, error: str) -> None:
    response = await house.client.post("/generate", content=content, headers=headers)
    assert (response.status_code, response.json()["error"]) == (status, error)


async def test_keys_guard_the_routes_that_cost(open_house: OpenHouse) -> None:
    house = await open_house(api_key="secret")
    for url in ("/", "/generate", "/generate_stream", "/tokenize"):
        assert (await house.client.post(url, json=body())).status_code == 401
        good = await house.client.post(url, json=body(), headers={"authorization": "Bearer secret"})
        assert good.status_code == 200
    assert (await house.client.get("/info")).status_code == 200
