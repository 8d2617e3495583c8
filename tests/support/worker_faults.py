"""Faults inside real workers: ``install`` makes ``LocalProcesses`` start them with one, at a rank and a step, once.

Workers are forks of a server that has none of our modules, so the fault travels in the environment and is made where
the worker begins.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest

import cluster.local_processes

_VARIABLE = "BATON_TEST_WORKER_FAULT"
_FOR_EVER_S = 600


class Fault(StrEnum):
    STOPPED = "stopped"
    """SIGSTOP"""
    HOLDS_INTERPRETER = "holds_interpreter"
    """a thread that never lets go of the interpreter's lock"""
    NEVER_JOINS = "never_joins"
    """sleeps where the others are in a collective"""
    NAN = "nan"
    """the loss of a step is NaN; ``rank`` None: on all ranks; ``always``: also when it is done again, and so for all
    steps before ``until``"""
    NO_MEMORY = "no_memory"
    """a tensor larger than any machine, asked of the real allocator"""
    NEVER_ENDS = "never_ends"
    """a thread that does not end, and keeps the process from ending"""
    SLOW_EVALUATION = "slow_evaluation"
    """half a second for each micro batch of evaluations, on all ranks; no fault"""
    MISREAD = "misread"
    """from a step on this process reads a wrong bit in each shard, however often it tries; the shards are good"""


def install(
    monkeypatch: pytest.MonkeyPatch, fault: Fault, mark: Path, *, rank: int | None = 1, step: int = 4, **options: Any
) -> None:
    """Args: mark: file that is made when the fault fires; where it is there, it does not fire again."""
    value = {"fault": fault, "rank": rank, "step": step, "mark": str(mark), **options}
    monkeypatch.setenv(_VARIABLE, json.dumps(value))
    monkeypatch.setattr(cluster.local_processes, "run_rank", _faulty_rank)


def _faulty_rank(spec: dict[str, object], environment: dict[str, str]) -> None:
    wanted = json.loads(environment[_VARIABLE])
    if wanted["rank"] in (None, int(environment["RANK"])):
        _FAULTS[Fault(wanted["fault"])](wanted)
    cluster.local_processes.run_rank(spec, environment)


def before_step(step: int, action: Callable[[], object]) -> None:
    """Have something done in this process when so many steps are done and the next begins."""
    from trainer import loop

    train_step = loop.train_step

    def disturbed(*arguments: Any, **options: Any) -> Any:
        if options["step"] == step:
            action()
        return train_step(*arguments, **options)

    loop.train_step = disturbed


def fires(mark: str) -> bool:
    """The first time."""
    try:
        Path(mark).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _once(action: Callable[[], object]) -> Callable[[dict[str, Any]], None]:
    return lambda wanted: before_step(wanted["step"], lambda: fires(wanted["mark"]) and action())


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _hold_the_interpreter() -> None:
    ctypes.PyDLL(None).sleep(_FOR_EVER_S)  # other than CDLL, PyDLL keeps the lock


def _begin_holding_the_interpreter() -> None:
    time.sleep(1)  # tiny steps are faster than the watchdog looks
    threading.Thread(target=_hold_the_interpreter, daemon=True).start()


def _never_joins() -> None:
    time.sleep(_FOR_EVER_S)


def _never_ends() -> None:
    threading.Thread(target=time.sleep, args=(_FOR_EVER_S,)).start()


def _no_memory() -> None:
    import torch

    torch.empty(2**60, dtype=torch.uint8)


def _nan(wanted: dict[str, Any]) -> None:
    """Each firing adds a byte to the mark."""
    from trainer import engine

    honest, mark = engine.token_loss_sum, Path(wanted["mark"])

    def spoil() -> None:
        engine.token_loss_sum = honest if mark.exists() and not wanted.get("always") else spoiled

    def spoiled(*arguments: Any) -> Any:
        with mark.open("a") as file:
            file.write(".")
        return honest(*arguments) * float("nan")

    before_step(wanted["step"], spoil)
    before_step(wanted.get("until", wanted["step"] + 1), lambda: setattr(engine, "token_loss_sum", honest))


def _slow_evaluation(wanted: dict[str, Any]) -> None:
    from trainer.engine import ZeroEngine

    evaluate = ZeroEngine.evaluate_micro_batch

    def slow(self: ZeroEngine, batch: Any) -> Any:
        with Path(wanted["mark"]).open("a") as file:
            file.write(".")
        time.sleep(0.5)
        return evaluate(self, batch)

    ZeroEngine.evaluate_micro_batch = slow  # type: ignore[method-assign]


def _misread(wanted: dict[str, Any]) -> None:
    """Each firing adds a byte to the mark."""
    from data_shards.reading import shard_reader

    mark, honest, packs = Path(wanted["mark"]), shard_reader.map_file, shard_reader.SplitReader.packs
    spoilt: list[bool] = []

    def misread(path: Path) -> Any:
        import pyarrow as pa

        with mark.open("a") as file:
            file.write(".")
        data = bytearray(honest(path).to_pybytes())
        data[len(data) // 2] ^= 1
        return pa.py_buffer(data)

    def spoil() -> None:
        if fires(wanted["mark"]):
            spoilt.append(True)
            shard_reader.map_file = misread

    def anew(self: Any, rows: Any) -> Any:
        if spoilt:  # as where they were evicted; a small dataset is read but once
            self._files = [None] * len(self._files)
        return packs(self, rows)

    before_step(wanted["step"], spoil)
    shard_reader.SplitReader.packs = anew  # type: ignore[method-assign]


_FAULTS = {
    Fault.STOPPED: _once(_stop),
    Fault.HOLDS_INTERPRETER: _once(_begin_holding_the_interpreter),
    Fault.NEVER_JOINS: _once(_never_joins),
    Fault.NEVER_ENDS: _once(_never_ends),
    Fault.NO_MEMORY: _once(_no_memory),
    Fault.NAN: _nan,
    Fault.SLOW_EVALUATION: _slow_evaluation,
    Fault.MISREAD: _misread,
}
