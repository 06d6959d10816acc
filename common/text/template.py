"""Chat templates: the model's own Jinja template in a sandbox, with what transformers offers to templates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from common.errors import TemplateError

CONTINUATION_MARK = "<<the answer continues here>>"
"""Put behind the last message to find where its text ends in the rendered conversation."""


class _GenerationBlock(Extension):
    """`{% generation %} … {% endgeneration %}` marks what a training run learns; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it as a plain set)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own filter this one does not escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """A compiled template and the tokens it may write. Thread-safe."""

    def __init__(self, source: str, bos_token: str, eos_token: str) -> None:
        """Raises TemplateError if `source` is not a template."""
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise TemplateError(f"Template error: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The conversation as the text that the model was trained on. It has the special tokens the template writes, so
        it must be tokenised without adding any.

        Raises:
            TemplateError: the template refuses the messages or cannot digest them.
        """
        values = {**variables, "messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(self._tokens | values)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, ArithmeticError) as error:
            raise TemplateError(f"Template error: {error or type(error).__name__}") from error

    def render_continued(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The conversation up to the end of its last message's text, so that the model goes on with that message.

        Raises:
            TemplateError: as `render`, or the template does not show the last message.
        """
        last = dict(messages[-1])
        last["content"] = f"{last['content']}{CONTINUATION_MARK}"
        text = self.render([*messages[:-1], last], add_generation_prompt=False, **variables)
        before, mark, _ = text.rpartition(CONTINUATION_MARK)
        if not mark:
            raise TemplateError(
                "Template error: the template does not show the last message, so it cannot be continued"
            )
        return before
