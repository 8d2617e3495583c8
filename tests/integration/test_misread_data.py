"""A node that misreads a good shard costs an attempt; a shard that is bad where it is kept ends the run."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from launch import finetune
from tests.integration.conftest import Workshop
from tests.support.command import RunFiles, run_here, write_config
from tests.support.worker_faults import Fault, install

STEPS, EVERY, AT = 9, 3, 4


@pytest.fixture(scope="module")
def values(workshop: Workshop) -> dict[str, Any]:
    return workshop.values | {
        "data": workshop.values["data"] | {"prepared": str(workshop.data / "prepared-to-misread")},
        "training": {"global_batch": 4, "micro_batch": 2, "steps": STEPS},
        "checkpoint": {"every_steps": EVERY},
    }


@pytest.fixture(scope="module")
def undisturbed(workshop: Workshop, values: dict[str, Any]) -> RunFiles:
    done = run_here(finetune.main, "--config", str(write_config(workshop.data, values, "well-read")))
    assert done.code == 0, done.output
    return RunFiles(workshop.data / "runs" / "well-read")


def weights(files: RunFiles) -> dict[str, bytes]:
    (newest,) = files.path.glob(f"checkpoints/{STEPS:08d}-*")
    return {path.name: path.read_bytes() for path in newest.glob("rank-*.safetensors")}


def test_a_good_shard_that_one_worker_misreads(
    workshop: Workshop, values: dict[str, Any], undisturbed: RunFiles, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mark = tmp_path / "fired"
    install(monkeypatch, Fault.MISREAD, mark, rank=1, step=AT)
    done = run_here(finetune.main, "--config", str(write_config(workshop.data, values, "misread")))
    files = RunFiles(workshop.data / "runs" / "misread")
    assert done.code == 0, done.output
    assert len(mark.read_text()) >= 3, "it was read again, and again"
    first, second = sorted(
        (json.loads(path.read_text()) for path in files.path.glob("attempts/*/start.json")),
        key=lambda start: start["number"],
    )
    assert (first["start_step"], second["start_step"]) == (0, EVERY)
    decision = json.loads((files.path / "attempts" / first["attempt"] / "decision.json").read_text())["decision"]
    assert decision["action"] == "retry" and "delete" not in decision["reason"]
    assert "the driver reads it as it was written" in decision["reason"]
    assert f"look at rank 1's node {socket.gethostname()}" in decision["reason"]
    assert files.trace() == undisturbed.trace()
    assert weights(files) == weights(undisturbed) != {}


def test_a_shard_that_is_bad_where_it_is_kept(
    workshop: Workshop, values: dict[str, Any], undisturbed: RunFiles, tmp_path: Path
) -> None:
    prepared = tmp_path / "prepared"
    shutil.copytree(workshop.data / "prepared-to-misread", prepared)
    (shard,) = prepared.glob("*/train-0*.arrow")
    contents = bytearray(shard.read_bytes())
    contents[len(contents) // 2] ^= 1
    shard.write_bytes(contents)
    config = write_config(workshop.data, values, "bad-shard")
    done = run_here(finetune.main, "--config", str(config), f"data.prepared={prepared}")
    assert done.code == 1, done.output
    result = RunFiles(workshop.data / "runs" / "bad-shard").result
    assert result["attempts"] == 1 and f"{shard}: block 0" in result["reason"]
    assert f"To prepare the dataset anew, delete {shard.parent} and run the same command again" in result["reason"]
