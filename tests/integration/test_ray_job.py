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
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.local_processes import free_port
from cluster.story import Story
from launch import finetune, status
from launch.quickstart_inputs import make_inputs
from tests.support.command import ROOT, RunFiles, edited_tree, environment, run_here, slowed_tree
from tests.support.secrets_search import leaks
from trainer.run_directory import RunDirectory

BIN = Path(sys.executable).parent
STEPS, COMMIT_EVERY = 60, 10
PLANTED = {name: f"planted-{secrets.token_hex(16)}" for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY")}
"""Secrets in the environment of the cluster, and with it of every driver and worker."""


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

    def baton(self, verb: str, *arguments: str, tree: Path = ROOT) -> subprocess.CompletedProcess[str]:
        """A verb of the command, on a machine that sees the cluster's dashboard, its token and the run's storage."""
        command = [sys.executable, str(tree / "launch" / f"{verb}.py"), *arguments]
        return subprocess.run(
            command, cwd=tree, env=self.environment, text=True, capture_output=True, timeout=240, check=False
        )

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


@contextmanager
def head_node(num_cpus: int, **extra: str) -> Iterator[Cluster]:
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
        **extra,
    )
    command = [
        *(str(BIN / "ray"), "start", "--head", "--block", f"--num-cpus={num_cpus}", f"--port={port}"),
        f"--temp-dir={temp}",
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
def cluster() -> Iterator[Cluster]:
    with head_node(num_cpus=4, **PLANTED) as made:
        yield made


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
        "cluster.use_gpu=false",
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
    waiting: Story
    """what is told of the second submission while it waits for the node that was lost"""
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
    waiting = waited_for(RunDirectory.at(str(storage_of(inputs) / "quickstart")))
    with cluster.node(num_cpus=3):
        after = int(cluster.wait_for_log(second, r"attempt 3 \(\w+\): resuming from step (\d+)")[1])
        cluster.wait_for_log(second, "finished: all steps are done")
        cluster.wait_for_end(second)
    return Resumed(RunFiles(storage_of(inputs) / "quickstart"), stopped, waiting, before, after, cluster.logs(second))


def waited_for(run: RunDirectory) -> Story:
    """What is told once its launcher has left word of what it waits for, a moment after it has said so."""
    deadline = time.monotonic() + 20
    while (story := status.look(run).story).doing is None:
        assert time.monotonic() < deadline, story
        time.sleep(0.2)
    return story


def storage_of(inputs: list[str]) -> Path:
    return Path(next(value for value in inputs if value.startswith("run.storage=")).partition("=")[2])


def test_stopped_job_resumes_from_an_edited_tree(resumed: Resumed) -> None:
    assert "was stopped" in resumed.stopped
    assert 12 <= resumed.from_step < STEPS, "what was done by the time of the stop is saved"
    assert re.search(rf"step {STEPS}/{STEPS}  loss [\d.]+  lr .*tok/s  ETA 0s \(edited\)", resumed.logs)
    assert resumed.files.result["status"] == "finished" and resumed.files.result["step"] == STEPS
    assert (resumed.files.path / "export" / f"step-{STEPS:08d}" / "model" / "config.json").is_file()


def test_lost_node_is_waited_for(resumed: Resumed) -> None:
    doing = resumed.waiting.doing
    assert resumed.waiting.state == "waiting" and doing is not None
    assert doing.text.startswith(
        "waiting for room: cluster.num_workers=2 with 3 CPU each; the cluster has 4 CPU, 0 GPU"
    )
    story = status.look(RunDirectory.at(str(resumed.files.path))).story
    assert (story.state, story.doing) == ("finished", None)
    waited = [event.text for event in story.events if (event.kind, event.attempt) == ("waiting", story.attempts[-1].id)]
    assert len(waited) == 1 and waited[0].endswith(doing.text)
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


TINY = ("training.steps=6", "export.at_end=false", "cluster.wait_for_capacity_s=30")


@dataclass(frozen=True)
class Submitted:
    done: subprocess.CompletedProcess[str]
    files: RunFiles
    job: str
    record: Any
    """of the Jobs API"""
    metrics: str
    """the last scrape"""


@contextmanager
def scraped(port: int) -> Iterator[list[str]]:
    """What Prometheus gets meanwhile, once a second, whenever somebody answers."""
    found: list[str] = []
    ended = threading.Event()

    def scrape() -> None:
        while not ended.wait(1):
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                found.append(answer.read().decode())

    thread = threading.Thread(target=scrape, daemon=True)
    thread.start()
    yield found
    ended.set()
    thread.join(10)


@pytest.fixture(scope="module")
def submitted(cluster: Cluster, inputs: list[str]) -> Submitted:
    """`baton submit`, followed to its end."""
    name, port = "submitted", free_port()
    mine = [*inputs, *TINY, f"run.name={name}", f"metrics.port={port}"]
    with scraped(port) as metrics:
        done = cluster.baton("submit", "--config", "launch/configs/quickstart.yaml", *mine)
    job = re.search(rf"submitted ({name}-\w+): run {name} in", done.stdout)
    assert job is not None, done.stdout + done.stderr
    return Submitted(done, RunFiles(storage_of(inputs) / name), job[1], cluster.ask(job[1]), metrics[-1])


def test_submit_follows_a_run_to_its_end(submitted: Submitted, cluster: Cluster) -> None:
    done = submitted.done
    assert done.returncode == 0, done.stdout + done.stderr
    assert submitted.files.result["status"] == "finished" and submitted.files.result["step"] == 6
    for line in ("step 6/6  loss", "finished: all steps are done"):
        assert done.stdout.count(line) == 1, done.stdout
    assert submitted.record["metadata"]["run"] == "submitted" and submitted.record["driver_exit_code"] == 0
    assert submitted.record["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "1260"}


def test_submit_ends_with_the_jobs_exit_code(cluster: Cluster, inputs: list[str]) -> None:
    wanted = ["run.name=huge-again", "cluster.num_workers=50", "cluster.wait_for_capacity_s=0"]
    done = cluster.baton("submit", "--config", "launch/configs/quickstart.yaml", *inputs, *wanted)
    assert done.returncode == 2 and "num_workers=50" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("token", [None, "0" * 64], ids=["none", "wrong"])
def test_nobody_gets_in_without_the_token(cluster: Cluster, inputs: list[str], token: str | None) -> None:
    api = f"{cluster.environment['RAY_API_SERVER_ADDRESS']}/api/jobs/"
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(api, headers=headers), timeout=30)
    assert refused.value.code == (401 if token is None else 403)
    other = dict(cluster.environment) | ({"RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"})
    outsider = Cluster(cluster.gcs, other)
    done = outsider.baton("submit", "--config", "launch/configs/quickstart.yaml", *inputs)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "the cluster does not take this token, or wants one. Set RAY_AUTH_MODE=token" in done.stderr


def test_secrets_of_the_environment_stay_there(submitted: Submitted, cluster: Cluster) -> None:
    """Not in what the run leaves, not in what it says, not in what the Jobs API tells of it."""
    secret = {**PLANTED, "RAY_AUTH_TOKEN": cluster.environment["RAY_AUTH_TOKEN"]}
    assert leaks(submitted.files.path.parent, secret) == []
    told = "\n".join(
        [submitted.done.stdout, submitted.done.stderr, json.dumps(cluster.ask("")), cluster.logs(submitted.job)]
    )
    assert [name for name, value in secret.items() if value in told] == []
    assert submitted.job in told and len(list(submitted.files.path.rglob("*"))) > 10, "there was something to search"
    assert "baton_steps_total" in submitted.metrics


def test_a_head_without_resources_drives_a_run(inputs: list[str]) -> None:
    """As on Kubernetes, where the head has no room for workers: the driver asks for none."""
    with head_node(num_cpus=0) as cluster, cluster.node(num_cpus=2):
        name = "headless"
        done = cluster.baton("submit", "--config", "launch/configs/quickstart.yaml", *inputs, *TINY, f"run.name={name}")
        assert done.returncode == 0, done.stdout + done.stderr
        (job,) = [job for job in cluster.ask("") if (job["submission_id"] or "").startswith(name)]
        nodes = cluster.ray("list", "nodes", "--format=json")
    assert RunFiles(storage_of(inputs) / name).result["status"] == "finished"
    heads = [node["node_id"] for node in json.loads(nodes.stdout) if node["is_head_node"]]
    assert heads == [job["driver_node_id"]], nodes.stdout
