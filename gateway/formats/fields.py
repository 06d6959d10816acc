"""Reading JSON bodies: bytes to an object, and typed fields out of it. Null means unset; every number is finite."""

from __future__ import annotations

import math
from typing import Any

import orjson

from common.errors import BadRequest, UnsupportedMediaType, ValidationError

LARGEST_INTEGER = 2**64 - 1


def parse_json(body: bytes, content_type: str | None = "application/json") -> dict[str, Any]:
    """The JSON object in a request's body.

    Raises:
        UnsupportedMediaType: another content type was declared (or none).
        BadRequest: the bytes are not UTF-8 or not JSON.
        ValidationError: the JSON is not an object.
    """
    media_type = (content_type or "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not (
        media_type.startswith("application/") and media_type.endswith("+json")
    ):
        raise UnsupportedMediaType("Expected request with `Content-Type: application/json`")
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        message = f"Failed to parse the request body as JSON: error at {where}"
        raise BadRequest(message, code="invalid_json") from None
    if not isinstance(value, dict):
        raise ValidationError("the request body must be a JSON object")
    return value


class Fields:
    """The fields of one JSON object; `path` stands before their names. What was never asked for is left in `unread`."""

    def __init__(self, values: dict[str, Any], path: str = "") -> None:
        self._values = values
        self.path = path
        self._read: set[str] = set()

    def raw(self, name: str) -> Any:
        """The value as it came, None when absent."""
        self._read.add(name)
        return self._values.get(name)

    def has(self, name: str) -> bool:
        self._read.add(name)
        return self._values.get(name) is not None

    def integer(self, name: str, default: int | None = None) -> int | None:
        value = self.raw(name)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or abs(value) > LARGEST_INTEGER:
            raise self._wrong(name, "an integer")
        return value

    def number(self, name: str, default: float | None = None) -> float | None:
        value = self.raw(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._wrong(name, "a number")
        return float(value)

    def boolean(self, name: str, default: bool = False) -> bool:
        value = self.raw(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def text(self, name: str) -> str | None:
        value = self.raw(name)
        if value is not None and not isinstance(value, str):
            raise self._wrong(name, "a string")
        return value

    def texts(self, name: str, *, or_one: bool = False) -> list[str]:
        """A list of strings; with `or_one` a plain string is a list of one."""
        value = self.raw(name)
        if value is None:
            return []
        if or_one and isinstance(value, str):
            return [value]
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(name, "a string or a list of strings" if or_one else "a list of strings")
        return value

    def integers(self, name: str, most: int) -> list[int]:
        value = self.raw(name)
        if value is None:
            return []
        if not isinstance(value, list) or not all(is_token_id(item) for item in value):
            raise self._wrong(name, "a list of token ids")
        if len(value) > most:
            raise ValidationError(f"`{self.path}{name}` has more than {most} items", param=self.path + name)
        return value

    def table(self, name: str) -> dict[str, Any] | None:
        value = self.raw(name)
        if value is not None and not isinstance(value, dict):
            raise self._wrong(name, "an object")
        return value

    def unread(self) -> list[str]:
        """Names of fields that have a value and were never asked for."""
        return [name for name, value in self._values.items() if name not in self._read and value is not None]

    def _wrong(self, name: str, expected: str) -> ValidationError:
        return ValidationError(f"`{self.path}{name}` must be {expected}", param=self.path + name)


def is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def unsupported(name: str, reason: str) -> ValidationError:
    """A parameter that means something elsewhere and cannot be honoured here: refused, never ignored."""
    return ValidationError(f"`{name}` is not supported: {reason}", code="unsupported_parameter", param=name)
