"""What a gateway must know of a served model. Workers announce it, gateways read it; it travels as msgpack."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from common import wire
from common.errors import WireError

LANE_LENGTH = 6
ANY_MODEL = frozenset({"tgi", "dummy", ""})
"""Names sent by clients that cannot know what is served: they mean the only model there is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """One served model. `lane` names its keys on Redis; limits are those of the announcing worker.

    `tokenizer_digest` finds the tokenizer blob (the bytes of tokenizer.json). `special_ids` are the ids that
    `skip_special_tokens` hides. `default_sampling` is what the model's generation_config asks for. `aliases` are
    further names clients may use. The answers of a model that `is_encoder_decoder` do not continue their prompts.
    """

    lane: str
    served_name: str
    aliases: tuple[str, ...]
    model_id: str
    revision: str
    architecture: str
    dtype: str
    quantize: str
    created: int
    vocab_size: int
    max_input_tokens: int
    max_total_tokens: int
    max_batch_prefill_tokens: int
    kv_tokens: int
    tokenizer_digest: str
    chat_template: str
    bos_token: str
    eos_token: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    special_ids: tuple[int, ...]
    default_sampling: dict[str, Any] = field(default_factory=dict)
    is_encoder_decoder: bool = False


def lane_of(
    served_name: str, weights_digest: str, tokenizer_digest: str, dtype: str, quantize: str, kv_cache_dtype: str
) -> str:
    """Six characters of [a-z2-7] that change whenever an answer could: a job never changes model on its way."""
    text = "\0".join((served_name, weights_digest, tokenizer_digest, dtype, quantize, kv_cache_dtype))
    return base64.b32encode(hashlib.sha256(text.encode()).digest()).decode().lower()[:LANE_LENGTH]


def encode_card(card: ModelCard) -> bytes:
    return wire.pack([wire.VERSION, "card", asdict(card)])


_FIELDS = {item.name for item in fields(ModelCard)}


def decode_card(data: bytes) -> ModelCard:
    """Inverse of `encode_card`; fields that other versions of workers have are ignored.

    Raises:
        WireError: if the bytes are not a card of this version.
    """
    value = wire.unpack(data)
    if not isinstance(value, list) or value[:2] != [wire.VERSION, "card"]:
        raise WireError("not a model card of this version")
    tuples = ("aliases", "eos_token_ids", "special_ids")
    try:
        found = {name: item for name, item in value[2].items() if name in _FIELDS}
        return ModelCard(**(found | {name: tuple(found[name]) for name in tuples}))
    except (AttributeError, KeyError, TypeError) as error:
        raise WireError(f"not a model card: {error}") from error
