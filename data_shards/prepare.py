"""Records to committed shards: read, split, encode, pack, write; nothing to do where it was done before."""

from __future__ import annotations

import fcntl
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from data_shards import manifest as manifests
from data_shards.audit.batch import TokenizerFacts
from data_shards.audit.dataset import check_audit, write_audit
from data_shards.config import DataConfig
from data_shards.corpus import Corpus, encoders_of, fingerprint_of, fingerprint_parts
from data_shards.encoding.encoder import Encoder
from data_shards.errors import CorruptFile, DataError
from data_shards.manifest import DatasetManifest, SourceEntry, SplitEntry
from data_shards.processes import ordered_map
from data_shards.reading.shard_reader import read_dataset_manifest
from data_shards.splits import TEST, TRAIN, VALIDATION
from data_shards.storage import Storage
from data_shards.writing.batch_encoder import BatchEncoder, DropReason, EncodedBatch, audit_limits
from data_shards.writing.receipts import FOLDER, Receipt, audits_of, in_order, read_receipts
from data_shards.writing.row_counts import write_counts
from data_shards.writing.tasks import Task, plan_tasks
from data_shards.writing.window_writer import WindowWriter, jobs_of

__all__ = ["TRAIN", "VALIDATION", "Prepared", "prepare"]

_BYTES_PER_PROCESS = 16 << 20
"""Of source, before another process pays for its start, some three seconds."""
_TELL_EVERY_S = 10.0

Report = Callable[[str], None]
WriteTasks = Callable[[Sequence[Task], DataConfig, Encoder, Storage, dict[int, list[Receipt]], Report], None]


@dataclass(frozen=True)
class Prepared:
    location: Storage
    manifest: DatasetManifest


def prepare(
    config: DataConfig,
    encoder: Encoder,
    root: Storage,
    *,
    write: WriteTasks | None = None,
    report: Report = lambda line: None,
) -> Prepared:
    """Make ``<root>/<fingerprint>`` hold the dataset, unless it does already. Killed, it goes on where it was.

    Args:
        write: writes the tasks' windows; default by processes of this machine.

    Raises DataError with file and line for anything that can't be used.
    """
    corpus = Corpus(config)
    parts = fingerprint_parts(config, encoder, corpus)
    fingerprint = fingerprint_of(parts)
    location = root.child(fingerprint)
    found = _already(location, report)
    is_new = found is None
    if found is None or location.list(FOLDER):  # receipts behind a manifest: killed just then
        with _alone(root, fingerprint, report):
            found = _already(location, _silent)  # perhaps by whom we waited for
            if found is None:
                make = partial(_make, config, encoder, location, corpus, parts, write or write_tasks, report)
                found = _made_or_found(make, location)
            _remove_receipts(location)
    check_audit(location, config.audit, report, tell=is_new)
    return found


def _made_or_found(make: Callable[[], Prepared], location: Storage) -> Prepared:
    """What is made; on an object store another job may finish the same dataset at the same time, and then the receipts
    are gone."""
    try:
        return make()
    except FileNotFoundError:
        if found := _already(location, _silent):
            return found
        raise


def _make(
    config: DataConfig,
    encoder: Encoder,
    location: Storage,
    corpus: Corpus,
    parts: dict[str, Any],
    write: WriteTasks,
    report: Report,
) -> Prepared:
    location.remove_leftovers()
    written = _write_windows(config, encoder, location, corpus, write, report)
    splits = _splits(config, location, written, report)
    audits = audits_of(location, (receipt for _, receipt in written), audit_limits(config))
    write_audit(location, audits, splits, config.seq_len, encoder)
    made = Prepared(location, DatasetManifest(fingerprint_of(parts), config.seq_len, splits, parts))
    location.write(manifests.MANIFEST, [made.manifest.to_bytes()])
    report(f"data: prepared at {location.uri}")
    return made


def _silent(line: str) -> None:
    """It was said already."""


def _already(location: Storage, report: Report) -> Prepared | None:
    try:
        found = Prepared(location, read_dataset_manifest(location))
        report(f"data: already prepared at {location.uri}")
        return found
    except FileNotFoundError:
        return None
    except CorruptFile as error:
        report(f"data: prepared again, because {error}")
        return None


def _remove_receipts(location: Storage) -> None:
    if location.list(FOLDER):
        location.delete_tree(FOLDER)


@contextmanager
def _alone(root: Storage, fingerprint: str, report: Report) -> Iterator[None]:
    """Where the storage is a file system: one process at a time prepares a dataset, others wait and find it done."""
    if root.local_path is None:
        yield  # An object store shows whole objects only, and all writers write the same.
        return
    root.local_path.mkdir(parents=True, exist_ok=True)
    with (root.local_path / f".{fingerprint}.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            report("data: another process prepares the same dataset; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write_windows(
    config: DataConfig, encoder: Encoder, location: Storage, corpus: Corpus, write: WriteTasks, report: Report
) -> list[tuple[Task, Receipt]]:
    tasks = plan_tasks(corpus.sources)
    receipts = read_receipts(location, audit_limits(config))
    if kept := sum(map(len, receipts.values())):
        report(f"data: going on after {kept} finished parts")
    write(tasks, config, encoder, location, receipts, report)
    return list(in_order(receipts, tasks))


def write_tasks(
    tasks: Sequence[Task],
    config: DataConfig,
    encoder: Encoder,
    location: Storage,
    receipts: dict[int, list[Receipt]],
    report: Report,
) -> None:
    """Write the windows of these tasks that have no receipt yet; ``receipts`` gets theirs."""
    size = sum(file.size for task in tasks for file in task.files)
    processes = config.processes or max(1, min(os.cpu_count() or 1, size // _BYTES_PER_PROCESS))
    work = BatchEncoder(config, encoders_of(config, encoder), TokenizerFacts.of(encoder.tokenizer, encoder.stops))
    writer = WindowWriter(location, config, receipts)
    jobs = chain.from_iterable(jobs_of(task, receipts.get(task.number, [])) for task in tasks)
    progress = _Progress(report)
    for encoded in ordered_map(work, jobs, processes):
        writer.add(encoded)
        progress.add(encoded)
    writer.finish()


class _Progress:
    """A line every ten seconds: preparing may take hours."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._began = self._told = time.monotonic()
        self._tokens = self._records = 0

    def add(self, encoded: EncodedBatch) -> None:
        self._records += sum(part.num_records for part in encoded.splits.values())
        self._tokens += sum(len(part.input_ids) for part in encoded.splits.values())
        now = time.monotonic()
        if now - self._told >= _TELL_EVERY_S:
            self._told = now
            speed = self._tokens / (now - self._began)
            where = encoded.job.source_batch.batch.path
            self._report(f"data: {self._records:,} records, {self._tokens:,} tokens, {speed:,.0f} tok/s; at {where}")


def _splits(
    config: DataConfig, location: Storage, written: list[tuple[Task, Receipt]], report: Report
) -> dict[str, SplitEntry]:
    """Raises DataError where nothing is left to train on."""
    asked = {TRAIN: True, VALIDATION: config.holds_out, TEST: bool(config.test)}
    splits = {name: _split_entry(config, location, name, written, report) for name, wanted in asked.items() if wanted}
    if splits[TRAIN].rows == 0:
        dropped = ", ".join(f"{count} {reason}" for reason, count in splits[TRAIN].dropped.items()) or "none"
        raise DataError(
            f"{config.train[0].path}: no record is left to train on (dropped: {dropped}; data.seq_len="
            f"{config.seq_len}); the rest went to validation"
        )
    return splits


def _split_entry(
    config: DataConfig, location: Storage, name: str, written: list[tuple[Task, Receipt]], report: Report
) -> SplitEntry:
    found = [(task, receipt.splits[name]) for task, receipt in written if name in receipt.splits]
    windows = [window for _, window in found]
    counts = np.concatenate([np.zeros(0, np.int32), *(window.row_counts for window in windows)])
    dropped: Counter[str] = Counter()
    for window in windows:
        dropped.update(window.dropped)
    rows: Counter[str] = Counter()
    for task, window in found:
        rows[task.source.name] += len(window.row_counts)
    entry = SplitEntry(
        shards=tuple(shard for window in windows for shard in window.shards),
        rows=len(counts),
        records=sum(window.records for window in windows),
        tokens=sum(window.tokens for window in windows),
        trained_tokens=int(counts.sum(dtype=np.int64)),
        dropped=dict(dropped),
        truncated=sum(window.truncated for window in windows),
        sources=tuple(SourceEntry(*item) for item in rows.items()),
        counts=write_counts(location, name, counts),
    )
    _tell(config, name, entry, report)
    return entry


def _tell(config: DataConfig, name: str, entry: SplitEntry, report: Report) -> None:
    if entry.rows:
        report(
            f"data: {name}: {entry.records:,} records, {entry.rows:,} packs of {config.seq_len} "
            f"({entry.tokens / entry.rows / config.seq_len:.1%} full), {entry.tokens:,} tokens, "
            f"{entry.trained_tokens / entry.tokens:.1%} trained"
        )
    if dropped := entry.dropped.get(DropReason.TOO_LONG):
        report(
            f"data: {name}: DROPPED {dropped:,} of {entry.records:,} records longer than data.seq_len="
            f"{config.seq_len}; raise it to keep them, or set data.too_long=truncate, or error to be stopped"
        )
    for reason in (DropReason.FILTERED, DropReason.DUPLICATE):
        if number := entry.dropped.get(reason):
            report(f"data: {name}: left out {number:,} of {entry.records:,} records ({reason.value}; data.cleaning)")
    if entry.truncated:
        report(f"data: {name}: cut {entry.truncated:,} of {entry.records:,} records to data.seq_len={config.seq_len}")
