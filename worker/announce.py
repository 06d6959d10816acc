"""From `--model-id` to the model card: finding the folder, reading its small files, saying what is wrong in a sentence.

Weights are not touched here; the engine reads them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.card import ModelCard, lane_of
from common.errors import ConfigurationError
from common.settings import WorkerSettings
from worker.hub import (
    SMALL_FILES,
    WEIGHT_FILES,
    HubModel,
    ProgressFunction,
    commit_of,
    fetch,
    in_the_log,
    local_folder,
)
from worker.pipe import Ready

SAMPLING_FIELDS = ("do_sample", "temperature", "top_k", "top_p", "typical_p", "min_p", "repetition_penalty")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """What the agent reads of a model folder. Token texts are "" where the model has none."""

    folder: Path
    model_id: str
    revision: str
    config: dict[str, Any]
    generation_config: dict[str, Any]
    tokenizer_json: bytes
    chat_template: str
    bos_token: str
    eos_token: str
    token_ids: dict[str, int]  # of the two tokens above
    special_ids: tuple[int, ...]

    @property
    def bos_token_id(self) -> int | None:
        configured = self.generation_config.get("bos_token_id", self.config.get("bos_token_id"))
        return configured if isinstance(configured, int) else self.token_ids.get(self.bos_token)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The list of generation_config, else of config, else the tokenizer's."""
        for source in (self.generation_config, self.config, self.config.get("text_config") or {}):
            value = source.get("eos_token_id")
            if value is not None:
                return tuple(value) if isinstance(value, list) else (value,)
        token_id = self.token_ids.get(self.eos_token)
        return () if token_id is None else (token_id,)


def find_model(settings: WorkerSettings, on_progress: ProgressFunction = lambda done, total: None) -> Path:
    """The folder of the model: a local one, or one of the hub's cache, downloaded when it is not there yet.

    Raises:
        ConfigurationError: one sentence with the fix.
    """
    is_dummy = settings.load_format == "dummy"
    folder = local_folder(settings.model_id, "--model-id")
    if folder is None:
        model = HubModel(settings.model_id, settings.revision, settings.huggingface_hub_cache)
        folder = fetch(model, SMALL_FILES if is_dummy else (*SMALL_FILES, *WEIGHT_FILES), in_the_log(on_progress))
    if not is_dummy and not any(folder.glob(WEIGHT_FILES[0])):
        raise ConfigurationError(
            f"{settings.model_id} has no .safetensors file, and pickled weights are never loaded because unpickling "
            f"runs code; `{_prepare_command(settings)}` converts them"
        )
    return folder


def _prepare_command(settings: WorkerSettings) -> str:
    revision = ["--revision", settings.revision] if settings.revision else []
    return shlex.join(["inferfleet", "prepare", settings.model_id, *revision])


def read_model(folder: Path, settings: WorkerSettings) -> ModelFiles:
    """Read tokenizer, template and configuration.

    Raises:
        ConfigurationError: a file is missing or is not what it should be.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConfigurationError(
            f"{settings.model_id} has no tokenizer.json; `{_prepare_command(settings)}` makes one of its other files"
        )
    tokenizer_json = path.read_bytes()
    token_ids, special_ids = _token_ids(tokenizer_json)
    tokenizer_config = _read_json(folder / "tokenizer_config.json")
    bos_token, eos_token = (_token_text(folder, tokenizer_config, name) for name in ("bos_token", "eos_token"))
    return ModelFiles(
        folder=folder,
        model_id=settings.model_id,
        revision=commit_of(folder) or settings.revision or "",
        config=_read_json(folder / "config.json", must_exist=True),
        generation_config=_read_json(folder / "generation_config.json"),
        tokenizer_json=tokenizer_json,
        chat_template=_chat_template(folder, tokenizer_config, settings),
        bos_token=bos_token,
        eos_token=eos_token,
        token_ids={text: token_ids[text] for text in (bos_token, eos_token) if text in token_ids},
        special_ids=special_ids,
    )


def _read_json(path: Path, *, must_exist: bool = False) -> dict[str, Any]:
    if not path.is_file():
        if must_exist:
            raise ConfigurationError(f"there is no {path.name} in {path.parent}; is it a model folder?")
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ConfigurationError(f"{path} does not hold a JSON object")
    return value


def _token_ids(tokenizer_json: bytes) -> tuple[dict[str, int], tuple[int, ...]]:
    """Ids of all tokens by their text, and those of special tokens."""
    try:
        content = json.loads(tokenizer_json)
        added = {token["content"]: int(token["id"]) for token in content.get("added_tokens") or []}
        special = sorted(int(token["id"]) for token in content.get("added_tokens") or [] if token.get("special"))
        vocabulary = content["model"].get("vocab") or {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"tokenizer.json is not a tokenizer: {error}") from error
    known = vocabulary if isinstance(vocabulary, dict) else {text: i for i, (text, _) in enumerate(vocabulary)}
    return known | added, tuple(special)


def _token_text(folder: Path, tokenizer_config: dict[str, Any], name: str) -> str:
    value = tokenizer_config.get(name) or _read_json(folder / "special_tokens_map.json").get(name)
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _chat_template(folder: Path, tokenizer_config: dict[str, Any], settings: WorkerSettings) -> str:
    """The template file of the options, else of the named configuration, else of the model; "" when it has none."""
    if settings.chat_template:
        path = Path(settings.chat_template).expanduser()
        if not path.is_file():
            raise ConfigurationError(f"there is no file {path}; check --chat-template")
        return path.read_text(encoding="utf-8")
    if settings.tokenizer_config_path:
        config = _read_json(Path(settings.tokenizer_config_path).expanduser(), must_exist=True)
        return _default_template(config.get("chat_template"))
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return _default_template(tokenizer_config.get("chat_template"))


def _default_template(value: Any) -> str:
    """A template is a string, or a list of named ones of which one is called default."""
    if isinstance(value, list):
        named = {entry["name"]: entry["template"] for entry in value if isinstance(entry, dict) and "name" in entry}
        value = named.get("default") or next(iter(named.values()), "")
    return value if isinstance(value, str) else ""


def make_card(files: ModelFiles, ready: Ready, settings: WorkerSettings) -> ModelCard:
    """Everything gateways must know, with the limits the engine found."""
    names = settings.served_model_name or [served_name(settings)]
    digest = hashlib.sha256(files.tokenizer_json).hexdigest()
    architectures = files.config.get("architectures") or [""]
    sampling = {name: files.generation_config[name] for name in SAMPLING_FIELDS if name in files.generation_config}
    return ModelCard(
        lane=lane_of(names[0], ready.weights_digest, digest, ready.dtype, ready.quantize, settings.kv_cache_dtype),
        served_name=names[0],
        aliases=tuple(names[1:]),
        model_id=files.model_id,
        revision=files.revision,
        architecture=str(architectures[0]),
        dtype=ready.dtype,
        quantize=ready.quantize,
        created=int(time.time()),
        vocab_size=ready.vocab_size,
        max_input_tokens=ready.max_input_tokens,
        max_total_tokens=ready.max_total_tokens,
        max_batch_prefill_tokens=ready.max_batch_prefill_tokens,
        kv_tokens=ready.kv_tokens,
        tokenizer_digest=digest,
        chat_template=files.chat_template,
        bos_token=files.bos_token,
        eos_token=files.eos_token,
        bos_token_id=files.bos_token_id,
        eos_token_ids=files.eos_token_ids,
        special_ids=files.special_ids,
        default_sampling=sampling,
        is_encoder_decoder=ready.decoder_start_id is not None,
    )


def served_name(settings: WorkerSettings) -> str:
    """The first of the names given; else the hub id, or the name of a local folder."""
    if settings.served_model_name:
        return settings.served_model_name[0]
    folder = Path(settings.model_id).expanduser()
    return folder.resolve().name if folder.is_dir() else settings.model_id
