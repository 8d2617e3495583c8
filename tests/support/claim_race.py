"""Launchers that want one run at the same moment, as threads or as processes."""

from __future__ import annotations

import multiprocessing
import random
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from cluster.claims import Timing
from cluster.lease import World, take
from data_shards.storage import Storage
from trainer.errors import RunHeld
from trainer.run_directory import RunDirectory

PATIENCE_S = 60.0
"""Nobody is dead in a race, so nobody may be taken for it, however slow the machine."""


def uneven(chance: random.Random) -> World:
    """Sometimes a launcher waits for much less, sometimes for much more than it should before it looks."""
    return World(sleep=lambda seconds: time.sleep(seconds * chance.choice((0.0, 0.5, 1.0, 3.0))))


class Tally(NamedTuple):
    """Of one round."""

    most_at_once: int
    winners: int
    all_others_refused: bool


ONE_WINS = Tally(1, 1, True)


def race(root: Storage, number: int, settle_s: float) -> Tally:
    """One round of 3 to 8 threads on a run of its own. Who wins holds on until all others have come to an end."""
    chance = random.Random(number)
    delays = [chance.choice((0.0, chance.uniform(0, 4 * settle_s))) for _ in range(chance.randrange(3, 9))]
    run = RunDirectory(root.child(f"round-{number:06d}"))
    timing = Timing(patience_s=PATIENCE_S, settle_s=settle_s)
    holders: list[int] = []
    most: list[int] = []
    refused: list[RunHeld] = []
    ended: list[int] = []

    def claimant(delay: float) -> None:
        time.sleep(delay)
        try:
            lease = take(run, lambda line: None, timing=timing, world=uneven(chance))
            holders.append(1)
            most.append(len(holders))
            while len(ended) < len(delays) - 1 and len(most) < 2:
                time.sleep(settle_s)
            lease.check()
            holders.pop()
            lease.release()
        except RunHeld as error:
            refused.append(error)
        finally:
            ended.append(1)

    with ThreadPoolExecutor(len(delays)) as pool:
        for future in [pool.submit(claimant, delay) for delay in delays]:
            future.result()
    return Tally(max(most), len(most), len(refused) == len(delays) - 1)


def _racer(uri: str, rounds: int, settle_s: float, number: int, start: Any, end: Any, counts: Any) -> None:
    """A process of ``race_processes``: in each round, claims, and holds until all others were refused."""
    chance = random.Random(number)
    timing = Timing(patience_s=PATIENCE_S, settle_s=settle_s)
    for index in range(rounds):
        run = RunDirectory.at(f"{uri}/processes-{index:05d}")
        start.wait(PATIENCE_S)
        time.sleep(chance.choice((0.0, chance.uniform(0, 4 * settle_s))))
        won, refused = 2 * index, 2 * index + 1
        try:
            lease = take(run, lambda line: None, timing=timing, world=uneven(chance))
        except RunHeld:
            with counts.get_lock():
                counts[refused] += 1
        else:
            with counts.get_lock():
                counts[won] += 1
            give_up_at = time.monotonic() + PATIENCE_S
            while counts[refused] < start.parties - 1 and counts[won] < 2 and time.monotonic() < give_up_at:
                time.sleep(settle_s)
            lease.release()
        end.wait(PATIENCE_S)


def race_processes(uri: str, rounds: int, claimants: int, settle_s: float) -> list[tuple[int, int]]:
    """Winners and refused ones of each round."""
    context = multiprocessing.get_context("forkserver")
    start, end = context.Barrier(claimants), context.Barrier(claimants)
    counts = context.Array("i", 2 * rounds)
    racers = [
        context.Process(target=_racer, args=(uri, rounds, settle_s, number, start, end, counts), daemon=True)
        for number in range(claimants)
    ]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert [racer.exitcode for racer in racers] == [0] * claimants
    return [(counts[2 * i], counts[2 * i + 1]) for i in range(rounds)]
