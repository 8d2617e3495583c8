"""`ray job submit` against a cluster with token auth: to the end, stopped and resumed from an edited tree, refused."""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.quickstart_inputs import make_inputs
from tests.integration.test_recovery import edited_tree
from tests.support.command import ROOT, RunFiles, environment
from tests.support.distributed import free_port

BIN = Path(sys.executable).parent
STEPS = 60


@dataclass(frozen=True)
class Cluster:
    address: str
    environment: dict[str, str]

    def ray(self, *arguments: str, cwd: Path = ROOT, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
        command = [str(BIN / "ray"), *arguments]
        return subprocess.run(
            command, cwd=cwd, env=self.environment, text=True, capture_output=True, timeout=timeout_s, check=False
        )

    def submit(self, *arguments: str, tree: Path = ROOT, wait: bool = True) -> subprocess.CompletedProcess[str]:
        """The README's command line, with what is particular to this test behind it."""
        options = [] if wait else ["--no-wait"]
        script = ["python", "launch/finetune.py", "--config", "launch/configs/quickstart.yaml", *arguments]
        return self.ray("job", "submit", *options, "--working-dir", ".", "--", *script, cwd=tree)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head node of our own, ended by its pid; everything on loopback."""
    port, dashboard, client = free_port(), free_port(), free_port()
    temp = tempfile.mkdtemp(prefix="baton-", dir="/tmp")  # Ray's sockets need a short path
    env = environment(
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN=secrets.token_hex(32),
        RAY_API_SERVER_ADDRESS=f"http://127.0.0.1:{dashboard}",
        PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}",
    )
    command = [
        *(str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=4", f"--port={port}", f"--temp-dir={temp}"),
        *("--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
        f"--ray-client-server-port={client}",
    ]
    head = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    made = Cluster(env["RAY_API_SERVER_ADDRESS"], env)
    try:
        deadline = time.monotonic() + 90
        while made.ray("job", "list").returncode != 0:
            assert head.poll() is None and time.monotonic() < deadline, "the head node did not come up"
            time.sleep(1)
        yield made
    finally:
        head.send_signal(signal.SIGTERM)
        try:
            head.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)  # the head's own session: nothing but what it started


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
        "training.log_every=1",
        "checkpoint.every_steps=10",
        "evaluation.at_start=false",
    ]


def job_id(output: str) -> str:
    return re.search(r"raysubmit_\w+", output)[0]  # type: ignore[index]


def test_stopped_job_resumes_from_an_edited_tree(cluster: Cluster, inputs: list[str], tmp_path: Path) -> None:
    storage = Path(next(i for i in inputs if i.startswith("run.storage=")).partition("=")[2])
    files = RunFiles(storage / "quickstart")
    submitted = cluster.submit(*inputs, wait=False)
    assert submitted.returncode == 0, submitted.stderr
    first = job_id(submitted.stdout + submitted.stderr)
    deadline = time.monotonic() + 180
    while f"step 15/{STEPS}  loss" not in (logs := cluster.ray("job", "logs", first).stdout):
        assert time.monotonic() < deadline and "baton:" not in logs, logs
        time.sleep(1)
    stopped = cluster.ray("job", "stop", first)
    assert stopped.returncode == 0, stopped.stderr
    assert "was stopped" in cluster.ray("job", "status", first).stdout
    time.sleep(2)
    again = cluster.submit(*inputs, tree=edited_tree(tmp_path))
    logs = cluster.ray("job", "logs", job_id(again.stdout + again.stderr)).stdout
    assert again.returncode == 0, logs
    resumed = int(re.search(r"resuming from step (\d+)", logs)[1])  # type: ignore[index]
    assert 10 <= resumed < STEPS
    assert re.search(rf"step {STEPS}/{STEPS}  loss [\d.]+  lr .*tok/s  ETA 0s \(edited\)", logs)
    assert files.result["status"] == "finished" and files.result["step"] == STEPS
    assert sorted(files.steps()) == list(range(1, STEPS + 1))
    assert (storage / "quickstart" / "export" / f"step-{STEPS:08d}" / "model" / "config.json").is_file()


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
