"""The other lineages: layer norms, plain feed-forward networks, learned positions or slopes or partial rope."""

from __future__ import annotations

from worker.model.families.base import Family

GPT_FAMILIES: dict[str, Family] = {}
