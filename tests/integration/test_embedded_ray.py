"""The Ray that a command starts for itself: closed to others, and no master of the command's signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from tests.support.command import ROOT, environment

_HOLDS = """
import signal, sys, time
from cluster.ray_train import connect
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
assert connect(1)
import ray
assert ray.get(ray.remote(lambda: 7).remote()) == 7
print(ray.get_runtime_context().gcs_address, flush=True)
time.sleep(60)
"""
_JOINS = "from launch.cli import run_verb; from cluster.ray_train import connect; exit(run_verb(connect, 1))"


def _run(script: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=120
    )


def test_it_takes_its_own_command_alone_and_leaves_it_its_exit_code() -> None:
    env = environment()
    del env["RAY_AUTH_MODE"]
    with subprocess.Popen([sys.executable, "-c", _HOLDS], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as own:
        assert own.stdout is not None
        address = own.stdout.readline().strip()
        outsider = dict(environment(), RAY_ADDRESS=address)
        joined = subprocess.run(
            [sys.executable, "-c", _JOINS], env=outsider, capture_output=True, text=True, check=False
        )
        os.kill(own.pid, signal.SIGTERM)
        assert own.wait(60) == 143
    assert joined.returncode == 2 and "Traceback" not in joined.stderr, joined.stderr
    assert f"baton: RAY_ADDRESS={address}: the Ray cluster can't be joined" in joined.stderr
    assert "RAY_AUTH_TOKEN" in joined.stderr
