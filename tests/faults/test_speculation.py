"""A worker that guesses ahead beside one that does not: same answers, also where one goes on for the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.faults.streams import BODIES, assert_exact, dead_letters, final_job, undisturbed
from tests.faults.test_full_stack import fleet_job, stream
from tests.support.fleet import Fleet, wait_for
from tests.support.redis_server import ServerUnderTest

OPTIONS = {"DTYPE": "float64", "INFERFLEET_LEASE": "1.5"}
GUESSING, PLAIN = "w1", "w2"
LAST = 150


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("guessing")
    server = ServerUnderTest(folder / "redis")
    running = Fleet(folder, server.url, options=OPTIONS)
    try:
        running.add_gateway("g1")
        running.add_worker(PLAIN)
        running.wait_until_ready()
        yield running
    finally:
        running.__exit__()
        server.stop()


@pytest.fixture(scope="module")
def expected(fleet: Fleet) -> dict[str, str]:
    """What the worker that does not guess answers."""
    return {kind: undisturbed(fleet, body) for kind, body in BODIES.items()}


@pytest.fixture(scope="module")
def details(fleet: Fleet) -> dict[str, Any]:
    return generate(fleet)


def generate(fleet: Fleet) -> dict[str, Any]:
    """A count that was counted before, with everything that an answer can tell."""
    numbers = ", ".join(map(str, range(1, 51)))
    turn = "<|user|>Count to 50<|end|><|assistant|>"
    parameters = {"max_new_tokens": 140, "details": True, "top_n_tokens": 2, "ignore_eos": True, "min_tokens": 130}
    parameters |= {"stop": ["never said"], "frequency_penalty": 0.1}
    body = {"inputs": f"{turn}{numbers}<|end|>{turn}", "parameters": parameters}
    with fleet.client() as client:
        return dict(client.post("/generate", json=body).raise_for_status().json())


def rounded(answer: dict[str, Any]) -> list[Any]:
    rows = zip(answer["details"]["tokens"], answer["details"]["top_tokens"], strict=True)
    return [[(seen["id"], seen["text"], round(seen["logprob"], 4)) for seen in [token, *tops]] for token, tops in rows]


def num_accepted(fleet: Fleet) -> float:
    found = {worker["id"]: worker["stats"] for worker in fleet.worker_states()}
    assert not found.get(PLAIN, {}).get("draft_tokens")
    return float(found[GUESSING].get("accepted_tokens", 0))


def test_a_worker_that_guesses_answers_like_one_that_does_not(
    fleet: Fleet, expected: dict[str, str], details: dict[str, Any]
) -> None:
    fleet.worker(PLAIN).stop()
    fleet.workers.clear()
    fleet.add_worker(GUESSING, SPECULATE="8")
    fleet.wait_until_ready()
    assert {kind: undisturbed(fleet, body) for kind, body in BODIES.items()} == expected
    assert rounded(generate(fleet)) == rounded(details)
    wait_for(lambda: num_accepted(fleet) >= 20, "guesses were right")
    with fleet.client() as client:
        lines = client.get("/metrics").text.splitlines()
    assert f"tgi_request_skipped_tokens_sum {num_accepted(fleet)}" in lines


def test_a_stream_moves_from_who_guesses_to_who_does_not_and_back(fleet: Fleet, expected: dict[str, str]) -> None:
    before = num_accepted(fleet)

    def hand_over(job_id: str) -> None:
        """Kill the only worker in the middle of the stream, and let the other one begin."""
        assert fleet_job(fleet, job_id)["num_tokens"] <= LAST
        (worker,) = fleet.workers
        worker.kill()
        fleet.workers.clear()
        other = PLAIN if worker.name == GUESSING else GUESSING
        fleet.add_worker(other, **({"SPECULATE": "8"} if other == GUESSING else {}))

    for first, kind in ((GUESSING, "greedy"), (PLAIN, "japanese")):
        assert [worker.name for worker in fleet.workers] == [first]
        seen = stream(fleet, BODIES[kind], 40, hand_over)
        job = final_job(fleet, seen.job_id)
        assert job["attempts"] >= 2, "the job never moved to another worker"
        assert_exact(seen, job, expected[kind])
    assert before >= 20
    assert dead_letters(fleet) == []
