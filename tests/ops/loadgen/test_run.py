"""A load against a scripted server: what is counted, and what each kind of failure is called."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from typing import Any

import pytest

from common.errors import ConfigurationError
from ops.loadgen.result import LoadResult
from ops.loadgen.run import Load
from ops.loadgen.target import Target
from ops.loadgen.workload import Ask, Workload, arrival_times
from tests.ops.loadgen.scripted_server import (
    CLOSE,
    SSE,
    Request,
    Script,
    ScriptedServer,
    completion,
    event,
    head,
    stream,
    usage,
    whole,
)

ASKS = [Ask("one two three", 3)] * 6


async def load(url: str, workload: Workload, **target: Any) -> LoadResult:
    return await Load(Target(url=url, **target), workload).run()


async def load_of(script: Script, workload: Workload | None = None, **target: Any) -> tuple[LoadResult, ScriptedServer]:
    async with ScriptedServer(script) as server:
        return await load(server.url, workload or Workload.of(ASKS, clients=2), **target), server


async def test_tokens_are_those_of_the_usage_and_events_those_that_came() -> None:
    """Two tokens in one event, and one event in two reads: both counts are exact."""
    first, *rest = completion("a", "bc", "d", usage=usage(3, 4))
    result, server = await load_of(lambda request: stream(first[:20], first[20:], *rest))
    summary = result.summary()
    assert len(server.requests) == len(ASKS) == summary["num_good"]
    assert (summary["input_tokens"], summary["output_tokens"]) == (3 * len(ASKS), 4 * len(ASKS))
    assert [list(answer.counts) for answer in result.answers] == [[1, 1, 1]] * len(ASKS)
    assert summary["tokens_per_event"] == 4 / 3
    assert summary["counted_by"] == "usage"
    assert summary["errors"] == {}


async def test_events_of_one_read_are_one_arrival() -> None:
    """An error that is null is none."""
    events = completion("a", "b", "c", "d", usage=usage(3, 4))
    events[0] = event({"choices": [{"text": "a"}], "error": None})
    result, _ = await load_of(lambda request: stream(events[0] + events[1] + events[2], b"".join(events[3:])))
    assert [list(answer.counts) for answer in result.answers] == [[3, 1]] * len(ASKS)
    assert all(len(answer.gaps_s) == 1 for answer in result.answers)


async def test_without_usage_events_with_text_are_the_tokens() -> None:
    result, _ = await load_of(lambda request: stream(*completion("a", "", "b")))
    summary = result.summary()
    assert (summary["output_tokens"], summary["input_tokens"]) == (2 * len(ASKS), None)
    assert summary["input_tokens_per_s"] is None
    assert (summary["counted_by"], summary["num_short"]) == ("events", len(ASKS))


async def test_chats_count_deltas_with_text_only() -> None:
    opening = event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
    deltas = [event({"choices": [{"delta": {"content": text}}]}) for text in "xy"]
    thought = event({"choices": [{"delta": {"reasoning_content": "hm"}}]})
    end = [event({"choices": [], "usage": usage(9, 3)}), b"data: [DONE]\n\n"]
    result, server = await load_of(lambda request: stream(opening, thought, *deltas, *end), api="chat", model="m")
    assert [answer.num_events for answer in result.answers] == [3] * len(ASKS)
    assert result.summary()["input_tokens"] == 9 * len(ASKS)
    body = server.requests[0].body
    assert server.requests[0].path == "/v1/chat/completions"
    assert body["messages"] == [{"role": "user", "content": "one two three"}]
    assert (body["model"], body["max_tokens"], body["ignore_eos"], body["stream"]) == ("m", 3, True, True)
    assert body["stream_options"] == {"include_usage": True}


async def test_tgi_streams_end_with_the_text_and_its_details() -> None:
    """As TGI writes them: no blank after the colon."""

    def token(text: str, whole_text: str | None = None, details: Any = None) -> bytes:
        value = {"index": 1, "token": {"id": 1, "text": text}, "generated_text": whole_text, "details": details}
        return event(value).replace(b"data: ", b"data:")

    last = token("b", "ab", {"finish_reason": "length", "generated_tokens": 2, "input_length": 7})
    result, server = await load_of(lambda request: stream(token("a"), last), api="generate_stream", ignore_eos=False)
    assert result.summary()["output_tokens"] == 2 * len(ASKS) == sum(answer.num_events for answer in result.answers)
    assert result.input_tokens == 7 * len(ASKS)
    expected = {"inputs": "one two three", "parameters": {"max_new_tokens": 3, "details": True}}
    assert (server.requests[0].path, server.requests[0].body) == ("/generate_stream", expected)


async def test_extra_fields_key_and_prefix_go_along() -> None:
    def script(request: Request) -> Sequence[bytes]:
        return stream(*completion("a", usage=usage(1, 1)))

    async with ScriptedServer(script) as server:
        target = {"api_key": "secret", "extra": {"temperature": 0.5}, "include_usage": False}
        result = await load(f"{server.url}/base/v1", Workload.of(ASKS[:1]), **target)
    assert not result.errors
    request = server.requests[0]
    assert (request.path, request.headers["authorization"]) == ("/base/v1/completions", "Bearer secret")
    assert request.body["temperature"] == 0.5 and "stream_options" not in request.body


async def test_other_line_ends_and_comments_are_read_alike() -> None:
    events = [piece.replace(b"\n", b"\r\n") for piece in completion("a", "b", usage=usage(1, 2))]
    pieces = [b"retry: 1000\r\n", b": ping\r\n\r\n", b"id: 3\r\n" + events[0][:-1], events[0][-1:], *events[1:]]
    result, _ = await load_of(lambda request: stream(*pieces))
    assert [answer.num_events for answer in result.answers] == [2] * len(ASKS)


OVERLOADED = '{"error": {"message": "too much is waiting", "type": "rate_limit_error"}}'
FAILURES: list[tuple[str, Script, str]] = [
    ("HTTP 429", lambda _: whole("429 Too Many Requests", OVERLOADED), "too much is waiting"),
    ("HTTP 500", lambda _: whole("500 Internal Server Error", "it\n broke", "text/plain"), "it broke"),
    ("HTTP 422", lambda _: whole("422 Nope", '{"error": "bad", "error_type": "validation"}'), "bad"),
    ("not an event stream", lambda _: whole("200 OK", '{"choices": []}'), '{"choices": []}'),
    ("broken stream", lambda _: [*stream(*completion("a"))[:2], CLOSE], "the server closed it"),
    ("broken stream", lambda _: [head(content_type=SSE), completion("a")[0], CLOSE], "stopped without its end"),
    ("broken stream", lambda _: stream(*completion("a", "b")[:-1]), "stopped without its end"),
    ("connection lost", lambda _: [b"HTTP/1.1 200", CLOSE], "the server closed it"),
    ("error event", lambda _: stream(completion("a")[0], event({"error": {"message": "no memory"}})), "no memory"),
    ("unknown event", lambda _: stream(b'data: {"choices": 7}\n\n'), '{"choices": 7}'),
    ("unknown event", lambda _: stream(b"data: hello\n\n"), "hello"),
    ("unknown event", lambda _: stream(event({"choices": [], "usage": {"prompt_tokens": "x"}})), "prompt_tokens"),
    ("not HTTP", lambda _: [b"SSH-2.0-OpenSSH_9.2\r\n", CLOSE], ""),
]


@pytest.mark.parametrize(("kind", "script", "words"), FAILURES)
async def test_failures_are_counted_by_kind_beside_good_answers(kind: str, script: Script, words: str) -> None:
    """One answer of three is good, so that the run goes on after each failure and the figures are of good ones."""

    def one_in_three_is_good(request: Request) -> Sequence[bytes]:
        is_good = request.body["prompt"] == "good"
        return stream(*completion("a", "b", "c", usage=usage(5, 3))) if is_good else script(request)

    asks = [Ask("good" if number % 3 == 0 else "bad", 3) for number in range(6)]
    result, server = await load_of(one_in_three_is_good, Workload.of(asks, clients=2))
    assert len(server.requests) == 6
    assert result.errors == {kind: 4}
    assert words in result.message_of(kind)
    summary = result.summary()
    assert (summary["num_good"], summary["output_tokens"], summary["input_tokens"]) == (2, 6, 10)
    assert summary["errors"][kind]["count"] == 4


async def test_nobody_there_is_connection_refused() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        result = await load(f"http://127.0.0.1:{probe.getsockname()[1]}", Workload.of(ASKS[:3]))
    assert result.errors == {"connection refused": 3}
    assert result.summary()["ttft_ms"] is None


async def test_an_answer_without_end_is_a_timeout() -> None:
    async with ScriptedServer(lambda request: stream(*completion("a"))[:2]) as server:
        workload = Workload.of(ASKS[:2], clients=2, timeout_s=0.2)
        result = await load(server.url, workload)
        assert len(server.requests) == 2
    assert result.errors == {"timeout": 2}


async def test_connections_are_kept_and_a_stale_one_is_replaced() -> None:
    """The server closes after two answers, which it does not announce."""
    seen: list[int] = []

    def script(request: Request) -> Sequence[bytes]:
        seen.append(request.connection)
        answer = stream(*completion("a", usage=usage(1, 1)))
        return [*answer, CLOSE] if seen.count(request.connection) == 2 else answer

    result, _ = await load_of(script, Workload.of(ASKS, clients=1))
    assert seen == [1, 1, 2, 2, 3, 3]
    assert not result.errors


async def test_a_closed_loop_has_as_many_open_as_there_are_clients() -> None:
    result, server = await load_of(
        lambda request: stream(*completion("a", usage=usage(1, 1))),
        Workload.of(ASKS * 4, clients=5, warmup=[Ask("warm", 1)] * 7),
    )
    assert [request.body["prompt"] for request in server.requests].count("warm") == 7
    assert len(result.answers) == 24, "the warm-up does not count"
    assert result.most_open == server.most_connections == 5


async def test_an_open_loop_sends_at_its_moments_whatever_is_unanswered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server holds every answer until the last request is there."""
    everyone = asyncio.Event()

    async with ScriptedServer(lambda request: []) as server:

        async def write(writer: asyncio.StreamWriter, pieces: Sequence[bytes]) -> bool:
            if len(server.requests) == 20:
                everyone.set()
            await everyone.wait()
            writer.writelines(stream(*completion("a", usage=usage(1, 1))))
            return True

        monkeypatch.setattr(server, "_write", write)
        workload = Workload.of([Ask("x", 1)] * 20, rate=500.0, seed=3)
        result = await load(server.url, workload)
    assert result.most_open == 20 and not result.errors
    due = sorted(answer.started - result.started for answer in result.answers)
    expected = [moment for moment, _ in zip(arrival_times(500.0, 3), range(20), strict=False)]
    assert due == pytest.approx(expected, abs=1e-6)
    assert all(answer.sent >= answer.started for answer in result.answers)


async def test_time_ends_a_run_that_has_no_number() -> None:
    """What is under way then still ends, and counts for latencies."""
    workload = Workload(ask_of=lambda number: Ask(str(number), 1), duration_s=0.2, clients=3)
    result, server = await load_of(lambda request: stream(*completion("a", usage=usage(1, 1))), workload)
    assert sorted(int(request.body["prompt"]) for request in server.requests) == list(range(len(server.requests)))
    assert len(result.answers) == len(server.requests) > 3
    assert result.seconds == 0.2


async def test_an_interrupted_run_says_what_it_has() -> None:
    def script(request: Request) -> Sequence[bytes]:
        answer = stream(*completion("a", usage=usage(1, 1)))
        return answer if request.body["prompt"] == "0" else answer[:2]

    async with ScriptedServer(script) as server:
        workload = Workload(ask_of=lambda number: Ask(str(number), 1), num_requests=9)
        running = asyncio.create_task(load(server.url, workload))
        while len(server.requests) < 2:
            await asyncio.sleep(0.002)
        running.cancel()
        result = await running
    assert result.is_interrupted
    assert [answer.error for answer in result.answers] == [""]


def test_a_workload_without_end_is_refused() -> None:
    with pytest.raises(ValueError, match="num_requests or duration_s"):
        Workload(ask_of=ASKS.__getitem__)


def test_arrivals_are_a_poisson_process_that_the_seed_decides() -> None:
    """Pauses of an exponential distribution: mean 1 / rate, and as much again for its deviation."""
    moments = [moment for moment, _ in zip(arrival_times(4.0, 7), range(20_000), strict=False)]
    again = [moment for moment, _ in zip(arrival_times(4.0, 7), range(100), strict=False)]
    assert moments[:100] == again
    assert again != [moment for moment, _ in zip(arrival_times(4.0, 8), range(100), strict=False)]
    pauses = [after - before for before, after in zip([0.0, *moments], moments, strict=False)]
    mean = sum(pauses) / len(pauses)
    deviation = (sum((pause - mean) ** 2 for pause in pauses) / len(pauses)) ** 0.5
    assert mean == pytest.approx(0.25, rel=0.03) and deviation == pytest.approx(0.25, rel=0.03)
    regular = [0.25] * len(pauses)
    assert sum((pause - 0.25) ** 2 for pause in regular) == 0, "evenly spaced requests would not pass"


BAD_URLS = ["localhost:8080", "ftp://x", "http://", "http://x:99999", "http://x:0"]
BAD_URLS += ["http://user:word@x", "http://x/?a=b", "http://x/\r\nHost: y", "http://x/\udcff"]


@pytest.mark.parametrize("url", BAD_URLS)
def test_what_is_no_url_of_a_server_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="is no URL of a server"):
        Target(url=url)


def test_a_key_cannot_be_a_header_of_its_own() -> None:
    with pytest.raises(ConfigurationError, match="the key has characters that cannot be sent"):
        Target(url="http://x", api_key="a\r\nHost: y")
