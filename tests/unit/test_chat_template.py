"""Which characters of a conversation are trained, against strings written by hand and against transformers itself."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken

from data_shards.config import DataConfig, TrainOn
from data_shards.encoding.chat_template import ChatTemplate, fix_date
from data_shards.encoding.encoder import Encoder, load_tokenizer, stop_tokens
from data_shards.errors import DataError
from data_shards.pack import Sequence
from data_shards.sources.records import Record
from tests.support import tokenizers as families

Turns = tuple[tuple[str, str], ...]
Pieces = list[tuple[str, bool]]
"""Consecutive parts of the rendered text, and whether they are trained"""

DATE = DataConfig.model_fields["template_date"].default
DATE_TEXT = "26 Jul 2024"

CONVERSATIONS: dict[str, Turns] = {
    "single": (("user", "What is two and two?"), ("assistant", "Four.")),
    "system": (
        ("system", "You are a helpful assistant."),
        ("user", "What is the capital of France?"),
        ("assistant", "Paris."),
        ("user", "How many apples?"),
        ("assistant", "Two apples, and two more."),
    ),
    "spaces": (
        ("system", " Be brief. "),
        ("user", "  padded question \n"),
        ("assistant", "  padded answer \t "),
        ("user", " again "),
        ("assistant", " padded answer"),
    ),
    "unicode": (
        ("system", "Réponds en français 🇫🇷"),
        ("user", "¿Qué? 你好 👩🏽‍🚀"),
        ("assistant", "👩🏽‍🚀 Voilà 你好"),
        ("user", "🎉"),
        ("assistant", "🎉"),
    ),
    "repeats": (
        ("system", "What is two and two?"),
        ("user", "What is two and two?"),
        ("assistant", "What is two and two?"),
        ("user", "What is two and two?"),
        ("assistant", "What is two and two? assistant\n\nWhat is two and two?"),
    ),
    "headers": (
        ("user", "assistant"),
        (
            "assistant",
            "The header is <|im_start|>assistant\n or <|start_header_id|>assistant<|end_header_id|>\n\n or [/INST] x",
        ),
        ("user", "user"),
        ("assistant", "assistant"),
    ),
    "thinking": (
        ("user", "What is two and two?"),
        ("assistant", "<think>\nTwo more.\n</think>\n\nFour."),
        ("user", "What is the capital of France?"),
        ("assistant", "<think>\nFrance?\n</think>\n\nParis."),
    ),
}


def _llama3_pieces(turns: Turns) -> Pieces:
    system = turns[0][1].strip() if turns[0][0] == "system" else ""
    pieces: Pieces = [
        ("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n", False),
        (f"Today Date: {DATE_TEXT}\n\n{system}<|eot_id|>", False),
    ]
    for role, content in turns:
        if role != "system":
            pieces.append((f"<|start_header_id|>{role}<|end_header_id|>\n\n", False))
            pieces.append((f"{content.strip()}<|eot_id|>", role == "assistant"))
    return pieces


def _chatml_pieces(turns: Turns) -> Pieces:
    pieces: Pieces = []
    for role, content in turns:
        pieces += [(f"<|im_start|>{role}\n", False), (f"{content}<|im_end|>", role == "assistant"), ("\n", False)]
    return pieces


def _qwen3_pieces(turns: Turns) -> Pieces:
    seen: list[tuple[str, str]] = []
    for number, (role, content) in enumerate(turns):
        if role == "assistant":
            thought, _, content = content.rpartition("</think>\n\n")
            thought = thought.removeprefix("<think>\n").removesuffix("\n")
            if number == len(turns) - 1:
                content = f"<think>\n{thought}\n</think>\n\n{content}"
        seen.append((role, content))
    return _chatml_pieces(tuple(seen))


def _mistral_pieces(turns: Turns) -> Pieces:
    system, rest = (turns[0][1] + "\n\n", turns[1:]) if turns[0][0] == "system" else ("", turns)
    pieces: Pieces = [("<s>", False)]
    for number, (role, content) in enumerate(rest):
        if role == "user":
            pieces.append((f"[INST] {system if number == 0 else ''}{content} [/INST]", False))
        else:
            pieces.append((f" {content}</s>", True))
    return pieces


EXPECTED: dict[str, Callable[[Turns], Pieces]] = {
    "llama3": _llama3_pieces,
    "llama3_today": _llama3_pieces,
    "llama3_given_date": _llama3_pieces,
    "qwen3": _qwen3_pieces,
    "mistral": _mistral_pieces,
    "chatml": _chatml_pieces,
    "chatml_marked": _chatml_pieces,
    "chatml_marked_without_stop": _chatml_pieces,
    "chatml_pad_is_eos": _chatml_pieces,
}
STOP = {
    family: "<|eot_id|>" if family.startswith("llama3") else "</s>" if family == "mistral" else "<|im_end|>"
    for family in EXPECTED
}

each_family = pytest.mark.parametrize("family", families.FACTORIES)


def messages_of(turns: Turns) -> tuple[dict[str, str], ...]:
    return tuple({"role": role, "content": content} for role, content in turns)


def record_of(turns: Turns) -> Record:
    return Record("data.jsonl", 7, messages_of(turns))


@functools.cache
def base_tokenizer(family: str) -> Any:
    return families.FACTORIES[family]()


def encoder_of(tokenizer: Any, **options: Any) -> Encoder:
    stops = families.stop_texts(tokenizer)
    return Encoder(tokenizer, DataConfig(train="unused", **options), stops)


def encode(tokenizer: Any, turns: Turns, **options: Any) -> Sequence:
    (encoded,) = encoder_of(tokenizer, **options).encode([record_of(turns)])
    return encoded.sequence


def trained_characters(tokenizer: Any, text: str, sequence: Sequence) -> set[int]:
    """Characters of ``text`` under trained tokens, by the tokenizer's own offsets."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert encoding["input_ids"] == sequence.input_ids.tolist()
    offsets = encoding["offset_mapping"]
    return {c for (start, stop), on in zip(offsets, sequence.trained, strict=True) if on for c in range(start, stop)}


def trained_by_hand(pieces: Pieces) -> tuple[str, list[tuple[int, int]]]:
    """The whole text, and ``[start, stop)`` of its trained pieces."""
    spans, place = [], 0
    for text, trained in pieces:
        if trained:
            spans.append((place, place + len(text)))
        place += len(text)
    return "".join(text for text, _ in pieces), spans


class _FixedNow(datetime.datetime):
    today_is = datetime.date(2031, 1, 5)

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> _FixedNow:
        return cls(cls.today_is.year, cls.today_is.month, cls.today_is.day, tzinfo=tz)


@pytest.fixture
def set_today(monkeypatch: pytest.MonkeyPatch) -> Callable[[datetime.date], None]:
    """Changes the day that transformers' strftime_now tells."""
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", _FixedNow)
    return lambda date: monkeypatch.setattr(_FixedNow, "today_is", date)


@each_family
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_every_character_is_trained_or_not_as_by_hand(family: str, conversation: str) -> None:
    tokenizer, turns = base_tokenizer(family), CONVERSATIONS[conversation]
    text, spans = trained_by_hand(EXPECTED[family](turns))
    template = ChatTemplate(
        tokenizer.chat_template, tokenizer.special_tokens_map, families.stop_texts(tokenizer), date=DATE
    )
    rendered = template.render_with_spans(messages_of(turns), TrainOn.ASSISTANT)
    assert rendered.text == text
    assert list(rendered.spans) == spans
    sequence = encode(tokenizer, turns)
    wanted = {c for start, stop in spans for c in range(start, stop)}
    assert trained_characters(tokenizer, text, sequence) == wanted


@each_family
@pytest.mark.parametrize("conversation", ["single", "system", "unicode", "thinking"])
def test_one_bos_and_every_stop_token_trained(family: str, conversation: str) -> None:
    tokenizer, turns = base_tokenizer(family), CONVERSATIONS[conversation]
    sequence = encode(tokenizer, turns)
    if tokenizer.bos_token_id is not None:
        assert sequence.input_ids[0] == tokenizer.bos_token_id
        assert sequence.input_ids.tolist().count(tokenizer.bos_token_id) == 1
    stop = tokenizer.convert_tokens_to_ids(STOP[family])
    trained_stops = int((sequence.input_ids[sequence.trained] == stop).sum())
    assert trained_stops == sum(role == "assistant" for role, _ in turns)
    # A run of trained tokens is one answer: each ends with its stop token.
    ends = np.flatnonzero(sequence.trained & ~np.append(sequence.trained[1:], False))
    assert (sequence.input_ids[ends] == stop).all()


@each_family
@pytest.mark.parametrize("conversation", ["system", "spaces", "unicode", "thinking"])
def test_ids_are_those_of_transformers(
    family: str, conversation: str, set_today: Callable[[datetime.date], None]
) -> None:
    set_today(DATE)
    tokenizer, turns = base_tokenizer(family), CONVERSATIONS[conversation]
    theirs = tokenizer.apply_chat_template(messages_of(turns), tokenize=True, return_dict=True)
    assert encode(tokenizer, turns).input_ids.tolist() == theirs["input_ids"]


def test_marked_masks_are_those_of_transformers() -> None:
    tokenizer = base_tokenizer("chatml_marked")
    for turns in CONVERSATIONS.values():
        theirs = tokenizer.apply_chat_template(
            messages_of(turns), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        assert encode(tokenizer, turns).trained.astype(int).tolist() == theirs["assistant_masks"]


@pytest.mark.parametrize("family", ["chatml", "chatml_marked"])
def test_token_across_the_start_of_an_answer_is_trained(family: str) -> None:
    """The header's line end and the answer's are one token: without it the answer would lack its beginning."""
    tokenizer = base_tokenizer(family)
    sequence = encode(tokenizer, (("user", "Hm?"), ("assistant", "\nYes.")))
    assert tokenizer.decode(sequence.input_ids[sequence.trained]) == "\n\nYes.<|im_end|>"


def test_header_token_that_swallows_blanks_stays_untrained() -> None:
    """Phi-3's header tokens take the white space behind them along (rstrip), also the answer's own."""
    turn = "{{ '<|' + message.role + '|>\\n' + message.content + '<|im_end|>\\n' }}"
    prompt = "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    tokenizer = families.chatml("{% for message in messages %}" + turn + "{% endfor %}" + prompt)
    tokenizer.add_tokens([AddedToken("<|assistant|>", rstrip=True, special=True)], special_tokens=True)
    sequence = encode(tokenizer, (("user", "Hm?"), ("assistant", "  Yes.")))
    assert tokenizer.decode(sequence.input_ids[sequence.trained]) == "Yes.<|im_end|>"


def test_qwen3_drops_earlier_thinking_and_keeps_the_last() -> None:
    tokenizer = base_tokenizer("qwen3")
    sequence = encode(tokenizer, CONVERSATIONS["thinking"])
    assert tokenizer.decode(sequence.input_ids) == (
        "<|im_start|>user\nWhat is two and two?<|im_end|>\n<|im_start|>assistant\nFour.<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nFrance?\n</think>\n\nParis.<|im_end|>\n"
    )
    assert tokenizer.decode(sequence.input_ids[sequence.trained]) == (
        "Four.<|im_end|><think>\nFrance?\n</think>\n\nParis.<|im_end|>"
    )


def test_earlier_turn_of_nothing_but_thinking_is_refused() -> None:
    turns: Turns = (("user", "Hm?"), ("assistant", "<think>\nYes?\n</think>"), ("user", "Hm?"), ("assistant", "Yes."))
    with pytest.raises(DataError, match=r"^data\.jsonl:7: .*messages\[1\] leaves no text of its own"):
        encode(base_tokenizer("qwen3"), turns)


@each_family
def test_train_on_all_trains_all(family: str) -> None:
    sequence = encode(base_tokenizer(family), CONVERSATIONS["system"], train_on=TrainOn.ALL)
    assert sequence.trained.all()
    assert sequence.input_ids.tolist() == encode(base_tokenizer(family), CONVERSATIONS["system"]).input_ids.tolist()


_LAST = "{% if not add_generation_prompt %}{{ messages[-1].content | length }}{% endif %}"
UNMASKABLE = {
    "count first": ("{{ messages | length }}" + families.CHATML_TEMPLATE, "does not give a beginning of the whole"),
    "length always last": (
        families.CHATML_TEMPLATE + "{{ messages[-1].content | length }}",
        "does not give a beginning of the whole",
    ),
    "length last": (families.CHATML_TEMPLATE + _LAST, "depends on its content"),
    "newest first": (
        families.CHATML_TEMPLATE.replace("in messages", "in messages[::-1]"),
        "does not give a beginning of the whole",
    ),
    "content twice": (
        families.CHATML_TEMPLATE.replace("message.content", "message.content + message.content"),
        "shows it 2 times",
    ),
    "no answers": (
        families.CHATML_TEMPLATE.replace("in messages", "in messages if message.role != 'assistant'"),
        "does not give a beginning of the whole",
    ),
}


@pytest.mark.parametrize("name", UNMASKABLE)
def test_template_that_cannot_be_masked_is_refused(name: str) -> None:
    template, reason = UNMASKABLE[name]
    with pytest.raises(DataError, match=rf"^data\.jsonl:7: the chat template can't be masked for .*{reason}"):
        encode(families.chatml(template), CONVERSATIONS["single"])
    # Masks are what can't be had; the text itself is fine.
    assert encode(families.chatml(template), CONVERSATIONS["single"], train_on=TrainOn.ALL).trained.all()


def test_assistant_first_under_a_template_that_looks_at_the_first_turn_is_refused() -> None:
    template = "{{ raise_exception('no turns') if not messages }}" + families.CHATML_TEMPLATE
    with pytest.raises(DataError, match=r"^data\.jsonl:7: .*begins with the assistant.*no turns.*begin with a user"):
        encode(families.chatml(template), [("assistant", "Hello.")])


def test_marks_around_nothing_train_on_nothing() -> None:
    template = families.MARKED_TEMPLATE.replace("message.role == 'assistant'", "message.role == 'critic'")
    with pytest.raises(DataError, match=r"^data\.jsonl:7: the template marks no assistant text"):
        encode(families.chatml(template), CONVERSATIONS["single"])


@pytest.mark.parametrize("template", [families.CHATML_TEMPLATE, families.MARKED_TEMPLATE])
def test_missing_stop_token_is_refused_unless_allowed(template: str) -> None:
    tokenizer = families.chatml(template.replace("<|im_end|>", ""))
    with pytest.raises(DataError, match=r"^data\.jsonl:7: .*no stop token \(<\|im_end\|>\).*require_stop_token=false"):
        encode(tokenizer, CONVERSATIONS["system"])
    sequence = encode(tokenizer, CONVERSATIONS["system"], require_stop_token=False)
    assert tokenizer.decode(sequence.input_ids[sequence.trained]) == "Paris.Two apples, and two more."


def test_without_chat_template_conversations_are_refused_and_text_is_not() -> None:
    tokenizer = families.chatml(None)
    with pytest.raises(DataError, match=r"no chat template.*data\.jsonl:7"):
        encode(tokenizer, CONVERSATIONS["single"])
    (encoded,) = encoder_of(tokenizer).encode([Record("data.jsonl", 1, text="Plain text.")])
    assert tokenizer.decode(encoded.sequence.input_ids) == "Plain text.<|im_end|>"
    assert encoded.sequence.trained.all()


def test_default_of_several_named_templates_is_used() -> None:
    tokenizer = families.chatml()
    tokenizer.chat_template = {"default": families.CHATML_TEMPLATE, "tool_use": "{{ raise_exception('no') }}"}
    text, _ = trained_by_hand(_chatml_pieces(CONVERSATIONS["single"]))
    assert tokenizer.decode(encode(tokenizer, CONVERSATIONS["single"]).input_ids) == text
    tokenizer.chat_template = {"tool_use": families.CHATML_TEMPLATE}
    with pytest.raises(DataError, match="no chat template"):
        encode(tokenizer, CONVERSATIONS["single"])


def test_template_file_replaces_the_tokenizers(tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text(families.CHATML_TEMPLATE, encoding="utf-8")
    sequence = encode(families.chatml("{{ raise_exception('no') }}"), CONVERSATIONS["single"], chat_template=str(path))
    assert sequence.input_ids.tolist() == encode(families.chatml(), CONVERSATIONS["single"]).input_ids.tolist()
    with pytest.raises(DataError, match=r"data\.chat_template='.*nowhere\.jinja' can't be read"):
        encoder_of(families.chatml(), chat_template=str(tmp_path / "nowhere.jinja"))


@pytest.mark.parametrize("family", ["llama3", "llama3_today", "llama3_given_date"])
def test_text_depends_on_template_date_not_on_the_day(family: str, set_today: Callable[[datetime.date], None]) -> None:
    tokenizer, turns = base_tokenizer(family), CONVERSATIONS["single"]
    seen = []
    for today in (datetime.date(2031, 1, 5), datetime.date(2032, 2, 6)):
        set_today(today)
        # By itself the template tells the day, if it is one that reads the clock.
        theirs = tokenizer.apply_chat_template(messages_of(turns), tokenize=False)
        assert (today.strftime("%d %b %Y") in theirs) == (family != "llama3_given_date")
        seen.append(tokenizer.decode(encode(tokenizer, turns).input_ids))
    assert seen[0] == seen[1] and f"Today Date: {DATE_TEXT}\n" in seen[0]
    other = {"template_date": datetime.date(2025, 3, 9)}
    assert "Today Date: 09 Mar 2025\n" in tokenizer.decode(encode(tokenizer, turns, **other).input_ids)
    assert encoder_of(tokenizer).identity() != encoder_of(tokenizer, **other).identity()


@pytest.mark.parametrize(
    "call",
    [
        '{% set f = "%d" %}{{ strftime_now(f) }}',
        '{{ strftime_now("%d" ~ " %b") }}',
        '{{ strftime_now (format="%d") }}',
        '{% set now = strftime_now %}{{ now("%d") }}',
        '{{ (strftime_now)("%d") }}',
    ],
)
def test_computed_date_is_refused(call: str) -> None:
    with pytest.raises(DataError, match=r"strftime_now.*from day to day.*data\.chat_template"):
        encoder_of(families.chatml(call + families.CHATML_TEMPLATE))


def test_every_spelling_of_a_fixed_date_is_replaced() -> None:
    template = """{{ strftime_now('%Y "%d"') }} {{ strftime_now( "%B" ) }} {{ strftime_now is defined }}"""
    fixed = fix_date(template, datetime.date(2024, 7, 26))
    assert ChatTemplate(fixed, {}, [], date=DATE).render(messages_of(CONVERSATIONS["single"])) == '2024 "26" July True'


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ lipsum.__globals__['os'].system('touch MARKER') }}",
        "{{ cycler.__init__.__globals__.os.popen('touch MARKER').read() }}",
        "{{ (''|attr('__class__')).mro() }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ messages.append(messages[0]) }}",
    ],
)
@pytest.mark.parametrize("train_on", TrainOn)
def test_template_cannot_leave_its_sandbox(attack: str, train_on: TrainOn, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    tokenizer = families.chatml(attack.replace("MARKER", str(marker)) + families.CHATML_TEMPLATE)
    with pytest.raises(DataError, match=r"^data\.jsonl:7: the chat template refuses this conversation: .*unsafe"):
        encode(tokenizer, CONVERSATIONS["single"], train_on=train_on)
    assert not marker.exists()


def test_what_a_template_raises_is_told_with_its_record() -> None:
    turns: Turns = (("user", "Hm?"), ("user", "Hm?"), ("assistant", "Yes."))
    with pytest.raises(DataError, match=r"^data\.jsonl:7: .*refuses this conversation: .*roles must alternate"):
        encode(base_tokenizer("mistral"), turns)


def test_stop_tokens_come_from_eos_and_generation_config(tmp_path: Path) -> None:
    for name, wanted in (("llama3", ["<|end_of_text|>", "<|eot_id|>"]), ("qwen3", ["<|im_end|>"])):
        base = families.save_family(tmp_path / name, name)
        assert stop_tokens(load_tokenizer(base), base) == wanted
    base = families.save_tokenizer(tmp_path / "base", families.chatml(), ["<|endoftext|>"])
    assert stop_tokens(load_tokenizer(base), base) == ["<|endoftext|>", "<|im_end|>"]
    # Ids that the tokenizer lacks, as in models whose vocabulary was padded, stop nothing.
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 100_000}), encoding="utf-8")
    assert stop_tokens(load_tokenizer(base), base) == ["<|im_end|>"]


def test_saved_and_loaded_tokenizer_encodes_the_same(tmp_path: Path) -> None:
    for family in ("llama3", "mistral", "qwen3"):
        base = families.save_family(tmp_path / family, family)
        loaded = load_tokenizer(base)
        encoder = Encoder(loaded, DataConfig(train="unused"), stop_tokens(loaded, base))
        (encoded,) = encoder.encode([record_of(CONVERSATIONS["unicode"])])
        wanted = encode(base_tokenizer(family), CONVERSATIONS["unicode"])
        assert encoded.sequence.input_ids.tolist() == wanted.input_ids.tolist()
        assert encoded.sequence.trained.tolist() == wanted.trained.tolist()


def test_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tokenizer that can be loaded"):
        load_tokenizer(tmp_path)
