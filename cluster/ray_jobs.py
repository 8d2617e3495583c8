"""Runs as jobs of a Ray cluster, through its Jobs API: submitted, followed, and what they ended with."""

from __future__ import annotations

import asyncio
import os
import shlex
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from data_shards.errors import BadInput, BatonError

_ADDRESS = "RAY_API_SERVER_ADDRESS"
_HERE = "http://127.0.0.1:8265"
_AGAIN_S = 2.0
_OUT_OF_SIGHT_S = 600.0
"""For which a head that does not answer is asked again: it may be replaced meanwhile"""


class JobLost(BatonError):
    """Nothing is heard of a submitted job any more; it may well go on."""


class JobStatus(StrEnum):
    PENDING = "PENDING"
    RUNNING = "RUNNING"
    STOPPED = "STOPPED"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"


_OVER = {JobStatus.STOPPED, JobStatus.SUCCEEDED, JobStatus.FAILED}


@dataclass(frozen=True)
class JobEnd:
    status: JobStatus
    driver_exit_code: int | None
    """None where Ray does not tell it: of jobs that `ray job stop` has stopped, and where the driver never ran"""
    message: str


class JobsApi:
    """The Jobs API of one cluster, with its token where Ray is told one (RAY_AUTH_MODE, RAY_AUTH_TOKEN[_PATH])."""

    def __init__(self, address: str | None = None) -> None:
        """
        Args:
            address: of the dashboard. Default: as Ray's own tools are told by the environment, else this machine's.

        Raises BadInput where nobody answers there, or the token is not the cluster's.
        """
        from ray.job_submission import JobSubmissionClient

        if address is not None:
            os.environ[_ADDRESS] = address  # Ray lets it win over what is given
        with _explained(os.environ.get(_ADDRESS) or os.environ.get("RAY_ADDRESS") or _HERE):
            self._client: Any = JobSubmissionClient(_HERE)

    def submit(
        self,
        command: Sequence[str],
        *,
        tree: Path,
        run: str,
        env_vars: Mapping[str, str],
        metadata: Mapping[str, str],
    ) -> str:
        """Returns the submission id, which begins with the run's name.

        The driver takes no resources: it runs on the head node, whether that offers any or not.

        Args:
            tree: uploaded but for what its .rayignore and .gitignore leave out; the command runs in it.
            env_vars: can be read by everybody who may use the Jobs API: no secrets.
        """
        with _explained(self._client.get_address()):
            return str(
                self._client.submit_job(
                    entrypoint=shlex.join(command),
                    submission_id=f"{run}-{uuid.uuid4().hex[:8]}",
                    runtime_env={"working_dir": str(tree), "env_vars": dict(env_vars)},
                    metadata=dict(metadata),
                )
            )

    def follow(self, job: str, write: Callable[[str], object]) -> JobEnd:
        """Pass its log on as it comes, and return its end. A head that is away for some minutes is waited for.

        Raises JobLost where it stays away.
        """
        log, heard = _Log(write), time.monotonic()
        while True:
            try:
                asyncio.run(self._tail(job, log))
                end = self._end(job)
                heard = time.monotonic()
            except _trouble() as error:
                if time.monotonic() > heard + _OUT_OF_SIGHT_S:
                    raise JobLost(f"nothing is heard of job {job} any more ({error}); it may go on") from error
                end = None
            if end is not None:
                return end
            time.sleep(_AGAIN_S)

    async def _tail(self, job: str, log: _Log) -> None:
        log.rewind()
        async for text in self._client.tail_job_logs(job):
            log.add(text)

    def _end(self, job: str) -> JobEnd | None:
        """None while it is not over."""
        info = self._client.get_job_info(job)
        status = JobStatus(str(info.status.value))
        return JobEnd(status, info.driver_exit_code, info.message or "") if status in _OVER else None


class _Log:
    """What is told of a job's log: each follower gets it from its beginning, and it is to be shown once."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._shown = 0
        self._at = 0

    def rewind(self) -> None:
        self._at = 0

    def add(self, text: str) -> None:
        new = text[max(0, self._shown - self._at) :]
        self._at += len(text)
        if new:
            self._shown = self._at
            self._write(new)


def _trouble() -> tuple[type[Exception], ...]:
    """What a connection that breaks raises, and what an answer of somebody in between."""
    import aiohttp
    from ray.exceptions import AuthenticationError

    return (RuntimeError, OSError, aiohttp.ClientError, AuthenticationError)


@contextmanager
def _explained(address: str) -> Iterator[None]:
    """What goes wrong with the cluster's address or token becomes BadInput."""
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise BadInput(
            f"{address}: the cluster does not take this token, or wants one. Set RAY_AUTH_MODE=token, and "
            f"RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's ({error.message.strip().splitlines()[0]})"
        ) from None
    except ConnectionError as error:
        raise BadInput(
            f"{address}: no Ray dashboard answers there ({error}). Give its address with --address "
            f"http://<head>:8265 or {_ADDRESS}; a cluster on Kubernetes needs `kubectl port-forward` first"
        ) from None
    except (OSError, RuntimeError, ValueError) as error:
        raise BadInput(f"{address}: the Jobs API refused the job: {error}") from error
