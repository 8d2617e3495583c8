"""The fast tier: checkpoints on the nodes' own disks, lost with a node, found again on another rank's."""

from __future__ import annotations

import os
import re
import shutil
import signal
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
from tests.support.command import Command, RunFiles, Trace, run, run_here, write_config
from tests.support.disk import disk_of
from tests.support.distributed import run_workers
from tests.support.nodes import become_node, skip_unless_allowed
from trainer.checkpoint import rank_file
from trainer.checkpointing import Checkpointing
from trainer.config import WorkerSpec
from trainer.errors import BatonError
from trainer.fast_tier import folder_on_node
from trainer.metrics import NoMetrics
from trainer.rank_file import RankFile
from trainer.run_directory import RunDirectory
from trainer.shared_storage import check_shared
from trainer.survey import durable_checkpoints, survey, tip_and_newest
from trainer.worker import train

STEPS = 40


def values_of(workshop: Workshop, disk: Path, *, every: int, fast_every: int = 3, steps: int = STEPS) -> dict[str, Any]:
    checkpoints = {"every_steps": every, "fast": {"path": str(disk), "every_steps": fast_every}}
    return workshop.values | {"checkpoint": checkpoints, "training": workshop.values["training"] | {"steps": steps}}


@pytest.fixture(scope="module")
def undisturbed(workshop: Workshop) -> Trace:
    config = write_config(workshop.data, workshop.values, "fast-undisturbed")
    done = run_here(finetune.main, "--config", str(config))
    assert done.code == 0, done.output
    return RunFiles(workshop.data / "runs" / "fast-undisturbed").trace()


def fast_folder(workshop: Workshop, disk: Path, name: str) -> Path:
    path = folder_on_node(str(disk), Storage.at(workshop.data / "runs" / name)).local_path
    assert path is not None
    return path


def test_a_killed_worker_costs_the_steps_since_the_last_fast_one(
    workshop: Workshop, undisturbed: Trace, tmp_path: Path
) -> None:
    config = write_config(workshop.data, values_of(workshop, tmp_path / "disk", every=1000), "fast")
    files = RunFiles(workshop.data / "runs" / "fast")
    command = Command("finetune", "--config", str(config))
    committed = int(command.wait_for(r"committed step (\d+) on the nodes")[1])
    os.kill(int(command.wait_for(r"worker rank 1 of 2: pid (\d+)")[1]), signal.SIGKILL)
    assert command.finish() == 0, command.output
    resumed = re.search(r"resuming from step (\d+)", command.output)
    assert resumed is not None and committed <= int(resumed[1]) < STEPS and int(resumed[1]) % 3 == 0
    assert files.trace() == undisturbed
    assert [path.name[:8] for path in (files.path / "checkpoints").iterdir()] == [f"{STEPS:08d}"]
    assert not fast_folder(workshop, tmp_path / "disk", "fast").exists(), "nothing is left on the nodes"


def cut_short(_checkpointing: Checkpointing, _progress: Any) -> float:
    raise BatonError("the attempt ends here")


def attempt_on_nodes(spec: WorkerSpec, disks: list[str], shown_at: str, ends: bool) -> str:
    """An attempt's worker, on a node of its own; each save ends before the next step. Returns what it failed with."""
    become_node(Path(disks[int(os.environ["RANK"])]), Path(shown_at))
    os.environ["LOCAL_RANK"] = "0"
    saves_end_before_the_next_step()
    if not ends:
        Checkpointing.save_at_end = cut_short  # type: ignore[method-assign,assignment]
    try:
        train(spec, NoMetrics())
    except BatonError as error:
        return f"{type(error).__name__}: {error}"
    return ""


class Nodes:
    """Attempts of one run, of 17 steps, on nodes whose disks are all shown at one path."""

    def __init__(self, workshop: Workshop, name: str, folder: Path, *, every: int) -> None:
        skip_unless_allowed()
        self.folder, self.shown_at = folder, folder / "nvme"
        self.shown_at.mkdir()
        values = values_of(workshop, self.shown_at, every=every, fast_every=4, steps=17)
        self.file = write_config(workshop.data, values | {"run": workshop.values["run"] | {"name": name}}, name)
        self.job: Job = make_job(load_config(self.file, []), lambda line: None)
        settle(self.job, lambda line: None)
        self.run = self.job.run

    def attempt(self, *disks: str, ends: bool) -> list[str]:
        """By workers that each see the disk of this name. Returns what they failed with."""
        parent, newest = tip_and_newest(self.run)
        start = self.run.start_attempt(parent, newest, ())
        places = [str(self.folder / disk) for disk in disks]
        spec = self.job.spec(start.attempt, newest)
        return run_workers(attempt_on_nodes, len(disks), spec, places, str(self.shown_at), ends)

    def committed(self) -> dict[str, bool]:
        """Whether it is of the fast tier, by step."""
        return {ref.name[:8].lstrip("0"): ref.manifest.fast for ref in survey(self.run).usable}

    def files_on(self, disk: str) -> list[str]:
        """Of the newest checkpoint."""
        newest = max((self.folder / disk).glob("*/*"))
        return [path.name for path in newest.glob("*.safetensors")]

    def final_files(self) -> tuple[RankFile, ...]:
        newest = durable_checkpoints(self.run)[-1]
        assert newest.step == 17
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
    """What a node lacks is brought from the one that has it."""
    nodes = Nodes(workshop, "nodes-swapped", tmp_path, every=1000)
    assert "the attempt ends here" in nodes.attempt("a", "b", ends=False)[0]
    assert (nodes.files_on("a"), nodes.files_on("b")) == ([rank_file(0)], [rank_file(1)])
    assert nodes.committed() == {"16": True}
    assert nodes.attempt("b", "a", ends=True) == ["", ""]
    assert nodes.final_files() == expected_files


def test_a_node_that_is_gone(workshop: Workshop, tmp_path: Path, expected_files: tuple[RankFile, ...]) -> None:
    """One worker has nothing of the other's: the attempt fails before it builds a model, and the next one begins with
    the durable checkpoint."""
    nodes = Nodes(workshop, "nodes-gone", tmp_path, every=9)
    nodes.attempt("a", "b", ends=False)
    assert nodes.committed() == {"9": False, "16": True}
    told = nodes.attempt("a", "c", ends=True)
    for line in told:
        assert "CheckpointOutOfReach" in line
        assert "rank-00001.safetensors (1 of 2 files): whole on none of the nodes" in line
    done = run_here(finetune.main, "--config", str(nodes.file))  # where nothing is shown at the path
    assert done.code == 0, done.output
    assert re.search(r"resuming from step 16\n", done.output) and re.search(r"resuming from step 9\n", done.output)
    assert "CheckpointOutOfReach: checkpoint 00000016-" in done.output and "2 of 2 files" in done.output
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
    nodes = Nodes(workshop, "nodes-damaged", tmp_path, every=9)
    nodes.attempt("a", "b", ends=False)
    victim = max((tmp_path / "a").glob(f"*/*/{rank_file(0)}"))
    damaged = bytearray(victim.read_bytes())
    damaged[-3] ^= 1
    victim.write_bytes(damaged)
    told = nodes.attempt("b", "a", ends=True)
    assert any(line.startswith("CheckpointCorrupt") and rank_file(0) in line for line in told)
    shutil.copytree(tmp_path / "a", nodes.shown_at, dirs_exist_ok=True)
    shutil.copytree(tmp_path / "b", nodes.shown_at, dirs_exist_ok=True)
    done = run_here(finetune.main, "--config", str(nodes.file))
    assert done.code == 0 and "CheckpointCorrupt" in done.output, done.output
    assert nodes.final_files() == expected_files


def test_a_path_that_can_not_be_written_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = write_config(workshop.data, values_of(workshop, tmp_path / "file" / "disk", every=10), "fast-nowhere")
    refused = run_here(finetune.main, "--config", str(config))
    assert refused.code == 2 and "checkpoint.fast.path=" in refused.output, refused.output


def test_a_disk_that_is_full_costs_the_fast_tier_alone(
    workshop: Workshop, tmp_path: Path, expected_files: tuple[RankFile, ...]
) -> None:
    with disk_of(tmp_path / "nvme", 1_000_000) as disk:  # a rank file has 4 MB
        config = write_config(workshop.data, values_of(workshop, disk, every=8, fast_every=4, steps=17), "fast-full")
        command = run("finetune", "--config", str(config))
    assert command.process.returncode == 0, command.output
    assert re.search(r"the save of step 4 failed: .*No space left on device", command.output), command.output
    assert "committed step 8: " in command.output and "on the nodes" not in command.output
    newest = durable_checkpoints(RunDirectory.at(str(workshop.data / "runs" / "fast-full")))[-1]
    assert newest.manifest.files == expected_files
