"""`inferfleet bench`: what it prints and writes, and what it refuses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest

from common.errors import ConfigurationError
from ops.bench.lora import SHORT
from ops.cli import bench
from tests.ops.loadgen.scripted_server import Request, ScriptedServer, completion, stream, usage, whole

ANSWER = stream(*completion("a", "b", "c", usage=usage(128, 3)))


def good(request: Request) -> Sequence[bytes]:
    # only the probe asks for two tokens; its question has eight ids
    return stream(*completion("a", usage=usage(8, 1))) if request.body.get("max_tokens") == 2 else ANSWER


async def run(server: ScriptedServer, *arguments: str) -> int:
    return await asyncio.to_thread(bench.main, ["--url", server.url, "--output-tokens", "3", *arguments])


async def test_a_run_is_shown_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, plot = tmp_path / "results.json", tmp_path / "plot.svg"
    async with ScriptedServer(good) as server:
        files = ("--results", str(results), "--plot", str(plot))
        status = await run(server, "--num-requests", "12", "--clients", "2", "--api-key", "secret", *files)
    asked = [request.body for request in server.requests if request.body.get("max_tokens") == 3]
    assert (status, len(asked)) == (0, 2 + 12), "a warm-up for each client comes first"
    assert all(len(body["prompt"]) == 128 for body in asked)
    assert len({str(body["prompt"]) for body in asked}) == 14, "no prompt is asked twice"
    found = json.loads(results.read_text())
    (level,) = found["levels"]
    assert (level["num_good"], level["output_tokens"], level["input_tokens"]) == (12, 36, 12 * 128)
    assert len(level["requests"]) == 12 and level["requests"][0]["output_tokens"] == 3
    assert (found["api"], found["options"]["num_requests"]) == ("completions", 12)
    assert "secret" not in results.read_text()
    assert ElementTree.fromstring(plot.read_text()).tag.endswith("svg")
    out = capsys.readouterr().out
    assert "2 clients" in out and "first token (TTFT)" in out and "failed" not in out
    assert f"{level['output_tokens_per_s']:.1f}" in out and f"{level['ttft_ms']['p99']:.1f}" in out


async def test_a_seed_repeats_the_prompts_and_none_draws_others() -> None:
    async def prompts(*seed: str) -> list[str]:
        async with ScriptedServer(good) as server:
            assert await run(server, "--num-requests", "3", "--clients", "1", *seed) == 0
        return [str(request.body["prompt"]) for request in server.requests if request.body.get("max_tokens") == 3]

    first = await prompts("--seed", "7")
    assert first == await prompts("--seed", "7")
    drawn = [await prompts(), await prompts()]
    assert not set(drawn[0]) & set(drawn[1])


async def test_several_loads_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "plot.svg"
    async with ScriptedServer(good) as server:
        assert await run(server, "--rate", "50,200", "--num-requests", "5", "--warmup", "0", "--plot", str(plot)) == 0
    header = next(line for line in capsys.readouterr().out.splitlines() if "requests/s sent" in line)
    assert "50" in header and "200" in header
    texts = [text.text for text in ElementTree.fromstring(plot.read_text()).iter("{http://www.w3.org/2000/svg}text")]
    assert {"requests per second", "50", "200", "TTFT p99"} <= set(texts)


async def test_failures_are_lines_by_kind_and_a_status(capsys: pytest.CaptureFixture[str]) -> None:
    def script(request: Request) -> Sequence[bytes]:
        is_refused = request.body.get("max_tokens") == 3
        return whole("429 Too Many", '{"error": {"message": "full"}}') if is_refused else good(request)

    async with ScriptedServer(script) as server:
        assert await run(server, "--num-requests", "4", "--clients", "4", "--warmup", "0") == 1
    assert "4 clients: failed: 4 x HTTP 429 (full)\n" in capsys.readouterr().out


async def test_what_a_server_cannot_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    def script(request: Request) -> Sequence[bytes]:
        if "ignore_eos" in request.body:
            return whole("400 Bad Request", "{}")
        return good(request)

    async with ScriptedServer(script) as server:
        assert await run(server, "--num-requests", "2", "--output-tokens", "5") == 0
    shown = capsys.readouterr()
    assert shown.err == "inferfleet bench: the server refuses ignore_eos: answers may be shorter than asked for\n"
    assert "8 clients: 2 of 2 answers are shorter than asked for\n" in shown.out


async def test_prompts_of_a_file_are_those_that_are_asked(tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    path.write_text('"one"\n"two"\n')
    async with ScriptedServer(good) as server:
        assert await run(server, "--dataset", str(path), "--num-requests", "2", "--body", '{"top_p": 0.5}') == 0
    asked = [request.body for request in server.requests if request.body.get("max_tokens") == 3]
    assert {body["prompt"] for body in asked} == {"one", "two"}
    assert all(body["top_p"] == 0.5 for body in asked)


def test_an_engine_in_this_process_needs_no_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHORT.config))
    results = tmp_path / "results.json"
    options = ["--offline", "--num-requests", "4", "--clients", "2", "--results", str(results)]
    options += ["--input-tokens", "5-9", "--output-tokens", "4"]
    engine = ["--", "--model-id", str(tmp_path), "--load-format", "dummy", "--kv-tokens", "1024"]
    assert bench.main([*options, *engine]) == 0
    (level,) = json.loads(results.read_text())["levels"]
    assert (level["num_good"], level["output_tokens"], level["most_open"]) == (4, 16, 2)
    assert all(5 <= request["input_tokens"] <= 9 for request in level["requests"])
    assert "2 clients" in capsys.readouterr().out


BAD = [
    (["--rate", "1", "--clients", "2"], "--clients is a closed loop and --rate an open one; give one of them"),
    (["--clients", "0"], "--clients: Input should be greater than 0"),
    (["--rate", "x"], "--rate: Input should be a valid number, unable to parse string as a number"),
    (
        ["--input-tokens", "9-3"],
        "--input-tokens: must be from 1 to 10000000, the smaller number first, not '9-3'",
    ),
    (
        ["--output-tokens", "many"],
        "--output-tokens: must be a number or two with a dash between, such as 16-512, not 'many'",
    ),
    (["--api", "embeddings"], "--api: Input should be 'completions', 'chat' or 'generate_stream'"),
    (["--url", "localhost"], "'localhost' is no URL of a server, such as http://localhost:8080"),
    (["--body", "[]"], "--body must be a JSON object, not '[]'"),
    (["--body", "{"], "--body must be a JSON object, not '{'"),
    (["--results", "/no/such/folder/file"], "cannot write /no/such/folder/file"),
    (["--dataset", "/no/such/file"], "--dataset /no/such/file: No such file or directory"),
    (["--tokenizer", "/no/such/file"], "--tokenizer /no/such/file: No such file or directory"),
    (
        ["--dataset", "x", "--input-tokens", "3"],
        "--input-tokens is for prompts that are made up; --dataset has its own",
    ),
    (["--offline", "--api", "chat"], "--api is for servers; --offline has none"),
    (["--", "--dtype", "float32"], "options after -- are those of an engine in this process; give --offline too"),
    (["--offline", "--", "--metrics-port", "1"], "--metrics-port says nothing to an engine alone"),
    (["--offline", "--", "--num-shard", "2"], "--num-shard says nothing to an engine alone"),
    (["--duraton", "3"], "unknown option --duraton; did you mean --duration?"),
]


@pytest.mark.parametrize(("arguments", "sentence"), BAD)
def test_wrong_options_are_one_sentence(arguments: list[str], sentence: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        bench.main(arguments)
    assert str(caught.value) == sentence
