"""A data set with most kinds of trouble, each on lines that are known, and its audit."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import reduce
from pathlib import Path
from typing import Any

from data_shards.audit.batch import TokenizerFacts
from data_shards.audit.config import AuditConfig
from data_shards.audit.kind import Kind
from data_shards.audit.part import AuditLimits, AuditPart, Dropped, merge
from data_shards.config import DataConfig
from data_shards.encoding.encoder import Encoded, Encoder
from data_shards.errors import DataError
from data_shards.sources.record import Record
from tests.support import tokenizers as families

SEQ_LEN = 256
SCRIPT = "<script>document.title='owned'</script>\"'><img src=x onerror=\"document.title='owned'\">"

Turn = tuple[str, str]
Found = dict[Kind, set[str]]
"""Places ``file:line`` by kind"""


def pair(question: str, answer: str) -> list[Turn]:
    return [("user", question), ("assistant", answer)]


CLEAN = [pair(f"What is {n} and {n}? ({n})", f"{n} and {n} make {2 * n}.") for n in range(150)]

TROUBLE: list[tuple[Kind | None, list[Turn]]] = [
    (Kind.DUPLICATE, CLEAN[3]),
    (Kind.DUPLICATE, CLEAN[3]),
    (Kind.CONFLICT, pair(CLEAN[4][0][1], "Nobody knows that.")),
    (Kind.TOO_LONG, pair("Count apples.", "two apples " * 200)),
    (Kind.SHORT_ANSWER, pair("Are there apples?", "y")),
    (Kind.SPECIAL_TOKEN, pair("Is <|eot_id|> the end?", "It is for me.")),
    (Kind.CONTROL, pair("Is this\x00 a NUL?", "It was one.")),
    (Kind.REPLACEMENT, pair("The caf\ufffd of Paris?", "Which of them?")),
    (Kind.MOJIBAKE, pair("The cafÃ© of Paris?", "Which one of them?")),
    (Kind.INVISIBLE, pair("Pay \u202eevil\u202c now?", "Better not at all.")),
    (Kind.EMPTY_TURN, [("system", " "), *pair("How many apples are there?", "Two of them.")]),
    (Kind.REPEATED_ROLE, [("user", "Hello?"), *pair("How many?", "Two and two more.")]),
    (Kind.UNANSWERED, [*pair("How many pears?", "Two green ones."), ("user", "And plums?")]),
    (Kind.ECHO, pair("The capital of France", "The capital of France")),
    (Kind.REFUSED, pair("refuse this", "The template does.")),
    (None, pair(f"What does {SCRIPT} do?", f"{SCRIPT} does nothing here.")),
]
REFUSALS = [pair(f"Tell me secret {n}.", "There are no secrets that I know of.") for n in range(30)]
VALIDATION: list[tuple[Kind | None, list[Turn]]] = [
    (None, pair("Is this one new?", "It is indeed.")),
    (Kind.LEAK, CLEAN[7]),
    (Kind.PROMPT_LEAK, pair(CLEAN[8][0][1], "Another answer this time.")),
]
TEXTS: list[tuple[Kind | None, str]] = [
    (None, "The capital of France is Paris."),
    (Kind.TWO_BOS_TOKENS, "<|begin_of_text|>Paris is the capital."),
    (Kind.SPLIT, "How many apples? " * 100),
    (Kind.OUTLIER, "Apples and more apples. " * 600),
]


def tokenizer() -> Any:
    """Refuses one record."""
    refusal = "{% if 'refuse' in messages[0]['content'] %}{{ raise_exception('not this one') }}{% endif %}"
    return families.llama3(refusal + families.LLAMA3_TEMPLATE)


def write(folder: Path) -> tuple[dict[str, list[Record]], Found]:
    """Three files, their records by split, and what must be found where."""
    found: Found = {}
    train = [*((None, turns) for turns in CLEAN), *TROUBLE, *((Kind.REPEATED_ANSWER, turns) for turns in REFUSALS[:1])]
    train += [(None, turns) for turns in REFUSALS[1:]]
    records = {
        "train": [
            *_write(folder / "train.jsonl", [(kind, _messages(turns)) for kind, turns in train], found),
            *_write(folder / "text.jsonl", [(kind, {"text": text}) for kind, text in TEXTS], found),
        ],
        "validation": _write(folder / "held_out.jsonl", [(k, _messages(turns)) for k, turns in VALIDATION], found),
    }
    found[Kind.SPECIAL_TOKEN] |= found[Kind.TWO_BOS_TOKENS]
    found[Kind.SPLIT] |= found[Kind.OUTLIER]
    return records, found


def _messages(turns: list[Turn]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _write(path: Path, rows: list[tuple[Kind | None, dict[str, Any]]], found: Found) -> list[Record]:
    path.write_text("".join(json.dumps(value) + "\n" for _, value in rows), encoding="utf-8")
    for line, (kind, _) in enumerate(rows, 1):
        if kind:
            found.setdefault(kind, set()).add(f"{path}:{line}")
    return [
        Record(str(path), line, tuple(value.get("messages", ())), value.get("text"), source=path.stem)
        for line, (_, value) in enumerate(rows, 1)
    ]


def encode(records: Iterable[Record], encoder: Encoder) -> Iterator[Encoded | Dropped]:
    """What the template refuses is left out and named."""
    for record in records:
        try:
            yield from encoder.encode([record])
        except DataError as error:
            yield Dropped(record.path, record.line, Kind.REFUSED, str(error), record.source)


def encoder_of(tokenizer: Any, **options: Any) -> Encoder:
    return Encoder(
        tokenizer, DataConfig(**({"train": "unused", "seq_len": SEQ_LEN} | options)), families.stop_texts(tokenizer)
    )


def limits_of(too_long: str = "drop", **options: Any) -> AuditLimits:
    return AuditLimits(SEQ_LEN, too_long, AuditConfig(**({"min_trained_tokens": 3} | options)))


def audit_of(encoded: dict[str, list[Encoded | Dropped]], facts: TokenizerFacts, limits: AuditLimits) -> AuditPart:
    return reduce(merge, (AuditPart.of(items, split, facts, limits) for split, items in encoded.items()))
