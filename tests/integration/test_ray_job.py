"""`ray job submit` against a cluster with token auth: to the end, stopped and resumed from an edited tree, through the
loss of a node, refused."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.local_processes import free_port
from launch import finetune
from launch.quickstart_inputs import make_inputs
from tests.support.command import ROOT, RunFiles, edited_tree, environment, run_here, slowed_tree

BIN = Path(sys.executable).parent
STEPS, COMMIT_EVERY = 60, 10


@dataclass(frozen=True)
class Cluster:
    gcs: str
    environment: dict[str, str]

    def ray(self, *arguments: str, cwd: Path = ROOT, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
        command = [str(BIN / "ray"), *arguments]
        return subprocess.run(
            command, cwd=cwd, env=self.environment, text=True, capture_output=True, timeout=timeout_s, check=False
        )

    @contextmanager
    def node(self, num_cpus: int) -> Iterator[subprocess.Popen[bytes]]:
        """One more node; at the end it is gone, with all that ran on it, as when a machine is taken away."""
        temp = tempfile.mkdtemp(prefix="baton-", dir="/tmp")  # not the head's, which it would clean up
        command = [
            *(str(BIN / "ray"), "start", "--block", f"--address={self.gcs}", f"--num-cpus={num_cpus}"),
            *("--node-ip-address=127.0.0.1", f"--temp-dir={temp}", f"--dashboard-agent-listen-port={free_port()}"),
        ]
        process = subprocess.Popen(
            command, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield process
        finally:
            end_session(process, signal.SIGKILL)
            shutil.rmtree(temp, ignore_errors=True)

    def ask(self, path: str) -> Any:
        """Of the Jobs API; the command line takes seconds of a core to ask."""
        request = urllib.request.Request(
            f"{self.environment['RAY_API_SERVER_ADDRESS']}/api/jobs/{path}",
            headers={"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def is_up(self) -> bool:
        with suppress(OSError):
            return isinstance(self.ask(""), list)
        return False

    def logs(self, job: str) -> str:
        return str(self.ask(f"{job}/logs")["logs"])

    def wait_for_log(self, job: str, pattern: str, timeout_s: float = 180) -> re.Match[str]:
        deadline = time.monotonic() + timeout_s
        while not (found := re.search(pattern, logs := self.logs(job))):
            assert time.monotonic() < deadline and "baton:" not in logs, f"no {pattern!r} in:\n{logs}"
            time.sleep(1)
        return found

    def wait_for_end(self, job: str, timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while (status := self.ask(job)["status"]) != "SUCCEEDED":
            assert time.monotonic() < deadline and status == "RUNNING", f"{job} is {status}:\n{self.logs(job)}"
            time.sleep(1)

    def submit(self, *arguments: str, tree: Path = ROOT, wait: bool = True) -> subprocess.CompletedProcess[str]:
        """The README's command line, with what is particular to this test behind it."""
        options = [] if wait else ["--no-wait"]
        script = ["python", "launch/finetune.py", "--config", "launch/configs/quickstart.yaml", *arguments]
        return self.ray("job", "submit", *options, "--working-dir", ".", "--", *script, cwd=tree)


def end_session(process: subprocess.Popen[bytes], signum: signal.Signals) -> None:
    """Signal a command's own session: nothing but what it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signum)
    process.wait(30)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head node of our own, ended by its pid; everything on loopback."""
    port, dashboard, client = free_port(), free_port(), free_port()
    temp = tempfile.mkdtemp(prefix="baton-", dir="/tmp")  # Ray's sockets need a short path
    env = environment(
        RAY_AUTH_MODE="token",
        RAY_health_check_period_ms="1000",  # a lost node is noticed in seconds
        RAY_prestart_worker_first_driver="0",  # jobs have a runtime environment; these would idle
        RAY_AUTH_TOKEN=secrets.token_hex(32),
        RAY_API_SERVER_ADDRESS=f"http://127.0.0.1:{dashboard}",
        OMP_NUM_THREADS="1",  # Ray would else set it by cpus_per_worker, and sums differ by it
        PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}",
    )
    command = [
        *(str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=4", f"--port={port}", f"--temp-dir={temp}"),
        *("--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
        *(f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={free_port()}"),  # not another Ray's
    ]
    head = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    made = Cluster(f"127.0.0.1:{port}", env)
    try:
        deadline = time.monotonic() + 90
        while not made.is_up():
            assert head.poll() is None and time.monotonic() < deadline, "the head node did not come up"
            time.sleep(1)
        yield made
    finally:
        end_session(head, signal.SIGKILL)
        shutil.rmtree(temp, ignore_errors=True)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder, num_train=600, num_validation=20)
    return [
        f"model.base={folder}/base",
        f"data.train={folder}/train.jsonl",
        f"data.validation={folder}/validation.jsonl",
        f"run.storage={folder}/runs",
        "cluster.cpus_per_worker=1",
        f"training.steps={STEPS}",
        "training.global_batch=4",
        "training.micro_batch=2",
        "training.log_every=1",
        f"checkpoint.every_steps={COMMIT_EVERY}",
        "evaluation.at_start=false",
    ]


def job_id(output: str) -> str:
    return re.search(r"raysubmit_\w+", output)[0]  # type: ignore[index]


@dataclass(frozen=True)
class Resumed:
    """A job that was stopped, submitted again from an edited tree, lost the node of one of its two workers, waited for
    another one and went on to the end."""

    files: RunFiles
    stopped: str
    """what ``ray job status`` says of the first submission"""
    from_step: int
    """that the second submission began with"""
    from_step_after_loss: int
    logs: str
    """of the second submission"""


@pytest.fixture(scope="module")
def resumed(cluster: Cluster, inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Resumed:
    wide = ["cluster.cpus_per_worker=3", "cluster.wait_for_capacity_s=30"]  # a node each
    folder = tmp_path_factory.mktemp("trees")
    slow = slowed_tree(folder, 0.2)
    with cluster.node(num_cpus=3):
        submitted = cluster.submit(*inputs, *wide, tree=slow, wait=False)
        assert submitted.returncode == 0, submitted.stderr
        first = job_id(submitted.stdout + submitted.stderr)
        cluster.wait_for_log(first, f"step 12/{STEPS}  loss")
        done = cluster.ray("job", "stop", first)
        assert done.returncode == 0, done.stderr
        stopped = cluster.ray("job", "status", first).stdout
        time.sleep(2)
        again = cluster.submit(*inputs, *wide, tree=edited_tree(folder, tree=slow), wait=False)
        second = job_id(again.stdout + again.stderr)
        before = int(cluster.wait_for_log(second, r"attempt 2 \(\w+\): resuming from step (\d+)")[1])
        cluster.wait_for_log(second, f"step {before + COMMIT_EVERY + 2}/{STEPS}  loss")
    cluster.wait_for_log(second, "attempt 2 failed")
    cluster.wait_for_log(
        second, r"waiting for room: cluster\.num_workers=2 with 3 CPU each; the cluster has 4 CPU, 0 GPU,"
    )
    with cluster.node(num_cpus=3):
        after = int(cluster.wait_for_log(second, r"attempt 3 \(\w+\): resuming from step (\d+)")[1])
        cluster.wait_for_log(second, "finished: all steps are done")
        cluster.wait_for_end(second)
    return Resumed(RunFiles(storage_of(inputs) / "quickstart"), stopped, before, after, cluster.logs(second))


def storage_of(inputs: list[str]) -> Path:
    return Path(next(value for value in inputs if value.startswith("run.storage=")).partition("=")[2])


def test_stopped_job_resumes_from_an_edited_tree(resumed: Resumed) -> None:
    assert "was stopped" in resumed.stopped
    assert 12 <= resumed.from_step < STEPS, "what was done by the time of the stop is saved"
    assert re.search(rf"step {STEPS}/{STEPS}  loss [\d.]+  lr .*tok/s  ETA 0s \(edited\)", resumed.logs)
    assert resumed.files.result["status"] == "finished" and resumed.files.result["step"] == STEPS
    assert (resumed.files.path / "export" / f"step-{STEPS:08d}" / "model" / "config.json").is_file()


def test_lost_node_is_waited_for(resumed: Resumed) -> None:
    assert resumed.from_step_after_loss > resumed.from_step
    assert resumed.from_step_after_loss % COMMIT_EVERY == 0
    assert resumed.files.result["attempts"] == 3


def test_it_ends_as_the_run_that_was_left_alone(resumed: Resumed, inputs: list[str]) -> None:
    """Which ran without Ray."""
    config = str(ROOT / "launch" / "configs" / "quickstart.yaml")
    local = [*inputs, "run.name=left-alone", "cluster.launcher=processes", "export.at_end=false"]
    done = run_here(finetune.main, "--config", config, *local)
    assert done.code == 0, done.output
    assert resumed.files.trace() == RunFiles(storage_of(inputs) / "left-alone").trace()


def test_job_that_can_not_be_placed_is_refused_in_time(cluster: Cluster, inputs: list[str]) -> None:
    started = time.monotonic()
    done = cluster.submit(*inputs, "run.name=huge", "cluster.num_workers=50", "cluster.wait_for_capacity_s=5")
    seconds = time.monotonic() - started
    assert done.returncode != 0
    assert "num_workers=50" in done.stdout and "the cluster has 4 CPU, 0 GPU, room for 4" in done.stdout, done.stdout
    assert "exit code 2" in done.stdout + done.stderr
    assert seconds < 60, f"{seconds:.0f} s, submitting included"


def test_relative_storage_is_refused(cluster: Cluster, inputs: list[str]) -> None:
    done = cluster.submit(*inputs, "run.storage=runs")
    assert done.returncode != 0 and "run.storage='runs' is relative" in done.stdout, done.stdout
