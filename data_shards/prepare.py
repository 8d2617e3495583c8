"""Records to committed shards: read, split, encode, pack, write; nothing to do where it was done before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_shards import manifest as manifests
from data_shards import signed_json
from data_shards.config import DataConfig, TooLong
from data_shards.encode import Encoded, Encoder
from data_shards.errors import CorruptFile, DataError
from data_shards.manifest import DatasetManifest, SplitEntry
from data_shards.pack import Sequence
from data_shards.packing import best_fit
from data_shards.records import Record, read_records
from data_shards.sampler import SAMPLER_VERSION
from data_shards.shard_reader import read_dataset_manifest
from data_shards.shard_writer import write_shards
from data_shards.storage import Storage, content_hash, sha256

TRAIN, VALIDATION = "train", "validation"
_OPTIONS = (
    "validation_fraction",
    "format",
    "columns",
    "seq_len",
    "too_long",
    "require_stop_token",
    "max_shard_tokens",
)


@dataclass(frozen=True)
class Prepared:
    location: Storage
    manifest: DatasetManifest


def fingerprint_parts(config: DataConfig, encoder: Encoder) -> dict[str, Any]:
    """Everything that the packs and their order depend on."""
    options = config.model_dump(mode="json", include=set(_OPTIONS))
    sources = {
        name: content_hash([_existing(path)])
        for name, path in ((TRAIN, config.train), (VALIDATION, config.validation))
        if path is not None
    }
    return {
        "sources": sources,
        "encoding": encoder.identity(),
        "options": options,
        "format_version": manifests.VERSION,
        "sampler_version": SAMPLER_VERSION,
    }


def fingerprint_of(parts: dict[str, Any]) -> str:
    return sha256(signed_json.canonical(parts))[:32]


def _existing(path: str) -> Path:
    if not Path(path).is_file():
        raise DataError(
            f"{path}: no such file. Check data.train and data.validation; paths are relative to where you run"
        )
    return Path(path)


def prepare(
    config: DataConfig, encoder: Encoder, root: Storage, *, report: Callable[[str], None] = lambda line: None
) -> Prepared:
    """Make ``<root>/<fingerprint>`` hold the dataset, unless it does already.

    Raises DataError with file and line for anything that can't be used.
    """
    parts = fingerprint_parts(config, encoder)
    fingerprint = fingerprint_of(parts)
    location = root.child(fingerprint)
    try:
        found = Prepared(location, read_dataset_manifest(location))
        report(f"data: already prepared at {location.uri}")
        return found
    except FileNotFoundError:
        pass
    except CorruptFile as error:
        report(f"data: prepared again, because {error}")
    splits = {name: _prepare_split(config, encoder, location, name, report) for name in _split_names(config)}
    if splits[TRAIN].rows == 0:
        raise DataError(
            f"{config.train}: no record is left to train on: {splits[TRAIN].dropped_too_long} were longer than "
            f"data.seq_len={config.seq_len}, the rest went to validation"
        )
    result = DatasetManifest(fingerprint, config.seq_len, splits, parts)
    location.write(manifests.MANIFEST, [result.to_bytes()])
    report(f"data: prepared at {location.uri}")
    return Prepared(location, result)


def _split_names(config: DataConfig) -> list[str]:
    return [TRAIN, VALIDATION] if config.validation or config.validation_fraction else [TRAIN]


def records_of(config: DataConfig, split: str) -> Iterator[Record]:
    """The records of one split, in the file's order."""
    path = config.validation if split == VALIDATION and config.validation else config.train
    for record in read_records(path, config.format, config.columns):
        held_out = record.split_position() < config.validation_fraction
        if not config.validation_fraction or held_out == (split == VALIDATION):
            yield record


def _fit(config: DataConfig, encoded: Encoded) -> list[Sequence]:
    """The sequence, its pieces (plain text), or nothing, where it is longer than a pack."""
    sequence, limit = encoded.sequence, config.seq_len
    if len(sequence.input_ids) <= limit:
        return [sequence]
    if encoded.record.text is not None:
        cuts = list(range(limit, len(sequence.input_ids), limit))
        if cuts[-1] == len(sequence.input_ids) - 1:
            cuts[-1] -= 1  # Alone in its piece, the last token (mostly the stop token) would never be predicted.
        return list(map(Sequence, np.split(sequence.input_ids, cuts), np.split(sequence.trained, cuts)))
    if config.too_long == TooLong.ERROR:
        raise encoded.record.error(
            f"{len(sequence.input_ids)} tokens, more than data.seq_len={limit}; raise it, shorten the record, or set "
            "data.too_long=drop"
        )
    return []


def _prepare_split(
    config: DataConfig, encoder: Encoder, location: Storage, split: str, report: Callable[[str], None]
) -> SplitEntry:
    sequences: list[Sequence] = []
    records = dropped = 0
    for encoded in encoder.encode(records_of(config, split)):
        pieces = _fit(config, encoded)
        sequences += pieces
        records += 1
        dropped += not pieces
    packs = best_fit(np.array([len(s.input_ids) for s in sequences], np.int64), config.seq_len)
    shards = tuple(
        write_shards(location, split, ([sequences[i] for i in pack] for pack in packs), config.max_shard_tokens)
    )
    tokens = sum(len(s.input_ids) for s in sequences)
    trained = sum(s.num_targets for s in sequences)
    if packs:
        report(
            f"data: {split}: {records:,} records, {len(packs):,} packs of {config.seq_len} "
            f"({tokens / len(packs) / config.seq_len:.1%} full), {tokens:,} tokens, {trained / tokens:.1%} trained"
        )
    if dropped:
        report(
            f"data: {split}: DROPPED {dropped:,} of {records:,} records longer than data.seq_len={config.seq_len}; "
            "raise it to keep them, or set data.too_long=error to be stopped"
        )
    return SplitEntry(shards, len(packs), records, tokens, trained, dropped)
