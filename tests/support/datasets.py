"""Prepared datasets of random packs, written as preparing writes them, without records or a tokenizer."""

from __future__ import annotations

import numpy as np

from data_shards.manifest import MANIFEST, DatasetManifest, SourceEntry, SplitEntry
from data_shards.pack import Sequence
from data_shards.storage import Storage
from data_shards.writing.packed_tokens import PackedTokens
from data_shards.writing.packing import Packs
from data_shards.writing.row_counts import write_counts
from data_shards.writing.shard_writer import write_shards


def random_packs(num_rows: int, seq_len: int, seed: int = 0, *, full: bool = False) -> list[list[Sequence]]:
    """Packs of one to four sequences; without ``full`` most have some room left."""
    rng = np.random.default_rng(seed)
    packs = []
    for _ in range(num_rows):
        tokens = seq_len if full else int(rng.integers(8, seq_len + 1))
        cuts = np.sort(rng.choice(np.arange(2, tokens - 1), size=int(rng.integers(0, 4)), replace=False))
        lengths = np.diff([0, *cuts, tokens])
        packs.append(
            [Sequence(rng.integers(0, 32_000, n).astype(np.int32), rng.integers(0, 2, n).astype(bool)) for n in lengths]
        )
    return packs


def packed(packs: list[list[Sequence]]) -> PackedTokens:
    sequences = [sequence for pack in packs for sequence in pack]
    lengths = np.array([len(sequence.input_ids) for sequence in sequences])
    bounds = np.cumsum([0, *map(len, packs)])
    return PackedTokens(
        np.concatenate([sequence.input_ids for sequence in sequences]),
        np.concatenate([sequence.trained for sequence in sequences]),
        np.cumsum(lengths) - lengths,
        Packs(np.arange(len(sequences)), np.zeros_like(lengths), lengths, bounds),
    )


def write_dataset(location: Storage, packs: list[list[Sequence]], seq_len: int, shard_tokens: int) -> DatasetManifest:
    """One split, ``train``, committed."""
    shards = tuple(write_shards(location, "train", packed(packs), shard_tokens))
    counts = [sum(sequence.num_targets for sequence in pack) for pack in packs]
    split = SplitEntry(
        shards=shards,
        rows=len(packs),
        records=sum(map(len, packs)),
        tokens=sum(len(sequence.input_ids) for pack in packs for sequence in pack),
        trained_tokens=sum(counts),
        dropped={},
        truncated=0,
        sources=(SourceEntry("random", len(packs)),),
        counts=write_counts(location, "train", counts),
    )
    manifest = DatasetManifest("0" * 32, seq_len, {"train": split})
    location.write(MANIFEST, [manifest.to_bytes()])
    return manifest
