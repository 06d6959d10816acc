"""OpenAI's routes: /v1/chat/completions, /v1/completions and /v1/models."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.responses import Response

from common.job import JobRecord
from gateway.dependencies import Services, services
from gateway.formats import body_of, parse_chat, parse_completion
from gateway.formats.completion import completion_body
from gateway.models import ServedModel
from gateway.routes.door import Call, OpenCall
from gateway.routes.many import headers_of_all, many_streams, results_of_all
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
    if call.body.get("stream"):
        return await (call.stream(drafts[0]) if len(drafts) == 1 else many_streams(call, drafts))
    if len(drafts) > 1:
        admitted, answers = await results_of_all(call, drafts)
    else:
        admitted = [await call.admit(drafts[0])]
        answers = [await call.result(admitted[0])]
    special_ids = frozenset(call.special_ids(drafts[0].lane))
    headers = headers_of_all(call, admitted) | _timing_headers(call, [record for record, _ in answers])
    return json_response(completion_body(answers, special_ids), headers)


def _timing_headers(call: Call, records: list[JobRecord]) -> dict[str, str]:
    """Counts are sums over the prompts, times those of the first one."""
    headers = timing_headers(call, records[0], sum(record.view["prompt_characters"] for record in records))
    headers["x-prompt-tokens"] = str(sum(record.prompt_tokens for record in records))
    headers["x-generated-tokens"] = str(sum(record.num_tokens for record in records))
    return headers


def _model_object(served: ServedModel, name: str) -> dict[str, Any]:
    """OpenAI's model object; `max_model_len`, `root` and `parent` (of an adapter: its base) are vLLM's additions."""
    found = {
        "id": name,
        "object": "model",
        "created": served.card.created,
        "owned_by": served.card.model_id,
        "max_model_len": served.card.max_total_tokens,
        "root": served.card.model_id,
        "parent": None,
    }
    entry = served.adapters.get(name)
    if entry is None or name in served.names:
        return found
    return found | {"created": entry.created_ms // 1000, "root": entry.source, "parent": served.card.served_name}


@router.get("/v1/models")
async def models(services: Annotated[Services, Depends(services)]) -> Response:
    """Models first, adapters behind them; a name that stands for several things is listed as what it means."""
    served = sorted(services.registry.models.values(), key=lambda model: model.card.created, reverse=True)
    named = {name: model for model in reversed(served) for name in model.names}
    adapted = {name: model for model in reversed(served) for name in model.adapters if name not in named}
    rows = [_model_object(model, name) for name, model in (named | adapted).items()]
    return json_response({"object": "list", "data": rows})


@router.get("/v1/models/{name:path}")
async def model(name: str, services: Annotated[Services, Depends(services)]) -> Response:
    return json_response(_model_object(await services.registry.find(name), name))
