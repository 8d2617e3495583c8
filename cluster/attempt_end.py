"""How an attempt ended, by what it has left; and whether what its workers found corrupt is so from here, too."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from cluster.failures import AttemptEnd, EndKind, misread, root_cause
from data_shards.errors import BatonError, CorruptFile
from data_shards.reading.shard_reader import verify_dataset_file
from data_shards.storage import Storage
from trainer.checkpoint import CheckpointRef
from trainer.config import WorkerSpec
from trainer.run_directory import AttemptStart, RunDirectory, Say, StopKind, WorkerError, read_json
from trainer.survey import problem_here, quarantine, release, survey


def end_of(run: RunDirectory, start: AttemptStart, spec: WorkerSpec, lost: str, say: Say) -> AttemptEnd:
    """Look at what the attempt has left, and at files that it found to be corrupt; a checkpoint that is so is put in
    quarantine."""
    end = _end_written(run, start.attempt)
    error = None if end is not None else root_cause(run.errors_of(start.attempt))
    if error is not None and error.checkpoint is not None and error.corrupt:
        error = _quarantine(run, start.attempt, error.checkpoint, error, say)
    elif error is not None and error.data_file is not None:
        error = _check_data(run, start.attempt, Storage.at(spec.dataset_uri), error.data_file, error)
    newest = newest_usable_of(run)
    committed = newest.step if newest else 0
    kind = EndKind(end["outcome"]) if end is not None else EndKind.FAILED
    lost = lost if end is None else ""
    early = end.get("reason", "") if end is not None else ""
    return AttemptEnd(kind, start.start_step, committed, error, lost, _making_way(run, start.attempt), early)


def newest_usable_of(run: RunDirectory) -> CheckpointRef | None:
    """For reports: None also where nothing can be used."""
    usable = survey(run).usable
    return usable[-1] if usable else None


def _end_written(run: RunDirectory, attempt: str) -> Any:
    """None also where it was cut off: the machine of its writer may have gone."""
    with suppress(CorruptFile):
        return read_json(run.attempt(attempt), "end.json")
    return None


def _making_way(run: RunDirectory, attempt: str) -> str:
    """Why an attempt was to end though the run goes on; empty where nobody wished it."""
    asked = [run.stop_request(attempt), *run.notices(attempt).values()]
    ends = (StopKind.STOP, StopKind.SUPERSEDED)
    return next((request.reason for request in asked if request and request.kind not in ends), "")


def _quarantine(run: RunDirectory, attempt: str, name: str, error: WorkerError, say: Say) -> WorkerError:
    """Believe a worker that a checkpoint is corrupt where it is so from here, too."""
    try:
        told = [each.message for each in run.errors_of(attempt) if each.checkpoint == name]
        if problem_here(run, name, "\n".join(told)):
            quarantine(run, name, error.message)
            return error
        release(run, name)
    except OSError as failed:  # the next attempt goes on without it all the same
        say(f"checkpoint {name} could not be put in quarantine: {failed}")
        return error
    doubt = f"{error.message}; the driver reads it as it was written, so it is used again"
    return misread(error, doubt, _place_of(run, attempt, error.rank))


def _check_data(run: RunDirectory, attempt: str, dataset: Storage, path: str, error: WorkerError) -> WorkerError:
    """Believe a worker that a file of the data is corrupt where it is so from here, too. Else its advice to delete the
    data is not passed on."""
    try:
        verify_dataset_file(dataset, path)
    except (BatonError, FileNotFoundError):
        return error
    except OSError as failed:
        found = f"the driver could not look, either: {failed}"
    else:
        found = "the driver reads it as it was written"
    doubt = f"{dataset.uri_of(path)} was not what its manifest says; {found}"
    return misread(error, doubt, _place_of(run, attempt, error.rank))


def _place_of(run: RunDirectory, attempt: str, rank: int) -> str:
    """Where a rank ran, in words."""
    with suppress(CorruptFile, OSError):
        if place := read_json(run.attempt(attempt), f"workers/rank-{rank:05d}.json"):
            return f"rank {rank}'s node {place['host']}"
    return f"rank {rank}'s node"
