"""`baton submit`: what it refuses before anything is sent, what it asks Ray for, and what it makes of a job's end.
Jobs that run are in tests/integration/test_ray_job.py."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import ray_jobs
from cluster.local_processes import free_port
from cluster.ray_jobs import JobEnd, JobLost, JobsApi, JobStatus
from launch import submit
from tests.support.command import ROOT, Ended, run_here

CONFIG = str(ROOT / "launch" / "configs" / "quickstart.yaml")


@pytest.fixture(autouse=True)
def nothing_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.setenv(name, "x")  # so that it is put back as it was
        monkeypatch.delenv(name)


@pytest.fixture
def stranger() -> Iterator[str]:
    """Something answers there, and is no Ray."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def submitted(*arguments: str, config: str = CONFIG) -> Ended:
    return run_here(submit.main, "--config", config, "run.storage=/shared/runs", *arguments)


def test_where_nobody_answers(stranger: str) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    done = submitted("--address", nobody)
    assert done.code == 2 and f"{nobody}: no Ray dashboard answers there" in done.output, done.output
    done = submitted("--address", stranger)
    assert done.code == 2 and stranger in done.output and "Traceback" not in done.output, done.output


def test_the_address_that_is_given_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    nobody = f"http://127.0.0.1:{free_port()}"
    assert nobody in submitted("--address", nobody).output
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    assert "http://127.0.0.1:1: no Ray dashboard" in submitted().output


def test_what_the_job_could_not_do_is_refused_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside = tmp_path / "mine.yaml"
    outside.write_text(Path(CONFIG).read_text())
    done = submitted(config=str(outside))
    assert done.code == 2 and f"lies outside of {ROOT}" in done.output and "Copy the file into it" in done.output
    done = submitted("run.storage=runs")
    assert done.code == 2 and "run.storage='runs' is relative" in done.output
    done = submitted("optimizer.learning_rate=1")
    assert done.code == 2 and "unknown key" in done.output
    monkeypatch.setattr(submit, "ROOT", tmp_path)
    done = submitted(config=str(outside))
    assert done.code == 2 and "is an installation, and a job runs from a checkout" in done.output


class Client:
    """Stands in for Ray's."""

    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}

    def get_address(self) -> str:
        return "http://head:8265"

    def submit_job(self, **asked: Any) -> str:
        self.asked = asked
        return str(asked["submission_id"])


def api_of(client: Any) -> JobsApi:
    api = JobsApi.__new__(JobsApi)
    api._client = client
    return api


def test_what_ray_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client()
    monkeypatch.setattr(submit, "JobsApi", lambda address: api_of(client))
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "planted")
    done = submitted(
        "--no-wait", "--take-over", "run.name=my.run", "data.chat_template=a b", "checkpoint.every_steps=5"
    )
    assert done.code == 0 and "submitted my.run-" in done.output, done.output
    asked = client.asked
    command = "python launch/finetune.py --config launch/configs/quickstart.yaml --take-over run.storage=/shared/runs"
    assert asked["entrypoint"].startswith(command) and "'data.chat_template=a b'" in asked["entrypoint"]
    assert asked["runtime_env"] == {"working_dir": str(ROOT), "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "1260"}}
    assert asked["metadata"] == {"run": "my.run", "storage": "/shared/runs"}
    assert not {name for name in asked if name.startswith("entrypoint_")}, "else the driver would not fit every head"
    assert "planted" not in str(asked)


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (JobEnd(JobStatus.SUCCEEDED, 0, ""), 0),
        (JobEnd(JobStatus.FAILED, 75, ""), 75),
        (JobEnd(JobStatus.FAILED, 2, ""), 2),
        (JobEnd(JobStatus.FAILED, -9, ""), 137),
        (JobEnd(JobStatus.FAILED, None, "the runtime environment failed"), 1),
        (JobEnd(JobStatus.STOPPED, None, ""), 75),
    ],
)
def test_a_jobs_end_is_the_commands(end: JobEnd, code: int) -> None:
    assert submit._exit_code("job", end) == code


class Flaky:
    """A job whose log breaks off again and again, and is told from its beginning each time."""

    def __init__(self, *tells: str | Exception, status: str = "SUCCEEDED") -> None:
        self._tells = list(tells)
        self._status = status

    async def tail_job_logs(self, job: str) -> Any:
        while self._tells:
            told = self._tells.pop(0)
            if isinstance(told, Exception):
                raise told
            yield told

    def get_job_info(self, job: str) -> Any:
        class Info:
            status = ray_jobs.JobStatus(self._status)
            driver_exit_code = 75
            message = None

        return Info


def test_a_log_that_breaks_off_is_shown_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_jobs, "_AGAIN_S", 0.01)
    shown: list[str] = []
    client = Flaky(
        "one\ntwo\n", RuntimeError("closed"), "one\n", "two\nthr", OSError("gone"), "one\ntwo\nthree\n", "end"
    )
    end = api_of(client).follow("job", shown.append)
    assert "".join(shown) == "one\ntwo\nthree\nend"
    assert end == JobEnd(JobStatus.SUCCEEDED, 75, "")


def test_a_head_that_stays_away_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_jobs, "_AGAIN_S", 0.01)
    monkeypatch.setattr(ray_jobs, "_OUT_OF_SIGHT_S", 0.1)
    client = Flaky(*[RuntimeError("closed")] * 1000)
    with pytest.raises(JobLost, match="nothing is heard of job x any more"):
        api_of(client).follow("x", lambda text: None)
