"""Writes docs/options.md from the declarations in common/settings.py: `python -m ops.options > docs/options.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from pydantic import AliasChoices
from pydantic_core import PydanticUndefined
from pydantic_settings import BaseSettings

from common.settings import (
    WITHOUT_MEANING,
    BenchSettings,
    CommonSettings,
    GatewaySettings,
    PrepareSettings,
    UpSettings,
    WorkerSettings,
    environment_name,
)

SECTIONS: tuple[tuple[str, type[BaseSettings], tuple[type[BaseSettings], ...]], ...] = (
    ("Every process", CommonSettings, ()),
    ("`inferfleet gateway`", GatewaySettings, (CommonSettings,)),
    ("`inferfleet worker`", WorkerSettings, (CommonSettings,)),
    ("`inferfleet up`", UpSettings, (GatewaySettings, WorkerSettings)),
    ("`inferfleet prepare`", PrepareSettings, ()),
    ("`inferfleet bench`", BenchSettings, ()),
)


def flags(settings_class: type[BaseSettings], name: str) -> str:
    alias = settings_class.model_fields[name].validation_alias
    names = [str(choice) for choice in alias.choices] if isinstance(alias, AliasChoices) else [name]
    return ", ".join(f"`{'-' if len(flag) == 1 else '--'}{flag.replace('_', '-')}`" for flag in names)


def rows(settings_class: type[BaseSettings], inherited: tuple[type[BaseSettings], ...]) -> Iterator[str]:
    for name, field in settings_class.model_fields.items():
        if any(name in parent.model_fields for parent in inherited):
            continue
        if field.is_required():
            yield f"| `{name.upper()}` | | | {field.description} |"
            continue
        default = "" if field.default in (None, "", PydanticUndefined) or field.default == [] else f"`{field.default}`"
        variable = environment_name(settings_class, name)
        yield f"| {flags(settings_class, name)} | `{variable}` | {default} | {field.description} |"


def document() -> str:
    lines = ["# Options", "", "A flag wins over the environment, the environment over the default."]
    for title, settings_class, inherited in SECTIONS:
        lines += ["", f"## {title}", "", "| flag | environment | default | |", "|---|---|---|---|"]
        lines += rows(settings_class, inherited)
    lines += ["", "## Accepted without effect", "", "These parse, so that known command lines work, and warn.", ""]
    lines += ["| flag | why |", "|---|---|"]
    lines += [f"| `--{name}` | {reason} |" for name, (_, reason) in WITHOUT_MEANING.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(document())
