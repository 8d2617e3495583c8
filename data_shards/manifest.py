"""What a prepared dataset is: one manifest, written last, that lists its shards (pure)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from data_shards import signed_json
from data_shards.errors import CorruptFile
from data_shards.storage import FileEntry

KIND = "baton-dataset"
VERSION = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class ShardEntry:
    file: FileEntry
    rows: int


@dataclass(frozen=True)
class SplitEntry:
    shards: tuple[ShardEntry, ...]
    rows: int
    """packs"""
    records: int
    tokens: int
    trained_tokens: int
    dropped_too_long: int = 0


@dataclass(frozen=True)
class DatasetManifest:
    fingerprint: str
    """of source content, tokenizer, template, options and format versions; never of the package's version"""
    seq_len: int
    splits: dict[str, SplitEntry]
    identity: dict[str, Any] = field(default_factory=dict)
    """what the fingerprint was made of"""

    def to_bytes(self) -> bytes:
        payload = asdict(self)
        for name, split in self.splits.items():
            payload["splits"][name]["shards"] = [
                {"file": shard.file.to_json(), "rows": shard.rows} for shard in split.shards
            ]
        return signed_json.encode(payload, KIND, VERSION)

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> DatasetManifest:
        """Raises CorruptFile unless it is whole, ours, of a known version, and names only files beside itself."""
        body = signed_json.decode(data, KIND, VERSION, where)
        try:
            splits = {
                name: SplitEntry(
                    **split
                    | {
                        "shards": tuple(
                            ShardEntry(FileEntry.from_json(s["file"], where), s["rows"]) for s in split["shards"]
                        )
                    }
                )
                for name, split in body["splits"].items()
            }
            return cls(**body | {"splits": splits})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptFile(f"{where}: a field is missing or of the wrong type ({error})") from error
