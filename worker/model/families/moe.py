"""Families whose feed-forward networks are mixtures of experts."""

from __future__ import annotations

from worker.model.families.base import Family

MOE_FAMILIES: dict[str, Family] = {}
