"""Launchers in every order of their steps: exclusion while nobody is suspended, and what is read when somebody was."""

from __future__ import annotations

import random
from contextlib import suppress
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.attempts import run_attempts
from cluster.claims import Timing
from cluster.holder import Life, this_process
from cluster.lease import World, take
from tests.support.interleaving import Launcher, MemoryStorage, Stage
from tests.unit.test_run_directory import commit
from trainer.checkpoint import CheckpointRef
from trainer.config import CheckpointConfig
from trainer.errors import RunHeld
from trainer.retention import Sparing, prune
from trainer.run_directory import RunDirectory
from trainer.survey import durable_checkpoints, newest_usable, tip_and_newest

TIMING = Timing(heartbeat_s=1.0, patience_s=4.0, settle_s=0.5)
PATIENT = replace(TIMING, patience_s=60.0)
ME = this_process()
SEEDS = st.integers(0, 2**64)


def silent(line: str) -> None:
    pass


def run_of(stage: Stage, launcher: Launcher | None) -> Any:
    return RunDirectory(MemoryStorage(stage, launcher))  # type: ignore[arg-type]


def world_of(stage: Stage, launcher: Launcher) -> World:
    """A machine of its own: only heartbeats tell about the others."""
    return World(lambda: stage.clock, launcher.sleep, lambda holder: Life.UNSURE, lambda: ME)


@settings(max_examples=600, deadline=None)
@given(SEEDS, st.integers(2, 5), st.booleans())
def test_never_two_hold_a_run_and_always_one_gets_it(seed: int, claimants: int, kills: bool) -> None:
    chance, stage = random.Random(seed), Stage()
    holders: list[Launcher] = []
    winners: list[Launcher] = []
    refused: list[Launcher] = []

    def body(launcher: Launcher) -> None:
        launcher.sleep(chance.choice((0.0, 0.5, chance.uniform(0, 3))))
        try:
            lease = take(run_of(stage, launcher), silent, timing=PATIENT, world=world_of(stage, launcher))
        except RunHeld:
            refused.append(launcher)
            return
        assert all(other.killed for other in holders), "two at once"
        holders.append(launcher)
        winners.append(launcher)
        for _ in range(chance.randrange(4, 12)):
            launcher.sleep(TIMING.heartbeat_s)
            lease.beat()
            assert lease.lost_to is None
        holders.remove(launcher)
        lease.release()

    for _ in range(claimants):
        stage.add(body)
    # Suspended for longer than the others wait before they look, yet not for so long that they could be taken for dead.
    stage.play(chance, kill=0.005 if kills else 0.0, suspend=0.3, longest_s=2)
    killed = [launcher for launcher in stage.launchers if launcher.killed]
    assert winners, "nobody got it"
    assert set(winners) | set(refused) | set(killed) == set(stage.launchers)
    assert len([name for name in stage.files if name.startswith("claims/")]) <= 1 + len(killed), "they clean up"


@settings(max_examples=200, deadline=None)
@given(SEEDS, st.integers(2, 4))
def test_what_a_superseded_launcher_commits_is_never_read(seed: int, launchers: int) -> None:
    """Any of them is suspended at any point, for longer than the others' patience, or is taken over while alive."""
    chance, stage = random.Random(seed), Stage()
    unaware: list[list[str]] = []
    """attempts of launchers that came to their end in the belief that the run was theirs"""

    def body(launcher: Launcher) -> None:
        launcher.sleep(chance.uniform(0, 8))
        run, mine = run_of(stage, launcher), []
        try:
            lease = take(run, silent, take_over=chance.random() < 0.5, timing=TIMING, world=world_of(stage, launcher))
            for _ in range(chance.randrange(1, 4)):
                parent, newest = tip_and_newest(run, silent)
                lease.check()
                start = run.start_attempt(parent, newest, (), term=lease.term, claim=lease.id)
                mine.append(start.attempt)
                for ahead in range(chance.randrange(4)):  # its workers, who ask nobody
                    commit(run, start.attempt, start.start_step + 2 * ahead + chance.randrange(1, 3))
                    launcher.sleep(0.7)
                lease.beat()
            lease.check()
            unaware.append(mine)
            lease.release()
        except RunHeld:
            pass

    for _ in range(launchers):
        stage.add(body)
    stage.play(chance, suspend=0.02, longest_s=20)
    run = run_of(stage, None)
    chain = [start.attempt for start in run.lineage()]
    for attempts in unaware:
        assert set(attempts) <= set(chain), "a launcher whose attempts do not count must have noticed"
    order = {path: index for index, path in enumerate(stage.written)}
    began = [order[f"attempts/{attempt}/start.json"] for attempt in chain]
    assert began == sorted(began)
    for ref in durable_checkpoints(run, silent):
        of = chain.index(ref.manifest.attempt)
        at = order[f"checkpoints/{ref.name}/manifest.json"]
        assert all(at < later for later in began[of + 1 :]), "it was committed after its attempt had a successor"


@settings(max_examples=400, deadline=None)
@given(SEEDS, st.integers(1, 3), st.sampled_from(Sparing))
def test_workers_that_outlive_their_launcher_leave_what_the_next_one_goes_on_from(
    seed: int, keep_last: int, sparing: Sparing
) -> None:
    """They commit, and retention removes, at any point of the other's look, beginning, and work."""
    chance, stage = random.Random(seed), Stage()
    config = CheckpointConfig(keep_last=keep_last)
    first = run_of(stage, None).start_attempt(None, None, (), term=1)
    commit(run_of(stage, None), first.attempt, 4)
    began_from: list[str] = []

    def writer(launcher: Launcher) -> None:
        for step in (8, 12, 16):
            launcher.sleep(chance.uniform(0, 0.6))
            commit(run_of(stage, launcher), first.attempt, step)

    def retention(launcher: Launcher) -> None:
        for _ in range(4):
            launcher.sleep(chance.uniform(0, 0.4))
            prune(run_of(stage, launcher), config, first.attempt, sparing)

    def successor(launcher: Launcher) -> None:
        run = run_of(stage, launcher)

        class Begun(Exception):
            pass

        def begins(attempt: str, ref: CheckpointRef | None) -> Any:
            assert ref is not None
            began_from.append(ref.name)
            raise Begun

        lease = take(run, silent, take_over=True, timing=TIMING, world=world_of(stage, launcher))
        room: Any = Mock(wait_for_room=lambda wanted, say: 1)
        with suppress(Begun):
            run_attempts(run, room, begins, lease=lease, max_failures_without_progress=1, say=silent)

    for body in (writer, retention, successor):
        stage.add(body)
    stage.play(chance, suspend=0.05, longest_s=3)
    newest = newest_usable(run_of(stage, None), silent)
    assert newest is not None and newest.name in began_from
