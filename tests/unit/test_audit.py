"""Every kind of trouble is found where it is and nowhere else, whatever the parts that the audit is made in."""

from __future__ import annotations

import json
import pickle
import re
from collections import Counter
from dataclasses import replace
from functools import reduce
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data_shards.audit import state as audit_state
from data_shards.audit.batch import TokenizerFacts
from data_shards.audit.config import AuditConfig
from data_shards.audit.findings import Packing
from data_shards.audit.kind import Kind
from data_shards.audit.page import page, previews_of, token_texts
from data_shards.audit.part import AuditPart, Dropped, merge
from data_shards.audit.report import MAX_LINES, Report, at, check, from_bytes, lines, report_of, to_bytes
from data_shards.encoding.encoder import Encoded
from data_shards.errors import CorruptFile, DataError
from data_shards.pack import Sequence
from data_shards.sources.record import Record
from tests.support import dirty_data as dirty
from tests.support import tokenizers as families

PACKING = {"train": Packing(100, 20_000, 256), "validation": Packing(1, 200, 256), "test": Packing(0, 0, 256)}


class Dirty:
    """The dirty data set, encoded once for all tests."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = dirty.tokenizer()
        records, self.expected = dirty.write(folder)
        encoder = dirty.encoder_of(self.tokenizer)
        self.encoded = {split: list(dirty.encode(items, encoder)) for split, items in records.items()}
        self.facts = TokenizerFacts.of(self.tokenizer, families.stop_texts(self.tokenizer))
        self.audit = dirty.audit_of(self.encoded, self.facts, dirty.limits_of())
        self.report = self.report_of(self.audit)

    def report_of(self, audit: AuditPart) -> Report:
        return report_of(audit, PACKING, self.facts.vocab_size)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dirty:
    return Dirty(tmp_path_factory.mktemp("dirty"))


def places(report: Report) -> dict[str, set[str]]:
    return {
        finding["kind"]: {f"{example['path']}:{example['line']}" for example in finding["examples"]}
        for finding in report["findings"]
    }


def finding(report: Report, kind: Kind) -> Report:
    return next(item for item in report["findings"] if item["kind"] == kind.value)


def test_every_kind_of_trouble_is_found_where_it_is_and_nowhere_else(data: Dirty) -> None:
    found = places(data.report)
    assert len(data.expected) >= 18
    assert {kind: found.get(kind.value) for kind in data.expected} == data.expected
    assert found.keys() - {kind.value for kind in data.expected} == {"empty_split", "loose_packs"}
    printed = "\n".join(lines(data.report))
    for item in data.report["findings"][:10]:
        assert item["kind"] in printed and all(at(e) in printed for e in item["examples"][:1])


def test_repeats_name_the_record_that_they_repeat(data: Dirty) -> None:
    shown = {kind: [at(e) for e in finding(data.report, kind)["examples"]] for kind in (Kind.LEAK, Kind.DUPLICATE)}
    (leak,) = shown[Kind.LEAK]
    assert re.fullmatch(r".*/held_out\.jsonl:2 = .*/train\.jsonl:8", leak)
    assert [re.sub(r"\S*/", "", pair) for pair in shown[Kind.DUPLICATE]] == [
        "train.jsonl:151 = train.jsonl:4",
        "train.jsonl:152 = train.jsonl:4",
    ]
    assert finding(data.report, Kind.LEAK)["splits"] == {"validation": 1}
    assert finding(data.report, Kind.REPEATED_ANSWER)["count"] == 30


def test_duplicates_that_are_removed_are_no_trouble(data: Dirty) -> None:
    limits = replace(dirty.limits_of(max_duplicate_share=0), removes_duplicates=True)
    report = data.report_of(dirty.audit_of(data.encoded, data.facts, limits))
    assert "duplicate" not in places(report) and finding(report, Kind.REMOVED_DUPLICATE)["severity"] == "note"
    assert places(report)["removed_duplicate"] == data.expected[Kind.DUPLICATE]
    check(report, limits.config)


def test_figures_are_those_of_the_records(data: Dirty) -> None:
    total, encoded = data.report["total"], [i for i in data.encoded["train"] if not isinstance(i, Dropped)]
    train, source = data.report["splits"]["train"], data.report["sources"]["held_out"]
    kept = [item for item in encoded if item.record.text is not None or len(item.sequence.input_ids) <= dirty.SEQ_LEN]
    assert total["records"] == sum(map(len, data.encoded.values())) and source["records"] == len(dirty.VALIDATION)
    assert train["dropped_records"] == len(data.encoded["train"]) - len(kept) == 2
    assert train["tokens"] == sum(len(item.sequence.input_ids) for item in kept)
    assert train["trained_tokens"] == sum(item.sequence.num_targets for item in kept)
    assert train["length_longest"] == max(len(item.sequence.input_ids) for item in encoded)
    assert sum(count for _, count in train["lengths"]) == len(encoded)
    assert train["length_median"] <= train["length_p99"] <= train["length_longest"]
    assert train["stop_token_share"] == 1.0 and train["roles"]["system"] == {"messages": 1, "characters": 1}
    counts = Counter(token for item in data.encoded["train"] + data.encoded["validation"]
                     if isinstance(item, Encoded) for token in item.sequence.input_ids.tolist())  # fmt: skip
    assert data.report["vocabulary"]["used"] == len(counts)
    assert {tuple(pair) for pair in data.report["vocabulary"]["most_frequent"][:5]} == set(counts.most_common(5))


@settings(max_examples=25, deadline=None)
@given(drawn=st.data())
def test_any_parts_give_the_same_audit(data: Dirty, drawn: st.DataObject) -> None:
    limits = dirty.limits_of(num_examples=drawn.draw(st.integers(1, 5)), num_previews=drawn.draw(st.integers(0, 9)))
    parts = []
    for split, items in data.encoded.items():
        cuts = sorted(drawn.draw(st.lists(st.integers(0, len(items)), max_size=8)))
        for start, stop in zip([0, *cuts], [*cuts, len(items)], strict=True):
            part = AuditPart.of(items[start:stop], split, data.facts, limits)
            parts.append(pickle.loads(pickle.dumps(part)))  # As it comes from a worker.
    in_one = dirty.audit_of(data.encoded, data.facts, limits)
    while len(parts) > 1:  # Merged as any tree.
        place = drawn.draw(st.integers(0, len(parts) - 2))
        parts[place : place + 2] = [merge(*parts[place : place + 2])]
    assert documents(data, parts[0]) == documents(data, in_one)


def documents(data: Dirty, audit: AuditPart) -> tuple[bytes, bytes]:
    report = data.report_of(audit)
    return to_bytes(report), page(report, previews_of(audit.samples, data.tokenizer))


def test_unfinished_audit_survives_as_json(data: Dirty) -> None:
    limits = dirty.limits_of()
    first, second = (AuditPart.of(items, split, data.facts, limits) for split, items in data.encoded.items())
    kept = json.loads(json.dumps(audit_state.to_json(first)))
    again = audit_state.from_json(kept, limits)
    assert documents(data, merge(again, second)) == documents(data, data.audit)
    assert json.loads(json.dumps(audit_state.to_json(again))) == kept
    for broken in ({}, kept | {"rows": 1}, kept | {"rows": ["!"]}, kept | {"rows": ["AAAA"]}, kept | {"longest": [1]}):
        with pytest.raises(ValueError):
            audit_state.from_json(broken, limits)


def test_what_is_kept_is_bounded(data: Dirty) -> None:
    limits = dirty.limits_of(num_examples=2, num_previews=3, preview_tokens=16)
    part = AuditPart.of(data.encoded["train"], "train", data.facts, limits)
    many = reduce(merge, [part] * 50)
    assert all(len(examples) <= 2 for examples in many.examples.values()) and len(many.longest) == 2
    assert len(many.samples) == 3 and {len(ids) for s in many.samples for _, ids, _ in s.pieces} <= {16, 4, 12}
    assert sum(figures.records for figures in many.figures.values()) == 50 * len(data.encoded["train"])


def report_for(tokenizer: Any, records: list[Record], **options: Any) -> Report:
    stops = families.stop_texts(tokenizer)
    encoder = dirty.encoder_of(tokenizer, **options)
    facts = TokenizerFacts.of(tokenizer, stops)
    part = AuditPart.of(encoder.encode(records), "train", facts, dirty.limits_of(options.get("too_long", "drop")))
    return report_of(part, {}, facts.vocab_size)


def record(line: int, *turns: tuple[str, str]) -> Record:
    return Record("data.jsonl", line, tuple({"role": role, "content": content} for role, content in turns))


def test_answers_without_stop_token() -> None:
    end = "('' if 'endless' in message.content else '<|im_end|>')"
    template = families.MARKED_TEMPLATE.replace("'<|im_end|>' }}{%- endgen", end + " }}{%- endgen")
    records = [record(1, *dirty.pair("Hm?", "It is.")), record(2, *dirty.pair("Hm?", "endless it is"))]
    report = report_for(families.chatml(template), records, require_stop_token=False)
    assert places(report)["no_stop_token"] == {"data.jsonl:2"} and report["total"]["stop_token_share"] == 0.5


def test_stop_token_before_a_trained_line_end_counts() -> None:
    template = families.MARKED_TEMPLATE.replace("+ '<|im_end|>'", "+ '<|im_end|>\\n'", 1)
    report = report_for(families.chatml(template), [record(1, *dirty.pair("Hm?", "It is so."))])
    assert report["total"]["stop_token_share"] == 1.0 and not places(report)


def test_answer_of_nothing_but_the_stop_token() -> None:
    records = [record(1, *dirty.pair("Hm?", "It is.")), record(2, *dirty.pair("Hm?!", ""))]
    report = report_for(families.chatml_marked(), records)
    assert places(report) == {"only_stop_token": {"data.jsonl:2"}, "empty_turn": {"data.jsonl:2"}}


def test_truncated_conversations_are_counted_as_such() -> None:
    records = [record(1, *dirty.pair("Hm?", "It is.")), record(2, *dirty.pair("Hm?", "apples " * 300))]
    report = report_for(families.chatml(), records, too_long="truncate")
    assert places(report)["truncated"] == {"data.jsonl:2"} and report["total"]["dropped_records"] == 0


def test_unknown_tokens() -> None:
    model = models.WordLevel({"<unk>": 0, "two": 1, "apples": 2, "</s>": 3}, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    texts = ["two apples", "two pears apples", "plums pears"]
    report = report_for(tokenizer, [Record("a.txt", n, text=text) for n, text in enumerate(texts, 1)])
    assert places(report)["unknown_tokens"] == {"a.txt:2", "a.txt:3"} and report["total"]["unknown_tokens"] == 3
    with pytest.raises(DataError, match=r"max_unknown_token_share=0\.05: 30\.0%"):
        check(report, AuditConfig())


def test_sequence_that_trains_on_nothing_is_counted_as_dropped() -> None:
    facts = TokenizerFacts((2,), (), 10)
    items = [
        Encoded(record(n, *dirty.pair(f"{n}?", "It.")), Sequence(np.array([5, 6, 2], np.int32), np.array(mask)))
        for n, mask in ((1, [False, True, True]), (2, [True, False, False]), (3, [False] * 3))
    ]
    items.append(Encoded(record(4, *dirty.pair("4?", "")), Sequence(np.zeros(0, np.int32), np.zeros(0, bool))))
    report = report_of(AuditPart.of(items, "train", facts, dirty.limits_of()), {}, 10)
    assert places(report)["trains_on_nothing"] == {"data.jsonl:2", "data.jsonl:3", "data.jsonl:4"}
    assert (report["total"]["tokens"], report["total"]["trained_tokens"]) == (3, 2)
    assert report["total"]["dropped_records"] == 3


def test_nothing_at_all() -> None:
    facts = TokenizerFacts((2,), (), 10)
    report = report_of(AuditPart.of([], "train", facts, dirty.limits_of()), {"train": Packing(0, 0, 256)}, 10)
    assert list(places(report)) == ["empty_split"] and page(report, []) and lines(report)
    check(report, AuditConfig())


def test_weights_and_tools_in_the_hashes() -> None:
    facts = TokenizerFacts((2,), (), 10)
    plain = record(1, *dirty.pair("Hm?", "It is."))
    weighted = replace(plain, line=2, messages=(plain.messages[0], {**plain.messages[1], "weight": 0}))
    with_tools = replace(plain, line=3, tools=({"type": "function", "function": {"name": "look"}},))
    items = [
        Encoded(r, Sequence(np.array([5, 6, 2], np.int32), np.ones(3, bool))) for r in (plain, weighted, with_tools)
    ]
    report = report_of(AuditPart.of(items, "train", facts, dirty.limits_of()), {}, 10)
    assert places(report)["duplicate"] == {"data.jsonl:2"}


@pytest.mark.parametrize("family", families.FACTORIES)
def test_token_texts_add_up_to_the_text(family: str) -> None:
    tokenizer = families.FACTORIES[family]()
    text = "What is the capital?\n  Réponds 🇫🇷 👩🏽‍🚀 你好 <b>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    texts = token_texts(ids, tokenizer.backend_tokenizer)
    assert len(texts) == len(ids) and "".join(part or "" for part in texts) == tokenizer.decode(ids)


def test_previews_show_what_is_trained(data: Dirty) -> None:
    by_place = {f"{i.record.path}:{i.record.line}": i.sequence for i in data.encoded["train"] if isinstance(i, Encoded)}
    previews = [p for p in previews_of(data.audit.samples, data.tokenizer) if p.split == "train" and not p.left_out]
    assert len(previews) > 5
    for preview in previews:
        ((before, tokens),) = preview.pieces
        sequence = by_place[preview.where]
        assert before == 0 and ["t" in t.classes.split() for t in tokens] == [False, *sequence.trained[1:].tolist()]
        assert all(f"id {number}" in t.title for number, t in zip(sequence.input_ids, tokens, strict=True))
        shown = "".join(text for token in tokens for text, _ in token.parts)
        assert shown == data.tokenizer.decode(sequence.input_ids)
        special = [number for number, t in zip(sequence.input_ids.tolist(), tokens, strict=True) if "s" in t.classes]
        assert special == [number for number in sequence.input_ids.tolist() if number < 5] and len(special) > 1


LIMITS: dict[str, Any] = {
    "max_dropped_share": 0.001,
    "max_short_share": 0,
    "max_duplicate_share": 0.001,
    "max_leak_records": 0,
    "max_prompt_leak_records": 0,
    "max_conflict_share": 0,
    "max_special_token_records": 1,
    "max_unusual_text_share": 0,
    "min_trained_share": 0.999,
    "min_packed_share": 0.9,
}


@pytest.mark.parametrize("key", LIMITS)
def test_each_limit_stops(key: str, data: Dirty) -> None:
    read = from_bytes(to_bytes(data.report), "audit.json")
    check(read, AuditConfig())
    with pytest.raises(DataError, match=rf"data\.audit\.{key}={LIMITS[key]:g}: .*\d") as error:
        check(read, AuditConfig(**{key: LIMITS[key]}))
    if key.startswith("max") and key != "max_dropped_share":
        assert re.search(r"\.jsonl:\d+", str(error.value))
    check(read, AuditConfig(**{key: 1000 if key.endswith("records") else float(key.startswith("max"))}))


def test_limits_are_met_by_equality_and_all_are_named(data: Dirty) -> None:
    count = finding(data.report, Kind.DUPLICATE)
    check(data.report, AuditConfig(max_duplicate_share=count["share"], max_special_token_records=2, max_leak_records=1))
    with pytest.raises(DataError) as error:
        check(data.report, AuditConfig(max_leak_records=0, min_trained_share=1, min_stop_token_share=1))
    assert "max_leak_records=0" in str(error.value) and "min_trained_share=1" in str(error.value)
    assert "min_stop_token_share" not in str(error.value)


def test_document_is_read_back_and_guarded(data: Dirty) -> None:
    written = to_bytes(data.report)
    assert from_bytes(written, "audit.json") == data.report
    with pytest.raises(CorruptFile, match=r"audit\.json: its contents do not match"):
        from_bytes(written.replace(b'"duplicate"', b'"duplikate"'), "audit.json")


def test_printed_form_is_short_aligned_and_safe(data: Dirty) -> None:
    many: dict[str, list[Encoded | Dropped]] = {
        f"split{n}": [
            item._replace(record=replace(item.record, source=f"{n}\x1b[31m", path="a\n\u202eb.jsonl"))
            for item in data.encoded["train"]
            if isinstance(item, Encoded)
        ]
        for n in range(9)
    }
    report = data.report_of(dirty.audit_of(many, data.facts, dirty.limits_of()))
    printed = lines(report)
    assert len(printed) <= MAX_LINES and not re.search(r"[\x00-\x1f\u202e]", "".join(printed))
    assert any("… and" in line for line in printed)
    severities = [line.split()[0] for line in lines(data.report) if re.match("  (error|warning|note) ", line)]
    assert severities == sorted(severities, key=["error", "warning", "note"].index) and len(severities) > 10


class _Tags(HTMLParser):
    """Names of elements and attributes, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_escapes_what_it_shows(data: Dirty) -> None:
    odd = [
        Record(f"{dirty.SCRIPT}\x00\u202e.jsonl", 1, item.record.messages, source=dirty.SCRIPT)
        for item in data.encoded["train"]
        if isinstance(item, Encoded) and any("script" in turn["content"] for turn in item.record.messages)
    ]
    encoded = list(dirty.encoder_of(data.tokenizer).encode(odd))
    dropped = Dropped("a.jsonl", 2, Kind.REFUSED, dirty.SCRIPT, "other")
    audit = AuditPart.of([*encoded, dropped], dirty.SCRIPT, data.facts, dirty.limits_of())
    document = page(data.report_of(audit), previews_of(audit.samples, data.tokenizer)).decode()
    tags = _Tags()
    tags.feed(document)
    assert encoded and not tags.names & {"script", "img", "iframe", "a", "link"}
    assert not any(name.startswith("on") or name in ("src", "href") for name in tags.attributes)
    assert "\x00" not in document and "\u202e" not in document
    assert f"{dirty.SCRIPT}␀⟨U+202E⟩.jsonl:1" in tags.text
