"""Token ids and trained mask, side by side with TRL's own preparation with assistant-only loss."""

from __future__ import annotations

import copy
import json
import os
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from data_shards.config import DataConfig
from data_shards.encoding.encoder import Encoder
from data_shards.sources.records import read_records
from tests.support import tokenizers as families
from tests.support.data_files import write_rows

TOOLS_TEMPLATE = (
    "{%- if tools %}{{- '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.role == 'assistant' %}{%- generation %}"
    "{%- if message.reasoning_content %}{{- 'Hm: ' + message.reasoning_content + '\\n' }}{%- endif %}"
    "{{- message.content or '' }}"
    "{%- for call in message.tool_calls or [] %}{{- call.function | tojson }}{%- endfor %}"
    "{{- '<|im_end|>' }}{%- endgeneration %}{{- '\\n' }}"
    "{%- else %}{{- message.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
Labelled = tuple[list[int], list[int]]
"""ids, and labels with -100 where nothing is learnt"""


def by_trl(rows: list[dict[str, Any]], tokenizer: Any, tmp_path: Path) -> list[Labelled]:
    """What ``SFTTrainer`` would train on: its ``_prepare_dataset``, without the model that its constructor loads."""
    pytest.importorskip(
        "trl", reason="TRL is not installed (pip install --no-deps trl), so there is nobody to compare with"
    )
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer.__new__(SFTTrainer)
    trainer.chat_template = tokenizer.chat_template
    trainer._tokenizer = tokenizer
    trainer.completion_only_loss = "completion" in rows[0]
    config = SFTConfig(
        output_dir=str(tmp_path / "trl"), assistant_only_loss=True, max_length=None, use_cpu=True, bf16=False
    )
    # A copy: it renames keys in place.
    dataset = Dataset.from_list(copy.deepcopy(rows))
    prepared = trainer._prepare_dataset(dataset, tokenizer, config, False, None, "train")
    return [(row["input_ids"], row["labels"]) for row in prepared]


def by_baton(path: str, tokenizer: Any) -> list[Labelled]:
    encoder = Encoder(tokenizer, DataConfig(train=path), families.stop_texts(tokenizer))
    return [
        (
            encoded.sequence.input_ids.tolist(),
            [
                int(token) if trained else -100
                for token, trained in zip(encoded.sequence.input_ids, encoded.sequence.trained, strict=True)
            ],
        )
        for encoded in encoder.encode(read_records(path))
    ]


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


TURNS = [
    [user("What is the capital of France?"), assistant("Paris. 🎉")],
    [
        {"role": "system", "content": "Be brief."},
        user(" Two  blanks "),
        assistant("\nYes.\n"),
        user("ü?"),
        assistant("No"),
    ],
    [user("<|im_end|> in the text"), assistant("é<|im_start|>user\n")],
]
CALLS = [
    {
        "messages": [
            user("One and two?"),
            {
                "role": "assistant",
                "content": "",
                "reasoning_content": "Add them.",
                "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}],
            },
            {"role": "tool", "name": "add", "content": "3"},
            assistant("Three."),
        ],
        "tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}],
    }
]
PAIRS = [{"question": f"What is {n} and {n}?", "answer": f"It is {2 * n}.\n#### {2 * n}"} for n in range(20)]


def as_messages(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [user(question), assistant(answer)]}


def spoken(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """ShareGPT's senders, as TRL can't read them."""
    senders = {"user": "human", "assistant": "gpt"}
    return [
        {
            "conversations": [
                {"from": senders.get(turn["role"], turn["role"]), "value": turn["content"]} for turn in row["messages"]
            ]
        }
        for row in rows
    ]


MESSAGES = [{"messages": turns} for turns in TURNS]
CASES: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]], str]] = {
    # what Baton reads, what TRL is given, the template
    "messages": (MESSAGES, MESSAGES, families.MARKED_TEMPLATE),
    "sharegpt": (spoken(MESSAGES), MESSAGES, families.MARKED_TEMPLATE),
    "prompt and completion in turns": (
        [{"prompt": turns[:-1], "completion": turns[-1:]} for turns in TURNS],
        [{"prompt": turns[:-1], "completion": turns[-1:]} for turns in TURNS],
        families.MARKED_TEMPLATE,
    ),
    "prompt and completion": (
        [{"prompt": pair["question"], "completion": pair["answer"]} for pair in PAIRS],
        [{"prompt": [user(pair["question"])], "completion": [assistant(pair["answer"])]} for pair in PAIRS],
        families.MARKED_TEMPLATE,
    ),
    "instruction": (
        [{"instruction": pair["question"], "output": pair["answer"]} for pair in PAIRS],
        [as_messages(**pair) for pair in PAIRS],
        families.MARKED_TEMPLATE,
    ),
    "columns": (PAIRS, [as_messages(**pair) for pair in PAIRS], families.MARKED_TEMPLATE),
    "classification": (
        [{"text": pair["question"], "label": pair["answer"]} for pair in PAIRS],
        [as_messages(**pair) for pair in PAIRS],
        families.MARKED_TEMPLATE,
    ),
    "calls": (CALLS, CALLS, TOOLS_TEMPLATE),
}


@pytest.mark.parametrize("name", CASES)
def test_ids_and_labels_are_those_of_trl(name: str, tmp_path: Path) -> None:
    given, for_trl, template = CASES[name]
    tokenizer = families.chatml(template)
    wanted = by_trl(for_trl, tokenizer, tmp_path)
    found = by_baton(write_rows(tmp_path / "data.jsonl", given), tokenizer)
    assert found == wanted and len(wanted) == len(given)
    for ids, labels in found:
        assert 0 < sum(label != -100 for label in labels) < len(ids)


def test_plain_text_is_that_of_trl(tmp_path: Path) -> None:
    """TRL takes no mask for text; both learn all of it, with the eos behind."""
    pytest.importorskip("trl", reason="TRL is not installed (pip install --no-deps trl)")
    from trl.data_utils import _tokenize

    tokenizer = families.chatml()
    texts = ["What is it?", "  ü🎉\n\nlines"]
    path = write_rows(tmp_path / "data.jsonl", [{"text": text} for text in texts])
    wanted = [_tokenize(tokenizer, text + tokenizer.eos_token)["input_ids"] for text in texts]
    assert by_baton(path, tokenizer) == [(ids, ids) for ids in wanted]


def test_gsm8k_is_that_of_trl(tmp_path: Path) -> None:
    shared = os.environ.get("BATON_SHARED")
    if shared is None:
        pytest.skip("BATON_SHARED is not set, so there is no GSM8K here")
    with (Path(shared) / "data" / "gsm8k" / "test.jsonl").open(encoding="utf-8") as file:
        pairs = [json.loads(line) for line in islice(file, 500)]
    tokenizer = families.chatml(families.MARKED_TEMPLATE)
    wanted = by_trl([as_messages(**pair) for pair in pairs], tokenizer, tmp_path)
    for kind in ("jsonl", "csv", "parquet"):
        assert by_baton(write_rows(tmp_path / f"data.{kind}", pairs), tokenizer) == wanted
