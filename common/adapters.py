"""Names and sources of LoRA adapters as operators write them, and one sentence for what is wrong with one."""

from __future__ import annotations

import re
from collections.abc import Iterable

from common.card import ANY_MODEL

MAX_NAME, MAX_SOURCE, MAX_ADAPTERS = 96, 1024, 1024
"""Characters of a name (a hub id has no more) and of a source; adapters of a lane."""

_PART = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
NAME = re.compile(rf"{_PART}(/{_PART})*")
"""No part of a name begins with a dot: names stand in paths of URLs."""
HUB_ID = re.compile(rf"({_PART}/{_PART})(@\S+)?")


def check_name(name: str) -> None:
    """Raises ValueError unless an adapter may be called so."""
    if not NAME.fullmatch(name) or len(name) > MAX_NAME:
        raise ValueError(f"an adapter's name is 1 to {MAX_NAME} of [A-Za-z0-9._-], in parts divided by /")
    if name in ANY_MODEL:
        raise ValueError(f"{name!r} means any model that is served; give the adapter another name")


def check_source(source: str) -> None:
    """Raises ValueError unless it may be a folder or the id of a hub; whether there is one, workers find out."""
    if not source or len(source) > MAX_SOURCE or not source.isprintable():
        raise ValueError(
            f"an adapter's source is a folder or owner/name[@revision], of at most {MAX_SOURCE} characters"
        )
    if "://" in source:
        raise ValueError("an adapter's source is no URL but a folder or owner/name[@revision] of a hub")


def read_sources(items: Iterable[str]) -> dict[str, str]:
    """Source by name, from `name=folder`, `name=owner/name[@revision]` or `owner/name[@revision]`, which names itself.

    Raises:
        ValueError: an item is none of these, a name comes twice, or there are too many.
    """
    found: dict[str, str] = {}
    for item in items:
        name, source = _named(item)
        check_name(name)
        check_source(source)
        if name in found:
            raise ValueError(f"{name!r} is given twice")
        found[name] = source
    if len(found) > MAX_ADAPTERS:
        raise ValueError(f"at most {MAX_ADAPTERS} adapters are possible")
    return found


def _named(item: str) -> tuple[str, str]:
    name, sign, source = item.partition("=")
    if sign:
        return name.strip(), source.strip()
    hub_id = HUB_ID.fullmatch(item)
    if hub_id is None:
        raise ValueError(f"{item!r} is neither name=folder nor owner/name[@revision] of a hub")
    return hub_id[1], item
