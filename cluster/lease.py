"""Takes a run for one launcher, keeps it by a heartbeat, notices when it was taken over, lets it go.

The rules are in ``cluster.claims``; docs/one-launcher.md says what follows from them.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from cluster.claims import Claim, Move, Seen, State, Timing, Watch, next_move, successor, top_term
from cluster.holder import Holder, Life, life_here, this_process
from data_shards.errors import CorruptFile
from data_shards.storage import Storage
from trainer.errors import RunHeld
from trainer.run_directory import RunDirectory, Say, StopKind, read_json, utc_now, write_json

log = logging.getLogger(__name__)

CLAIMS = "claims"
STOP = ".stop"
"""Beside ``<id>.json``: whoever wrote ``<id>.stop`` asks the holder of that very claim to save and stop."""
_LOCAL_SETTLE_S = 0.2
"""A directory shows a file at once; over a network file system the claim just written makes the client look anew."""


@dataclass(frozen=True)
class World:
    """What a launcher knows beside the storage."""

    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    life_of: Callable[[Holder], Life] = life_here
    me: Callable[[], Holder] = this_process


def timing_for(storage: Storage) -> Timing:
    return Timing(settle_s=_LOCAL_SETTLE_S) if storage.local_path is not None else Timing()


class Desk:
    """The claims on one run, read and written."""

    def __init__(self, run: RunDirectory, timing: Timing, world: World) -> None:
        self._storage = run.storage.child(CLAIMS)
        self._watch = Watch(timing, world.life_of)
        self._world = world
        self.asked: frozenset[str] = frozenset()
        """claims whose holders were asked to stop, by the last look"""

    def look(self, but: Claim | None) -> list[Seen]:
        """All claims but one's own."""
        began = self._world.clock()
        own = but.id if but else None
        there = self._storage.list()
        self.asked = frozenset(name.removesuffix(STOP) for name in there if name.endswith(STOP))
        names = [name for name in there if name.endswith(".json") and name != f"{own}.json"]
        claims = [self._read(name) for name in names]
        return self._watch.see([claim for claim in claims if claim is not None], began)

    def _read(self, name: str) -> Claim | None:
        """None where it was removed meanwhile, be it between the two requests that reading an object takes."""
        try:
            value = read_json(self._storage, name)
        except OSError:
            if self._storage.exists(name):
                raise
            return None
        return None if value is None else Claim.from_json(value)

    def put(self, claim: Claim, **changes: Any) -> Claim:
        """Write one's own claim, changed."""
        written = replace(claim, beat=claim.beat + 1, beat_at=utc_now(), **changes)
        self._storage.write(f"{claim.id}.json", [written.to_bytes()])
        return written

    def remove(self, claim: Claim) -> None:
        for name in (f"{claim.id}.json", *([f"{claim.id}{STOP}"] if claim.id in self.asked else [])):
            with suppress(FileNotFoundError):
                self._storage.delete_file(name)

    def ask_to_stop(self, claim: Claim, reason: str) -> None:
        """Its holder looks with each heartbeat."""
        write_json(self._storage, f"{claim.id}{STOP}", {"reason": reason, "at": utc_now()})

    def why_to_stop(self, claim: Claim) -> str:
        """Raises FileNotFoundError where nobody asked."""
        with suppress(CorruptFile):
            if request := read_json(self._storage, f"{claim.id}{STOP}"):
                return str(request.get("reason", ""))
        raise FileNotFoundError(claim.id)


class Lease:
    """A run that this process holds. Methods may be called on any thread."""

    def __init__(self, run: RunDirectory, desk: Desk, mine: Claim, passed_over: tuple[Claim, ...]) -> None:
        self._run = run
        self._desk = desk
        self._mine = mine
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._when_lost: Callable[[], object] = lambda: None
        self._when_asked: Callable[[str], object] = _end_as_by_sigterm
        self._told: Callable[[str], object] | None = None
        """which ``act`` was called with the request to stop"""
        self.lost_to: Claim | None = None
        self.passed_over = passed_over
        """holds of others that ended without being let go"""

    @property
    def id(self) -> str:
        return self._mine.id

    @property
    def term(self) -> int:
        return self._mine.term

    def when_lost(self, act: Callable[[], object]) -> None:
        """``act`` is called, mostly on the heartbeat's thread, when the run turns out to be another launcher's."""
        self._when_lost = act
        if self.lost_to is not None:
            act()

    def when_asked_to_stop(self, act: Callable[[str], object] | None) -> None:
        """``act`` is called with the reason, on the heartbeat's thread, once somebody asks this holder through the
        storage to save and stop (`baton stop`); where it raises, again with the next heartbeat. None, as at first:
        SIGTERM to this process, there being nothing to save. A new ``act`` is told of a request that came before, too:
        what has begun since is to stop as well."""
        self._when_asked = act or _end_as_by_sigterm

    def keep(self, heartbeat_s: float) -> None:
        """Start the heartbeat."""
        threading.Thread(target=self._keep, args=(heartbeat_s,), daemon=True, name="heartbeat").start()

    def _keep(self, heartbeat_s: float) -> None:
        while not self._closed.wait(heartbeat_s):
            try:
                self.beat()
                if self.lost_to is not None:
                    self._when_lost()
                    return
                self._heed_request()
            except Exception as error:  # who looks on can't reach the storage either, or will take the run over
                log.warning("the heartbeat failed: %s", error)

    def beat(self) -> None:
        """Look, then write: who was superseded must not bring its claim back."""
        with self._lock:
            if not self._closed.is_set() and not self._look():
                self._mine = self._desk.put(self._mine)

    def _heed_request(self) -> None:
        act = self._when_asked
        if self._closed.is_set() or self._told is act or self.id not in self._desk.asked:
            return
        act(self._desk.why_to_stop(self._mine))
        self._told = act

    def check(self) -> None:
        """Called before what only the run's holder may do. Raises RunHeld where it is another's by now."""
        with self._lock:
            lost = self._look()
        if lost:
            raise RunHeld(
                f"the run was taken over by {self.lost_to}. This launcher stops; what its workers commit is ignored"
            )

    def _look(self) -> bool:
        """Whether the run is lost."""
        if self.lost_to is None:
            self.lost_to = successor(self._mine, [seen.claim for seen in self._desk.look(self._mine)])
        return self.lost_to is not None

    def release(self) -> None:
        """Let the run go. The claim stays, for its term, unless nothing came of it."""
        with self._lock:
            self._closed.set()
            if self.lost_to is not None or (self.term == 1 and not self._run.lineage()):
                self._desk.remove(self._mine)
            else:
                self._desk.put(self._mine, state=State.RELEASED)


def _end_as_by_sigterm(reason: str) -> None:
    log.warning("%s", reason)
    os.kill(os.getpid(), signal.SIGTERM)


def take(
    run: RunDirectory,
    say: Say,
    *,
    take_over: bool = False,
    timing: Timing | None = None,
    world: World | None = None,
) -> Lease:
    """Wait until it is clear who holds the run, if anybody, and claim it.

    Args:
        take_over: from whoever has it at this moment, be it alive. Those who come later are respected.

    Raises RunHeld where another launcher has it.
    """
    timing, world = timing or timing_for(run.storage), world or World()
    desk = Desk(run, timing, world)
    mine: Claim | None = None
    try:
        seen = desk.look(None)
        over = frozenset(claim.id for claim, _ in seen) if take_over else frozenset()
        refused, told, beat_at = False, False, 0.0
        while True:
            move, because_of = next_move(mine, seen, over)
            claims = [claim for claim, _ in seen]
            if move == Move.HOLD and mine is not None:
                mine = desk.put(mine, state=State.HELD)
                return Lease(run, desk, mine, _clear_away(desk, seen, over))
            if move == Move.REFUSE and because_of is not None:
                if refused:
                    raise RunHeld(_refusal(run, because_of))
                refused = True  # looked at once more: one that was killed this moment takes a while to go
            if move == Move.WITHDRAW and mine is not None:
                desk.remove(mine)
                mine = None
            elif move in (Move.ENTER, Move.RAISE):
                mine = mine or _new_claim(world.me())
                mine, beat_at = desk.put(mine, term=1 + max(top_term(claims), run.last_term())), world.clock()
            elif mine is not None and world.clock() - beat_at >= timing.heartbeat_s:
                mine, beat_at = desk.put(mine), world.clock()
            if because_of is not None and because_of.state == State.HELD and not (told or refused):
                told = True
                say(f"the run is held by {because_of}; looking whether it is alive, for {timing.patience_s:g} s")
            world.sleep(timing.settle_s)
            seen = desk.look(mine)
    except BaseException:
        if mine is not None:
            with suppress(OSError):  # then it lapses
                desk.remove(mine)
        raise


def _new_claim(holder: Holder) -> Claim:
    now = utc_now()
    return Claim(uuid.uuid4().hex[:12], State.WANTED, 0, 0, holder, since=now, beat_at=now)


def _clear_away(desk: Desk, seen: list[Seen], over: frozenset[str]) -> tuple[Claim, ...]:
    """Remove the claims that were passed over, which the new hold's term outdoes. Returns those that were holds."""
    passed = [c for c, life in seen if c.id in over or life == Life.DEAD or c.state == State.RELEASED]
    for claim in passed:
        desk.remove(claim)
    return tuple(claim for claim in passed if claim.state == State.HELD)


def _refusal(run: RunDirectory, by: Claim) -> str:
    return (
        f"the run {run.storage.uri} is held by another launcher: {by}. Nothing was started. Wait until it ends, or "
        f"stop it (`baton stop`, from anywhere; or SIGTERM to pid {by.holder.pid} on {by.holder.host}"
        f"{f', or `ray job stop {by.holder.job}`' if by.holder.job else ''}: it saves first). If it can't be reached, "
        "the same command with --take-over takes the run from it; what it commits after that is ignored"
    )


@contextmanager
def holding(
    run: RunDirectory,
    say: Say,
    *,
    take_over: bool = False,
    timing: Timing | None = None,
    catch_sigterm: bool = True,
) -> Iterator[Lease]:
    """Holds the run meanwhile, whatever ends it: errors, Ctrl-C, and SIGTERM unless told otherwise.

    Raises RunHeld where another launcher has it.
    """
    timing = timing or timing_for(run.storage)
    with _sigterm_exits(enabled=catch_sigterm):
        lease = take(run, say, take_over=take_over, timing=timing)
        lease.keep(timing.heartbeat_s)
        try:
            for claim in lease.passed_over:
                say(f"carrying on in place of {claim}")
            if lease.passed_over and (chain := run.lineage()):  # its workers may have outlived it
                reason = f"the run was taken over by {this_process()}"
                run.request_stop(chain[-1].attempt, reason, StopKind.SUPERSEDED)
            yield lease
        finally:
            with suppress(OSError):  # then it lapses
                lease.release()


def exit_by_signal(number: int, _frame: Any) -> None:
    """A handler: the stack is unwound, and the process ends with the code that shells tell of this signal."""
    sys.exit(128 + number)


@contextmanager
def _sigterm_exits(*, enabled: bool) -> Iterator[None]:
    """SIGTERM unwinds the stack as Ctrl-C does, unless somebody handles it already."""
    unhandled = enabled and threading.current_thread() is threading.main_thread()
    if not unhandled or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, exit_by_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
