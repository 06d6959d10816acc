"""Checks that every route makes on a prompt and on what a request may share: context, stop strings, metadata, seed."""

from __future__ import annotations

import secrets
from typing import Any

from common.card import ModelCard
from common.errors import ValidationError
from gateway.formats.base import (
    MAX_METADATA_KEY,
    MAX_METADATA_PAIRS,
    MAX_METADATA_VALUE,
    MAX_STOP_CHARACTERS,
    Limits,
)

COLDEST = 1e-5
"""Below this temperature scaled scores overflow; the limit of sampling is the likeliest token."""
NUM_SEED_BITS = 53
"""Seeds that we draw can be echoed by clients whose numbers are doubles; seeds of clients may have 64 bits."""


def fit_context(num_prompt: int, max_new_tokens: int | None, card: ModelCard, *, param: str) -> int:
    """How many tokens may be generated; without a wish all that the context holds.

    Raises:
        ValidationError: prompt, or prompt and output together, exceed the model's limits (TGI's texts).
    """
    if not num_prompt:
        raise ValidationError("`inputs` cannot be empty", param=param)
    wanted = max(card.max_total_tokens - num_prompt, 1) if max_new_tokens is None else max_new_tokens
    if max_new_tokens is not None and num_prompt + wanted > card.max_total_tokens:
        raise ValidationError(
            f"`inputs` tokens + `max_new_tokens` must be <= {card.max_total_tokens}. "
            f"Given: {num_prompt} `inputs` tokens and {wanted} `max_new_tokens`",
            code="context_length_exceeded",
            param=param,
        )
    if num_prompt > min(card.max_input_tokens, card.max_total_tokens - 1):
        limit = min(card.max_input_tokens, card.max_total_tokens - 1)
        message = f"`inputs` must have less than {limit} tokens. Given: {num_prompt}"
        raise ValidationError(message, code="context_length_exceeded", param=param)
    return wanted


def check_stops(stops: list[str], limits: Limits) -> tuple[str, ...]:
    """Raises ValidationError for too many, too long or empty stop strings."""
    if len(stops) > limits.max_stop_sequences:
        message = f"`stop` supports up to {limits.max_stop_sequences} stop sequences. Given: {len(stops)}"
        raise ValidationError(message, param="stop")
    if any(not stop for stop in stops):
        raise ValidationError("`stop` sequences must not be empty", param="stop")
    if any(len(stop) > MAX_STOP_CHARACTERS for stop in stops):
        raise ValidationError(f"`stop` sequences have at most {MAX_STOP_CHARACTERS} characters", param="stop")
    return tuple(stops)


def check_metadata(metadata: dict[str, Any]) -> dict[str, str]:
    """Raises ValidationError unless these are at most 16 pairs of short strings."""
    if len(metadata) > MAX_METADATA_PAIRS:
        raise ValidationError(f"`metadata` has at most {MAX_METADATA_PAIRS} pairs", param="metadata")
    for key, value in metadata.items():
        if len(key) > MAX_METADATA_KEY:
            raise ValidationError(f"`metadata` keys have at most {MAX_METADATA_KEY} characters", param="metadata")
        if not isinstance(value, str) or len(value) > MAX_METADATA_VALUE:
            message = f"`metadata` values are strings of at most {MAX_METADATA_VALUE} characters"
            raise ValidationError(message, param="metadata")
    return metadata


def choose_seed(seed: int | None) -> int:
    """The client's seed as 64 bits without sign, or one drawn now: a job keeps its seed on every worker."""
    return secrets.randbits(NUM_SEED_BITS) if seed is None else seed % 2**64
