"""Chat templates render as in transformers, in a sandbox, and never with a second beginning-of-text token."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from common.errors import TemplateError
from common.text.template import CONTINUATION_MARK, ChatTemplate
from common.text.tokenizer import TextTokenizer
from tests.support.tiny_model import CHAT_TEMPLATE, byte_tokenizer_json

CONVERSATION = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "  日本語で?  "},
    {"role": "assistant", "content": "はい。"},
    {"role": "user", "content": "Xin chào"},
]
LLAMA_LIKE = """
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'system' and not loop.first %}
        {{- raise_exception('The system speaks first.') }}
    {%- endif %}
    {{- '<|start|>' + message['role'] + '\\n\\n' + message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant\\n\\n' }}
{%- endif %}
"""
BLOCKS_AND_LOOPS = """
{% for message in messages %}
    {% if message.role == 'system' %}
        {% continue %}
    {% endif %}
    {% generation %}
[{{ message.role }}] {{ message | tojson }}
    {% endgeneration %}
    {% if loop.index > 3 %}
        {% break %}
    {% endif %}
{% endfor %}
{{ messages | tojson(indent=2) }}{{ eos_token }}
{% if enable_thinking is defined %}thinks={{ enable_thinking }}{% endif %}
"""
NAMESPACES = """
{%- set ns = namespace(last='') -%}
{%- for message in messages -%}
    {%- set ns.last = message.content.split('?')[0] -%}
{%- endfor -%}
{{ ns.last.strip() }}|{{ messages[::-1][0]['role'] }}|{{ messages | length }}|{{ strftime_now('%Y') }}
"""
TEMPLATES = {"tiny": CHAT_TEMPLATE, "llama": LLAMA_LIKE, "blocks": BLOCKS_AND_LOOPS, "namespaces": NAMESPACES}


def reference(template: str, messages: list[dict[str, str]], **options: Any) -> str:
    from tokenizers import Tokenizer

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_buffer(byte_tokenizer_json()), bos_token="<s>", eos_token="</s>"
    )
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_templates_render_as_in_transformers(name: str, add_generation_prompt: bool) -> None:
    template = ChatTemplate(TEMPLATES[name], "<s>", "</s>")
    expected = reference(TEMPLATES[name], CONVERSATION, add_generation_prompt=add_generation_prompt)
    assert template.render(CONVERSATION, add_generation_prompt=add_generation_prompt) == expected
    other = [*CONVERSATION[:-1], {"role": "user", "content": "Bye"}]
    assert template.render(other, add_generation_prompt=add_generation_prompt) != expected


def test_variables_of_the_request_reach_the_template() -> None:
    expected = reference(BLOCKS_AND_LOOPS, CONVERSATION, add_generation_prompt=True, enable_thinking=False)
    assert "thinks=False" in expected
    assert ChatTemplate(BLOCKS_AND_LOOPS, "<s>", "</s>").render(CONVERSATION, enable_thinking=False) == expected


@pytest.mark.parametrize("content", ["Well, ", "Well,", "はい"])
@pytest.mark.parametrize("name", ["tiny", "llama"])
def test_an_unfinished_answer_is_continued_as_in_transformers(name: str, content: str) -> None:
    messages = [*CONVERSATION, {"role": "assistant", "content": content}]
    rendered = ChatTemplate(TEMPLATES[name], "<s>", "</s>").render_continued(messages)
    assert rendered.rstrip() == reference(TEMPLATES[name], messages, continue_final_message=True).rstrip()
    assert rendered.rstrip().endswith(content.rstrip())


def test_an_empty_answer_is_continued_behind_its_header() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]
    assert ChatTemplate(CHAT_TEMPLATE, "", "").render_continued(messages) == "<|user|>a<|end|><|assistant|>"


def test_a_text_that_holds_the_mark_does_not_move_the_cut() -> None:
    messages = [{"role": "user", "content": CONTINUATION_MARK}, {"role": "assistant", "content": "x"}]
    assert ChatTemplate(CHAT_TEMPLATE, "", "").render_continued(messages).endswith("<|assistant|>x")


def test_a_template_that_drops_the_last_message_cannot_continue_it() -> None:
    with pytest.raises(TemplateError, match="does not show the last message"):
        ChatTemplate("{{ messages[0].content }}", "", "").render_continued(CONVERSATION)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{{ raise_exception('no tools') }}", "^Template error: no tools$"),
        ("{{ messages[0].content.nothing.more }}", "^Template error: .*has no attribute 'nothing'"),
        ("{{ messages[0].content + 5 }}", "^Template error: "),
        ("{{ ''.__class__.__mro__ }}", "^Template error: .*unsafe"),
        ("{{ messages.append(1) }}", "^Template error: .*"),
        ("{{ 1 // 0 }}", "^Template error: "),
    ],
)
def test_a_template_that_fails_says_why(source: str, problem: str) -> None:
    with pytest.raises(TemplateError, match=problem):
        ChatTemplate(source, "", "").render(CONVERSATION)


def test_a_template_that_is_none_is_refused_at_once() -> None:
    with pytest.raises(TemplateError, match="^Template error: "):
        ChatTemplate("{% for %}", "", "")


def test_the_date_is_todays() -> None:
    before = datetime.now().strftime("%Y-%m-%d")
    rendered = ChatTemplate("{{ strftime_now('%Y-%m-%d') }}", "", "").render(CONVERSATION)
    assert rendered in (before, datetime.now().strftime("%Y-%m-%d"))


def test_there_is_one_beginning_of_text() -> None:
    tokenizer = TextTokenizer(byte_tokenizer_json())
    text = ChatTemplate(CHAT_TEMPLATE, "<s>", "</s>").render(CONVERSATION)
    assert tokenizer.encode(text, add_special_tokens=False).count(256) == 1


CHECKPOINT = Path(__file__).resolve().parents[3] / "ops" / "demo_model" / "checkpoint"


def test_the_demo_models_conversations_are_those_of_transformers() -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(CHECKPOINT)
    ours = TextTokenizer((CHECKPOINT / "tokenizer.json").read_bytes())
    source = (CHECKPOINT / "chat_template.jinja").read_text()
    text = ChatTemplate(source, tokenizer.bos_token, tokenizer.eos_token).render(CONVERSATION)
    expected = tokenizer.apply_chat_template(CONVERSATION, add_generation_prompt=True, return_dict=False)
    assert ours.encode(text, add_special_tokens=False) == expected
    assert expected.count(tokenizer.bos_token_id) == 1
