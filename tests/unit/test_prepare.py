"""Records to shards and back: nothing lost, nothing done twice, nothing damaged goes unseen."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_shards import manifest as manifests
from data_shards import signed_json
from data_shards.audit.report import JSON_NAME, PAGE_NAME
from data_shards.config import DataConfig
from data_shards.encoding.encoder import Encoder, load_tokenizer
from data_shards.errors import CorruptFile, DataError
from data_shards.prepare import Prepared, prepare
from data_shards.reading.shard_reader import SplitReader, read_dataset_manifest
from data_shards.sources.records import read_records
from data_shards.storage import Storage
from data_shards.writing.shard_writer import ROWS_PER_BATCH
from tests.support import tokenizers as families

SEQ_LEN = 96
STOPS = ["<|im_end|>"]
Key = tuple[tuple[int, ...], tuple[bool, ...]]
"""A sequence's ids and mask, to be counted"""


def pairs(num: int, *, seed: int = 0, first: int = 0) -> list[dict[str, str]]:
    """Question and answer records of uneven lengths, each unlike every other; all fit into ``SEQ_LEN``."""
    words = ["What", "is", "the", "capital", "of", "France?", "How", "many", "apples", "are", "there?"]
    rng = np.random.default_rng(seed)
    return [
        {
            "question": f"{number}: " + " ".join(rng.choice(words, rng.integers(1, 8))),
            "answer": " ".join(rng.choice(words, rng.integers(1, 8))),
        }
        for number in range(first, first + num)
    ]


LONG = {"question": "What is the capital of France?", "answer": "Paris. " * SEQ_LEN}


def write_records(path: Path, records: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def config_of(train: Any, **options: Any) -> DataConfig:
    return DataConfig(**({"train": train, "seq_len": SEQ_LEN} | options))


def encoder_of(config: DataConfig, tokenizer: Any = None) -> Encoder:
    return Encoder(tokenizer or families.chatml(), config, STOPS)


def run(config: DataConfig, root: Path, report: Callable[[str], None] = lambda line: None) -> Prepared:
    return prepare(config, encoder_of(config), Storage.at(root), report=report)


def key_of(ids: np.ndarray, trained: np.ndarray) -> Key:
    return tuple(ids.tolist()), tuple(trained.astype(bool).tolist())


def encoded_keys(config: DataConfig, path: str | None = None) -> list[Key]:
    records = read_records(path or config.train[0].path, config.format, config.columns)
    return [key_of(*item.sequence) for item in encoder_of(config).encode(records)]


def reader_of(prepared: Prepared, split: str = "train") -> SplitReader:
    return SplitReader(prepared.location, prepared.manifest, split)


def read_keys(prepared: Prepared, split: str = "train") -> list[Key]:
    """The sequences of a split, out of its packs."""
    reader = reader_of(prepared, split)
    keys: list[Key] = []
    for row in range(reader.num_rows):
        pack = reader.pack(row)
        assert len(pack.input_ids) == len(pack.trained) == pack.sequence_lengths.sum() <= prepared.manifest.seq_len
        cuts = np.cumsum(pack.sequence_lengths)[:-1]
        keys += map(key_of, np.split(pack.input_ids, cuts), np.split(pack.trained, cuts))
    return keys


def targets(keys: list[Key]) -> int:
    """Tokens that are trained and that something comes before."""
    return sum(sum(trained[1:]) for _, trained in keys)


def files_of(prepared: Prepared) -> dict[str, bytes]:
    folder = prepared.location.local_path
    assert folder is not None
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def states_of(root: Path) -> dict[Path, tuple[int, int]]:
    """Which file lies at each path, and when it was last written."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in root.rglob("*")}


@pytest.fixture
def train(tmp_path: Path) -> str:
    return write_records(tmp_path / "train.jsonl", pairs(60))


def test_what_was_encoded_is_read_back(train: str, tmp_path: Path) -> None:
    lines: list[str] = []
    config = config_of(train)
    prepared = run(config, tmp_path / "root", lines.append)
    wanted = encoded_keys(config)
    assert len(wanted) == 60 and Counter(read_keys(prepared)) == Counter(wanted)
    split, reader = prepared.manifest.splits["train"], reader_of(prepared)
    assert split.records == 60 and split.dropped == {} and split.rows == reader.num_rows < 60
    assert split.tokens == sum(len(ids) for ids, _ in wanted)
    assert split.trained_tokens == targets(wanted) == reader.num_trained(np.arange(reader.num_rows))
    assert any(f"60 records, {split.rows} packs of {SEQ_LEN}" in line for line in lines)
    assert read_dataset_manifest(prepared.location) == prepared.manifest


def test_trained_tokens_are_counted_pack_by_pack(train: str, tmp_path: Path) -> None:
    reader = reader_of(run(config_of(train), tmp_path / "root"))
    for row in range(reader.num_rows):
        pack = reader.pack(row)
        first = np.cumsum(pack.sequence_lengths) - pack.sequence_lengths
        counted = int(pack.trained.sum()) - int(pack.trained[first].sum())
        assert 0 < counted == reader.num_trained(np.array([row]))


def test_a_window_ends_before_it_overflows_a_shard(tmp_path: Path) -> None:
    """Files of equal size, each a batch of its own: two fit, so each window is one shard of two files."""
    for number in range(6):
        write_records(tmp_path / f"{number}.jsonl", pairs(20))
    one = run(config_of(str(tmp_path / "0.jsonl")), tmp_path / "one").manifest.splits["train"]
    prepared = run(config_of(str(tmp_path / "*.jsonl"), max_shard_tokens=one.tokens * 5 // 2), tmp_path / "root")
    reader, shards = reader_of(prepared), prepared.manifest.splits["train"].shards
    bounds = np.cumsum([0, *(shard.rows for shard in shards)]).tolist()
    tokens = [sum(len(p.input_ids) for p in reader.packs(np.arange(*ends))) for ends in pairwise(bounds)]
    assert tokens == [2 * one.tokens] * 3


def test_several_shards_of_bounded_size(train: str, tmp_path: Path) -> None:
    config = config_of(train, max_shard_tokens=5 * SEQ_LEN)
    prepared = run(config, tmp_path / "root")
    shards = prepared.manifest.splits["train"].shards
    assert len(shards) >= 3 and [shard.file.path for shard in shards[:2]] == [
        "train-00000-00000.arrow",
        "train-00000-00001.arrow",
    ]
    assert Counter(read_keys(prepared)) == Counter(encoded_keys(config))
    reader, row = reader_of(prepared), 0
    for shard in shards:
        assert sum(len(reader.pack(row + i).input_ids) for i in range(shard.rows)) <= config.shard_tokens
        row += shard.rows
    # A pack that is larger than a shard may be gets one for itself.
    prepared = run(config_of(train, max_shard_tokens=1), tmp_path / "root")
    assert {shard.rows for shard in prepared.manifest.splits["train"].shards} == {1}
    assert Counter(read_keys(prepared)) == Counter(encoded_keys(config))


def test_shard_of_several_record_batches(tmp_path: Path) -> None:
    num = 2 * ROWS_PER_BATCH + 7
    path = write_records(tmp_path / "train.jsonl", [{"text": f"{n:06d}"} for n in range(num)])
    config = config_of(path, seq_len=8)
    prepared = run(config, tmp_path / "root")
    (shard,) = prepared.manifest.splits["train"].shards
    assert shard.rows == num
    assert Counter(read_keys(prepared)) == Counter(encoded_keys(config))


def test_same_input_gives_the_same_bytes_wherever_it_lies(train: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    copy = write_records(tmp_path / "other" / "train.jsonl", pairs(60))
    first, second = run(config_of(train), tmp_path / "one"), run(config_of(copy, prepared="there"), tmp_path / "two")
    assert first.manifest.fingerprint == second.manifest.fingerprint
    one, two = files_of(first), files_of(second)
    assert one.pop(PAGE_NAME) != two.pop(PAGE_NAME), "the audit names the sources' files"
    for files in (one, two):
        del files[JSON_NAME]
    assert one == two


def test_second_call_does_nothing(train: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    first = run(config_of(train), tmp_path / "root")
    folder = first.location.local_path
    assert folder is not None
    before = states_of(tmp_path / "root")
    monkeypatch.setattr(Encoder, "encode", lambda self, records: pytest.fail("encoded again"))
    second = run(config_of(train), tmp_path / "root", lines.append)
    assert second.manifest == first.manifest
    assert lines == [f"data: already prepared at {folder}"]
    assert states_of(tmp_path / "root") == before


def test_encoding_does_not_change_the_fingerprint(train: str, tmp_path: Path) -> None:
    """Truncation and padding saved in tokenizer.json are switched off by the first call, and must not matter."""
    tokenizer = families.chatml()
    tokenizer.backend_tokenizer.enable_truncation(max_length=16)
    tokenizer.backend_tokenizer.enable_padding(length=16)
    base = families.save_tokenizer(tmp_path / "base", tokenizer)
    assert json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))["truncation"]["max_length"] == 16
    config = config_of(train)
    encoder = encoder_of(config, load_tokenizer(base))
    first = prepare(config, encoder, Storage.at(tmp_path / "root"))
    second = prepare(config, encoder, Storage.at(tmp_path / "root"))
    assert first.manifest.fingerprint == second.manifest.fingerprint
    assert Counter(read_keys(first)) == Counter(encoded_keys(config))


CHANGES: dict[str, dict[str, Any]] = {
    "seq_len": {"seq_len": SEQ_LEN + 1},
    "train_on": {"train_on": "all"},
    "template_date": {"template_date": "2025-01-01"},
    "too_long": {"too_long": "error"},
    "require_stop_token": {"require_stop_token": False},
    "validation_fraction": {"validation_fraction": 0.3},
    "max_shard_tokens": {"max_shard_tokens": 1000},
}


@pytest.mark.parametrize("name", CHANGES)
def test_fingerprint_changes_with_each_option(name: str, train: str, tmp_path: Path) -> None:
    plain = run(config_of(train), tmp_path / "root")
    changed = run(config_of(train, **CHANGES[name]), tmp_path / "root")
    assert changed.manifest.fingerprint != plain.manifest.fingerprint
    assert changed.location.uri != plain.location.uri


def test_fingerprint_changes_with_content_template_tokenizer_and_stops(train: str, tmp_path: Path) -> None:
    config, root = config_of(train), Storage.at(tmp_path / "root")
    template = tmp_path / "chat.jinja"
    # Not even the text differs: the template is part of what was asked for.
    template.write_text("{# other #}" + families.CHATML_TEMPLATE, encoding="utf-8")
    with_template = config_of(train, chat_template=str(template))
    larger = families.chatml()
    larger.add_tokens(["apples"])
    seen = [
        prepare(*case, root).manifest.fingerprint
        for case in (
            (config, encoder_of(config)),
            (with_template, encoder_of(with_template)),
            (config, encoder_of(config, larger)),
            (config, Encoder(families.chatml(), config, [*STOPS, "<|endoftext|>"])),
        )
    ]
    write_records(Path(train), [*pairs(59), {"question": "59", "answer": "other"}])
    seen.append(run(config, tmp_path / "root").manifest.fingerprint)
    assert len(set(seen)) == 5


def test_fingerprint_knows_which_source_has_which_template(train: str, tmp_path: Path) -> None:
    other = tmp_path / "other.jinja"
    other.write_text(families.CHATML_TEMPLATE.replace("<|im_end|>", " <|im_end|>"), encoding="utf-8")
    own = {"chat_template": str(other)}
    first, second = (
        run(config_of([{"name": "a", "path": train} | a, {"name": "b", "path": train} | b]), tmp_path / "root")
        for a, b in ((own, {}), ({}, own))
    )
    assert first.manifest.fingerprint != second.manifest.fingerprint
    assert sorted(read_keys(first)) == sorted(read_keys(second))


def test_split_is_by_record_and_adding_records_moves_none(tmp_path: Path) -> None:
    old, new = pairs(100), pairs(80, seed=1, first=100)
    before = run(config_of(write_records(tmp_path / "a.jsonl", old), validation_fraction=0.3), tmp_path / "root")
    after = run(
        config_of(write_records(tmp_path / "b.jsonl", new + old[::-1]), validation_fraction=0.3), tmp_path / "root"
    )
    held_out, kept = set(read_keys(before, "validation")), set(read_keys(before, "train"))
    assert len(held_out) + len(kept) == 100 and 10 < len(held_out) < 50
    assert held_out < set(read_keys(after, "validation"))
    assert kept < set(read_keys(after, "train"))
    assert before.manifest.splits["validation"].records == len(held_out)


def test_duplicates_stay_on_one_side_of_the_split(tmp_path: Path) -> None:
    path = write_records(tmp_path / "train.jsonl", pairs(40) * 2)
    prepared = run(config_of(path, validation_fraction=0.5), tmp_path / "root")
    train, validation = read_keys(prepared, "train"), read_keys(prepared, "validation")
    assert len(train) + len(validation) == 80 and not set(train) & set(validation)
    assert set(Counter(train + validation).values()) == {2}


def test_validation_file_is_a_split_of_its_own(train: str, tmp_path: Path) -> None:
    other = write_records(tmp_path / "validation.jsonl", pairs(10, seed=2, first=500))
    config = config_of(train, validation=other)
    prepared = run(config, tmp_path / "root")
    assert Counter(read_keys(prepared, "train")) == Counter(encoded_keys(config))
    assert Counter(read_keys(prepared, "validation")) == Counter(encoded_keys(config, other))
    assert prepared.manifest.fingerprint != run(config_of(train), tmp_path / "root").manifest.fingerprint


def test_too_long_conversations_are_dropped_and_counted(tmp_path: Path) -> None:
    path = write_records(tmp_path / "train.jsonl", [LONG, *pairs(20), LONG])
    lines: list[str] = []
    prepared = run(config_of(path), tmp_path / "root", lines.append)
    split = prepared.manifest.splits["train"]
    assert (split.records, split.dropped) == (22, {"too_long": 2})
    assert len(read_keys(prepared)) == 20 and max(len(ids) for ids, _ in read_keys(prepared)) <= SEQ_LEN
    assert any("DROPPED 2 of 22 records longer than data.seq_len=96" in line for line in lines)


def test_pack_may_be_exactly_full(tmp_path: Path) -> None:
    path = write_records(tmp_path / "train.jsonl", pairs(1))
    ((ids, _),) = encoded_keys(config_of(path))
    prepared = run(config_of(path, seq_len=len(ids)), tmp_path / "root")
    assert prepared.manifest.splits["train"].dropped == {}
    with pytest.raises(DataError, match="no record is left"):
        run(config_of(path, seq_len=len(ids) - 1), tmp_path / "root")


def test_too_long_conversation_is_an_error_where_asked(tmp_path: Path) -> None:
    path = write_records(tmp_path / "train.jsonl", [*pairs(2), LONG])
    message = rf"^{re.escape(path)}:3: \d+ tokens, more than data\.seq_len=96; .*data\.too_long=drop"
    with pytest.raises(DataError, match=message):
        run(config_of(path, too_long="error"), tmp_path / "root")
    assert not list((tmp_path / "root").rglob(manifests.MANIFEST))


@pytest.mark.parametrize("length", [8, 9, 15, 16, 17, 23, 24, 25])
def test_plain_text_is_split_and_keeps_every_token(length: int, tmp_path: Path) -> None:
    """``length`` tokens with the stop token, which is learnt even where it would be alone in its piece."""
    path = write_records(tmp_path / "train.jsonl", [{"text": "7" * (length - 1)}])
    config = config_of(path, seq_len=8)
    ((ids, _),) = encoded_keys(config)
    assert len(ids) == length
    prepared = run(config, tmp_path / "root")
    pieces = [piece for piece, _ in read_keys(prepared)]
    assert sorted(token for piece in pieces for token in piece) == sorted(ids)
    assert all(2 <= len(piece) <= 8 for piece in pieces) and len(pieces) == -(-length // 8)
    stop = families.chatml().eos_token_id
    assert sum(stop in piece[1:] for piece in pieces) == 1
    assert prepared.manifest.splits["train"].trained_tokens == length - len(pieces)


def test_nothing_left_to_train_on_is_an_error(tmp_path: Path) -> None:
    path = write_records(tmp_path / "train.jsonl", [LONG] * 3)
    message = rf"^{re.escape(path)}: no record is left to train on \(dropped: 3 too_long; data\.seq_len=96\)"
    with pytest.raises(DataError, match=message):
        run(config_of(path), tmp_path / "root")
    assert not list((tmp_path / "root").rglob(manifests.MANIFEST))


def test_empty_validation_split_can_be_read(tmp_path: Path) -> None:
    path = write_records(tmp_path / "train.jsonl", pairs(3))
    prepared = run(config_of(path, validation_fraction=1e-9), tmp_path / "root")
    reader = reader_of(prepared, "validation")
    assert reader.num_rows == 0 and reader.num_trained(np.arange(0)) == 0
    assert len(read_keys(prepared)) == 3


def test_record_that_trains_on_nothing_is_an_error(tmp_path: Path) -> None:
    without_eos = families.chatml()
    without_eos.eos_token = None
    first_token_only = families.chatml("{% generation %}<|im_end|>{% endgeneration %}" + families.CHATML_TEMPLATE)
    for tokenizer, records, line in (
        (without_eos, [{"text": "77"}, {"text": "7"}], 2),
        (first_token_only, pairs(1), 1),
    ):
        config = config_of(write_records(tmp_path / "train.jsonl", records))
        with pytest.raises(
            DataError, match=rf"^{re.escape(config.train[0].path)}:{line}: none of its \d+ tokens would be tr"
        ):
            prepare(config, encoder_of(config, tokenizer), Storage.at(tmp_path / "root"))


def test_bad_record_leaves_nothing_that_counts(train: str, tmp_path: Path) -> None:
    write_records(Path(train), [*pairs(5), {"question": "x", "answer": ""}])
    with pytest.raises(DataError, match=rf"^{re.escape(train)}:6: 'answer' is empty"):
        run(config_of(train), tmp_path / "root")
    assert not list((tmp_path / "root").rglob(manifests.MANIFEST))
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file"):
        run(config_of(str(tmp_path / "nowhere.jsonl")), tmp_path / "root")


def _flip(path: Path, place: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 0x10
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flip in the first byte": lambda path: _flip(path, 0.0),
    "flip in the middle": lambda path: _flip(path, 0.5),
    "flip in the last byte": lambda path: _flip(path, 1.0),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "missing": lambda path: path.unlink(),
    "another shard": lambda path: path.write_bytes(path.with_name("train-00000-00000.arrow").read_bytes()),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_shard_is_named(name: str, train: str, tmp_path: Path) -> None:
    prepared = run(config_of(train, max_shard_tokens=5 * SEQ_LEN), tmp_path / "root")
    folder = prepared.location.local_path
    assert folder is not None
    reader_of(prepared)
    DAMAGE[name](folder / "train-00000-00001.arrow")
    with pytest.raises(CorruptFile, match=r"/train-00000-00001\.arrow: "):
        read_keys(prepared)


def resign(prepared: Prepared, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest as a forger would, who can compute its hash."""
    data = prepared.location.read(manifests.MANIFEST)
    body = signed_json.decode(data, manifests.KIND, manifests.VERSION, "here")
    change(body)
    prepared.location.write(manifests.MANIFEST, [signed_json.encode(body, manifests.KIND, manifests.VERSION)])


@pytest.mark.parametrize("path", ["../outside.arrow", "/outside.arrow", "s3://bucket/outside.arrow"])
def test_manifest_may_not_name_files_outside(path: str, train: str, tmp_path: Path) -> None:
    prepared = run(config_of(train), tmp_path / "root")
    data = prepared.location.read("train-00000-00000.arrow")
    (tmp_path / "root" / "outside.arrow").write_bytes(data)
    resign(prepared, lambda body: body["splits"]["train"]["shards"][0]["file"].update(path=path))
    with pytest.raises(CorruptFile, match=f"{re.escape(path)}.*outside its own directory"):
        read_dataset_manifest(prepared.location)


@pytest.mark.parametrize("field", ["rows", "trained_tokens"])
def test_manifest_must_add_up(field: str, train: str, tmp_path: Path) -> None:
    prepared = run(config_of(train), tmp_path / "root")
    resign(prepared, lambda body: body["splits"]["train"].update({field: body["splits"]["train"][field] + 1}))
    changed = read_dataset_manifest(prepared.location)
    with pytest.raises(CorruptFile, match="'train' do not add up"):
        SplitReader(prepared.location, changed, "train")
    resign(prepared, lambda body: body["splits"]["train"].update(shards=[]))
    with pytest.raises(CorruptFile, match="'train' do not add up"):
        SplitReader(prepared.location, read_dataset_manifest(prepared.location), "train")


def test_manifest_and_shard_must_agree_on_rows(train: str, tmp_path: Path) -> None:
    prepared = run(config_of(train), tmp_path / "root")
    resign(prepared, lambda body: body["splits"]["train"]["shards"][0].update(rows=1))
    with pytest.raises(CorruptFile, match="the shards of split 'train' do not add up"):
        SplitReader(prepared.location, read_dataset_manifest(prepared.location), "train")


@pytest.mark.parametrize("damage", ["cut off", "edited", "empty", "missing"])
def test_damaged_manifest_is_made_again(damage: str, train: str, tmp_path: Path) -> None:
    config = config_of(train)
    prepared = run(config, tmp_path / "root")
    before = files_of(prepared)
    folder = prepared.location.local_path
    assert folder is not None
    path, data = folder / manifests.MANIFEST, before[manifests.MANIFEST]
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"cut off": data[:-40], "edited": data.replace(b"60", b"61"), "empty": b""}[damage])
        assert path.read_bytes() != data
    DAMAGE["flip in the middle"](folder / "train-00000-00000.arrow")
    lines: list[str] = []
    again = run(config, tmp_path / "root", lines.append)
    assert any("prepared again, because" in line and manifests.MANIFEST in line for line in lines) == (
        damage != "missing"
    )
    assert files_of(again) == before
    assert Counter(read_keys(again)) == Counter(encoded_keys(config))
