"""What a prepared dataset is: one manifest, written last, that lists its shards (pure)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from data_shards import signed_json
from data_shards.errors import CorruptFile
from data_shards.hashed_file import FileEntry
from data_shards.order.mixture import SourceRows

KIND = "baton-dataset"
VERSION = 2
MANIFEST = "manifest.json"
_PLAIN = ("rows", "records", "tokens", "trained_tokens", "dropped", "truncated")


@dataclass(frozen=True)
class ShardEntry:
    file: FileEntry
    rows: int


class SourceEntry(NamedTuple):
    """Rows of a source are contiguous, in the order in which a split lists its sources."""

    name: str
    rows: int


@dataclass(frozen=True)
class SplitEntry:
    shards: tuple[ShardEntry, ...]
    rows: int
    """packs"""
    records: int
    """that were read for it, dropped ones included"""
    tokens: int
    trained_tokens: int
    dropped: dict[str, int]
    """records that were left out, by reason"""
    truncated: int
    """records"""
    sources: tuple[SourceEntry, ...]
    counts: FileEntry
    """the trained tokens of each row, in one small file"""

    @property
    def files(self) -> tuple[FileEntry, ...]:
        return (*(shard.file for shard in self.shards), self.counts)

    def source_rows(self, weights: Mapping[str, float]) -> tuple[SourceRows, ...]:
        """For the sampler. Weights are no part of a dataset, so they can change without preparing again."""
        return tuple(SourceRows(source.name, source.rows, weights.get(source.name)) for source in self.sources)


@dataclass(frozen=True)
class DatasetManifest:
    fingerprint: str
    """of source content, tokenizer, template, options and format versions; never of the package's version"""
    seq_len: int
    splits: dict[str, SplitEntry]
    identity: dict[str, Any] = field(default_factory=dict)
    """what the fingerprint was made of"""

    def has_rows(self, split: str) -> bool:
        return split in self.splits and self.splits[split].rows > 0

    def to_bytes(self) -> bytes:
        payload = asdict(self)
        payload["splits"] = {name: split_to_json(split) for name, split in self.splits.items()}
        return signed_json.encode(payload, KIND, VERSION)

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> DatasetManifest:
        """Raises CorruptFile unless it is whole, ours, of a known version, and names only files beside itself."""
        body = signed_json.decode(data, KIND, VERSION, where)
        try:
            splits = {name: split_from_json(split, where) for name, split in body["splits"].items()}
            return cls(**body | {"splits": splits})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptFile(f"{where}: a field is missing or of the wrong type ({error})") from error


def shards_to_json(shards: Iterable[ShardEntry]) -> list[dict[str, Any]]:
    return [{"file": shard.file.to_json(), "rows": shard.rows} for shard in shards]


def shards_from_json(value: list[dict[str, Any]], where: str) -> tuple[ShardEntry, ...]:
    return tuple(ShardEntry(FileEntry.from_json(shard["file"], where), shard["rows"]) for shard in value)


def split_to_json(split: SplitEntry) -> dict[str, Any]:
    return {
        **{name: getattr(split, name) for name in _PLAIN},
        "sources": [source._asdict() for source in split.sources],
        "counts": split.counts.to_json(),
        "shards": shards_to_json(split.shards),
    }


def split_from_json(value: dict[str, Any], where: str) -> SplitEntry:
    return SplitEntry(
        **{name: value[name] for name in _PLAIN},
        sources=tuple(SourceEntry(**source) for source in value["sources"]),
        counts=FileEntry.from_json(value["counts"], where),
        shards=shards_from_json(value["shards"], where),
    )
