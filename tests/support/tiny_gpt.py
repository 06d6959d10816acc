"""Tiny configurations of the other lineages: name -> (class prefix in transformers, differences from SIZES)."""

from __future__ import annotations

from typing import Any

CASES: dict[str, tuple[str, dict[str, Any]]] = {}
