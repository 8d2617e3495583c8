"""What names a base model in runs and checkpoints: the same name means the same bytes.

A base from the hub is named by its commit. A local one by a hash of its config.json and weights, every byte: two that
differ in one are two. Reading 140 GB takes minutes, so what was read is noted beside the runs, and believed for as long
as the system says of every file that it is still the same: size, inode, time of the last change of contents and of the
inode (which nobody can set back, as ``cp -p`` and ``touch`` do with the former).
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

from data_shards.errors import CorruptFile
from data_shards.hashed_file import BLOCK_BYTES
from data_shards.storage import Storage
from trainer.base_location import weight_files
from trainer.config import ModelConfig
from trainer.errors import ModelError
from trainer.run_directory import read_json, write_json

NOTES = "base-identities"
"""Folder beside the runs."""
_READERS = 4
_SETTLED_NS = 2_000_000_000
"""A file changed later than this before it was looked at may change again within the tick of its file system's clock,
unseen; it is not noted."""

Stamps = dict[str, list[int]]
"""File name to what the system says of it."""


@dataclass(frozen=True)
class BaseIdentity:
    name: str
    """what runs and checkpoints record"""
    files: dict[str, str]
    """xxh3-128 of each file by name, to say which one changed; none where a commit of the hub names the base"""


def base_identity(config: ModelConfig, path: Path, notes: Storage) -> BaseIdentity:
    """
    Args:
        path: what ``locate_base`` gave.
        notes: where identities are noted, ``NOTES`` beside the runs.

    Raises ModelError where a file changes while it is read.
    """
    if not Path(config.base).expanduser().is_dir():
        return BaseIdentity(f"{config.base}@{path.name}", {})
    files = [path / "config.json", *([] if config.random_init else weight_files(path))]
    now, stamps = time.time_ns(), stamps_of(files)
    note = f"{xxhash.xxh3_128(json.dumps(stamps).encode()).hexdigest()}.json"
    if (noted := _read_note(notes, note, stamps)) is not None:
        return noted
    identity = read_identity(files)
    if stamps_of(files) != stamps:
        raise ModelError(
            f"the files of model.base={config.base!r} changed while they were read; are they being copied?"
        )
    if settled(stamps, now):
        write_json(notes, note, {"stamps": stamps, **asdict(identity)})
    return identity


def refuse_other_base(base: str, checkpoint: str, trained_from: str) -> None:
    """Raises ModelError unless a checkpoint was trained from the base at hand. Arguments are names of identities."""
    if trained_from != base:
        raise ModelError(
            f"checkpoint {checkpoint} was trained from the base {trained_from}, and model.base is {base}: going on "
            "would put what it learnt on other weights. Give the base that it was trained from or, if you mean it, "
            "resume.allow=[model.base]"
        )


def stamps_of(files: Sequence[Path]) -> Stamps:
    found = {file.name: file.stat() for file in files}
    return {name: [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in found.items()}


def settled(stamps: Stamps, now_ns: int) -> bool:
    """Whether any later change must show in the stamps (pure)."""
    return all(now_ns - max(mtime_ns, ctime_ns) >= _SETTLED_NS for _, _, mtime_ns, ctime_ns in stamps.values())


def read_identity(files: Sequence[Path]) -> BaseIdentity:
    """From every byte of ``files``, read by several threads and hashed in order: the name is
    ``data_shards.storage.content_hash`` of them, as it has been since the first release."""
    whole, by_name = xxhash.xxh3_128(), {}
    buffers = [bytearray(BLOCK_BYTES) for _ in range(2 * _READERS)]  # used again and again: new memory is slow to fill
    with ThreadPoolExecutor(_READERS) as pool:
        for file in files:
            alone = xxhash.xxh3_128()
            whole.update(f"{file.stat().st_size}\0".encode())
            for block in _blocks(pool, file, buffers):
                whole.update(block)
                alone.update(block)
            by_name[file.name] = alone.hexdigest()
    return BaseIdentity(whole.hexdigest(), by_name)


def _blocks(pool: ThreadPoolExecutor, path: Path, buffers: Sequence[bytearray]) -> Iterator[memoryview]:
    """The file in order, read ahead into ``buffers``; each block is valid until the next is asked for."""
    ahead: deque[Future[memoryview]] = deque()
    for number, start in enumerate(range(0, path.stat().st_size, BLOCK_BYTES)):
        if number >= len(buffers):
            yield ahead.popleft().result()
        ahead.append(pool.submit(_read_block, path, start, buffers[number % len(buffers)]))
    while ahead:
        yield ahead.popleft().result()


def _read_block(path: Path, start: int, buffer: bytearray) -> memoryview:
    with path.open("rb") as file:
        file.seek(start)
        return memoryview(buffer)[: file.readinto(buffer)]


def _read_note(notes: Storage, note: str, stamps: Stamps) -> BaseIdentity | None:
    try:
        found = read_json(notes, note)
        if found is None or found["stamps"] != stamps:
            return None
        return BaseIdentity(str(found["name"]), dict(found["files"]))
    except (CorruptFile, KeyError, TypeError, ValueError):
        return None  # then the base itself is read
