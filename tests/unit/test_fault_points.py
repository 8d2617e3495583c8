"""Faults strike the processes that they should, also where workers are forks of a driver that touched files before."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from data_shards.fault_points import Kind, reach


def test_all_workers_are_killed_and_the_driver_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = {"rank": 1, "point": "write a/b/c", "kind": Kind.KILL_ALL, "mark": str(tmp_path / "fired")}
    monkeypatch.setenv("BATON_FAULTS", json.dumps(plan))
    reach("write", "/x/a/b/c")  # by the driver
    workers = []
    for rank in (0, 1):
        pid = os.fork()
        if pid == 0:
            os.environ["RANK"] = str(rank)
            reach("write", "/x/a/b/d")
            if rank == 1:
                time.sleep(0.2)  # the other one has been somewhere, too
                reach("write", "/x/a/b/c")
            time.sleep(20)
            os._exit(0)
        workers.append(pid)
    ends = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in workers]
    assert ends == [-signal.SIGKILL, -signal.SIGKILL] and (tmp_path / "fired").read_text() == "write a/b/c"
