"""What others see of who holds a run, and how they ask for its end: through its storage alone, from any machine."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.claims import Claim, State, Timing
from cluster.holder import Life
from cluster.lease import Desk, World, timing_for
from trainer.run_directory import RunDirectory


@dataclass(frozen=True)
class Hold:
    """A launcher's hold on a run, as far as it can be told."""

    claim: Claim
    alive: bool
    """False: it is silent, on a machine that can't be seen from here, for longer than a heartbeat takes. Perhaps dead,
    perhaps suspended, or the storage is slow there"""


class Onlooker:
    def __init__(self, run: RunDirectory, timing: Timing | None = None, world: World | None = None) -> None:
        self._timing = timing or timing_for(run.storage)
        self._world = world or World()
        self._desk = Desk(run, self._timing, self._world)

    def who_holds(self) -> Hold | None:
        """None where nobody does. Where its process can't be looked up, it takes a heartbeat or two to know."""
        until = self._world.clock() + 2 * self._timing.heartbeat_s
        while True:
            holds = [seen for seen in self._desk.look(None) if seen.claim.state != State.WANTED]
            newest = max(holds, key=lambda seen: seen.claim.term, default=None)
            if newest is None or newest.claim.state == State.RELEASED or newest.life == Life.DEAD:
                return None
            if newest.life == Life.ALIVE or self._world.clock() >= until:
                return Hold(newest.claim, newest.life == Life.ALIVE)
            self._world.sleep(self._timing.settle_s)

    def ask_to_stop(self, claim: Claim, reason: str) -> None:
        """Of the holder of this very claim: of no other, be it of the same run, and of a later one neither."""
        self._desk.ask_to_stop(claim, reason)

    def wait_for_end(self, claim: Claim, patience_s: float | None = None) -> Life | None:
        """Until its holder lets the run go (ALIVE: in order) or is DEAD; None where so many seconds were not enough."""
        until = None if patience_s is None else self._world.clock() + patience_s
        while True:
            seen = next((seen for seen in self._desk.look(None) if seen.claim.id == claim.id), None)
            if seen is None or seen.claim.state == State.RELEASED:
                return Life.ALIVE
            if seen.life == Life.DEAD:
                return Life.DEAD
            if until is not None and self._world.clock() >= until:
                return None
            self._world.sleep(self._timing.settle_s)
