"""Small fast tokenizers in the shapes of real families, trained on the spot on a few sentences."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = (
    "You are a helpful assistant. Answer the question of the user briefly.",
    "What is the capital of France? The capital of France is Paris.",
    "How many apples are there? There are two apples, and two more apples make four.",
    "Today Date: 26 Jul 2024\n\nCutting Knowledge Date: December 2023\n\n",
)

LLAMA3_TEMPLATE = r"""{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""

# Without a way to give the date from outside: today's, whatever happens.
LLAMA3_TODAY_TEMPLATE = LLAMA3_TEMPLATE.replace("if not date_string is defined", "if true")

# Never asks for today's date, as Llama 3.1: either it is given, or it is always the same.
LLAMA3_GIVEN_DATE_TEMPLATE = LLAMA3_TEMPLATE.replace("if strftime_now is defined", "if false").replace(
    'strftime_now("%d %b %Y")', '""'
)

QWEN3_TEMPLATE = r"""{%- set ns = namespace(last_query_index=messages|length - 1, searching=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" %}
        {%- set ns.searching = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' }}
            {{- content.lstrip('\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""

MISTRAL_TEMPLATE = r"""{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] + '\n\n' %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
{%- endif %}
{{- bos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, roles must alternate user/assistant/user/assistant') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + (system_message if loop.first else '') + message['content'] + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}"""

_CHATML_TURN = "'<|im_start|>' + message.role + '\\n'"
_CHATML_END = r"""
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""

CHATML_TEMPLATE = (
    r"{%- for message in messages %}{{- " + _CHATML_TURN + r" + message.content + '<|im_end|>\n' }}" + _CHATML_END
)


def _marked_chatml(marked: str, behind: str) -> str:
    return (
        r"{%- for message in messages %}{{- " + _CHATML_TURN + r" }}"
        r"{%- if message.role == 'assistant' %}"
        r"{%- generation %}{{- " + marked + r" }}{%- endgeneration %}{{- " + behind + r" }}"
        r"{%- else %}{{- message.content + '<|im_end|>\n' }}{%- endif %}" + _CHATML_END
    )


MARKED_TEMPLATE = _marked_chatml("message.content + '<|im_end|>'", r"'\n'")
MARKED_WITHOUT_STOP_TEMPLATE = _marked_chatml("message.content", r"'<|im_end|>\n'")

# The split of Qwen 2 and 3; Llama 3's takes three digits at a time.
_SPLIT = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(special_tokens: list[str], *, bos: str | None = None) -> Tokenizer:
    """BPE over bytes. With ``bos`` the post-processor writes it too, wherever special tokens are asked for."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_SPLIT, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400 + len(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special_tokens,
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    plain = processors.ByteLevel(trim_offsets=False)
    if bos is None:
        tokenizer.post_processor = plain
    else:
        writes_bos = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
        tokenizer.post_processor = processors.Sequence([plain, writes_bos])
    return tokenizer


def llama3(template: str = LLAMA3_TEMPLATE) -> PreTrainedTokenizerFast:
    """Both its template and its post-processor write the bos."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_level(special, bos="<|begin_of_text|>"),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        chat_template=template,
    )


def llama3_today() -> PreTrainedTokenizerFast:
    return llama3(LLAMA3_TODAY_TEMPLATE)


def llama3_given_date() -> PreTrainedTokenizerFast:
    return llama3(LLAMA3_GIVEN_DATE_TEMPLATE)


def chatml(template: str | None = CHATML_TEMPLATE, *, pad_token: str = "<|endoftext|>") -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
        eos_token="<|im_end|>",
        pad_token=pad_token,
        chat_template=template,
    )


def chatml_marked() -> PreTrainedTokenizerFast:
    """``{% generation %}`` spans that hold the stop token."""
    return chatml(MARKED_TEMPLATE)


def chatml_marked_without_stop() -> PreTrainedTokenizerFast:
    """``{% generation %}`` spans that end just before the stop token."""
    return chatml(MARKED_WITHOUT_STOP_TEMPLATE)


def chatml_pad_is_eos() -> PreTrainedTokenizerFast:
    return chatml(pad_token="<|im_end|>")


def qwen3() -> PreTrainedTokenizerFast:
    """Earlier turns lose their thinking, the last turn has some, if empty."""
    tokenizer = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    # Added, but not special: as in the real one, where they survive skip_special_tokens.
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=QWEN3_TEMPLATE
    )


def mistral() -> PreTrainedTokenizerFast:
    """SentencePiece's manners: a space is a ``▁`` before its word, unknown characters fall back to bytes."""
    special = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    learner.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=500, special_tokens=special + byte_tokens, show_progress=False)
    )
    learnt = json.loads(learner.to_str())["model"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=learnt["vocab"],
            merges=[tuple(merge) for merge in learnt["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=MISTRAL_TEMPLATE,
    )


FACTORIES: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    factory.__name__: factory
    for factory in (
        llama3,
        llama3_today,
        llama3_given_date,
        qwen3,
        mistral,
        chatml,
        chatml_marked,
        chatml_marked_without_stop,
        chatml_pad_is_eos,
    )
}

_LLAMA3_STOPS = ("<|end_of_text|>", "<|eot_id|>")


def stop_texts(tokenizer: Any) -> list[str]:
    """The texts that end a turn, for tests that go without a base folder."""
    return [token for token in (*_LLAMA3_STOPS, "<|im_end|>", "</s>") if token in tokenizer.get_added_vocab()]


def save_tokenizer(directory: Path, tokenizer: Any, stops: Iterable[str] = ()) -> Path:
    """As a base model's folder holds it, with the ``stops`` in generation_config.json where there are any."""
    tokenizer.save_pretrained(directory)
    if ids := [tokenizer.convert_tokens_to_ids(token) for token in stops]:
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}), encoding="utf-8")
    return directory


def save_family(directory: Path, name: str) -> Path:
    """One of ``FACTORIES``, with several stop tokens in generation_config.json where the real family has them."""
    return save_tokenizer(directory, FACTORIES[name](), _LLAMA3_STOPS if name.startswith("llama3") else ())
