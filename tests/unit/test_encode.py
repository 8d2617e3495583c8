"""The quick way to a mask gives what the exact one gives; weights, tool calls and reasoning; what is refused."""

from __future__ import annotations

import functools
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import processors

from data_shards.config import DataConfig, TrainOn
from data_shards.encoding.chat_template import ChatTemplate, Rendered, between, taught_turns
from data_shards.encoding.conversation_shape import has_constant_prompt
from data_shards.encoding.encoder import Encoder
from data_shards.encoding.masked_tokenizer import MaskedTokenizer, trained_by_offsets, trained_tokens
from data_shards.encoding.turn_bounds import CannotMask
from data_shards.errors import DataError
from data_shards.pack import Sequence
from data_shards.sources.records import Record
from tests.support import tokenizers as families
from tests.support import tool_templates

each_family = pytest.mark.parametrize("family", families.FACTORIES)

PIECES = (
    *(
        "a",
        " ",
        "  ",
        "\n",
        "\t",
        " ",
        "é",
        "é",
        "你好",
        "👩🏽‍🚀",
        "🇫🇷",
        "ﬁ",
        "İ",
        "\x00",
        "<",
        "{{",
        "%}",
        "{% generation %}",
    ),
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|start_header_id|>", "</s>", "<s>", "[/INST]"),
    *("<think>", "</think>", "\n</think>\n\n", "assistant", "assistant\n", "What is", "Paris.", "%s", "BatonStandsIn"),
)
contents = st.one_of(
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join).filter(str.strip),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(str.strip),
)
USER = {"role": "user", "content": "What is the capital of France?"}
ANSWER = {"role": "assistant", "content": "Paris."}


@st.composite
def conversations(draw: st.DrawFn) -> tuple[dict[str, Any], ...]:
    turns = [{"role": "system", "content": draw(contents)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns += [{"role": "user", "content": draw(contents)}, {"role": "assistant", "content": draw(contents)}]
    return tuple(turns)


@functools.cache
def tokenizer_of(family: str) -> Any:
    return families.FACTORIES[family]()


def encoder_of(tokenizer: Any, **options: Any) -> Encoder:
    return Encoder(tokenizer, DataConfig(train="unused", **options), families.stop_texts(tokenizer))


@functools.cache
def plain_encoder(family: str) -> Encoder:
    """One for all examples, so that shapes learnt with some are used with others."""
    return encoder_of(tokenizer_of(family))


def encode_one(encoder: Encoder, messages: Any, **fields: Any) -> Sequence:
    (encoded,) = encoder.encode([Record("data.jsonl", 7, tuple(messages), **fields)])
    return encoded.sequence


def template_of(tokenizer: Any, text: str | None = None) -> ChatTemplate:
    date = DataConfig.model_fields["template_date"].default
    return ChatTemplate(
        text or tokenizer.chat_template, tokenizer.special_tokens_map, families.stop_texts(tokenizer), date=date
    )


def exact(tokenizer: Any, messages: Any) -> tuple[list[int], list[bool]]:
    """Ids and mask by three renderings a turn, transformers' own tokenization and all of its offsets."""
    template = template_of(tokenizer)
    if template.marks_generation:
        rendered = template.render_with_spans(messages, TrainOn.ASSISTANT)
    else:
        text, spans = template.spans_by_rendering(messages, None, taught_turns(messages, TrainOn.ASSISTANT))
        rendered = Rendered(text, tuple(spans))
    encoding = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = np.array(encoding["offset_mapping"], np.int64).reshape(-1, 2)
    return encoding["input_ids"], trained_by_offsets(offsets, rendered).tolist()


def trained_text(tokenizer: Any, sequence: Sequence) -> list[str]:
    """Each run of trained tokens, decoded."""
    starts = np.flatnonzero(sequence.trained & ~np.append(False, sequence.trained[:-1]))
    stops = np.flatnonzero(sequence.trained & ~np.append(sequence.trained[1:], False)) + 1
    return [tokenizer.decode(sequence.input_ids[a:b]) for a, b in zip(starts, stops, strict=True)]


@each_family
@settings(max_examples=60, deadline=None)
@given(messages=conversations())
def test_quick_and_exact_way_agree(family: str, messages: tuple[dict[str, Any], ...]) -> None:
    tokenizer = tokenizer_of(family)
    try:
        ids, trained = exact(tokenizer, messages)
    except Exception as error:
        with pytest.raises(DataError) as refusal:
            encode_one(plain_encoder(family), messages)
        assert str(error) in str(refusal.value)
        return
    sequence = encode_one(plain_encoder(family), messages)
    assert sequence.input_ids.tolist() == ids
    assert sequence.trained.tolist() == trained


@each_family
def test_conversations_of_one_shape_are_rendered_once(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_of(tokenizer_of(family))
    encode_one(encoder, [USER, ANSWER])
    calls = []
    render = ChatTemplate.render
    monkeypatch.setattr(ChatTemplate, "render", lambda *a, **k: calls.append(a) or render(*a, **k))
    encode_one(encoder, [{**USER, "content": "Another question?"}, {**ANSWER, "content": "Another answer."}])
    assert not calls
    encode_one(encoder, [USER, ANSWER, USER, ANSWER])
    assert calls or "generation %}" in tokenizer_of(family).chat_template


def test_turn_without_text_is_refused_also_where_its_shape_is_known() -> None:
    template = template_of(tokenizer_of("chatml"))
    template.render_with_spans([USER, ANSWER], TrainOn.ASSISTANT)
    with pytest.raises(CannotMask, match=r"messages\[1\] leaves no text of its own"):
        template.render_with_spans([USER, ANSWER | {"content": ""}], TrainOn.ASSISTANT)


THINKS_FIRST = families.CHATML_TEMPLATE.replace("assistant\\n'", "assistant\\n<think>\\n'")


def test_turns_without_what_the_prompt_goes_on_with() -> None:
    """As under Qwen 3.5: the prompt opens the thinking that earlier turns lost."""
    tokenizer = families.chatml(THINKS_FIRST)
    assert tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True).endswith("<think>\n")
    # Only the prompt's text counts: an answer that begins like it does not move the start.
    turns = [USER, ANSWER, USER, ANSWER | {"content": "<table>"}, USER, ANSWER | {"content": "<think>\nHm."}]
    sequence = encode_one(encoder_of(tokenizer), turns)
    assert trained_text(tokenizer, sequence)[:2] == ["Paris.<|im_end|>", "<table><|im_end|>"]
    assert (sequence.input_ids.tolist(), sequence.trained.tolist()) == exact(tokenizer, turns)


NO_THINK = families.CHATML_TEMPLATE.replace(
    "{{- '<|im_start|>assistant\\n' }}",
    "{{- '<|im_start|>assistant\\n' }}{% if '/no_think' in messages[-1].content %}{{ 'Well, ' }}{% endif %}",
)


def test_prompt_that_depends_on_what_is_said_is_rendered_for_each_record() -> None:
    assert NO_THINK != families.CHATML_TEMPLATE
    tokenizer = families.chatml(NO_THINK)
    encoder = encoder_of(tokenizer)
    for question, wanted in (("Hm?", "Well, yes.<|im_end|>"), ("Hm? /no_think", "yes.<|im_end|>")):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "Well, yes."}]
        sequence = encode_one(encoder, messages)
        assert trained_text(tokenizer, sequence) == [wanted]
        assert (sequence.input_ids.tolist(), sequence.trained.tolist()) == exact(tokenizer, messages)


@pytest.mark.parametrize(
    ("constant", "template"),
    [
        (True, families.CHATML_TEMPLATE),
        (True, families.LLAMA3_TEMPLATE),
        (True, families.MISTRAL_TEMPLATE),
        (True, "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}x"),
        (True, "{% for m in messages %}{% if loop.last and add_generation_prompt %}A{% endif %}{% endfor %}"),
        (True, "{% if add_generation_prompt %}{{ bos_token if thinking is defined else 'A' }}{% endif %}"),
        (False, NO_THINK),
        (False, "{% set quiet = messages[0].content %}{% if add_generation_prompt %}{{ quiet }}{% endif %}"),
        (False, "{% if messages[0].content %}{% if add_generation_prompt %}A{% endif %}{% endif %}"),
        (False, "{% set prompt = add_generation_prompt %}{{ 'A' if prompt }}"),
        (False, "{% macro end() %}{{ messages[0].content }}{% endmacro %}{{ end() if add_generation_prompt }}"),
    ],
)  # fmt: skip
def test_constant_prompts_are_told_from_others(constant: bool, template: str) -> None:
    assert has_constant_prompt(template) is constant


@functools.cache
def spaced_out_tokenizer() -> Any:
    """Offsets without the blanks around words, as GPT-2's and Llama 3's are."""
    tokenizer = families.chatml()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


@pytest.mark.parametrize("family", ["chatml", "mistral", "qwen3", "trimmed"])
@settings(max_examples=150, deadline=None)
@given(text=st.lists(contents, min_size=1, max_size=4).map("".join), cuts=st.lists(st.integers(0, 60), max_size=6))
def test_ends_of_spans_give_the_same_tokens_as_all_offsets(family: str, text: str, cuts: list[int]) -> None:
    tokenizer = spaced_out_tokenizer() if family == "trimmed" else tokenizer_of(family)
    places = sorted({min(cut, len(text)) for cut in cuts})
    spans = tuple(zip(places[::2], places[1::2], strict=False))
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    rendered = Rendered(text, spans)
    assert trained_tokens(encoding, rendered).tolist() == trained_by_offsets(offsets, rendered).tolist()


spanned = st.tuples(
    st.lists(contents, min_size=1, max_size=4).map("".join), st.lists(st.integers(0, 60), max_size=6, unique=True)
)


@pytest.mark.parametrize("family", ["chatml", "llama3", "mistral", "qwen3", "trimmed"])
@settings(max_examples=100, deadline=None)
@given(batch=st.lists(spanned, max_size=5))
@example(batch=[("a ", [0, 2])])
def test_whatever_way_a_batch_is_masked_the_rule_is_the_same(family: str, batch: list[tuple[str, list[int]]]) -> None:
    tokenizer = spaced_out_tokenizer() if family == "trimmed" else tokenizer_of(family)
    rendered = []
    for text, cuts in batch:
        places = sorted({min(cut, len(text)) for cut in cuts})
        rendered.append(Rendered(text, tuple(zip(places[::2], places[1::2], strict=False))))
    found = MaskedTokenizer(tokenizer).encode(rendered, add_special_tokens=False)
    assert len(found) == len(rendered)
    for sequence, each in zip(found, rendered, strict=True):
        encoding = tokenizer.backend_tokenizer.encode(each.text, add_special_tokens=False)
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        assert sequence.input_ids.tolist() == encoding.ids
        # Of a whole text all is trained, also blanks that the offsets of some tokenizers leave out.
        wanted = np.ones(len(offsets), bool) if each.is_whole else trained_by_offsets(offsets, each)
        assert sequence.trained.tolist() == wanted.tolist(), (each, encoding.tokens)


def test_text_gets_what_the_tokenizer_adds_and_conversations_between_do_not() -> None:
    tokenizer = tokenizer_of("llama3")
    text, talk = Record("a", 1, text="Plain text."), Record("b", 1, (USER, ANSWER))
    ids = [item.sequence.input_ids.tolist() for item in encoder_of(tokenizer).encode([text, talk, text, text])]
    assert [one.count(tokenizer.bos_token_id) for one in ids] == [1, 1, 1, 1]
    assert ids[0] == ids[2] == ids[3] == [*tokenizer("Plain text.")["input_ids"], tokenizer.eos_token_id]


def test_truncation_and_padding_left_on_do_nothing() -> None:
    tokenizer = families.chatml()
    wanted = encode_one(encoder_of(tokenizer), [USER, ANSWER])
    tokenizer(["Hm?", "Why?"], truncation=True, max_length=3, padding="max_length")
    assert tokenizer.backend_tokenizer.truncation
    assert encode_one(encoder_of(tokenizer), [USER, ANSWER]).input_ids.tolist() == wanted.input_ids.tolist()


def test_encoder_can_be_sent_to_another_process() -> None:
    encoder = plain_encoder("llama3")
    before = encode_one(encoder, [USER, ANSWER])
    after = encode_one(pickle.loads(pickle.dumps(encoder)), [USER, ANSWER])
    assert after.input_ids.tolist() == before.input_ids.tolist()
    assert after.trained.tolist() == before.trained.tolist()


def answers(*weights: int | None) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = []
    for number, weight in enumerate(weights):
        turns += [USER, {"role": "assistant", "content": f"{number}."} | ({} if weight is None else {"weight": weight})]
    return turns


@pytest.mark.parametrize("family", ["chatml", "chatml_marked", "chatml_marked_without_stop"])
@pytest.mark.parametrize(
    ("train_on", "weights", "trained"),
    [
        (TrainOn.ASSISTANT, (None, None, None), [0, 1, 2]),
        (TrainOn.ASSISTANT, (1, 0, None), [0, 2]),
        (TrainOn.LAST, (None, None, None), [2]),
        (TrainOn.LAST, (0, 0, 1), [2]),
    ],
)
def test_which_turns_are_trained(family: str, train_on: TrainOn, weights: Any, trained: list[int]) -> None:
    tokenizer = tokenizer_of(family)
    sequence = encode_one(encoder_of(tokenizer, train_on=train_on), answers(*weights))
    assert trained_text(tokenizer, sequence) == [f"{number}.<|im_end|>" for number in trained]
    # Weights are not shown to the template.
    plain = encode_one(encoder_of(tokenizer), answers(*[None] * len(weights)))
    assert sequence.input_ids.tolist() == plain.input_ids.tolist()


def test_weight_0_is_left_out_of_all() -> None:
    tokenizer = tokenizer_of("chatml")
    sequence = encode_one(encoder_of(tokenizer, train_on=TrainOn.ALL), answers(None, 0))
    assert tokenizer.decode(sequence.input_ids[~sequence.trained]) == "1.<|im_end|>"
    assert encode_one(encoder_of(tokenizer, train_on=TrainOn.ALL), answers(None, 1)).trained.all()


@pytest.mark.parametrize("train_on", [TrainOn.ASSISTANT, TrainOn.LAST])
@pytest.mark.parametrize("family", ["chatml", "chatml_marked"])
def test_nothing_but_weight_0_is_refused(family: str, train_on: TrainOn) -> None:
    with pytest.raises(DataError, match=rf"^data\.jsonl:7: .*weights.*train_on={train_on.value}.*trains on nothing"):
        encode_one(encoder_of(tokenizer_of(family), train_on=train_on), answers(0, 0))


def test_marks_that_are_not_one_a_turn_cannot_be_weighted() -> None:
    template = families.MARKED_TEMPLATE.replace(
        "{%- generation %}", "{%- generation %}{{ '' }}{%- endgeneration %}{%- generation %}"
    )
    tokenizer = families.chatml(template)
    assert trained_text(tokenizer, encode_one(encoder_of(tokenizer), answers(None, None)))[1:] == ["1.<|im_end|>"]
    with pytest.raises(DataError, match=r"^data\.jsonl:7: .*marks 4 pieces for 2 assistant turns"):
        encode_one(encoder_of(tokenizer, train_on=TrainOn.LAST), answers(None, None))


@given(st.lists(st.integers(0, 20), max_size=6, unique=True).map(sorted))
def test_between_is_the_rest(places: list[int]) -> None:
    spans = list(zip(places[::2], places[1::2], strict=False))
    inside = {c for start, stop in spans for c in range(start, stop)}
    outside = {c for start, stop in between(spans, 20) for c in range(start, stop)}
    assert inside | outside == set(range(20))
    assert not inside & outside


TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a place.",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
        },
    },
)


def calls(place: str, content: str | None = "") -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": {"place": place}}
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
    }


def tool(content: str) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": "call_1", "name": "get_weather"}


ASKED = [USER, calls("Rome"), tool("Sunny"), ANSWER, USER, calls("Oslo", "I look."), tool("Rain"), ANSWER]


def qwen_call(place: str) -> str:
    return f'<tool_call>\n{{"name": "get_weather", "arguments": {{"place": "{place}"}}}}\n</tool_call><|im_end|>'


@pytest.mark.parametrize("template", [tool_templates.QWEN25, tool_templates.QWEN3])
@pytest.mark.parametrize("tools", [TOOLS, None])
def test_qwen_tool_calls_are_trained(template: str, tools: Any) -> None:
    tokenizer = families.chatml(template)
    sequence = encode_one(encoder_of(tokenizer), ASKED, tools=tools)
    assert trained_text(tokenizer, sequence) == [
        qwen_call("Rome"),
        "Paris.<|im_end|>",
        "I look.\n" + qwen_call("Oslo"),
        "Paris.<|im_end|>",
    ]
    assert ("The weather of a place." in tokenizer.decode(sequence.input_ids)) is (tools is not None)
    theirs = tokenizer.apply_chat_template(ASKED, tools=tools and list(tools), tokenize=True, return_dict=True)
    assert sequence.input_ids.tolist() == theirs["input_ids"]


@pytest.mark.parametrize("absent", [True, False])
def test_turn_of_nothing_but_calls(absent: bool) -> None:
    turn = calls("Rome", None)
    if absent:
        del turn["content"]
    tokenizer = families.chatml(tool_templates.QWEN25)
    sequence = encode_one(encoder_of(tokenizer), [USER, turn], tools=TOOLS)
    assert trained_text(tokenizer, sequence) == [qwen_call("Rome")]


@pytest.mark.parametrize("end", ["<|eot_id|>", "<|end_of_text|>"])
def test_llama_tool_calls_are_trained(end: str) -> None:
    """Also where a turn with calls ends with another token than a plain one."""
    template = tool_templates.LLAMA31_EOT if end == "<|eot_id|>" else tool_templates.LLAMA31_EOM
    tokenizer = families.llama3(template)
    sequence = encode_one(encoder_of(tokenizer), [USER, calls("Rome"), tool("Sunny"), ANSWER], tools=TOOLS)
    call = '{"name": "get_weather", "parameters": {"place": "Rome"}}'
    assert trained_text(tokenizer, sequence) == [call + end, "Paris.<|eot_id|>"]
    assert "Given the following functions" in tokenizer.decode(sequence.input_ids)


def test_what_a_tool_template_refuses_is_told_with_its_record() -> None:
    turn = calls("Rome")
    turn["tool_calls"] *= 2
    with pytest.raises(DataError, match=r"^data\.jsonl:7: .*refuses this conversation: .*single tool-calls"):
        encode_one(encoder_of(families.llama3(tool_templates.LLAMA31_EOT)), [USER, turn], tools=TOOLS)


@pytest.mark.parametrize("key", ["reasoning_content", "thinking"])
def test_reasoning_is_trained_where_the_template_prints_it(key: str) -> None:
    tokenizer = families.chatml(tool_templates.QWEN3)
    sequence = encode_one(encoder_of(tokenizer), [USER, ANSWER | {key: "Which city?"}])
    assert trained_text(tokenizer, sequence) == ["<think>\nWhich city?\n</think>\n\nParis.<|im_end|>"]
    # What a template leaves out of earlier turns on purpose is no loss.
    turns = [USER, ANSWER | {key: "Which city?"}, USER, ANSWER]
    assert trained_text(tokenizer, encode_one(encoder_of(tokenizer), turns)) == ["Paris.<|im_end|>"] * 2


@pytest.mark.parametrize("train_on", TrainOn)
@pytest.mark.parametrize(
    ("messages", "tools", "field"),
    [
        ([USER, ANSWER], TOOLS, r'tools \(.*get_weather'),
        ([USER, calls("Rome"), tool("Sunny"), ANSWER], None, r'tool_calls \(messages\[1\]: .*call_1'),
        ([USER, ANSWER | {"reasoning_content": "Hm."}], None, r'reasoning_content \(messages\[1\]: "Hm\."\)'),
    ],
)  # fmt: skip
def test_fields_that_the_template_leaves_out_are_named(
    messages: Any, tools: Any, field: str, train_on: TrainOn
) -> None:
    encoder = encoder_of(tokenizer_of("chatml"), train_on=train_on)
    for _ in range(2):
        with pytest.raises(DataError, match=rf"^data\.jsonl:7: the chat template does not print ({field}).*lost"):
            encode_one(encoder, messages, tools=tools)
    empty = [turn | {"tool_calls": [], "reasoning_content": None} for turn in (USER, ANSWER)]
    assert encode_one(encoder, empty, tools=()).trained.any()


def test_template_that_wants_more_than_the_probe_has_is_asked_with_the_record() -> None:
    """A probe holds two turns; here three are wanted, so the record itself is rendered with and without."""
    for prints in (True, False):
        template = "{{ raise_exception('three turns') if messages | length < 3 and not add_generation_prompt }}" + (
            tool_templates.QWEN3 if prints else families.CHATML_TEMPLATE
        )
        template = template_of(tokenizer_of("chatml"), template)
        unused = template.unused_field([USER, ANSWER, USER, ANSWER | {"reasoning_content": "Hm."}], None)
        assert unused == (None if prints else 'reasoning_content (messages[3]: "Hm.")')
