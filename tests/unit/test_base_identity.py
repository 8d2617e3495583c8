"""A base is named by its bytes; what is noted of it is believed only while no file changed."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from data_shards.storage import Storage, content_hash
from launch.compatibility import differences
from trainer import base_identity as module
from trainer import checkpoint, resume
from trainer.base_identity import base_identity, read_identity, settled, stamps_of
from trainer.checkpoint import CheckpointRef
from trainer.config import Method, ModelConfig, TrainerConfig, TrainingConfig, WorkerSpec
from trainer.errors import ModelError
from trainer.run_directory import RunDirectory


class Base:
    """Files named as a base's, and how often they were read."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.notes, self.reads = folder / "base", Storage.at(folder / "notes"), 0
        self.path.mkdir()
        (self.path / "config.json").write_text('{"model_type": "llama"}')
        monkeypatch.setattr(module, "BLOCK_BYTES", 4096)
        (self.path / "model-1.safetensors").write_bytes(os.urandom(30 * 4096 + 11))
        (self.path / "model-2.safetensors").write_bytes(b"")

        def counting(files: Any) -> Any:
            self.reads += 1
            return read_identity(files)

        monkeypatch.setattr(module, "read_identity", counting)

    def identity(self, **options: Any) -> module.BaseIdentity:
        return base_identity(ModelConfig(base=str(self.path), **options), self.path, self.notes)


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Base:
    return Base(tmp_path, monkeypatch)


@pytest.fixture
def base_of_old(base: Base, monkeypatch: pytest.MonkeyPatch) -> Base:
    """As if its files had been there for long."""
    monkeypatch.setattr(module, "_SETTLED_NS", -(10**12))
    return base


def test_the_name_is_that_of_earlier_releases(base: Base) -> None:
    """Else every run that they began would be orphaned."""
    config, *weights = sorted(base.path.iterdir())
    assert base.identity().name == content_hash([config, *weights])
    assert base.identity(random_init=True).name == content_hash([config])
    hub = base_identity(ModelConfig(base="org/model"), base.path / "1f2e", base.notes)
    assert hub.name == "org/model@1f2e" and hub.files == {}


def test_an_unchanged_base_is_read_once(base_of_old: Base) -> None:
    first = base_of_old.identity()
    assert base_of_old.identity() == first and base_of_old.reads == 1
    (note,) = base_of_old.notes.list()
    base_of_old.notes.write(note, [b'{"stamps": '])
    assert base_of_old.identity() == first and base_of_old.reads == 2, "a damaged note is no reason to fail"
    base_of_old.notes.write(note, [b'{"stamps": {}, "name": "x", "files": {}}'])
    assert base_of_old.identity() == first and base_of_old.reads == 3, "a note of other stamps counts for nothing"


@pytest.mark.parametrize("name", ["config.json", "model-1.safetensors"])
def test_one_byte_is_seen_even_with_its_time_put_back(base_of_old: Base, name: str) -> None:
    first, victim = base_of_old.identity(), base_of_old.path / name
    before = victim.stat()
    with victim.open("r+b") as file:
        file.seek(7)
        file.write(b"!")
    os.utime(victim, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert victim.stat().st_mtime_ns == before.st_mtime_ns
    second = base_of_old.identity()
    assert second.name != first.name
    assert {each for each in first.files if first.files[each] != second.files[each]} == {name}


def test_a_base_that_was_just_written_is_not_noted(base: Base) -> None:
    """Within a tick of the clock it could change again without a trace."""
    base.identity()
    assert base.notes.list() == [] and base.identity() and base.reads == 2
    stamps = stamps_of(list(base.path.iterdir()))
    assert not settled(stamps, time.time_ns()) and settled(stamps, time.time_ns() + 3 * 10**9)


def test_a_base_that_changes_while_it_is_read_is_refused(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    def growing(files: Any) -> Any:
        (base.path / "model-2.safetensors").write_bytes(b"more")
        return read_identity(files)

    monkeypatch.setattr(module, "read_identity", growing)
    with pytest.raises(ModelError, match="changed while they were read"):
        base.identity()


def record(base: str, files: dict[str, str] | None) -> dict[str, Any]:
    return {"config": {}, "base": base, "data": {}} | ({} if files is None else {"base_files": files})


def test_the_difference_names_the_files() -> None:
    was = {"config.json": "1", "a.safetensors": "2", "b.safetensors": "3"}
    now = {"config.json": "1", "a.safetensors": "9", "c.safetensors": "4"}
    (found,) = differences(record("x", was), record("y", now))
    assert str(found) == (
        "model.base: was 'x', now 'y' (a.safetensors has other contents, b.safetensors is gone, c.safetensors is new)"
    )
    (older,) = differences(record("x", None), record("y", now))
    assert str(older) == "model.base: was 'x', now 'y'", "runs of earlier releases did not record them"
    assert differences(record("x", None), record("x", now)) == []


@pytest.mark.parametrize(
    ("key", "method", "allowed", "refused"),
    [
        ("resume_from", Method.LORA, False, True),
        ("resume_from", Method.FULL, False, True),
        ("resume_from", Method.LORA, True, False),
        ("init_from", Method.LORA, False, True),
        ("init_from", Method.LORA, True, False),
        ("init_from", Method.FULL, False, False),
    ],
)
def test_workers_refuse_a_checkpoint_of_another_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, method: Method, allowed: bool, refused: bool
) -> None:
    """Of a full-parameter run whose weights a new one begins with, nothing of the base is left."""
    from tests.support.tiny import DRAFT

    loaded: list[str] = []
    monkeypatch.setattr(checkpoint, "read_manifest", lambda storage, name: CheckpointRef(name, DRAFT))
    monkeypatch.setattr(checkpoint, "load", lambda engine, storage, ref, staging, **_: loaded.append(ref.name))
    trainer = TrainerConfig(model=ModelConfig(base="b"), training=TrainingConfig(method=method, steps=1))
    common = {"run_uri": str(tmp_path), "attempt": "a", "trainer": trainer, "dataset_uri": "d", "fingerprint": "f"}
    places = {"resume_from": None, key: f"{tmp_path}/checkpoints/c"}

    def restore(base: str) -> None:
        spec = WorkerSpec(**common, **places, base_identity=base, other_base=allowed, resolved_config={})
        run = RunDirectory.at(str(tmp_path))
        resume.restore(None, run, spec, None, resume.find_resumed(run, spec))  # type: ignore[arg-type]

    restore(DRAFT.base)
    if refused:
        with pytest.raises(ModelError, match=r"was trained from the base b, and model\.base is other"):
            restore("other")
    else:
        restore("other")
    assert len(loaded) == (1 if refused else 2)
