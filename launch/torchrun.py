"""``torchrun … launch/finetune.py``: every process runs the command; rank 0 does the driver's part, the rest wait.

They wait on torchrun's own store, in no collective: however long preparing takes, nothing times out, and what they are
told can't be a leftover of an earlier submission.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta

from cluster.lease import Lease, holding
from data_shards.errors import BadInput, BatonError
from launch.config import Config
from launch.exit_codes import ExitCode
from launch.job import Job, export_if_asked, make_job, settle, tell_finished, why_finished, write_result
from launch.places import newest_checkpoint, open_run_to_write
from trainer.config import WorkerSpec
from trainer.errors import RunHeld
from trainer.loop import Outcome
from trainer.progress_log import say
from trainer.survey import tip_and_newest
from trainer.worker import run_worker

_PATIENCE = timedelta(days=7)
_TOLD_APART = (BadInput, RunHeld)
"""Errors that have exit codes of their own, on every rank"""


def agree(begin: Callable[[], WorkerSpec | None]) -> WorkerSpec | None:
    """What rank 0's ``begin`` gives, on every rank; elsewhere ``begin`` is not called. None: there is nothing to do.

    Raises on the other ranks what tells them that rank 0 could not begin.
    """
    from torch.distributed import rendezvous

    store, rank, _ = next(rendezvous("env://", timeout=_PATIENCE))
    key = f"baton/begin/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if rank == 0:
        try:
            spec = begin()
        except BaseException as error:
            kind = next((kind for kind in _TOLD_APART if isinstance(error, kind)), BatonError)
            store.set(key, json.dumps({"failed": str(error), "kind": kind.__name__}))
            raise
        store.set(key, json.dumps({"spec": spec.model_dump(mode="json") if spec else None}))
        return spec
    message = json.loads(store.get(key))
    if "failed" in message:
        kind = next((kind for kind in _TOLD_APART if kind.__name__ == message["kind"]), BatonError)
        raise kind(f"rank 0 could not begin: {message['failed']}")
    return WorkerSpec.model_validate(message["spec"]) if message["spec"] else None


def finetune_as_worker(config: Config, *, take_over: bool = False) -> int:
    """This process's part of the run. Restarts are torchrun's (``--max-restarts``); each is an attempt of its own."""
    with ExitStack() as held:  # by rank 0, until the end
        leases: list[Lease] = []
        jobs: list[Job] = []

        def begin() -> WorkerSpec | None:
            # torchrun ends what outlives its SIGTERM only after half a minute, so that stays as deadly as it is.
            run = open_run_to_write(config)
            leases.append(held.enter_context(holding(run, say, take_over=take_over, catch_sigterm=False)))
            jobs.append(make_job(config, say))
            return _begin(jobs[0], leases[0])

        spec = agree(begin)
        if spec is None:
            return ExitCode.DONE
        outcome = run_worker(spec)
        for job, lease in zip(jobs, leases, strict=True):
            lease.check()
            newest = newest_checkpoint(job.run)
            write_result(job, lease, newest, outcome.value, why_finished(newest, job) or "torchrun's workers ended")
            if outcome == Outcome.FINISHED:
                export_if_asked(job, lease)
    return ExitCode.DONE if outcome == Outcome.FINISHED else ExitCode.STOPPED


def _begin(job: Job, lease: Lease) -> WorkerSpec | None:
    standing = settle(job, say)
    if standing.why_finished:
        tell_finished(job, lease, standing, say)
        export_if_asked(job, lease)
        return None
    parent, newest = tip_and_newest(job.run, lambda line: None)
    lease.check()
    start = job.run.start_attempt(parent, newest, standing.allowed_changes, term=lease.term, claim=lease.id)
    lease.when_lost(lambda: job.run.request_stop(start.attempt, "another launcher took the run over"))
    lease.when_asked_to_stop(lambda reason: job.run.request_stop(start.attempt, reason))
    say(f"attempt {start.number} ({start.attempt}) under torchrun, from step {start.start_step}")
    return job.spec(start.attempt, newest)
