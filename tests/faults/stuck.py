"""Workers that neither go on nor end, are slow, or fail again and again."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import trainer.stragglers
import trainer.worker
from launch.exit_codes import ExitCode
from tests.faults.bench import AT, EVERY, Bench, Install, Mark, Result, at_step, before_steps, rank
from tests.faults.processes import survives
from trainer.events import EventKind

LIMIT_S = 3.0
FOR_EVER_S = 600
SOON: dict[str, Any] = {"at_least_s": LIMIT_S, "first_step_s": 60}
"""Of the section ``watchdog``: its defaults are for steps that take seconds."""


def _hangs(bench: Bench, name: str, install: Install, said: str) -> Result:
    trial = bench.trial(name, watchdog=SOON)
    result = survives(trial, install, said=said)
    (attempt, *_) = trial.story.attempts
    stacks = list((trial.path / "attempts" / attempt.id / "stacks").iterdir())
    assert "Hang: no progress" in attempt.reason and stacks
    return Result(f"{result.outcome}; named: “{said}”", result.lost_steps, result.recovery_s)


def stopped(bench: Bench) -> Result:
    stop = lambda: os.kill(os.getpid(), signal.SIGSTOP)  # noqa: E731
    return _hangs(bench, "stopped", at_step(Mark(bench.root / "stopped" / "fired"), stop), "Rank 1 did not report")


def holds_the_interpreter(bench: Bench) -> Result:
    def hold() -> None:
        # Other than CDLL, PyDLL keeps the interpreter's lock.
        threading.Thread(target=ctypes.PyDLL(None).sleep, args=(FOR_EVER_S,), daemon=True).start()

    return _hangs(bench, "holds", at_step(Mark(bench.root / "holds" / "fired"), hold), "Rank 1 did not report")


def never_joins(bench: Bench) -> Result:
    return _hangs(
        bench,
        "never-joins",
        at_step(Mark(bench.root / "never-joins" / "fired"), lambda: time.sleep(FOR_EVER_S)),
        "The others wait for rank 1",
    )


def _is_alive(pid: int) -> bool:
    """Or stopped, and holds memory; what is dead and not yet waited for holds none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def zombie(bench: Bench) -> Result:
    """A worker fails, and a thread that cannot be ended keeps its process, and its memory, there. When the next attempt
    begins, it must be gone."""
    trial = bench.trial("zombie")
    mark, met = trial.mark(), trial.folder / "met"

    def fail() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        threading.Thread(target=time.sleep, args=(FOR_EVER_S,)).start()
        raise RuntimeError("made by the fault suite")

    def install() -> None:
        restore = trainer.worker.restore

        def looks(*arguments: object) -> None:
            if mark.is_there and _is_alive(mark.fired.pid):
                met.touch()
            restore(*arguments)  # type: ignore[arg-type]

        trainer.worker.restore = looks  # type: ignore[assignment]

    result = survives(trial, at_step(mark, fail), install, said="RuntimeError: made by the fault suite")
    assert not met.exists(), "the next attempt met the old worker"
    return Result(f"{result.outcome}; the old worker was gone before", result.lost_steps, result.recovery_s)


def straggler(bench: Bench) -> Result:
    """Nothing is ended for it: the rank is named, and the run comes to its end."""
    looks = {"probe_every_steps": 2, "slow_looks": 2, "slow_ratio": 4}
    trial = bench.trial("straggler", watchdog=looks)
    mark = trial.mark()

    def install() -> None:
        probe = trainer.stragglers.Probe.seconds

        def slow(self: trainer.stragglers.Probe) -> float:
            began = time.perf_counter()
            for _ in range(40 if rank() == 1 else 1):
                probe(self)
            mark.fire(0)
            return time.perf_counter() - began

        trainer.stragglers.Probe.seconds = slow  # type: ignore[method-assign]

    assert trial.give(install) == ExitCode.DONE, trial.log
    assert mark.is_there and len(trial.story.attempts) == 1
    (event,) = [event for event in trial.story.events if event.kind == EventKind.STRAGGLER]
    assert event.rank == 1 and event.details["cause"] == "computing"
    trial.check_same_end()
    named = event.text.split(":")[0].replace(socket.gethostname(), "…")
    return Result(f"the same end, bit for bit, in one attempt; named: “{named}”", 0)


def crash_loop(bench: Bench) -> Result:
    """The same error at the same step in every attempt. Mended, the run goes on."""
    trial = bench.trial("crash-loop")
    mark = trial.mark()

    def fail(step: int) -> None:
        if step == AT and rank() == 1:
            mark.fire(step)
            raise RuntimeError("made by the fault suite")

    assert trial.give(lambda: before_steps(fail)) == ExitCode.FAILED, trial.log
    reason = trial.files.result["reason"]
    assert "a crash loop: step 8 failed 3 times in a row" in reason and "made by the fault suite" in reason, reason
    assert trial.files.result["step"] == EVERY
    stopped_lost = trial.lost_steps
    assert trial.give() == ExitCode.DONE, trial.log
    trial.check_same_end()
    return Result(
        "stops with exit code 1: “a crash loop: step 8 failed 3 times in a row in the same way: RuntimeError: …”; "
        "mended and given again, the same end, bit for bit",
        stopped_lost,
    )
