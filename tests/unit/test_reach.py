"""What a machine lacks of an attempt's needs is said in words that name it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import ray_nodes, ray_reach
from cluster.ray_reach import Reach
from data_shards.manifest import MANIFEST
from data_shards.storage import Storage
from tests.support.datasets import random_packs, write_dataset
from trainer.base_location import sketch_of
from trainer.config import ModelConfig
from trainer.reach import Needs, find_out_of_reach

BLOCK = 64 << 10


@dataclass
class Machine:
    """Folders as a machine sees them, and what is asked of it."""

    folder: Path
    needs: Needs

    def lacks(self, **changed: object) -> str:
        return find_out_of_reach(self.needs._replace(**changed), patience_s=0)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "llama"}')
    (base / "model.safetensors").write_bytes(os.urandom(3 * BLOCK + 11))
    dataset = Storage.at(tmp_path / "data")
    manifest = write_dataset(dataset, random_packs(40, 64), 64, shard_tokens=1_000)
    run = Storage.at(tmp_path / "run")
    run.write("mark", [b""])
    run.write("checkpoints/7-a/manifest.json", [b"{}"])
    model = ModelConfig(base=str(base))
    needs = Needs(run.uri, "mark", dataset.uri, manifest.fingerprint, model, sketch_of(base, model), None)
    return Machine(tmp_path, needs)


def test_nothing_lacks(machine: Machine) -> None:
    assert machine.lacks() == ""
    assert machine.lacks(init_from=f"{machine.folder}/run/checkpoints/7-a") == ""


def test_a_folder_of_its_own_where_the_run_should_be(machine: Machine) -> None:
    (machine.folder / "run" / "mark").unlink()
    assert machine.lacks() == f"{machine.folder}/run is not what the driver sees there (run.storage)"


def test_data_that_is_not_there_is_other_data_or_is_damaged(machine: Machine) -> None:
    assert "holds other data" in machine.lacks(fingerprint="1" * 32)
    shard = next((machine.folder / "data").glob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert shard.name in machine.lacks()
    (machine.folder / "data" / MANIFEST).unlink()
    assert machine.lacks() == f"{machine.folder}/data is not there (data.prepared)"


def test_a_bad_read_there_is_no_advice_to_delete_the_data(machine: Machine) -> None:
    shard = min((machine.folder / "data").glob("*.arrow"))
    shard.write_bytes(bytes(shard.stat().st_size))
    assert shard.name in machine.lacks() and "delete" not in machine.lacks()


def test_a_base_that_is_not_there_or_is_another(machine: Machine) -> None:
    weights = machine.folder / "base" / "model.safetensors"
    whole = bytearray(weights.read_bytes())
    for position in (0, BLOCK - 1, len(whole) - 1):  # among the bytes that are looked at
        whole[position] ^= 1
        weights.write_bytes(whole)
        assert "holds another model" in machine.lacks()
        whole[position] ^= 1
    weights.write_bytes(whole + b"1")
    assert "holds another model" in machine.lacks()
    weights.unlink()
    assert "has no weights" in machine.lacks()


def test_a_checkpoint_to_begin_with_that_is_gone(machine: Machine) -> None:
    gone = f"{machine.folder}/run/checkpoints/9-b"
    assert machine.lacks(init_from=gone) == f"{gone} is not there (init_from)"


def test_who_joins_gets_workers_once_it_has_what_they_need(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The question is asked here, not over Ray: `test_many_nodes.py` does."""
    monkeypatch.setattr(ray_nodes, "addresses", lambda: {"new": "10.0.0.9"})
    answered, clock = [False], [0.0]
    monkeypatch.setattr(ray_reach, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def ask(node: str, question: Callable[..., str], needs: Needs) -> Any:
        assert node == "new" and (machine.folder / "run" / needs.mark).is_file()
        return lambda: question(needs, 0.0)

    monkeypatch.setattr(ray_reach, "ask_node", ask)
    monkeypatch.setattr(ray_reach, "_is_answered", lambda reference: answered[0])
    monkeypatch.setattr(ray_reach, "_answer", lambda reference: reference())
    said: list[str] = []
    needs = machine.needs
    trainer = SimpleNamespace(model=needs.model)
    spec: Any = SimpleNamespace(
        run_uri=needs.run_uri,
        dataset_uri=needs.dataset_uri,
        fingerprint=needs.fingerprint,
        init_from=None,
        trainer=trainer,
    )
    reach = Reach(spec, said.append)
    reach._fit = {"old"}
    manifest = machine.folder / "data" / MANIFEST
    manifest.rename(machine.folder / "away")

    def fit(seconds: float) -> set[str]:
        clock[0] += seconds
        return set(reach.fit({"old", "new"}))

    assert fit(1) == fit(31) == {"old"} and reach.lacking() == set()
    assert said == ["10.0.0.9 has joined; it gets workers once it has found the run, its data and base"]
    answered[0] = True
    assert fit(1) == {"old"} and reach.lacking() == {"new"}
    assert said.pop() == f"10.0.0.9 gets no workers: {machine.folder}/data is not there (data.prepared)"
    (machine.folder / "away").rename(manifest)
    assert fit(30) == fit(29) == {"old"}, "it is not asked every second"
    assert fit(2) == {"old"} and fit(1) == {"old", "new"} and reach.lacking() == set()
    assert said.pop() == "10.0.0.9 now has what workers need"
    assert len(list((machine.folder / "run").glob("reach-*"))) == 1
    reach.close()
    assert not list((machine.folder / "run").glob("reach-*"))


def test_asking_takes_no_torch() -> None:
    script = "import sys, trainer.reach; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])
