"""OpenAI's routes: /v1/chat/completions, /v1/completions and /v1/models."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.responses import Response

from common.errors import InferfleetError
from common.store.jobs import new_job_id
from gateway.dependencies import Services, services
from gateway.formats import body_of, parse_chat, parse_completion
from gateway.formats.base import JobDraft
from gateway.formats.completion import completion_body
from gateway.formats.fields import Fields
from gateway.models import ServedModel
from gateway.routes.door import Admitted, Call, OpenCall
from gateway.routes.many import many_streams, results_of_all
from gateway.routes.tgi import json_response, timing_headers

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(call: OpenCall) -> Response:
    draft = await call.parse(parse_chat)
    if call.body.get("stream"):
        return await call.stream(draft)
    admitted = await call.admit(draft)
    record, columns = await call.result(admitted)
    headers = call.headers(admitted) | timing_headers(call, record, record.view["prompt_characters"])
    return json_response(body_of(record, columns, call.special_ids(draft.lane)), headers)


@router.post("/v1/completions")
async def completions(call: OpenCall) -> Response:
    drafts = await call.parse(parse_completion)
    is_stream = Fields(call.body).boolean("stream")
    if is_stream and len(drafts) == 1:
        return await call.stream(drafts[0])
    admitted = await _admit_all(call, drafts)
    special_ids = call.special_ids(drafts[0].lane)
    headers = call.headers(admitted[0]) | {"x-job-id": ", ".join(call.headers(one)["x-job-id"] for one in admitted)}
    if is_stream:
        return await many_streams(call, admitted, special_ids, headers)
    answers = await results_of_all(call, admitted)
    num_characters = sum(record.view["prompt_characters"] for record, _ in answers)
    timing = timing_headers(call, answers[0][0], num_characters)
    timing["x-prompt-tokens"] = str(sum(record.prompt_tokens for record, _ in answers))
    timing["x-generated-tokens"] = str(sum(record.num_tokens for record, _ in answers))
    return json_response(completion_body(answers, frozenset(special_ids)), headers | timing)


async def _admit_all(call: Call, drafts: list[JobDraft]) -> list[Admitted]:
    """One job for each prompt; several are the children `<id>.<k>` of one id. All or none."""
    if len(drafts) == 1:
        return [await call.admit(drafts[0])]
    parent = new_job_id(drafts[0].lane)
    admitted: list[Admitted] = []
    try:
        for index, draft in enumerate(drafts):
            admitted.append(await call.admit(draft, job_id=f"{parent}.{index}", child=index))
    except InferfleetError:
        for one in admitted:
            await call.services.jobs.cancel(one.job_id)
        raise
    return admitted


def _model_object(served: ServedModel, name: str) -> dict[str, Any]:
    """OpenAI's model object; `max_model_len` is vLLM's addition."""
    return {
        "id": name,
        "object": "model",
        "created": served.card.created,
        "owned_by": served.card.model_id,
        "max_model_len": served.card.max_total_tokens,
    }


@router.get("/v1/models")
async def models(services: Annotated[Services, Depends(services)]) -> Response:
    served = sorted(services.registry.models.values(), key=lambda model: model.card.created, reverse=True)
    named = {name: model for model in reversed(served) for name in model.names}
    return json_response({"object": "list", "data": [_model_object(model, name) for name, model in named.items()]})


@router.get("/v1/models/{name:path}")
async def model(name: str, services: Annotated[Services, Depends(services)]) -> Response:
    return json_response(_model_object(services.registry.resolve(name), name))
