"""TGI's native routes: /generate, /generate_stream, /, /tokenize and /info."""

from __future__ import annotations

import asyncio
import os
import time
from functools import partial
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.responses import Response

from common.job import JobRecord
from gateway.dependencies import Services, services
from gateway.formats import body_of
from gateway.formats.base import JobDraft, dump
from gateway.formats.fields import Fields
from gateway.formats.tgi import parse_generate, read_inputs, tokenize_body
from gateway.routes.door import Call, OpenCall

router = APIRouter()

ROUTER_NAME = "text-generation-router"
NUM_VALIDATION_THREADS = 1


def compute_type() -> str:
    """What TGI reports of its hardware; clusters set it by environment."""
    return os.environ.get("COMPUTE_TYPE", "inferfleet")


def timing_headers(call: Call, record: JobRecord, num_characters: int) -> dict[str, str]:
    """TGI's headers of an answer that is not streamed: whole milliseconds, but `x-compute-time` in seconds."""
    total_s = time.monotonic() - call.started
    inference_ms = max(record.finished_ms - record.started_ms, 0)
    return {
        "x-compute-type": compute_type(),
        "x-compute-time": f"{total_s:.6f}",
        "x-compute-characters": str(num_characters),
        "x-total-time": str(round(total_s * 1000)),
        "x-validation-time": str(round(call.validation_s * 1000)),
        "x-queue-time": str(max(record.started_ms - record.created_ms, 0)),
        "x-inference-time": str(inference_ms),
        "x-time-per-token": str(round(inference_ms / max(record.num_tokens, 1))),
        "x-prompt-tokens": str(record.prompt_tokens),
        "x-generated-tokens": str(record.num_tokens),
    }


def json_response(value: Any, headers: dict[str, str] | None = None) -> Response:
    return Response(dump(value), media_type="application/json", headers=headers)


async def _answer(call: Call, draft: JobDraft, *, as_list: bool = False) -> Response:
    admitted = await call.admit(draft)
    record, columns = await call.result(admitted)
    body = body_of(record, columns, call.special_ids(draft.lane))
    headers = call.headers(admitted) | timing_headers(call, record, record.view["prompt_characters"])
    return json_response([body] if as_list else body, headers)


@router.post("/generate")
async def generate(call: OpenCall) -> Response:
    return await _answer(call, await call.parse(parse_generate))


@router.post("/generate_stream")
async def generate_stream(call: OpenCall) -> Response:
    return await call.stream(await call.parse(partial(parse_generate, door="generate_stream", is_stream=True)))


@router.post("/")
async def compat_generate(call: OpenCall) -> Response:
    """Where TGI's Python client and the hub's InferenceClient post to: a list of one answer, or a stream."""
    is_stream = Fields(call.body).boolean("stream")
    draft = await call.parse(partial(parse_generate, door="compat", is_stream=is_stream))
    return await call.stream(draft) if is_stream else await _answer(call, draft, as_list=True)


@router.post("/tokenize")
async def tokenize(call: OpenCall) -> Response:
    inputs = read_inputs(call.body)
    served = await call.services.registry.find(Fields(call.body).text("model"))
    return json_response(await asyncio.to_thread(tokenize_body, inputs, served))


@router.get("/info")
async def info(services: Annotated[Services, Depends(services)]) -> Response:
    """Of several models the one that was announced last."""
    served = services.registry.newest_first()[0]
    card, settings = served.card, services.settings
    return json_response(
        {
            "model_id": card.model_id,
            "model_sha": card.revision or None,
            "model_pipeline_tag": "text2text-generation" if card.is_encoder_decoder else "text-generation",
            "max_concurrent_requests": settings.max_concurrent_requests,
            "max_best_of": settings.max_best_of,
            "max_stop_sequences": settings.max_stop_sequences,
            "max_input_tokens": card.max_input_tokens,
            "max_total_tokens": card.max_total_tokens,
            "validation_workers": NUM_VALIDATION_THREADS,
            "max_client_batch_size": settings.max_client_batch_size,
            "router": ROUTER_NAME,
            "version": version("inferfleet"),
            "sha": None,
            "docker_label": None,
        }
    )
