"""Reading shuffled rows as a trainer consumes them: Baton beside Hugging Face datasets, MosaicML streaming and litdata.

The same rows of 2,048 tokens (ids, what is trained, the lengths of the packed sequences) are written in each library's
own format, and read in random order, batch by batch, each library by its fastest documented way:

- Baton: ``Sampler.rows_of_step`` and ``SplitReader.packs``
- datasets: ``load_from_disk``, one indexing call a batch, in numpy format, and in the default format, which gives lists
  (as transformers' Trainer and TRL read)
- streaming: ``LocalDataset`` (map-style, without the bookkeeping of ``StreamingDataset``) at the same random rows, and
  ``StreamingDataset(shuffle=True)`` iterated
- litdata: ``StreamingDataset`` at the same random rows, and with ``shuffle=True`` iterated

Each way is timed to numpy rows ("rows"), and through the trainer's own collate to the tensors of a micro batch
("micro batches"): there all share the same cost. The contenders take turns, in one order and the other, because a
shared machine's speed drifts. Then: the first micro batch after opening a split at several positions of an epoch.

The peers (``pip install --no-deps mosaicml-streaming litdata`` and what those import) may lie in a folder of their own:
--peers. streaming imports torchvision, of which it needs nothing here: a stub stands in.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data_shards.order.sampler import Sampler  # noqa: E402
from data_shards.pack import Pack, Sequence  # noqa: E402
from data_shards.reading.shard_reader import SplitReader, read_dataset_manifest  # noqa: E402
from data_shards.storage import Storage  # noqa: E402
from tests.support.datasets import random_packs, write_dataset  # noqa: E402

SEQ_LEN = 2048
GLOBAL_BATCH, BATCH = 256, 8
"""Rows of a step, and of a micro batch."""
COLUMNS = ("input_ids", "trained", "sequence_lengths")

Batches = Iterator[list[Pack]]
Contender = Callable[[int], Batches]
"""A new epoch, in the order of this seed."""


def sampler(num_rows: int, seed: int) -> Sampler:
    return Sampler(num_rows, seed, GLOBAL_BATCH, num_rows)


def random_rows(num_rows: int, seed: int) -> Iterator[np.ndarray]:
    """The rows of each micro batch."""
    order = sampler(num_rows, seed)
    for step in range(order.num_steps):
        rows = order.rows_of_step(step)
        yield from (rows[start : start + BATCH] for start in range(0, len(rows), BATCH))


def columns_of(pack: list[Sequence]) -> dict[str, np.ndarray]:
    return {
        "input_ids": np.concatenate([sequence.input_ids for sequence in pack]),
        "trained": np.concatenate([sequence.trained for sequence in pack]).astype(np.uint8),
        "sequence_lengths": np.array([len(sequence.input_ids) for sequence in pack], np.int32),
    }


def as_pack(row: dict[str, Any]) -> Pack:
    return Pack(*(row[name] for name in COLUMNS))


def grouped(rows: Iterator[dict[str, Any]]) -> Batches:
    batch: list[Pack] = []
    for row in rows:
        batch.append(as_pack(row))
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def baton(folder: Path, packs: list[list[Sequence]]) -> dict[str, Contender]:
    location = Storage.at(folder / "baton")
    write_dataset(location, packs, SEQ_LEN, 4_000_000)
    reader = SplitReader(location, read_dataset_manifest(location), "train")

    def read(seed: int) -> Batches:
        return (reader.packs(rows) for rows in random_rows(len(packs), seed))

    return {"baton": read}


def hugging_face(folder: Path, packs: list[list[Sequence]]) -> dict[str, Contender]:
    import datasets

    features = datasets.Features(
        {
            "input_ids": datasets.Sequence(datasets.Value("int32")),
            "trained": datasets.Sequence(datasets.Value("uint8")),
            "sequence_lengths": datasets.Sequence(datasets.Value("int32")),
        }
    )
    rows = [columns_of(pack) for pack in packs]
    made = datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in COLUMNS}, features)
    made.save_to_disk(str(folder / "datasets"))
    lists = datasets.load_from_disk(str(folder / "datasets"))
    arrays = lists.with_format("numpy")

    def as_arrays(seed: int) -> Batches:
        for chosen in random_rows(len(packs), seed):
            batch = arrays[chosen.tolist()]
            yield [Pack(*(batch[name][i] for name in COLUMNS)) for i in range(len(chosen))]

    def as_lists(seed: int) -> Batches:
        for chosen in random_rows(len(packs), seed):
            batch = lists[chosen.tolist()]
            yield [Pack(*(np.array(batch[name][i], np.int32) for name in COLUMNS)) for i in range(len(chosen))]

    return {"datasets, numpy": as_arrays, "datasets, lists": as_lists}


class _Stub(types.ModuleType):
    """Any name of torchvision's, as a class that does nothing."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def _stub_torchvision() -> None:
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        for name in ("", ".transforms", ".transforms.functional", ".datasets", ".io", ".models"):
            sys.modules[f"torchvision{name}"] = _Stub(f"torchvision{name}")


def mosaic(folder: Path, packs: list[list[Sequence]]) -> dict[str, Contender]:
    import transformers.feature_extraction_utils  # noqa: F401 - looks for torchvision, so it comes before the stub

    _stub_torchvision()
    from streaming import LocalDataset, MDSWriter, StreamingDataset

    place = str(folder / "streaming")
    encodings = {"input_ids": "ndarray:int32", "trained": "ndarray:uint8", "sequence_lengths": "ndarray:int32"}
    with MDSWriter(out=place, columns=encodings) as writer:
        for pack in packs:
            writer.write(columns_of(pack))
    local = LocalDataset(place)
    stream = StreamingDataset(local=place, shuffle=True, batch_size=BATCH)

    def by_index(seed: int) -> Batches:
        return ([as_pack(local[int(row)]) for row in rows] for rows in random_rows(len(packs), seed))

    def iterated(seed: int) -> Batches:
        return grouped(iter(stream))

    return {"streaming, by index": by_index, "streaming, iterated": iterated}


def litdata_of(folder: Path, packs: list[list[Sequence]]) -> dict[str, Contender]:
    from litdata.streaming import StreamingDataset
    from litdata.streaming.cache import Cache

    place = str(folder / "litdata")
    cache = Cache(place, chunk_bytes="64MB")
    for index, pack in enumerate(packs):
        cache[index] = columns_of(pack)
    cache.done()
    cache.merge()
    by_place = StreamingDataset(place, shuffle=False)
    shuffled = StreamingDataset(place, shuffle=True)

    def by_index(seed: int) -> Batches:
        return ([as_pack(by_place[int(row)]) for row in rows] for rows in random_rows(len(packs), seed))

    def iterated(seed: int) -> Batches:
        return grouped(iter(shuffled))

    return {"litdata, by index": by_index, "litdata, iterated": iterated}


WAYS = {"baton": baton, "datasets": hugging_face, "streaming": mosaic, "litdata": litdata_of}


def timed(batches: Batches, use: Callable[[list[Pack]], Any], limit: int) -> float:
    """Microseconds a row, over at most ``limit`` rows."""
    seen = 0
    started = time.perf_counter()
    for batch in batches:
        use(batch)
        seen += len(batch)
        if seen >= limit:
            break
    return (time.perf_counter() - started) / seen * 1e6


def check_content(found: dict[str, Contender], packs: list[list[Sequence]]) -> None:
    """All contenders read the same rows: equal sums over one epoch."""
    wanted = sum(int(columns_of(pack)["input_ids"].sum(dtype=np.int64)) for pack in packs)
    for name, read in found.items():
        rows = [pack for batch in read(0) for pack in batch]
        total = sum(int(pack.input_ids.sum(dtype=np.int64)) for pack in rows)
        if (len(rows), total) != (len(packs), wanted):
            raise SystemExit(f"{name} read {len(rows)} rows with the sum {total}; written: {len(packs)}, {wanted}")


def alternate(
    found: dict[str, Contender], use: Callable[[list[Pack]], Any], rounds: int, limit: int
) -> dict[str, float]:
    """Median microseconds a row, by contender."""
    times: dict[str, list[float]] = {name: [] for name in found}
    for index in range(rounds):
        for name in list(found) if index % 2 == 0 else list(found)[::-1]:
            times[name].append(timed(found[name](index), use, limit))
    return {name: statistics.median(values) for name, values in times.items()}


def show(what: str, medians: dict[str, float]) -> None:
    print(f"\n{what}: microseconds a row, and how many times Baton's")
    for name, value in medians.items():
        print(f"  {name:22} {value:8.1f}  {value / medians['baton']:6.1f}x", flush=True)


def first_batches(location: Storage, num_rows: int) -> None:
    """Seconds from opening the split to the first micro batch, in a reader of its own each time."""
    from trainer.batch import collate

    print("\nfirst micro batch after a resume (open, order, read, collate)")
    for share in (0.0, 0.5, 0.9, 0.99):
        started = time.perf_counter()
        reader = SplitReader(location, read_dataset_manifest(location), "train")
        rows = sampler(num_rows, 7).rows_of_step(int(share * num_rows / GLOBAL_BATCH))
        reader.num_trained(rows)
        collate(reader.packs(rows[:BATCH]))
        print(f"  at {share:4.0%} of the epoch: {time.perf_counter() - started:.4f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="a folder that holds the peers' packages")
    parser.add_argument("--rows", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--limit", type=int, default=2000, help="rows read a turn")
    parser.add_argument("--only", nargs="*", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--folder", type=Path, help="where the datasets are written; default a temporary one")
    options = parser.parse_args()
    if options.peers:
        sys.path.append(str(options.peers))
    import torch

    from trainer.batch import collate
    from trainer.host_memory import keep_freed_memory

    torch.set_num_threads(1)
    keep_freed_memory()  # as the trainer does on CPUs; it serves all contenders alike
    logging.disable(logging.WARNING)
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    packs = random_packs(options.rows, SEQ_LEN, full=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as temp:
        folder = Path(temp)
        found = {name: read for way in options.only for name, read in WAYS[way](folder, packs).items()}
        check_content(found, packs)
        print(f"{options.rows:,} rows of {SEQ_LEN:,} tokens, batches of {BATCH}, {options.rounds} rounds, medians")
        show("rows", alternate(found, lambda batch: None, options.rounds, options.limit))
        show("micro batches", alternate(found, collate, options.rounds, options.limit))
        first_batches(Storage.at(folder / "baton"), options.rows)


if __name__ == "__main__":
    main()
