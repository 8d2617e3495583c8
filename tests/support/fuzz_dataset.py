"""Flips random bytes of a prepared dataset, one at a time, and looks at what a reader makes of it.

As a script it does so as often as it is told: ``python -m tests.support.fuzz_dataset --flips 1000000``.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_shards.errors import CorruptFile
from data_shards.reading import shard_reader
from data_shards.reading.shard_reader import SplitReader, read_dataset_manifest
from data_shards.storage import Storage
from tests.support.datasets import random_packs, write_dataset

Content = list[tuple[bytes, bytes, bytes]]


def make_dataset(folder: Path) -> Storage:
    """A few small shards, the counts and the manifest: few bytes, so that flips meet all of them."""
    location = Storage.at(folder)
    write_dataset(location, random_packs(24, 32), 32, 260)
    return location


def read_all(location: Storage) -> Content:
    """Every row, and a step's count checked against the rows, as training does."""
    reader = SplitReader(location, read_dataset_manifest(location), "train")
    packs = reader.packs(np.arange(reader.num_rows))
    trained = 0
    for pack in packs:
        firsts = np.cumsum(pack.sequence_lengths) - pack.sequence_lengths
        trained += int(pack.trained.sum()) - int(pack.trained[firsts].sum())
    assert trained == reader.num_trained(np.arange(reader.num_rows)), "the counts are not those of the rows"
    return [(p.input_ids.tobytes(), p.trained.tobytes(), p.sequence_lengths.tobytes()) for p in packs]


def flip_bytes(location: Storage, flips: int, seed: int) -> Counter[tuple[str, str]]:
    """How many flips of each file were caught, and how many changed nothing that is read.

    Raises AssertionError where one was accepted and something else was read, and any error but
    CorruptFile as it is.
    """
    assert location.local_path is not None
    folder, chance = location.local_path, random.Random(seed)
    wanted = read_all(location)
    files = {path: path.read_bytes() for path in sorted(folder.iterdir())}
    outcomes: Counter[tuple[str, str]] = Counter()
    for _ in range(flips):
        path = chance.choice(list(files))
        place, mask = chance.randrange(len(files[path])), chance.randrange(1, 256)
        _write_byte(path, place, files[path][place] ^ mask)
        try:
            found = read_all(location)
        except CorruptFile as error:
            assert path.name in str(error), f"{path.name}, byte {place} ^ {mask}: blamed on something else: {error}"
            outcomes[path.name, "caught"] += 1
        else:
            assert found == wanted, f"{path.name}, byte {place} ^ {mask}: other rows were read, and nothing was said"
            outcomes[path.name, "harmless"] += 1
        finally:
            _write_byte(path, place, files[path][place])
    return outcomes


def _write_byte(path: Path, place: int, value: int) -> None:
    with path.open("r+b") as file:  # in place: to cut a file off and write it anew takes ten times as long
        file.seek(place)
        file.write(bytes([value]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flips", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    # Trying again helps against storage that fails for a moment, not against a file that stays wrong.
    with tempfile.TemporaryDirectory() as temp, pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_reader, "_RETRY_PAUSES_S", ())
        started = time.monotonic()
        outcomes = flip_bytes(make_dataset(Path(temp)), options.flips, options.seed)
        print(f"{options.flips:,} flips in {time.monotonic() - started:.0f} s, seed {options.seed}; none read wrongly")
        for (name, outcome), count in sorted(outcomes.items()):
            print(f"  {name:24} {outcome:9} {count:9,}")


if __name__ == "__main__":
    main()
