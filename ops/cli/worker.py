"""`inferfleet worker`: one agent process with its engine; on the further machines of a model, its ranks there."""

from __future__ import annotations

from pathlib import Path

from common.errors import ConfigurationError
from common.settings import WorkerSettings, parse
from common.telemetry import set_up_logging

DEMO_MODEL = Path(__file__).resolve().parent.parent / "demo_model" / "checkpoint"


def default_model(model_id: str, served_model_name: list[str]) -> tuple[str, list[str]]:
    """The model to serve and its names: the built-in demo model when none is asked for."""
    if model_id:
        return model_id, served_model_name
    return str(DEMO_MODEL), served_model_name or ["demo"]


def main(arguments: list[str]) -> int:
    settings = parse(WorkerSettings, arguments, program="inferfleet worker")
    if settings.redis_url is None and settings.node_rank == 0:
        raise ConfigurationError("a worker needs --redis-url or REDIS_URL; `inferfleet up` starts a Redis of its own")
    model_id, names = default_model(settings.model_id, settings.served_model_name)
    settings = settings.model_copy(update={"model_id": model_id, "served_model_name": names})
    set_up_logging(settings.log_level, json_output=settings.json_output)

    if settings.node_rank:
        from worker.parallel.node import run
    else:
        from worker.main import run
    return run(settings)
