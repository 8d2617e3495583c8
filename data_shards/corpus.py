"""What is to be prepared: the sources of a configuration, and what identifies them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from data_shards import manifest as manifests
from data_shards import signed_json
from data_shards.config import DataConfig
from data_shards.encoding.encoder import Encoder
from data_shards.order.sampler import SAMPLER_VERSION
from data_shards.sources.config import SourceConfig
from data_shards.sources.files import SourceFile
from data_shards.sources.find import content_identity, resolve
from data_shards.sources.record import Record
from data_shards.sources.records import source_batches
from data_shards.splits import TRAIN
from data_shards.storage import sha256
from data_shards.writing.batch_encoder import records_by_split

_OPTIONS = (
    "validation_fraction",
    "split",
    "seq_len",
    "packing",
    "order",
    "too_long",
    "cleaning",
    "require_stop_token",
)
_OF_A_SOURCE = ("name", "format", "columns", "limit", "label_names", "prompt_template")


class Corpus:
    """The sources of a configuration with their files, looked up once."""

    def __init__(self, config: DataConfig) -> None:
        self.sources: list[tuple[str, SourceConfig, tuple[SourceFile, ...]]] = [
            (role, source, resolve(source)) for role, sources in config.sources().items() for source in sources
        ]

    def identity(self) -> list[dict[str, Any]]:
        """What is in the sources, and how it is read. Paths are no part of it."""
        return [
            {
                "role": role,
                **source.model_dump(mode="json", include=set(_OF_A_SOURCE)),
                "content": [content_identity(file) for file in files],
            }
            for role, source, files in self.sources
        ]


def fingerprint_parts(config: DataConfig, encoder: Encoder, corpus: Corpus | None = None) -> dict[str, Any]:
    """Everything that the packs and their order depend on. Weights of sources are not in it: shards stay the same."""
    corpus = corpus or Corpus(config)
    encoders = encoders_of(config, encoder)
    templates = [encoders[source.chat_template].template_hash for _, source, _ in corpus.sources]
    return {
        "sources": [source | {"template": text} for source, text in zip(corpus.identity(), templates, strict=True)],
        "encoding": encoder.identity(),
        "options": config.model_dump(mode="json", include=set(_OPTIONS)) | {"max_shard_tokens": config.shard_tokens},
        "format_version": manifests.VERSION,
        "sampler_version": SAMPLER_VERSION,
    }


def fingerprint_of(parts: dict[str, Any]) -> str:
    return sha256(signed_json.canonical(parts))[:32]


def encoders_of(config: DataConfig, encoder: Encoder) -> dict[str | None, Encoder]:
    """By a source's own chat template; None: it has none."""
    templates = {source.chat_template for sources in config.sources().values() for source in sources}
    return {None: encoder} | {path: encoder.with_template(path) for path in sorted(filter(None, templates))}


def num_records(config: DataConfig) -> int:
    """Rows of the training sources, held-out ones included; they are cut into batches, not parsed."""
    return sum(each.num_rows for source in config.sources()[TRAIN] for each in source_batches(source))


def records_of(config: DataConfig, split: str) -> Iterator[Record]:
    """The records of one split, in the sources' order, cleaned."""
    for role, sources in config.sources().items():
        for source in sources:
            for source_batch in source_batches(source):
                yield from records_by_split(source_batch, role, config).get(split, [])
