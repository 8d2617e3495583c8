"""Which checkpoints stay."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from enum import StrEnum

from trainer import checkpoint
from trainer.checkpoint import CheckpointRef, is_fast, parse_name
from trainer.config import CheckpointConfig
from trainer.run_directory import RunDirectory, StopKind
from trainer.survey import STRANGER, survey

_ONE_AT_A_TIME = threading.Lock()


class Sparing(StrEnum):
    """How much is kept of what the configuration only keeps as a reserve."""

    AS_CONFIGURED = "as configured"
    NEWEST = "newest"
    """of ``keep_last`` just one, and nothing damaged: the disk is full"""


def kept(usable: Sequence[CheckpointRef], config: CheckpointConfig, sparing: Sparing) -> set[str]:
    """Names of those that stay; the newest is always among them (pure). Of the fast tier none stays that is older than
    a durable one; ``keep_every`` and ``keep_best`` are of durable ones.

    Args:
        usable: oldest first.
    """
    durable = [ref for ref in usable if not ref.manifest.fast]
    number = 1 if sparing == Sparing.NEWEST else config.keep_last
    stay = {ref.name for ref in durable[-number:]}
    if config.keep_every is not None:
        firsts = {ref.step // config.keep_every: ref.name for ref in reversed(durable)}
        stay |= {name for multiple, name in firsts.items() if multiple > 0}
    stay |= {ref.name for ref in best_of(durable)[: config.keep_best]}
    fast = usable[usable.index(durable[-1]) + 1 :] if durable else list(usable)
    return stay | {ref.name for ref in fast[-(config.fast.keep_last if config.fast else 1) :]}


def best_of(durable: Sequence[CheckpointRef]) -> list[CheckpointRef]:
    """Those whose evaluation loss is that of their own step, the lowest first (pure)."""
    scored = [ref for ref in durable if ref.manifest.progress.evaluated_here]
    return sorted(scored, key=lambda ref: (ref.manifest.progress.eval_loss, -ref.step))


def prune(
    run: RunDirectory, config: CheckpointConfig, attempt: str, sparing: Sparing = Sparing.AS_CONFIGURED
) -> list[str]:
    """Remove checkpoints that need not stay, those that nobody may read, and what killed saves have left.

    Quarantined ones stay for people to look at while there is room, damaged ones while their attempt counts, and so
    does what no attempt of this run made; but of the fast tier, which fills the nodes' memory or disks, neither stays
    once a durable one is newer. What ``attempt``, the caller's own, has not committed stays too, as a save may be under
    way. A caller that has been superseded, or was told that it will be, removes nothing: who goes on in its place tells
    it, looks then, and so finds either all that is there or what is the newest here. May be called on several threads:
    one waits for the other.

    Returns:
        Names of what was removed.

    Raises OSError for the first that could not be removed, when all others are.
    """
    with _ONE_AT_A_TIME:
        found = survey(run)
        if not found.chain or found.chain[-1].attempt != attempt:
            return []
        request = run.stop_request(attempt)  # looked for last: what is the newest here is older than that look
        if request is not None and request.kind == StopKind.SUPERSEDED:
            return []
        set_aside = {name for name in found.quarantined if not is_fast(name)}
        stay = kept(found.usable, config, sparing) | (set_aside if sparing == Sparing.AS_CONFIGURED else set())
        durable_step = max((ref.step for ref in found.usable if not ref.manifest.fast), default=0)
        others = found.attempts.keys() - {attempt}
        doomed = [*(ref.name for ref in found.usable), *sorted(set_aside)]
        doomed += [name for name, limit in found.superseded.items() if limit != STRANGER]
        doomed += [name for name in found.bad if is_fast(name) and parse_name(name)[0] <= durable_step]
        doomed += [name for name in found.unfinished if parse_name(name)[1] in others]
        removed, failure = [], None
        for name in dict.fromkeys(doomed):  # one in quarantine may be superseded, too
            if name in stay:
                continue
            try:
                _remove(run, name)
                removed.append(name)
            except OSError as error:
                failure = failure or error
    if failure is not None:
        raise failure
    return removed


def _remove(run: RunDirectory, name: str) -> None:
    """The manifest goes first, so that none is ever half there. What is gone already is no error."""
    folder = run.checkpoints.child(name)
    with suppress(FileNotFoundError):
        if folder.exists(checkpoint.MANIFEST):
            folder.delete_file(checkpoint.MANIFEST)
    with suppress(FileNotFoundError):
        run.checkpoints.delete_tree(name)
