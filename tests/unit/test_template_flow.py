"""Templates that only print contents are known by their syntax; all that do more are not taken for such."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.config import DataConfig
from data_shards.encoding.chat_template import ChatTemplate
from data_shards.encoding.template_flow import Flow, content_flow
from tests.support import tokenizers as families
from tests.unit.test_real_templates import FOLDER

LOOP = "{%% for message in messages %%}%s{%% endfor %%}"

SEEN_THROUGH = {
    "a sum": LOOP % "{{ '<|im_start|>' + message.role + '\n' + message['content'] + '<|im_end|>\n' }}",
    "pieces": LOOP % "<{{ message['role'] }}>{{ message.content }}</{{ message['role'] }}>",
    "joined": LOOP % "{{ message.role ~ ': ' ~ message.content }}",
    "by role": LOOP
    % "{% if message.role == 'user' %}{{ message.content }}{% elif loop.last %}{{ eos_token }}{% endif %}",
    "system first": "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{{ m.content if loop.first else m.role }}{% endfor %}",
    "a name": LOOP % "{% set text = message.content + eos_token %}{% if loop.first %}{% set text = '<s>' + text %}"
    "{% endif %}{{ text }}",
    "its type": LOOP % "{% if message.content is string and message.tool_calls is not defined %}{{ message.content }}"
    "{% endif %}",
    "a count": "{% set ns = namespace(n=0) %}"
    + LOOP % "{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ message.content }}"
    + "{{ messages | length }}{{ (messages | last).content }}",
    "fields": LOOP % "{% if 'name' in message %}{{ message.name }}{% endif %}{{ message.content }}",
    "used before it is set": "{% for message in messages %}{% if not loop.first %}{{ last }}{% endif %}"
    "{% set last = message.content %}{% endfor %}",
    "a macro of constants": "{% macro head(role) %}<{{ role }}>{% endmacro %}"
    + LOOP % "{{ head(message.role) }}{{ message.content }}",
    "no contents": "{{ bos_token }}",
}
TRIMMED = {
    "trimmed": LOOP % "{{ message.role + ': ' + message['content'] | trim + '\n' }}",
    "trimmed name": LOOP % "{% set text = message.content | trim %}{{ text }}",
}
MORE_THAN_PRINTED = {
    "changed": LOOP % "{{ message.content | upper }}",
    "replaced": LOOP % "{{ message.content.replace('a', 'b') }}",
    "trimmed at one end": LOOP % "{{ message.content.lstrip() }}",
    "trimmed of more": LOOP % "{{ message.content | trim('x') }}",
    "trimmed of more by a list": LOOP % "{{ message.content | trim(*['x']) }}",
    "a trimmed sum": LOOP % "{{ (' a ' + message.content) | trim }}",
    "a trimmed name": LOOP % "{% set text = ' a ' + message.content %}{{ text | trim }}",
    "a piece": LOOP % "{{ message.content[1:] }}",
    "a letter": LOOP % "{{ message.content[0] }}",
    "twice": LOOP % "{{ message.content * 2 }}",
    "its length": LOOP % "{{ message.content | length }}{{ message.content }}",
    "as json": LOOP % "{{ message | tojson }}",
    "the message": LOOP % "{{ message }}",
    "all of them": "{{ messages }}",
    "tested": LOOP % "{% if message.content %}{{ message.content }}{% endif %}",
    "compared": LOOP % "{% if message.content == 'x' %}y{% else %}{{ message.content }}{% endif %}",
    "searched": LOOP % "{% if 'x' in message.content %}y{% endif %}{{ message.content }}",
    "a choice": LOOP % "{{ message.content if message.content else 'none' }}",
    "or else": LOOP % "{{ message.content or 'none' }}",
    "its letters": LOOP % "{% for letter in message.content %}{{ letter }}.{% endfor %}",
    "a tested name": LOOP % "{% set text = message.content %}{% if text %}{{ text }}{% endif %}",
    "a tested name further up": "{% for message in messages %}{% if last %}!{% endif %}{% set last = message.content %}"
    "{{ last }}{% endfor %}",
    "kept in a namespace": "{% set ns = namespace(text='') %}"
    + LOOP % "{% set ns.text = message.content %}{{ ns.text }}",
    "a namespace of messages": "{% set ns = namespace(all=messages) %}{{ ns.all[0].content | upper }}",
    "the loop's neighbour": LOOP % "{{ loop.previtem.content | upper if loop.previtem else '' }}{{ message.content }}",
    "the loop's neighbour by name": LOOP % "{{ loop['nextitem'] }}",
    "the loop": LOOP % "{{ loop.changed(message.content) }}{{ message.content }}",
    "the loop kept": LOOP % "{% set outer = loop %}{{ outer.nextitem }}",
    "by a method": LOOP % "{{ message.get('content') | upper }}",
    "by its values": LOOP % "{{ message.values() | list }}",
    "by a method's name": LOOP % "{{ message['items']() | list }}",
    "by a computed name": LOOP % "{% set key = 'content' %}{{ message[key] | upper }}",
    "by a list of them": "{{ messages | map(attribute='content') | join('|') }}",
    "selected": "{% for message in messages if message.content %}{{ message.content }}{% endfor %}",
    "selected by a filter": "{% for message in messages | selectattr('content') %}{{ message.content }}{% endfor %}",
    "sorted": "{% for message in messages | sort(attribute='content') %}{{ message.content }}{% endfor %}",
    "unpacked": "{% for role, content in messages %}{{ content }}{{ role }}{% endfor %}",
    "a macro": "{% macro show(text) %}{{ text | upper }}{% endmacro %}" + LOOP % "{{ show(message.content) }}",
    "a macro that looks": "{% macro show() %}{{ messages[0].content | upper }}{% endmacro %}{{ show() }}",
    "a call": LOOP % "{% call(x) message.content.join('ab') %}{% endcall %}",
    "a filtered block": LOOP % "{% filter upper %}{{ message.content }}{% endfilter %}",
    "a captured block": LOOP % "{% set text %}{{ message.content }}{% endset %}{{ text | upper }}",
    "two meanings": LOOP % "{% set text = message %}{% set text = message.content %}{{ text }}",
    "a message's message": LOOP % "{% set message = message.content %}{{ message.content | upper }}",
    "raised": LOOP % "{% if message.content | length > 3 %}{{ raise_exception('no') }}{% endif %}{{ message.content }}",
    "recursive": "{% for message in messages recursive %}{{ message.content }}{{ loop(messages[:1]) }}{% endfor %}",
}


@pytest.mark.parametrize("name", SEEN_THROUGH)
def test_templates_that_print(name: str) -> None:
    assert content_flow(SEEN_THROUGH[name]) == Flow.PRINTED


@pytest.mark.parametrize("name", TRIMMED)
def test_templates_that_trim(name: str) -> None:
    assert content_flow(TRIMMED[name]) == Flow.TRIMMED


@pytest.mark.parametrize("name", MORE_THAN_PRINTED)
def test_templates_that_do_more(name: str) -> None:
    assert content_flow(MORE_THAN_PRINTED[name]) is None


def subject(template: str) -> ChatTemplate:
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    return ChatTemplate(template, special, ["</s>"], date=DataConfig.model_fields["template_date"].default)


CONTENTS = st.text(st.sampled_from(" \n\tab{}%<>'\"é"), max_size=6)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(SEEN_THROUGH | TRIMMED)), st.lists(CONTENTS, min_size=1, max_size=4), st.booleans())
def test_filled_in_is_rendered(name: str, contents: list[str], system: bool) -> None:
    template = subject((SEEN_THROUGH | TRIMMED)[name])
    roles = ["system"] * system + ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    assert template._plain(messages)[0] == template.render(messages)


def test_nothing_is_rendered_where_contents_are_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    template = subject(SEEN_THROUGH["a sum"])
    messages = [{"role": "user", "content": "{{ a }}"}, {"role": "assistant", "content": " b"}]
    rendered = template.render(messages)
    assert template._plain(messages)[0] == rendered
    monkeypatch.setattr(template, "_render_plain", None)
    assert template._plain(messages)[0] == rendered


def test_of_families() -> None:
    flows = {name: content_flow(str(make().chat_template)) for name, make in families.FACTORIES.items()}
    assert flows["chatml"] == Flow.PRINTED and flows["qwen3"] is None


@pytest.mark.skipif(FOLDER is None, reason="TRL, which ships the templates, is not installed")
def test_of_real_models() -> None:
    names = ("phi3", "llama3", "gemma", "qwen3", "deepseekv3")
    flows = {name: content_flow(Path(str(FOLDER), f"{name}.jinja").read_text(encoding="utf-8")) for name in names}
    assert (flows["phi3"], flows["llama3"], flows["gemma"]) == (Flow.PRINTED, Flow.TRIMMED, Flow.TRIMMED)
    assert flows["qwen3"] is None and flows["deepseekv3"] is None, "they take thinking out of contents"
