"""Claims on a run, and how they are settled. Decisions only; ``cluster.lease`` acts on them (docs/one-launcher.md).

``<run>/claims/<id>.json`` is written by the launcher that made it and by nobody else, so that no store needs rename or
conditional put. Who wants a run writes a claim, and looks at the others after that: of any two that want it at once at
least one sees the other, however late either writes or wherever it pauses. A claim is turned into a hold only where no
other stands in its way; where several want the run, all but the lowest id withdraw. A hold has a **term**, greater than
that of every claim that was passed over for it, whether let go, dead or taken over; attempts carry it, and the chain of
attempts with the highest term counts (``RunDirectory.lineage``). So whoever wakes up behind a successor is behind it
for good.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from cluster.holder import Holder, Life

_FILE_BYTES = 2047
"""Clients of object stores ask for an object's size before its bytes: a claim that is written anew in between must not
read as cut off."""


class State(StrEnum):
    WANTED = "wanted"
    HELD = "held"
    RELEASED = "released"
    """let go, and kept for its term: the next one must be greater"""


@dataclass(frozen=True)
class Claim:
    id: str
    state: State
    term: int
    beat: int
    """counts writes: a claim is alive while it changes"""
    holder: Holder
    since: str
    beat_at: str
    """``since`` and this by the holder's clock: for people, never compared"""

    @property
    def version(self) -> tuple[State, int, int]:
        return self.state, self.term, self.beat

    def to_bytes(self) -> bytes:
        """JSON, always of the same size."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False).encode().ljust(_FILE_BYTES) + b"\n"

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Claim:
        return cls(**value | {"state": State(value["state"]), "holder": Holder(**value["holder"])})

    def __str__(self) -> str:
        return f"{self.holder}, since {self.since}, last heartbeat {self.beat_at}"


@dataclass(frozen=True)
class Timing:
    heartbeat_s: float = 5.0
    patience_s: float = 25.0
    """a claim of another machine that stands still for so long is dead. Five heartbeats, because a launcher that loads
    its libraries, or whose disk is busy, may be silent for ten seconds and more"""
    settle_s: float = 1.0
    """from writing a claim to looking at the others, and between looks: for listings that lag a little"""


class Seen(NamedTuple):
    claim: Claim
    life: Life


@dataclass
class _Sighting:
    version: tuple[State, int, int]
    looked_at: float
    unchanged_s: float = 0.0
    changed: bool = False


class Watch:
    """Judges claims by whether they change while this process looks on, by its own monotonic clock.

    Only time in which it kept looking counts: neither a pause of its own nor a storage that was away for everybody
    makes others look dead.
    """

    def __init__(self, timing: Timing, life_of: Callable[[Holder], Life]) -> None:
        self._timing = timing
        self._life_of = life_of
        self._sightings: dict[str, _Sighting] = {}

    def see(self, claims: Sequence[Claim], at: float) -> list[Seen]:
        """
        Args:
            at: seconds, monotonic, from before the claims were read.
        """
        self._sightings = {claim.id: self._sighting(claim, at) for claim in claims}
        return [Seen(claim, self._life(claim)) for claim in claims]

    def _sighting(self, claim: Claim, at: float) -> _Sighting:
        last = self._sightings.get(claim.id)
        if last is None or last.version != claim.version:
            return _Sighting(claim.version, at, changed=last is not None)
        looked_on = min(at - last.looked_at, self._timing.heartbeat_s)
        return _Sighting(claim.version, at, last.unchanged_s + looked_on, last.changed)

    def _life(self, claim: Claim) -> Life:
        """What is known of its process; else what its heartbeat shows."""
        if (known := self._life_of(claim.holder)) != Life.UNSURE:
            return known
        sighting = self._sightings[claim.id]
        if sighting.unchanged_s >= self._timing.patience_s:
            return Life.DEAD
        return Life.ALIVE if sighting.changed else Life.UNSURE


class Move(StrEnum):
    ENTER = "enter"
    """write a claim"""
    WAIT = "wait"
    """look again"""
    WITHDRAW = "withdraw"
    """remove the claim and look on without one"""
    RAISE = "raise"
    """give the claim a greater term, then look again"""
    HOLD = "hold"
    REFUSE = "refuse"
    """another launcher has the run"""


class Decision(NamedTuple):
    move: Move
    because_of: Claim | None = None


def top_term(claims: Sequence[Claim]) -> int:
    return max((claim.term for claim in claims), default=0)


def next_move(mine: Claim | None, others: Sequence[Seen], over: AbstractSet[str]) -> Decision:
    """What who wants the run does next (pure).

    Args:
        mine: its own claim, if it has written one.
        over: ids of the claims that it was told to take over.
    """
    ended = top_term([seen.claim for seen in others if seen.claim.state != State.WANTED])
    in_the_way = [seen for seen in others if seen.claim.id not in over and _counts(seen, ended)]
    for claim, life in in_the_way:
        if claim.state == State.HELD:
            if life == Life.ALIVE:
                return Decision(Move.REFUSE, claim)
            return Decision(Move.WITHDRAW if mine else Move.WAIT, claim)
    if mine is None:
        return Decision(Move.WAIT, in_the_way[0].claim) if in_the_way else Decision(Move.ENTER)
    if in_the_way:
        first = min((seen.claim for seen in in_the_way), key=lambda claim: claim.id)
        return Decision(Move.WITHDRAW if first.id < mine.id else Move.WAIT, first)
    if mine.term <= top_term([seen.claim for seen in others]):
        return Decision(Move.RAISE)
    return Decision(Move.HOLD)


def _counts(seen: Seen, ended: int) -> bool:
    """Neither let go, nor dead, nor the hold of one that has a successor and will notice."""
    claim, life = seen
    if claim.state == State.RELEASED or life == Life.DEAD:
        return False
    return claim.state == State.WANTED or claim.term == ended


def successor(mine: Claim, others: Sequence[Claim]) -> Claim | None:
    """The hold that came after ``mine``, if there is one (pure): of a higher term, or, which should not be, of the same
    term and a lower id. It may have ended since."""
    after = [c for c in others if c.state != State.WANTED and (-c.term, c.id) < (-mine.term, mine.id)]
    return min(after, key=lambda claim: (-claim.term, claim.id), default=None)
