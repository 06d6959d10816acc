"""Weights as trees: dataclasses, lists and tuples, with products and tensors at their ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

from worker.model.lora import AdaptedLinear


def mapped(node: Any, change: Callable[[Any], Any]) -> Any:
    """`node` with what `change` makes of its parts, from the outermost inwards; what it leaves as it is stays the same
    object, and is looked into. Products with adapters, which others know, change in place."""
    if (new := change(node)) is not node:
        return new
    if isinstance(node, AdaptedLinear):
        node.base = mapped(node.base, change)
        return node
    if isinstance(node, list | tuple):
        parts = [mapped(part, change) for part in node]
        if all(new is part for new, part in zip(parts, node, strict=True)):
            return node
        return type(node)(*parts) if hasattr(node, "_fields") else type(node)(parts)
    if not is_dataclass(node) or isinstance(node, type):
        return node
    before = {part.name: getattr(node, part.name) for part in fields(node)}
    changed = {name: new for name, part in before.items() if (new := mapped(part, change)) is not part}
    return replace(node, **changed) if changed else node
