"""From records to committed shards beside what can't be avoided, the tokenizer alone, and beside datasets and TRL.

Contenders, one process on one core each, taking turns in both orders because a shared machine's speed drifts. Two times
are told: by the clock, which counts on a machine of one's own, and of the processor (with that of child processes),
which hardly changes when others use the machine.

- raw: ``encode_batch`` of the tokenizer over texts that were rendered before, their ids as numpy arrays; no more.
- baton: ``prepare`` as the command runs it: reads the jsonl, renders, tokenizes, masks, packs, writes, hashes, commits.
- trl (--peer): the same records through ``datasets`` and TRL's own ``SFTTrainer._prepare_dataset`` (``datasets.map``s
  and packing by best fit) with assistant-only loss; its template marks the assistant's text, as it needs. TRL must be
  installed beside Baton (`pip install --no-deps trl`).

The tokenizer is trained on the data, byte-level BPE, up to 32,000 entries; the template is ChatML without marks.

    python benchmarks/prepare_speed.py --data train.jsonl --rounds 5 --repeat 4 --peer

``--cores 1 2`` tells instead what raw and baton gain from a second core: threads of the tokenizer there, processes
here, whose start counts. Each measurement is a process of its own, because a tokenizer's threads are set once.
"""

from __future__ import annotations

import os

# BATON_BENCHMARK_CORES is set by --cores, for the processes that it starts.
os.environ |= {
    "RAYON_NUM_THREADS": os.environ.get("BATON_BENCHMARK_CORES", "1"),
    "TOKENIZERS_PARALLELISM": str(os.environ.get("BATON_BENCHMARK_CORES", "1") != "1").lower(),
    "OMP_NUM_THREADS": "1",
}

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_shards.config import DataConfig
from data_shards.encoding.encoder import Encoder
from data_shards.prepare import prepare
from data_shards.storage import Storage

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
BATCH = 1000
STOP = "<|im_end|>"


def make_tokenizer(texts: list[str], vocab_size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|im_start|>", STOP],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=STOP, chat_template=TEMPLATE)


def numbered(rows: list[dict[str, str]], repeat: int) -> list[dict[str, str]]:
    """The rows ``repeat`` times, each with its number before the question, so that no two are equal."""
    return [
        {"question": f"{turn * len(rows) + index}: {row['question']}", "answer": row["answer"]}
        for turn in range(repeat)
        for index, row in enumerate(rows)
    ]


def conversation(row: dict[str, str]) -> list[dict[str, str]]:
    return [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]


def raw(tokenizer: Any, texts: list[str]) -> None:
    backend = tokenizer.backend_tokenizer
    for start in range(0, len(texts), BATCH):
        for encoding in backend.encode_batch(texts[start : start + BATCH], add_special_tokens=False):
            np.array(encoding.ids, np.int32)


def baton(tokenizer: Any, data: Path, seq_len: int, folder: Path) -> None:
    config = DataConfig(train=str(data), seq_len=seq_len, processes=int(os.environ["RAYON_NUM_THREADS"]))
    prepare(config, Encoder(tokenizer, config, [STOP]), Storage.at(folder))


def trl(tokenizer: Any, data: Path, seq_len: int, folder: Path) -> None:
    import datasets
    from trl import SFTTrainer

    datasets.disable_progress_bars()
    rows = datasets.load_dataset("json", data_files=str(data), split="train", cache_dir=str(folder))
    rows = rows.map(lambda row: {"messages": conversation(row)}, remove_columns=rows.column_names)
    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=MARKED, completion_only_loss=False)
    options = SimpleNamespace(
        assistant_only_loss=True,
        dataset_num_proc=None,
        dataset_text_field="text",
        max_length=seq_len,
        packing_strategy="bfd",
        shuffle_dataset=False,
    )
    prepared = SFTTrainer._prepare_dataset(trainer, rows, tokenizer, options, True, None, "train")
    assert {"input_ids", "labels", "seq_lengths"} <= set(prepared.column_names)


class Times(NamedTuple):
    clock_s: float
    processor_s: float


def now() -> Times:
    used = os.times()
    return Times(time.perf_counter(), used.user + used.system + used.children_user + used.children_system)


def in_turns(contenders: dict[str, Callable[[Path], None]], rounds: int, scratch: Path) -> dict[str, list[Times]]:
    """What each took, ``rounds`` times, each in a fresh folder; every other round in the opposite order."""
    taken: dict[str, list[Times]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name in list(contenders)[:: 1 if number % 2 == 0 else -1]:
            folder = scratch / f"{name}-{number}"
            begin = now()
            contenders[name](folder)
            taken[name].append(Times(*(after - before for after, before in zip(now(), begin, strict=True))))
            shutil.rmtree(folder, ignore_errors=True)
        lasts = ", ".join(f"{name} {times[-1].clock_s:.2f} s" for name, times in taken.items())
        print(f"round {number + 1}: {lasts}", flush=True)
    return taken


def report(taken: dict[str, list[Times]], num_records: int) -> None:
    medians = {name: Times(*map(statistics.median, zip(*times, strict=True))) for name, times in taken.items()}
    print("medians        clock  processor  records/s by the clock")
    for name, (clock_s, processor_s) in medians.items():
        print(f"{name:10} {clock_s:7.2f} s  {processor_s:7.2f} s  {num_records / clock_s:9,.0f}")
    ours = taken["baton"]
    for name, theirs in taken.items():
        if name == "baton":
            continue
        # Round by round: a shared machine's speed drifts, and less within a round than between rounds.
        ratios = sorted(other.clock_s / own.clock_s for other, own in zip(theirs, ours, strict=True))
        by_processor = statistics.median(b.processor_s / a.processor_s for a, b in zip(ours, theirs, strict=True))
        print(
            f"baton is {statistics.median(ratios):.2f} times as fast as {name} in the median round "
            f"({ratios[0]:.2f}-{ratios[-1]:.2f}; by processor time {by_processor:.2f})"
        )


def measured_on(cores: int, options: argparse.Namespace) -> dict[str, float]:
    """Seconds by the clock of one round of raw and baton."""
    command = [
        *(sys.executable, __file__, "--data", str(options.data), "--rounds", "1", "--repeat", str(options.repeat)),
        *("--seq-len", str(options.seq_len), "--vocab-size", str(options.vocab_size)),
    ]
    environment = os.environ | {"BATON_BENCHMARK_CORES": str(cores)}
    done = subprocess.run(command, env=environment, text=True, capture_output=True, check=True)
    found = re.search(r"round 1: raw ([\d.]+) s, baton ([\d.]+) s", done.stdout)
    assert found, done.stdout
    return {"raw": float(found[1]), "baton": float(found[2])}


def report_cores(options: argparse.Namespace) -> None:
    """The gain of each contender from more cores, and of the one beside the other."""
    few, many = options.cores
    taken: dict[tuple[str, int], list[float]] = defaultdict(list)
    for number in range(options.rounds):
        for cores in (few, many) if number % 2 == 0 else (many, few):
            for name, seconds in measured_on(cores, options).items():
                taken[name, cores].append(seconds)
                print(f"round {number + 1}, {cores} cores: {name} {seconds:.2f} s", flush=True)
    gains = {
        name: statistics.median(taken[name, few]) / statistics.median(taken[name, many]) for name in ("raw", "baton")
    }
    for name, gain in gains.items():
        print(f"{name} is {gain:.2f} times as fast on {many} cores as on {few}")
    print(f"baton's gain is {gains['baton'] / gains['raw']:.2f} of raw's")


def main() -> None:
    shared = os.environ.get("BATON_SHARED")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = shared and Path(shared) / "data/gsm8k/train.jsonl"
    parser.add_argument("--data", type=Path, default=default, required=not shared, help="question and answer, as jsonl")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=1, help="the data so many times, with its records numbered")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--peer", action="store_true", help="beside datasets.map and TRL's packing, too")
    parser.add_argument("--cores", type=int, nargs=2, help="what is gained from so many cores beside so many")
    options = parser.parse_args()
    if options.cores:
        if options.peer:
            parser.error("--cores and --peer are two comparisons; ask for one at a time")
        report_cores(options)
        return
    rows = [json.loads(line) for line in options.data.read_text(encoding="utf-8").splitlines()]
    tokenizer = make_tokenizer([text for row in rows for text in row.values()], options.vocab_size)
    rows = numbered(rows, options.repeat)
    texts = [tokenizer.apply_chat_template(conversation(row), tokenize=False) for row in rows]
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        data = scratch / "data.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        contenders: dict[str, Callable[[Path], None]] = {
            "raw": lambda folder: raw(tokenizer, texts),
            "baton": lambda folder: baton(tokenizer, data, options.seq_len, folder),
        }
        if options.peer:
            contenders["trl"] = lambda folder: trl(tokenizer, data, options.seq_len, folder)
        size = data.stat().st_size / 2**20
        print(f"{len(rows):,} records, {size:.1f} MiB of jsonl, {len(tokenizer):,} entries, {options.rounds} rounds")
        report(in_turns(contenders, options.rounds, scratch), len(rows))


if __name__ == "__main__":
    main()
