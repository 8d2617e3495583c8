"""Saves that are cut off, disks that fail, checkpoints that are not what was written."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import data_shards.storage
import trainer.checkpoint
from data_shards import signed_json
from launch import export
from launch.exit_codes import ExitCode
from tests.faults.bench import (
    AT,
    EVERY,
    STEPS,
    Bench,
    Fired,
    Install,
    NotHere,
    Result,
    at_file,
    at_step,
    before_steps,
    rank,
)
from tests.faults.processes import kill_me, survives
from tests.support import disk, nodes
from trainer.checkpoint import MANIFEST, rank_file
from trainer.checkpoint_manifest import KIND, VERSION
from trainer.survey import survey

CUT_AT = 2 * EVERY
"""Where a run is ended whose checkpoints are damaged then."""
POINTS = (
    ("write", "rank-00001.safetensors", 1),
    ("rename", "rank-00001.safetensors", 1),
    ("rename", "receipts/rank-00001.json", 1),
    ("rename", MANIFEST, 0),
    ("written", MANIFEST, 0),
)
"""Of a save, in their order: operation, file, rank."""


def kill_while_saving(bench: Bench) -> Result:
    """At one point after the other, each in a run of its own."""
    results = []
    for number, (operation, name, victim) in enumerate(POINTS):
        trial = bench.trial(f"kill-saving-{number}")
        path = rf"/{CUT_AT:08d}-\w+/{name}$"
        kill = at_file(trial.mark(), operation, path, kill_me, ranks=(victim,))
        results.append(survives(trial, kill, said=f"rank {victim} was ended by SIGKILL"))
    return Result(
        f"the same end, bit for bit, {len(POINTS)} times of {len(POINTS)}; figures: the most",
        max(result.lost_steps or 0 for result in results),
        max(result.recovery_s or 0 for result in results),
    )


def kill_while_persisting(bench: Bench) -> Result:
    """A save is slow, and steps go on; then the process that writes it dies."""
    trial = bench.trial("persist")

    def install() -> None:
        write = trainer.checkpoint.write_tensors

        def slow(*arguments: object, **options: object) -> object:
            if rank() == 1 and not trial.mark().is_there:
                time.sleep(30)
            return write(*arguments, **options)  # type: ignore[arg-type]

        trainer.checkpoint.write_tensors = slow  # type: ignore[assignment]

    kill = at_step(trial.mark(), kill_me)
    result = survives(trial, kill, install, said="rank 1 was ended by SIGKILL")
    assert trial.story.attempts[1].from_step == 0
    return Result(
        f"the same end, bit for bit; the save of step {EVERY} was never committed, attempt 2 began before it",
        result.lost_steps,
        result.recovery_s,
    )


def kill_while_removing(bench: Bench) -> Result:
    """Its manifest is gone, its files are not."""
    trial = bench.trial("retention", checkpoint={"keep_last": 1})
    kill = at_file(trial.mark(), "delete tree", rf"/{EVERY:08d}-\w+$", kill_me, ranks=(0,))
    result = survives(trial, kill, said="rank 0 was ended by SIGKILL")
    found = survey(trial.run)
    assert not found.unfinished and not found.bad and len(found.usable) == 1
    return Result(f"{result.outcome}; what was half removed is gone", result.lost_steps, result.recovery_s)


def kill_while_exporting(bench: Bench) -> Result:
    trial = bench.trial("export")
    assert trial.give() == ExitCode.DONE and trial.give(verb=export.main) == ExitCode.DONE, trial.log
    folder = next((trial.path / "export").iterdir())
    whole = _contents(folder)
    assert any(name.endswith(".safetensors") for name in whole)
    shutil.rmtree(trial.path / "export")
    kill = at_file(trial.mark(), "rename", r"\.safetensors$", kill_me, ranks=(None,))
    assert trial.give(kill, verb=export.main) < 0
    assert trial.mark().is_there and _contents(folder) != whole
    began = time.monotonic()
    assert trial.give(verb=export.main) == ExitCode.DONE, trial.log
    assert _contents(folder) == whole
    return Result("given again, the same files, byte for byte", 0, time.monotonic() - began)


def _contents(folder: Path) -> dict[str, bytes]:
    """Of what is shown: what begins with a dot is written aside."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@contextmanager
def _disk_of(folder: Path, size_bytes: int) -> Iterator[Path]:
    try:
        with disk.disk_of(folder, size_bytes) as mounted:
            yield mounted
    except pytest.skip.Exception as skipped:
        raise NotHere(str(skipped)) from skipped


def _checkpoint_bytes(bench: Bench) -> int:
    return sum(file.size for file in bench.undisturbed.files)


def disk_full(bench: Bench) -> Result:
    """A file system with room for a checkpoint and a half."""
    size = _checkpoint_bytes(bench)
    with _disk_of(bench.root / "small-disk", size * 3 // 2) as small:
        trial = bench.trial("disk-full", run={"storage": str(small)})
        assert trial.give() == ExitCode.STOPPED, trial.log
        assert "is full" in trial.files.result["reason"] and trial.newest.step == EVERY
        (full,) = trial.story.attempts
        disk.resize(small, size * 10)
        began = time.time()
        assert trial.give() == ExitCode.DONE, trial.log
        result = trial.survived(Fired(min(full.to_step, STEPS - 1), began, 0), "")
    return Result(
        "stops with exit code 75: “the disk … is full … Make room there”; given again with more room, the same end, "
        "bit for bit",
        result.lost_steps,
        result.recovery_s,
    )


def disk_fails(bench: Bench) -> Result:
    """Once with EIO; then for good, read-only."""
    trial = bench.trial("io-error")

    def fail() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    once = at_file(trial.mark(), "write", rf"/{EVERY:08d}-\w+/rank-00001.safetensors$", fail)
    assert trial.give(once) == ExitCode.DONE, trial.log
    assert trial.mark().is_there and len(trial.story.attempts) == 1 and trial.lost_steps == 0
    trial.check_same_end()
    return _read_only(bench)


def _read_only(bench: Bench) -> Result:
    """From a step on, for driver and workers, until somebody mends it."""
    trial = bench.trial("read-only")
    mark = trial.mark()

    def install() -> None:
        reach = data_shards.storage.reach

        def refused(operation: str, path: str | os.PathLike[str]) -> None:
            if mark.is_there and not operation.startswith("read"):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            reach(operation, path)

        data_shards.storage.reach = refused
        before_steps(lambda step: step == AT and rank() == 1 and mark.fire(step))

    code = trial.give(install)
    assert code == ExitCode.FAILED and "Read-only file system" in trial.log, (code, trial.log)
    (first,) = trial.story.attempts
    assert mark.is_there and trial.newest.step == EVERY
    began = time.time()
    assert trial.give() == ExitCode.DONE, trial.log
    result = trial.survived(Fired(first.to_step, began, 0), "")
    return Result(
        "EIO: that save fails, training goes on, 0 steps lost. Read-only: stops with exit code 1, “Read-only file "
        "system”; writable and given again, the same end, bit for bit",
        result.lost_steps,
        result.recovery_s,
    )


def shared_memory_full(bench: Bench) -> Result:
    """``/dev/shm`` is a file system of its own without room."""
    trial = bench.trial("shared-memory")
    mark, place = trial.mark(), Path("/dev/shm")

    def install() -> None:
        tiny = trial.folder / "tiny"
        nodes.become_node(tiny, tiny)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "none", str(place)], check=True)
        (place / "filler").write_bytes(bytes(4096))

    def look() -> None:
        try:
            (place / f"more-{os.getpid()}").write_bytes(b"x" * 4096)
        except OSError as error:
            assert error.errno == errno.ENOSPC
            mark.fire(AT)

    if subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode:
        raise NotHere("this user may not make mount namespaces")
    looks: Install = lambda: before_steps(lambda step: step == AT and rank() == 1 and look())  # noqa: E731
    assert trial.give(install, looks) == ExitCode.DONE, trial.log
    assert mark.is_there and len(trial.story.attempts) == 1
    trial.check_same_end()
    return Result("the same end, bit for bit, in one attempt (gloo: nothing here keeps anything there)", 0)


def damaged(bench: Bench, name: str, damage: Callable[[Path], object], said: str, *, from_step: int = EVERY) -> Result:
    """A run ends early; its newest checkpoint is damaged; the command is given again, with the whole length."""
    trial = bench.trial(name)
    assert trial.give(arguments=[f"training.steps={CUT_AT}"]) == ExitCode.DONE, trial.log
    newest = trial.path / "checkpoints" / trial.newest.name
    damage(newest)
    began = time.time()
    assert trial.give() == ExitCode.DONE, trial.log
    assert said in trial.log, trial.log
    assert trial.story.attempts[-1].from_step == from_step
    return trial.survived(Fired(CUT_AT, began, 0), f"told: “{said}”; from step {from_step}")


def truncated(bench: Bench) -> Result:
    def damage(newest: Path) -> None:
        with (newest / rank_file(1)).open("r+b") as file:
            file.truncate((newest / rank_file(1)).stat().st_size // 2)

    return damaged(bench, "truncated", damage, "its manifest says")


def bit_flip(bench: Bench) -> Result:
    def damage(newest: Path) -> None:
        contents = bytearray((newest / rank_file(1)).read_bytes())
        contents[-100] ^= 1
        (newest / rank_file(1)).write_bytes(contents)

    return damaged(bench, "bit-flip", damage, "quarantined")


def missing(bench: Bench) -> Result:
    return damaged(bench, "missing", lambda newest: (newest / rank_file(1)).unlink(), "is not used")


def foreign_manifest(bench: Bench) -> Result:
    """Of another checkpoint; and, in a run of its own, an empty one."""

    def older(newest: Path) -> None:
        (other,) = [path for path in newest.parent.iterdir() if path.name.startswith(f"{EVERY:08d}")]
        shutil.copy(other / MANIFEST, newest / MANIFEST)

    damaged(bench, "empty-manifest", lambda newest: (newest / MANIFEST).write_bytes(b""), "is not used")
    return damaged(bench, "foreign-manifest", older, "its manifest is that of")


def reused_directory(bench: Bench) -> Result:
    """A whole checkpoint under the name of the last step."""

    def copy(newest: Path) -> None:
        shutil.copytree(newest, newest.with_name(newest.name.replace(f"{CUT_AT:08d}", f"{STEPS:08d}")))

    return damaged(bench, "reused", copy, "its manifest is that of", from_step=CUT_AT)


def path_traversal(bench: Bench) -> Result:
    """A manifest, rightly signed, that names a file outside its folder."""

    def damage(newest: Path) -> None:
        body = signed_json.decode((newest / MANIFEST).read_bytes(), KIND, VERSION, "here")
        body["files"][0]["path"] = f"../../../../../{rank_file(0)}"
        (newest / MANIFEST).write_bytes(signed_json.encode(body, KIND, VERSION))

    return damaged(bench, "traversal", damage, "is not used")
