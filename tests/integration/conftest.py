"""One tiny base with a tokenizer and one small dataset, shared by the tests that run the command."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launch.quickstart_inputs import make_base, records, write_jsonl


@dataclass(frozen=True)
class Workshop:
    """A base, data, and the configuration values to train on them."""

    base: Path
    data: Path
    values: dict[str, Any]


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    folder = tmp_path_factory.mktemp("workshop")
    rows = records(420, seed=3)
    write_jsonl(folder / "train.jsonl", rows[20:])
    write_jsonl(folder / "validation.jsonl", rows[:20])
    make_base(folder / "base", [f"{row['question']} {row['answer']}" for row in rows])
    values = {
        "model": {"base": str(folder / "base"), "precision": "fp32", "config_overrides": {"attention_dropout": 0.1}},
        "data": {
            "train": str(folder / "train.jsonl"),
            "validation": str(folder / "validation.jsonl"),
            "seq_len": 128,
            "prepared": str(folder / "prepared"),
        },
        "training": {"global_batch": 6, "micro_batch": 2, "steps": 40},
        "optimizer": {"lr": 1e-3, "warmup_steps": 5, "weight_decay": 0.1},
        "checkpoint": {"every_steps": 7, "keep_last": 2},
        "cluster": {"launcher": "processes", "num_workers": 2},
        "run": {"storage": str(folder / "runs")},
    }
    return Workshop(folder / "base", folder, values)
