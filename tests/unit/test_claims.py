"""Who holds a run: what is known of a process, what a heartbeat shows, and what follows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.claims import Claim, Move, Seen, State, Timing, Watch, next_move, successor
from cluster.holder import Holder, Life, life_here, process, this_process
from cluster.lease import World, holding, take
from data_shards.errors import BatonError
from tests.unit.test_run_directory import commit, steps
from trainer.errors import RunHeld
from trainer.run_directory import RunDirectory
from trainer.survey import tip_and_newest

TIMING = Timing(heartbeat_s=5.0, patience_s=25.0, settle_s=1.0)
ELSEWHERE = replace(this_process(), host="elsewhere", place="another boot")


def claim(name: str, state: State = State.WANTED, term: int = 1, beat: int = 1) -> Claim:
    return Claim(name, state, term, beat, ELSEWHERE, since="then", beat_at="later")


def silent(line: str) -> None:
    pass


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def until(wanted: Life, holder: Holder) -> None:
    deadline = time.monotonic() + 5
    while life_here(holder) != wanted:
        assert time.monotonic() < deadline, f"{life_here(holder)}, not {wanted}"
        time.sleep(0.01)


def test_a_process_of_this_machine_is_known(child: subprocess.Popen[bytes]) -> None:
    holder = process(child.pid)
    assert holder.started is not None and holder.place is not None
    assert life_here(holder) == life_here(this_process()) == Life.ALIVE
    assert life_here(replace(holder, started=holder.started - 1)) == Life.DEAD, "the pid is another process's by now"
    assert life_here(replace(holder, place="another boot or container")) == Life.UNSURE
    assert life_here(replace(holder, place=None)) == Life.UNSURE
    child.send_signal(signal.SIGSTOP)
    until(Life.UNSURE, holder)
    child.send_signal(signal.SIGKILL)
    until(Life.DEAD, holder)  # though nobody has waited for it yet
    child.wait()
    assert life_here(holder) == Life.DEAD


def test_only_time_in_which_one_looked_on_counts() -> None:
    watch = Watch(TIMING, lambda holder: Life.UNSURE)

    def life(at: float, beat: int) -> Life:
        return watch.see([claim("a", State.HELD, beat=beat)], at)[0].life

    assert [life(at, 1) for at in (0, 1, 5)] == [Life.UNSURE] * 3
    assert life(9, 2) == Life.ALIVE
    assert life(1000, 2) == Life.ALIVE, "this process was suspended, or the storage was away for both"
    assert [life(1000 + at, 2) for at in (5, 10, 15, 19)] == [Life.ALIVE] * 4
    assert life(1021, 2) == Life.DEAD
    assert life(1022, 3) == Life.ALIVE, "it came back"


def test_what_is_known_of_a_process_goes_before_its_heartbeat() -> None:
    for known in (Life.DEAD, Life.ALIVE):
        watch = Watch(TIMING, lambda holder, known=known: known)  # type: ignore[misc]
        assert [watch.see([claim("a")], at)[0].life for at in (0.0, 4.0, 99.0)] == [known] * 3


HELD, LET_GO = State.HELD, State.RELEASED


@pytest.mark.parametrize(
    ("mine", "others", "move"),
    [
        (None, [], Move.ENTER),
        (None, [Seen(claim("b", HELD), Life.ALIVE)], Move.REFUSE),
        (None, [Seen(claim("b", HELD), Life.UNSURE)], Move.WAIT),
        (None, [Seen(claim("b", HELD), Life.DEAD)], Move.ENTER),
        (None, [Seen(claim("b", LET_GO), Life.ALIVE)], Move.ENTER),
        (None, [Seen(claim("b"), Life.ALIVE)], Move.WAIT),
        (None, [Seen(claim("b"), Life.DEAD)], Move.ENTER),
        # The hold that was superseded has not noticed yet; its successor has ended.
        (None, [Seen(claim("b", HELD, 1), Life.ALIVE), Seen(claim("c", LET_GO, 2), Life.UNSURE)], Move.ENTER),
        (claim("b"), [], Move.HOLD),
        (claim("b"), [Seen(claim("c"), Life.UNSURE)], Move.WAIT),
        (claim("b"), [Seen(claim("a"), Life.UNSURE)], Move.WITHDRAW),
        (claim("b"), [Seen(claim("c"), Life.ALIVE), Seen(claim("a"), Life.ALIVE)], Move.WITHDRAW),
        (claim("b"), [Seen(claim("c", HELD), Life.UNSURE)], Move.WITHDRAW),
        (claim("b"), [Seen(claim("c", HELD), Life.ALIVE)], Move.REFUSE),
        (claim("b", term=3), [Seen(claim("a", term=3), Life.DEAD)], Move.RAISE),
        (claim("b", term=4), [Seen(claim("a", term=3), Life.DEAD)], Move.HOLD),
    ],
)
def test_moves(mine: Claim | None, others: list[Seen], move: Move) -> None:
    assert next_move(mine, others, frozenset()).move == move


def test_taking_over_passes_by_those_that_were_there_and_no_others() -> None:
    alive = Seen(claim("b", HELD), Life.ALIVE)
    assert next_move(None, [alive], {"b"}).move == Move.ENTER
    assert next_move(claim("z"), [alive], {"b"}).move == Move.RAISE
    assert next_move(claim("z", term=2), [alive], {"b"}).move == Move.HOLD
    assert next_move(claim("z", term=2), [alive, Seen(claim("c", HELD, 3), Life.ALIVE)], {"b"}).move == Move.REFUSE


def test_a_hold_of_a_greater_term_is_the_successor() -> None:
    mine = claim("m", HELD, term=2)
    assert successor(mine, [claim("a", HELD, 1), claim("z", HELD, 2), claim("b", State.WANTED, 9)]) is None
    assert successor(mine, [claim("z", HELD, 3)]) == claim("z", HELD, 3)
    assert successor(mine, [claim("z", LET_GO, 3)]) == claim("z", LET_GO, 3), "it came, and has ended since"
    assert successor(mine, [claim("a", HELD, 2)]) == claim("a", HELD, 2), "should not be; then one of them stops"


def held_by(run: RunDirectory, holder: Holder) -> Any:
    return take(run, silent, timing=TIMING, world=World(sleep=lambda s: None, me=lambda: holder))


def test_a_dead_process_of_this_machine_frees_the_run_at_once(tmp_path: Path, child: subprocess.Popen[bytes]) -> None:
    run = RunDirectory.at(str(tmp_path))
    first = held_by(run, process(child.pid))
    with pytest.raises(RunHeld, match=rf"pid {child.pid}, since .*--take-over") as refused:
        take(run, silent)
    assert isinstance(refused.value, BatonError) and "Nothing was started" in str(refused.value)
    child.kill()  # and not waited for: it may be seen once more
    began = time.monotonic()
    with holding(run, silent) as lease:
        assert time.monotonic() - began < 5, "no patience is needed"
        assert lease.term == first.term + 1 and [c.id for c in lease.passed_over] == [first.id]


def test_another_machine_must_be_silent_for_long(tmp_path: Path) -> None:
    run = RunDirectory.at(str(tmp_path))
    first = held_by(run, ELSEWHERE)
    now, said = [0.0], []

    def sleep(seconds: float) -> None:
        now[0] += seconds

    def beating(seconds: float) -> None:
        now[0] += seconds
        if now[0] % TIMING.heartbeat_s == 0:
            first.beat()

    with pytest.raises(RunHeld):
        take(run, silent, timing=TIMING, world=World(lambda: now[0], beating))
    assert now[0] == TIMING.heartbeat_s + TIMING.settle_s, "a refusal takes a heartbeat"
    now[0] = 0.0
    lease = take(run, said.append, timing=TIMING, world=World(lambda: now[0], sleep))
    assert TIMING.patience_s <= now[0] <= TIMING.patience_s + 2 * TIMING.settle_s
    assert len(said) == 1 and "elsewhere" in said[0]
    first.beat()
    with pytest.raises(RunHeld, match="was taken over by"):
        first.check()
    assert lease.lost_to is None
    lease.check()


def test_claims_that_came_to_nothing_leave_nothing(tmp_path: Path) -> None:
    run = RunDirectory.at(str(tmp_path))
    with holding(run, silent):
        assert len(run.storage.list("claims")) == 1
    assert run.storage.list("claims") == []
    with pytest.raises(KeyboardInterrupt), holding(run, silent) as lease:
        run.start_attempt(None, None, (), term=lease.term, claim=lease.id)
        raise KeyboardInterrupt
    (left,) = run.storage.list("claims")
    assert json.loads(run.storage.read(f"claims/{left}"))["state"] == "released"
    with holding(run, silent) as lease:
        assert lease.term == 2 and lease.passed_over == (), "the run had been let go"
        assert len(run.storage.list("claims")) == 1


def test_sigterm_lets_the_run_go(tmp_path: Path) -> None:
    run = RunDirectory.at(str(tmp_path))
    with pytest.raises(SystemExit) as ended, holding(run, silent):
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and run.storage.list("claims") == []


def test_a_claim_is_always_of_one_size() -> None:
    """Or an object store's reader would take one that is written anew while it reads for cut off."""
    sizes = {len(c.to_bytes()) for c in (claim("a"), claim("a", State.RELEASED, term=12345, beat=10**9))}
    assert len(sizes) == 1
    assert Claim.from_json(json.loads(claim("a", HELD, 3).to_bytes())) == claim("a", HELD, 3)


def test_a_heartbeat_survives_a_storage_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory.at(str(tmp_path))
    lease = held_by(run, ELSEWHERE)
    beats: list[int] = []

    def beat() -> None:
        beats.append(1)
        raise OSError("the storage is away")

    monkeypatch.setattr(lease, "beat", beat)
    lease.keep(0.01)
    deadline = time.monotonic() + 5
    while len(beats) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lease.release()


def test_a_zombies_attempts_and_commits_are_never_read(tmp_path: Path) -> None:
    run = RunDirectory.at(str(tmp_path))
    old = held_by(run, ELSEWHERE)
    first = run.start_attempt(None, None, (), term=old.term, claim=old.id)
    commit(run, first.attempt, 10)
    lost: list[str] = []
    old.when_lost(lambda: lost.append("stop"))
    old.keep(0.01)
    with holding(run, silent, take_over=True, timing=replace(TIMING, settle_s=0.01)) as new:
        assert run.stop_request(first.attempt) is not None, "its workers may run without their launcher"
        parent, newest = tip_and_newest(run, silent)
        second = run.start_attempt(parent, newest, (), term=new.term, claim=new.id)
        deadline = time.monotonic() + 5
        while not lost:
            assert time.monotonic() < deadline, "the heartbeat must notice"
            time.sleep(0.01)
        with pytest.raises(RunHeld, match="this launcher has lost the run"):
            run.start_attempt(first, newest, (), term=old.term, claim=old.id)
        zombie = next(name for name in run.storage.list("attempts") if name not in (first.attempt, second.attempt))
        commit(run, first.attempt, 20)
        commit(run, zombie, 30)
        commit(run, second.attempt, 15)
        assert steps(run) == [10, 15]
        assert [start.attempt for start in run.lineage()] == [first.attempt, second.attempt]
    old.release()
    assert len(run.storage.list("claims")) == 1
