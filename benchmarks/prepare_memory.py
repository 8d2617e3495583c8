"""Memory that preparing takes, by the size of what is prepared: it should not grow with the corpus.

Each size is prepared by a process of its own, on one core, from GSM8K's records over and over, each with its number.
Told is that process's largest resident set (files that it maps included), less what it had after its imports.

    python benchmarks/prepare_memory.py --data train.jsonl --megabytes 10 100 1000
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.prepare_speed import STOP, make_tokenizer
from data_shards.config import DataConfig
from data_shards.encoding.encoder import Encoder
from data_shards.prepare import prepare
from data_shards.storage import Storage


def write_records(source: Path, target: Path, megabytes: int) -> int:
    """Returns how many."""
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    size = 0
    with target.open("w", encoding="utf-8") as file:
        for number in count():
            row = rows[number % len(rows)]
            size += file.write(json.dumps(row | {"question": f"{number}: {row['question']}"}) + "\n")
            if size >= megabytes * 10**6:
                return number + 1
    raise AssertionError("count() does not end")


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def prepare_one(data: Path, tokenizer: Path, folder: Path) -> None:
    """In a process of its own: prints a line of JSON."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    config = DataConfig(train=str(data), seq_len=2048, processes=1)
    before, started = peak_mib(), time.perf_counter()
    prepared = prepare(config, Encoder(loaded, config, [STOP]), Storage.at(folder))
    seconds, packs = time.perf_counter() - started, prepared.manifest.splits["train"].rows
    print(json.dumps({"before": before, "peak": peak_mib(), "seconds": seconds, "packs": packs}))


def main() -> None:
    shared = os.environ.get("BATON_SHARED")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = shared and Path(shared) / "data/gsm8k/train.jsonl"
    parser.add_argument("--data", type=Path, default=default, required=not shared, help="question and answer, as jsonl")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--one", type=Path, nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        prepare_one(*options.one)
        return
    rows = [json.loads(line) for line in options.data.read_text(encoding="utf-8").splitlines()]
    for megabytes in options.megabytes:
        with tempfile.TemporaryDirectory() as temp:
            tokenizer, data = Path(temp) / "tokenizer", Path(temp) / "data.jsonl"
            make_tokenizer([text for row in rows for text in row.values()], 32_000).save_pretrained(tokenizer)
            records = write_records(options.data, data, megabytes)
            command = [sys.executable, __file__, "--data", str(options.data), "--one"]
            environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                [*command, str(data), str(tokenizer), f"{temp}/prepared"],
                env=environment,
                text=True,
                capture_output=True,
                check=True,
            )
            found = json.loads(done.stdout.splitlines()[-1])
            grown = found["peak"] - found["before"]
            print(
                f"{megabytes:6,} MB  {records:11,} records  {found['packs']:9,} packs  {found['seconds']:7.1f} s  "
                f"{found['before']:5,.0f} MiB before, at most {found['peak']:5,.0f} MiB: {grown:5,.0f} MiB more",
                flush=True,
            )


if __name__ == "__main__":
    main()
