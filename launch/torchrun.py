"""``torchrun … launch/finetune.py``: every process runs the command; rank 0 does the driver's part, the rest wait.

They wait for a file, not in a process group: however long preparing takes, no collective times out.
"""

from __future__ import annotations

import os
import time
from typing import Any

from data_shards.errors import BadInput, BatonError
from launch.cli import say
from launch.config import Config
from launch.exit_codes import ExitCode
from launch.job import make_job, open_run, settle
from trainer.config import WorkerSpec
from trainer.loop import Outcome
from trainer.run_directory import RunDirectory, read_json, write_json
from trainer.worker import run_worker

_POLL_S = 0.5


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def finetune_as_worker(config: Config) -> int:
    """This process's part of the run. Restarts are torchrun's (``--max-restarts``); each is an attempt of its own."""
    run = open_run(config)
    life = f"{os.environ['TORCHELASTIC_RUN_ID']}-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    note = f"torchrun/{life}.json"
    if int(os.environ["RANK"]) == 0:
        try:
            message = _begin(config, run)
        except BaseException as error:
            write_json(run.storage, note, {"failed": str(error), "bad_input": isinstance(error, BadInput)})
            raise
        write_json(run.storage, note, message)
    else:
        message = _wait(run, note)
    if "spec" not in message:
        return ExitCode.DONE
    spec = WorkerSpec.model_validate(message["spec"])
    outcome = run_worker(spec, group_timeout_s=config.cluster.collective_timeout_s)
    return ExitCode.DONE if outcome == Outcome.FINISHED else ExitCode.STOPPED


def _begin(config: Config, run: RunDirectory) -> dict[str, Any]:
    job = make_job(config, say)
    standing = settle(job, say)
    if standing.finished:
        say("the run is finished; nothing to do")
        return {}
    chain = run.lineage()
    start = run.start_attempt(chain[-1] if chain else None, standing.newest, standing.allowed_changes)
    say(f"attempt {start.number} ({start.attempt}) under torchrun, from step {start.start_step}")
    return {"spec": job.spec(start.attempt, standing.newest).model_dump(mode="json")}


def _wait(run: RunDirectory, note: str) -> dict[str, Any]:
    while (message := read_json(run.storage, note)) is None:
        time.sleep(_POLL_S)
    if "failed" in message:
        kind = BadInput if message["bad_input"] else BatonError
        raise kind(f"rank 0 could not begin: {message['failed']}")
    return message
