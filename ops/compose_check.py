"""Brings compose.yaml up for real, kills what holds a stream, and checks that the answer is the undisturbed one.

    python -m ops.compose_check [--no-build] [--only compose|all-in-one]

Needs a Docker engine (DOCKER_HOST) and docker-compose 1.29 or `docker compose`. Exit status 0 when every line says ok.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import httpx

from worker.kernels.build import cpu_flags, supported_levels

ROOT = Path(__file__).resolve().parent.parent
PROMPT = {"messages": [{"role": "user", "content": "Count to 100"}], "temperature": 0, "max_tokens": 300}
START_TIMEOUT_S = 180.0
KERNELS = "import shutil; from worker.kernels import build; print(bool(build.load_library()), shutil.which('g++'))"
GATEWAY_HEADER = "x-inferfleet-gateway"

Value = TypeVar("Value")


class CheckFailed(Exception):
    """One line of the check did not hold."""


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def expect(condition: bool, text: str) -> None:
    if not condition:
        raise CheckFailed(text)
    say(f"ok   {text}")


def wait_for(probe: Callable[[], Value | None], what: str, timeout_s: float = START_TIMEOUT_S) -> Value:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        with suppress(httpx.HTTPError, KeyError, StopIteration):
            if value := probe():
                return value
        time.sleep(0.3)
    raise CheckFailed(f"{what}: not within {timeout_s:g} s")


def compose(*arguments: str) -> None:
    command = ["docker-compose"] if shutil.which("docker-compose") else ["docker", "compose"]
    subprocess.run([*command, "-p", "inferfleet-check", *arguments], cwd=ROOT, check=True)


def docker(*arguments: str) -> str:
    return subprocess.run(["docker", *arguments], check=True, capture_output=True, text=True).stdout.strip()


def events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def container_of(process_name: str, service: str) -> str:
    """The container whose host name `process_name` carries."""
    names = docker("ps", "--filter", f"name=inferfleet-check_{service}", "--format", "{{.ID}}").split()
    names += docker("ps", "--filter", f"name=inferfleet-check-{service}", "--format", "{{.ID}}").split()
    return next(name for name in names if process_name.startswith(name))


def kernels_are_there(container: str) -> None:
    found = docker("exec", container, "python", "-c", KERNELS)
    expected = f"{bool(supported_levels(cpu_flags()))} None"
    expect(found == expected, "the image has kernels for this CPU and no C++ compiler")


class Check:
    """The steps against one address. Every answer is to the same prompt, greedy."""

    def __init__(self, url: str) -> None:
        self.client = httpx.Client(base_url=url, timeout=120)

    def is_served(self, num_workers: int) -> bool:
        workers = self.client.get("/v1/fleet/workers").json()["data"]
        return len([worker for worker in workers if worker["state"] == "ready"]) >= num_workers

    def undisturbed(self) -> str:
        job = self.client.post("/v1/jobs?wait=60", json={"input": PROMPT}).raise_for_status().json()
        expect(job["status"] == "completed", f"an undisturbed answer of {job['num_tokens']} tokens")
        return str(job["output_text"])

    def submit(self) -> str:
        return str(self.client.post("/v1/jobs", json={"input": PROMPT}).raise_for_status().json()["id"])

    def worker_killed(self, undisturbed: str, num_tokens: int) -> None:
        """Kill the container of the worker that writes the answer before half of it is there."""
        job_id = self.submit()
        text, killed_at = "", 0
        with self.client.stream("GET", f"/v1/jobs/{job_id}/stream") as response:
            for event in events(response):
                if event["type"] == "job.delta":
                    text += event["text"]
                    if not killed_at and event["end"] >= 10:
                        killed_at = event["end"]
                        owner = self.client.get(f"/v1/fleet/jobs/{job_id}").json()["worker"]
                        worker = next(
                            w for w in self.client.get("/v1/fleet/workers").json()["data"] if w["id"] == owner
                        )
                        docker("kill", "--signal", "KILL", container_of(worker["host"], "worker"))
        expect(0 < killed_at < num_tokens // 2, f"the worker's container was killed at token {killed_at}")
        expect(text == undisturbed, "its answer equals the undisturbed one")

    def gateway_killed(self, undisturbed: str) -> None:
        """Kill the container of the gateway that streams; the same URL goes on at another one."""
        job_id = self.submit()
        text, last_id, killed = "", "0", False
        with suppress(httpx.TransportError):
            with self.client.stream("GET", f"/v1/jobs/{job_id}/stream") as response:
                gateway = container_of(response.headers[GATEWAY_HEADER], "gateway")
                for event in events(response):
                    if event["type"] == "job.delta":
                        text, last_id = text + event["text"], str(event["end"])
                    if int(last_id) >= 10 and not killed:
                        killed = True
                        docker("kill", "--signal", "KILL", gateway)
                    expect_not_done(event)
        expect(killed, f"the gateway's container was killed, the stream broke after token {last_id}")
        text += wait_for(lambda: self.rest(job_id, last_id), "resumed stream")
        expect(text == undisturbed, "the resumed answer equals the undisturbed one")

    def rest(self, job_id: str, last_id: str) -> str:
        with self.client.stream("GET", f"/v1/jobs/{job_id}/stream", headers={"Last-Event-ID": last_id}) as response:
            response.raise_for_status()
            return "".join(event["text"] for event in events(response) if event["type"] == "job.delta")


def expect_not_done(event: dict[str, Any]) -> None:
    if event["type"] == "job.done":
        raise CheckFailed("the answer ended before its gateway was killed")


def check_compose(port: int, *, build: bool) -> None:
    os.environ |= {"PORT": str(port), "INFERFLEET_LEASE": "3"}
    if build:
        compose("build")
    try:
        compose("up", "-d", "--scale", "worker=2", "--scale", "gateway=2")
        check = Check(f"http://127.0.0.1:{port}")
        wait_for(lambda: check.is_served(2), "two workers ready")
        workers = check.client.get("/v1/fleet/workers").json()["data"]
        kernels_are_there(container_of(workers[0]["host"], "worker"))
        undisturbed = check.undisturbed()
        num_tokens = check.client.post("/v1/jobs?wait=60", json={"input": PROMPT}).json()["num_tokens"]
        check.worker_killed(undisturbed, num_tokens)
        check.gateway_killed(undisturbed)
    finally:
        compose("down", "-v", "-t", "3")


def check_all_in_one(port: int, *, build: bool) -> None:
    """TGI's line: docker run -p 8080:80 -v $PWD/data:/data inferfleet --model-id X."""
    if build:
        names = ("PIP_INDEX_URL", "PIP_FIND_LINKS", "PIP_CERT")
        arguments = [f"--build-arg={name}" for name in names if name in os.environ]
        network = os.environ.get("INFERFLEET_BUILD_NETWORK", "default")
        file = "ops/docker/all-in-one.Dockerfile"
        command = ["docker", "build", "--network", network, *arguments, "-f", file, "-t", "inferfleet", "."]
        subprocess.run(command, cwd=ROOT, check=True)
    model = ROOT / "ops" / "demo_model" / "checkpoint"
    volumes = ["-v", f"{model}:/model:ro", "--shm-size", "1g"]
    container = docker("run", "-d", "-p", f"{port}:80", *volumes, "inferfleet", "--model-id", "/model")
    try:
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        wait_for(lambda: client.get("/health").status_code == httpx.codes.OK, "the all-in-one image serves")
        kernels_are_there(container)
        body = {"inputs": "What is Deep Learning?", "parameters": {"max_new_tokens": 20}}
        answer = client.post("/generate", json=body).raise_for_status().json()
        expect(bool(answer["generated_text"]), f"TGI's docker run line answers: {answer['generated_text']!r}")
    except CheckFailed:
        say(docker("logs", "--tail", "50", container))
        raise
    finally:
        docker("rm", "-f", "-v", container)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=18080)
    parser.add_argument("--no-build", action="store_true", help="use the images that are there")
    parser.add_argument("--only", choices=["compose", "all-in-one"], help="one of the two parts")
    options = parser.parse_args()
    try:
        if options.only != "all-in-one":
            check_compose(options.port, build=not options.no_build)
        if options.only != "compose":
            check_all_in_one(options.port, build=not options.no_build)
    except CheckFailed as error:
        say(f"FAIL {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
