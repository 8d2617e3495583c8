"""The fast tier: checkpoints on the nodes' own disks, lost with a node, found again on another rank's."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_shards.errors import BadInput
from data_shards.storage import Storage
from launch import finetune
from launch.config import load_config
from launch.job import Job, make_job, settle
from tests.integration.conftest import Workshop
from tests.support.chaos import saves_end_before_the_next_step
from tests.support.command import run_here, write_config
from tests.support.disk import disk_of
from tests.support.distributed import run_workers
from tests.support.nodes import become_node, skip_unless_allowed
from trainer.checkpoint import rank_file
from trainer.checkpointing import Checkpointing
from trainer.config import WorkerSpec
from trainer.errors import BatonError
from trainer.metrics import NoMetrics, Report
from trainer.progress_log import ProgressLog
from trainer.pulse import Pulse
from trainer.rank_file import RankFile
from trainer.shared_storage import check_shared
from trainer.survey import durable_checkpoints, survey, tip_and_newest
from trainer.worker import train

STEPS = 17


def values_of(workshop: Workshop, disk: Path, *, every: int, steps: int = STEPS) -> dict[str, Any]:
    checkpoints = {"every_steps": every, "fast": {"path": str(disk), "every_steps": 4}}
    return workshop.values | {"checkpoint": checkpoints, "training": workshop.values["training"] | {"steps": steps}}


def cut_short(_checkpointing: Checkpointing, _progress: Any) -> float:
    raise BatonError("the attempt ends here")


def attempt_on_nodes(spec: WorkerSpec, disks: list[str], shown_at: str, ends: bool, faults: dict[str, Any]) -> str:
    """An attempt's worker, on a node of its own; each save ends before the next step. Returns what it warned of, and
    failed with; and whether it reported a checkpoint of the fast tier as if it could not be lost."""
    told: list[str] = []
    if faults:
        os.environ["BATON_FAULTS"] = json.dumps(faults)
    ProgressLog.warn = staticmethod(told.append)  # type: ignore[assignment]
    become_node(Path(disks[int(os.environ["RANK"])]), Path(shown_at))
    os.environ["LOCAL_RANK"] = "0"
    saves_end_before_the_next_step()
    if not ends:
        Checkpointing.save_at_end = cut_short  # type: ignore[method-assign,assignment]
    commits = Commits()
    try:
        train(spec, commits, Pulse())
    except BatonError as error:
        told.append(f"{type(error).__name__}: {error}")
    every = spec.trainer.checkpoint.every_steps
    if reported := [step for step in commits.steps if step != STEPS and step % every]:
        told.append(f"reported as durable: {reported}")
    return "\n".join(told)


class Commits(NoMetrics):
    """Remembers which steps were reported as committed."""

    def __init__(self) -> None:
        self.steps: set[int] = set()

    def send(self, report: Report) -> None:
        if report.last_commit is not None:
            self.steps.add(report.last_commit.step)


class Nodes:
    """Attempts of one run on nodes whose disks are all shown at one path."""

    def __init__(self, workshop: Workshop, name: str, folder: Path, *, every: int) -> None:
        skip_unless_allowed()
        self.folder, self.shown_at = folder, folder / "nvme"
        self.shown_at.mkdir()
        values = values_of(workshop, self.shown_at, every=every)
        self.file = write_config(workshop.data, values | {"run": workshop.values["run"] | {"name": name}}, name)
        self.job: Job = make_job(load_config(self.file, []), lambda line: None)
        settle(self.job, lambda line: None)
        self.run = self.job.run

    def attempt(self, *disks: str, ends: bool, faults: dict[str, Any] | None = None) -> list[str]:
        """By workers that each see the disk of this name. Returns what they told."""
        parent, newest = tip_and_newest(self.run)
        start = self.run.start_attempt(parent, newest, ())
        places = [str(self.folder / disk) for disk in disks]
        spec = self.job.spec(start.attempt, newest)
        return run_workers(attempt_on_nodes, len(disks), spec, places, str(self.shown_at), ends, faults or {})

    def committed(self) -> dict[str, bool]:
        """Whether it is of the fast tier, by step."""
        return {ref.name[:8].lstrip("0"): ref.manifest.fast for ref in survey(self.run).usable}

    def files_on(self, disk: str) -> list[str]:
        """Of the newest checkpoint."""
        newest = max((self.folder / disk).glob("*/*"))
        return [path.name for path in newest.glob("*.safetensors")]

    def final_files(self) -> tuple[RankFile, ...]:
        newest = durable_checkpoints(self.run)[-1]
        assert newest.step == STEPS
        return newest.manifest.files


@pytest.fixture(scope="module")
def expected_files(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> tuple[RankFile, ...]:
    """Of a run of 17 steps that was left alone."""
    nodes = Nodes(workshop, "nodes-undisturbed", tmp_path_factory.mktemp("undisturbed"), every=1000)
    assert nodes.attempt("a", "b", ends=True) == ["", ""]
    assert nodes.committed() == {"17": False}
    assert not list((nodes.folder / "a").iterdir()) and not list((nodes.folder / "b").iterdir())
    return nodes.final_files()


def look_for_marks(disks: list[str], shown_at: str) -> str:
    rank = int(os.environ["RANK"])
    become_node(Path(disks[rank]), Path(shown_at))
    try:
        check_shared(Storage.at(shown_at), rank, len(disks), patience_s=0.2)
    except BadInput as error:
        return str(error)
    return ""


def test_nodes_whose_storage_is_their_own_are_refused_with_what_to_do(tmp_path: Path) -> None:
    """One path, and a folder of its own behind it on each node; then on two of three the same one."""
    skip_unless_allowed()
    (tmp_path / "storage").mkdir()
    for nodes, unseen in ((["a", "b"], "rank 0, 1 of 2"), (["a", "a", "c"], "rank 0, 2 of 3")):
        disks = [str(tmp_path / node) for node in nodes]
        for told in run_workers(look_for_marks, len(disks), disks, str(tmp_path / "storage")):
            assert f"what {unseen} wrote there" in told and "nodes' own disks can hold checkpoint.fast" in told
    assert run_workers(look_for_marks, 2, [str(tmp_path / "a")] * 2, str(tmp_path / "storage")) == ["", ""]


def test_ranks_that_change_places(workshop: Workshop, tmp_path: Path, expected_files: tuple[RankFile, ...]) -> None:
    """What a node lacks is brought from the one that has it; where there is no room, nobody waits for it."""
    nodes = Nodes(workshop, "nodes-swapped", tmp_path, every=1000)
    assert "the attempt ends here" in nodes.attempt("a", "b", ends=False)[0]
    assert (nodes.files_on("a"), nodes.files_on("b")) == ([rank_file(0)], [rank_file(1)])
    assert nodes.committed() == {"16": True}
    copy = f"create checkpoints/00000016-ID.fast/{rank_file(0)}"  # by rank 1, which has what was rank 0's
    full = {"rank": 1, "point": copy, "kind": "ENOSPC", "mark": str(tmp_path / "fired")}
    for told in nodes.attempt("b", "a", ends=True, faults=full):
        assert told.startswith("CheckpointOutOfReach") and "no room to bring its files together" in told
    assert (tmp_path / "fired").read_text() == copy
    assert nodes.attempt("b", "a", ends=True) == ["", ""]
    assert nodes.final_files() == expected_files


def test_a_killed_attempt_costs_the_steps_since_the_last_fast_one(
    workshop: Workshop, tmp_path: Path, expected_files: tuple[RankFile, ...]
) -> None:
    """All nodes live: here they are one."""
    nodes = Nodes(workshop, "nodes-live", tmp_path, every=12)
    nodes.attempt("a", "b", ends=False)
    for disk in ("a", "b"):
        shutil.copytree(tmp_path / disk, nodes.shown_at, dirs_exist_ok=True)
    done = run_here(finetune.main, "--config", str(nodes.file))
    assert done.code == 0 and re.findall(r"resuming from step (\d+)", done.output) == ["16"], done.output
    assert nodes.final_files() == expected_files
    assert nodes.committed() == {"12": False, "17": False} and not list(nodes.shown_at.iterdir())


def test_a_node_that_is_gone(workshop: Workshop, tmp_path: Path, expected_files: tuple[RankFile, ...]) -> None:
    """One worker has nothing of the other's: the attempt fails before it builds a model, and the next one begins with
    the durable checkpoint."""
    nodes = Nodes(workshop, "nodes-gone", tmp_path, every=12)
    nodes.attempt("a", "b", ends=False)
    assert nodes.committed() == {"12": False, "16": True}
    told = nodes.attempt("a", "c", ends=True)
    for line in told:
        assert "CheckpointOutOfReach" in line
        assert "on no node that is here: rank-00001.safetensors, 1 of its files" in line
    done = run_here(finetune.main, "--config", str(nodes.file))  # where nothing is shown at the path
    assert done.code == 0, done.output
    assert re.search(r"resuming from step 16,", done.output) and re.search(r"resuming from step 12,", done.output)
    assert "as out of reach" not in done.output and "on no node that is here" in done.output
    assert nodes.final_files() == expected_files
    assert not list(nodes.run.checkpoints.local_path.glob("*/quarantine.json")), "it may be good, elsewhere"  # type: ignore[union-attr]


def test_where_nothing_durable_was_committed_the_run_begins_anew_and_says_so(
    workshop: Workshop, tmp_path: Path, expected_files: tuple[RankFile, ...]
) -> None:
    nodes = Nodes(workshop, "nodes-anew", tmp_path, every=1000)
    nodes.attempt("a", "b", ends=False)
    done = run_here(finetune.main, "--config", str(nodes.file))
    assert done.code == 0 and "those are lost: the run begins anew" in done.output, done.output
    assert nodes.final_files() == expected_files


def test_a_damaged_one_is_put_in_quarantine(
    workshop: Workshop, tmp_path: Path, expected_files: tuple[RankFile, ...]
) -> None:
    """Also where it is found while it is brought to another node."""
    nodes = Nodes(workshop, "nodes-damaged", tmp_path, every=12)
    nodes.attempt("a", "b", ends=False)
    victim = max((tmp_path / "a").glob(f"*/*/{rank_file(0)}"))
    damaged = bytearray(victim.read_bytes())
    damaged[-3] ^= 1
    victim.write_bytes(damaged)
    told = nodes.attempt("b", "a", ends=True)
    assert any(line.startswith("CheckpointCorrupt") and rank_file(0) in line for line in told)
    assert any(line.startswith("BringingFailed") for line in told), "the other rank's"
    for disk in ("a", "b"):
        shutil.copytree(tmp_path / disk, nodes.shown_at, dirs_exist_ok=True)
    done = run_here(finetune.main, "--config", str(nodes.file))  # on one node that has it all
    assert done.code == 0 and re.findall(r"resuming from step (\d+)", done.output) == ["16", "12"], done.output
    told_of = rf"checkpoint 00000016-\w+\.fast is not used: .*: quarantined .*{rank_file(0)}"
    assert re.search(told_of, done.output), done.output
    assert not list((nodes.run.checkpoints.local_path or tmp_path).glob("00000016-*")), "its attempt was superseded"
    assert nodes.final_files() == expected_files


def test_a_path_that_can_not_be_written(workshop: Workshop, tmp_path: Path) -> None:
    """A new run is refused; one that has begun goes on without the tier, as its node's disk may have broken since."""
    (tmp_path / "file").touch()
    values = values_of(workshop, tmp_path / "file" / "disk", every=8, steps=4)
    config = write_config(workshop.data, values, "fast-nowhere")
    refused = run_here(finetune.main, "--config", str(config))
    assert refused.code == 2 and "checkpoint.fast.path=" in refused.output, refused.output
    assert "or leave checkpoint.fast away" in refused.output
    begun = run_here(finetune.main, "--config", str(config), "checkpoint.fast=null")
    assert begun.code == 0, begun.output
    gone_on = run_here(finetune.main, "--config", str(config), "training.steps=6")
    assert gone_on.code == 0 and "resuming from step 4" in gone_on.output, gone_on.output


def test_a_disk_that_is_full_costs_the_fast_tier_alone(
    workshop: Workshop, tmp_path: Path, expected_files: tuple[RankFile, ...]
) -> None:
    nodes = Nodes(workshop, "nodes-full", tmp_path, every=8)
    with disk_of(tmp_path / "a", 1_000_000):  # a rank file has 4 MB
        full, other = nodes.attempt("a", "b", ends=True)
    assert "the save of step 4 failed: [Errno 28] No space left on device" in full
    assert "the save of step 12 failed: [Errno 28]" in full and "Errno 28" not in other
    assert nodes.committed() == {"16": False, "17": False} and nodes.final_files() == expected_files
