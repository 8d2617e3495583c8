"""Which of a run's checkpoints count, and why the others do not."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from data_shards.errors import BatonError, CorruptFile
from trainer import checkpoint
from trainer.checkpoint import CheckpointRef
from trainer.run_directory import (
    AttemptStart,
    RunDirectory,
    Say,
    WorkerError,
    fences,
    lineage_of,
    read_json,
    utc_now,
    write_json,
)

QUARANTINE = "quarantine.json"
"""Beside the manifest of a checkpoint that did not read back as written. It is kept, for people, and not used."""
VERIFIED = "verified.json"
"""Beside the manifest of one that an attempt could not use, and that was found good since."""


class NoUsableCheckpoint(BatonError):
    """There are commits, and none of them can be read."""


class Survey(NamedTuple):
    """Every folder under ``checkpoints/``, by what it is."""

    usable: list[CheckpointRef]
    """oldest first"""
    bad: dict[str, str]
    """committed by an attempt that counts, but damaged or quarantined: by name, why"""
    superseded: dict[str, int]
    """committed too late by an attempt that had a successor: by name, the step at which that began; ``NOTHING`` where
    nothing of that attempt counts, ``STRANGER`` where no attempt of the run is called so"""
    unfinished: list[str]
    """never committed, or half removed"""
    quarantined: set[str]
    attempts: dict[str, AttemptStart]
    """all of the run, by id"""
    chain: list[AttemptStart]
    """those that count, oldest first"""


NOTHING, STRANGER = -1, -2


def survey(run: RunDirectory) -> Survey:
    """Look at every checkpoint: its manifest, the sizes of its files, its place in the chain of attempts, and whether
    the last attempts could use it."""
    names = run.checkpoints.list()  # before the attempts: whoever made one of these folders has begun
    attempts = run.attempts()
    chain = lineage_of(attempts)
    limits: dict[str, int | None] = {**dict.fromkeys(attempts, NOTHING), **fences(chain)}
    found = Survey([], {}, {}, [], set(), attempts, chain)
    failed = _found_unusable(run, chain)
    for name in names:
        problem, ref = _known_problem(run, name, failed), None
        try:
            ref = checkpoint.read_manifest(run.checkpoints, name)
            _check_name(ref)
        except FileNotFoundError:
            found.unfinished.append(name)
            continue
        except CorruptFile as error:
            problem = str(error)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            problem = str(error)  # of this one, and not for a moment; the others may be on better disks
        if marked := _quarantined(run, name):
            found.quarantined.add(name)
            problem = marked
        step, attempt = checkpoint.parse_name(name)
        limit = limits.get(attempt, STRANGER)
        if limit is not None and step > limit:
            found.superseded[name] = limit
        elif problem or ref is None:
            found.bad[name] = problem
        else:
            found.usable.append(ref)
    age = {start.attempt: place for place, start in enumerate(chain)}
    # Of a step durable ones come last, and of those the later attempt's: it has the evaluation that the first gave up.
    found.usable.sort(key=lambda ref: (ref.step, not ref.manifest.fast, age[ref.manifest.attempt]))
    return found


def _found_unusable(run: RunDirectory, chain: Sequence[AttemptStart]) -> dict[str, WorkerError]:
    """By name what the attempts at the chain's end began with and could not use. An attempt that began with something
    else ends the list: what is beyond its start does not count any more."""
    found: dict[str, WorkerError] = {}
    for start in reversed(chain):
        errors = [error for error in run.errors_of(start.attempt) if error.checkpoint == start.resume_from]
        if start.resume_from is None or not errors:
            break
        found[start.resume_from] = min(errors, key=lambda error: not error.corrupt)
    return found


def _known_problem(run: RunDirectory, name: str, failed: Mapping[str, WorkerError]) -> str:
    if name in failed:
        return "" if run.checkpoints.child(name).exists(VERIFIED) else failed[name].message
    step, _ = checkpoint.parse_name(name)
    for other, error in failed.items():
        away = checkpoint.is_fast(other) and not error.corrupt
        if away and checkpoint.is_fast(name) and step <= checkpoint.parse_name(other)[0]:
            return f"checkpoint {name}: as out of reach as {other}"
    return ""


def _check_name(ref: CheckpointRef) -> None:
    own = checkpoint.name_of(ref.manifest)
    if ref.name != own:
        raise CorruptFile(f"checkpoint {ref.name}: its manifest is that of {own}; somebody has copied it here")


def _quarantined(run: RunDirectory, name: str) -> str:
    """Why, or nothing. A marker that was cut off is one too."""
    try:
        marker = read_json(run.checkpoints.child(name), QUARANTINE)
    except CorruptFile:
        marker = {}
    if marker is None:
        return ""
    return f"checkpoint {name}: quarantined {marker.get('at', '')}: {marker.get('reason', '')}"


def lines_of(found: Survey) -> list[str]:
    """What a person should know of those that are not used."""
    bad = [f"checkpoint {name} is not used: {why}" for name, why in sorted(found.bad.items())]
    late = [f"checkpoint {name} is ignored: {_why_late(limit)}" for name, limit in sorted(found.superseded.items())]
    return bad + late


def _why_late(limit: int) -> str:
    if limit == STRANGER:
        return "no attempt of this run made it"
    if limit == NOTHING:
        return "another launcher had taken the run from its attempt's"
    return f"its attempt had been superseded at step {limit}"


def durable_checkpoints(run: RunDirectory, say: Say = print) -> list[CheckpointRef]:
    """Committed checkpoints that can be read from anywhere, oldest first; of those that are not usable ``say`` tells
    why."""
    found = survey(run)
    for line in lines_of(found):
        say(line)
    return [ref for ref in found.usable if not ref.manifest.fast]


def newest_usable(run: RunDirectory, say: Say = print) -> CheckpointRef | None:
    """What to resume from; None where nothing was ever committed.

    Raises NoUsableCheckpoint where something durable was, but none of it can be accepted: starting over silently would
    fence it off for good. Where all that is lost was of the fast tier, the run begins anew, and ``say`` tells it.
    """
    before, found = run.lineage(), survey(run)
    while found.chain != before:  # an attempt began after the folders were listed: its checkpoint may not be among them
        before, found = found.chain, survey(run)
    for line in lines_of(found):
        say(line)
    if found.usable:
        return found.usable[-1]
    strangers = [name for name, limit in found.superseded.items() if limit == STRANGER]
    lost = sorted([*found.bad, *strangers])
    begun_with = found.chain[-1].resume_from if found.chain else None  # retention took those before it away
    passed_over = [name for name, limit in found.superseded.items() if limit > 0]  # a fast one before it was good
    only_fast = all(map(checkpoint.is_fast, [*lost, *passed_over]))
    if not only_fast or (begun_with is not None and begun_with not in {**found.bad, **found.superseded}):
        named = ", ".join(lost) or "they are gone"
        raise NoUsableCheckpoint(
            f"{run.storage.uri}: none of its committed checkpoints can be used ({named}; "
            "the reasons are above). If the storage was away for a moment, run the same command again; `baton "
            "checkpoints verify` reads them all and takes those that are good out of quarantine; to start over, choose "
            "a new run.name"
        )
    if lost or begun_with:
        say("nothing but checkpoints of the fast tier was committed, and those are lost: the run begins anew")
    return None


def tip_and_newest(run: RunDirectory, say: Say = print) -> tuple[AttemptStart | None, CheckpointRef | None]:
    """The attempt and the commit to go on from, by one chain: looked up again where an attempt began since.

    A start step beyond what its parent may commit would let in what the parent commits later. Raises as
    ``newest_usable``.
    """
    before = run.lineage()
    while True:
        ref = newest_usable(run, say)
        chain = run.lineage()
        if chain == before:
            return (chain[-1] if chain else None), ref
        before = chain


def problem_here(run: RunDirectory, name: str, told: str) -> str:
    """What is wrong with a checkpoint as this process reads it; empty where nothing is.

    Args:
        told: what others found. Only the files that it names are read, if it names any: to read all of a huge
            checkpoint would cost the run more time than to go back.
    """
    try:
        checkpoint.verify(run.checkpoints, name, told)
    except (BatonError, OSError) as error:
        return str(error)
    return ""


def quarantine(run: RunDirectory, name: str, reason: str) -> None:
    """From now on nobody uses this checkpoint; it is removed only for want of room (``retention.prune``)."""
    folder = run.checkpoints.child(name)
    if folder.exists(VERIFIED):
        folder.delete_file(VERIFIED)
    write_json(folder, QUARANTINE, {"reason": reason, "at": utc_now()})


def release(run: RunDirectory, name: str) -> bool:
    """A checkpoint was verified: it may be used again, whatever an attempt found. Returns whether that is news."""
    folder = run.checkpoints.child(name)
    marked, passed_over = folder.exists(QUARANTINE), name in _found_unusable(run, run.lineage())
    if passed_over:
        write_json(folder, VERIFIED, {"at": utc_now()})
    if marked:
        folder.delete_file(QUARANTINE)
    return marked or passed_over
