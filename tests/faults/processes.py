"""Processes that die."""

from __future__ import annotations

import ctypes
import os
import signal
import time

import trainer.worker
from launch.exit_codes import ExitCode
from tests.faults.bench import AT, EVERY, Bench, Install, Mark, Result, Trial, at_step, before_steps, rank


def kill_me() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def survives(trial: Trial, *installs: Install, said: str, mark: Mark | None = None, how: str = "") -> Result:
    """The command comes to its end by itself, over at least two attempts, the first of which ended so."""
    assert trial.give(*installs) == ExitCode.DONE, trial.log
    fired = (mark or trial.mark()).fired
    assert said in trial.ends[0], trial.ends
    starts = [attempt.from_step for attempt in trial.story.attempts]
    return trial.survived(fired, how or f"attempt {len(starts)} went on from step {starts[-1]}")


def _kill_one(bench: Bench, victim: int) -> Result:
    trial = bench.trial(f"kill-rank-{victim}")
    kill = at_step(trial.mark(), kill_me, ranks=(victim,))
    return survives(trial, kill, said=f"rank {victim} was ended by SIGKILL")


def kill_rank_0(bench: Bench) -> Result:
    return _kill_one(bench, 0)


def kill_rank_1(bench: Bench) -> Result:
    return _kill_one(bench, 1)


def segfault(bench: Bench) -> Result:
    trial = bench.trial("segfault")
    return survives(trial, at_step(trial.mark(), lambda: ctypes.string_at(0)), said="rank 1 was ended by SIGSEGV")


def exception(bench: Bench) -> Result:
    def fail() -> None:
        raise RuntimeError("made by the fault suite")

    trial = bench.trial("exception")
    return survives(trial, at_step(trial.mark(), fail), said="RuntimeError: made by the fault suite")


def kill_both(bench: Bench) -> Result:
    trial = bench.trial("kill-both")
    kills = [at_step(trial.mark(f"fired-{victim}"), kill_me, ranks=(victim,)) for victim in range(2)]
    return survives(
        trial,
        *kills,
        mark=trial.mark("fired-1"),
        said="rank 0 was ended by SIGKILL; rank 1 was ended by SIGKILL",
    )


def kill_again_while_recovering(bench: Bench) -> Result:
    """The second attempt dies while it reads the checkpoint."""
    trial = bench.trial("kill-again")
    first, second = trial.mark(), trial.mark("fired-again")

    def install() -> None:
        restore = trainer.worker.restore

        def dies(*arguments: object) -> None:
            if rank() == 0 and first.is_there and second.fire(EVERY):
                kill_me()
            restore(*arguments)  # type: ignore[arg-type]

        trainer.worker.restore = dies  # type: ignore[assignment]

    result = survives(trial, at_step(first, kill_me), install, said="rank 1 was ended by SIGKILL")
    assert second.is_there and trial.num_failed() == 2 and "rank 0 was ended by SIGKILL" in trial.ends[1]
    return result


def kill_before_the_first_checkpoint(bench: Bench) -> Result:
    trial = bench.trial("kill-early")
    kill = at_step(trial.mark(), kill_me, step=EVERY - 1)
    return survives(trial, kill, said="SIGKILL", how="attempt 2 began anew")


def kill_driver(bench: Bench) -> Result:
    """Its workers end with it; the command is given again."""
    trial = bench.trial("kill-driver")
    mark = trial.mark()
    running = trial.start(lambda: before_steps(lambda step: step == AT and rank() == 0 and mark.fire(step)))
    fired = mark.wait(running)
    running.send(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    assert trial.give() == ExitCode.DONE, trial.log
    return trial.survived(fired, f"given again, the command went on from step {trial.story.attempts[-1].from_step}")


def grace_too_short(bench: Bench) -> Result:
    """The last save takes longer than the time that is left: everything is killed in its midst."""
    import trainer.checkpoint

    trial = bench.trial("grace")
    mark = trial.mark()

    def slow_saves_from_now_on() -> None:
        write = trainer.checkpoint.write_tensors

        def slow(*arguments: object, **options: object) -> object:
            if mark.is_there and rank() == 1:
                time.sleep(60)
            return write(*arguments, **options)  # type: ignore[arg-type]

        trainer.checkpoint.write_tensors = slow  # type: ignore[assignment]

    note = lambda: before_steps(lambda step: step == AT and rank() == 0 and mark.fire(step))  # noqa: E731
    running = trial.start(slow_saves_from_now_on, note)
    fired = mark.wait(running)
    running.send(signal.SIGTERM)
    trial.wait_for("asking the workers to save and stop")
    time.sleep(1.5)
    assert not running.ended
    running.send(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    mark.path.rename(mark.path.with_name("over"))
    assert trial.give() == ExitCode.DONE, trial.log
    assert trial.story.attempts[-1].from_step == EVERY
    return trial.survived(fired, f"the save was cut off, and never counted; given again, from step {EVERY}")
