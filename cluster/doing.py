"""What the launcher that holds a run does while no attempt of its runs: ``<run>/doing.json``.

It is for people: nothing is decided by it, and where it can't be written it is left out. It lies beside the attempts,
as a launcher may wait before it has any. Nobody takes it away: whose it is, and after which attempt, tells whether it
still is so (``cluster.story``).
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import StrEnum

from data_shards.errors import BatonError, CorruptFile
from trainer.run_directory import RunDirectory, read_json, write_json

FILE = "doing.json"


class DoingKind(StrEnum):
    WAITING = "waiting"
    """for room on the cluster"""
    EXPORTING = "exporting"
    """what the run has become, as ``export.at_end`` asks"""


@dataclass(frozen=True)
class Doing:
    kind: str
    """a ``DoingKind``, or what a later release calls so"""
    since: float
    """Unix seconds, by the launcher's clock"""
    text: str
    """for people, one line"""
    claim: str
    """id of the launcher's hold on the run"""
    after: str | None = None
    """of one that waits: the last attempt that it has started; None: none yet"""


def write_doing(run: RunDirectory, doing: Doing) -> None:
    with suppress(OSError, BatonError):
        write_json(run.storage, FILE, asdict(doing))


def read_doing(run: RunDirectory) -> Doing | None:
    """What was written last, by whatever launcher. Raises OSError where the storage can't be read."""
    with suppress(CorruptFile, TypeError):  # cut off, or of a later release
        if value := read_json(run.storage, FILE):
            return Doing(**value)
    return None
