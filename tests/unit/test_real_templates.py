"""Chat templates of real models, as TRL ships them, beside TRL's own versions that mark the assistant's text."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from data_shards.config import DataConfig, TrainOn
from data_shards.encoding.chat_template import ChatTemplate, Rendered, taught_turns
from tests.unit.test_encode import ANSWER, ASKED, TOOLS, USER, calls, conversations, tool

_TRL = importlib.util.find_spec("trl")
FOLDER = Path(_TRL.origin or "").parent / "chat_templates" if _TRL else None
pytestmark = pytest.mark.skipif(FOLDER is None, reason="TRL, which ships the templates, is not installed")

STOPS = ("<|im_end|>", "<|eot_id|>", "</s>", "<end_of_turn>", "<|end|>", "<|return|>", "<|call|>")
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
PLAIN = ("qwen2_5", "qwen3", "qwen3_5_think", "llama3", "llama3_1", "gemma3", "phi3", "gptoss", "deepseekv3", "lfm2")
CALLING = ("qwen2_5", "qwen3_instruct_2507", "qwen3_vl")


def template(name: str) -> ChatTemplate:
    assert FOLDER is not None
    date = DataConfig.model_fields["template_date"].default
    text = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return ChatTemplate(text, SPECIAL, STOPS, date=date, require_stop=False)


def outcome(find: Any) -> Rendered | str:
    try:
        return find()
    except Exception as error:
        return str(error)


@pytest.mark.parametrize("name", PLAIN)
def test_quick_and_exact_way_agree(name: str) -> None:
    subject = template(name)

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(conversations())
    def check(messages: tuple[dict[str, Any], ...]) -> None:
        turns = taught_turns(messages, TrainOn.ASSISTANT)

        def exactly() -> Rendered:
            text, spans = subject.spans_by_rendering(messages, None, turns)
            return Rendered(text, tuple(spans))

        assert outcome(lambda: subject.render_with_spans(messages, TrainOn.ASSISTANT)) == outcome(exactly)

    check()
    assert isinstance(subject.render_with_spans([USER, ANSWER], TrainOn.ASSISTANT), Rendered)


def trained(rendered: Rendered) -> list[str]:
    """Without line ends around, which the marks hold in some and in others do not."""
    return [rendered.text[start:stop].strip("\n") for start, stop in rendered.spans]


@pytest.mark.parametrize("name", CALLING)
@pytest.mark.parametrize("tools", [TOOLS, None])
def test_tool_calls_are_trained_as_marked(name: str, tools: Any) -> None:
    for messages in (ASKED, [USER, calls("Rome", "I look."), tool("Sunny")]):
        marked = template(f"{name}_training").render_with_spans(messages, TrainOn.ASSISTANT, tools)
        found = template(name).render_with_spans(messages, TrainOn.ASSISTANT, tools)
        assert found.text == marked.text
        assert trained(found) == trained(marked)
        assert any("get_weather" in text for text in trained(found))


@pytest.mark.parametrize("name", ["llama3", "gemma3", "phi3", "cohere"])
def test_fields_that_real_templates_leave_out(name: str) -> None:
    assert (template(name).unused_field([USER, calls("Rome")], TOOLS) or "").startswith("tools (")
    reasoning = [USER, {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}]
    assert (template(name).unused_field(reasoning, None) or "").startswith("reasoning_content (")


def test_fields_that_real_templates_print() -> None:
    reasoning = [USER, {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}]
    assert template("qwen3").unused_field(reasoning, None) is None
    for name in (*CALLING, "llama3_1", "glm4moe", "gptoss"):
        assert template(name).unused_field([USER, calls("Rome"), tool("Sunny")], TOOLS) is None
