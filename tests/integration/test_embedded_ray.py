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


_PREPARES = """
import sys
from cluster.ray_train import connected
assert "ray" not in sys.modules
with connected():
    import ray
    assert ray.get(ray.remote(lambda: 7).remote()) == 7
"""


def test_it_takes_its_own_command_alone_and_leaves_it_its_exit_code() -> None:
    env = environment()
    del env["RAY_AUTH_MODE"]
    with subprocess.Popen([sys.executable, "-c", _HOLDS], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as own:
        assert own.stdout is not None
        address = own.stdout.readline().strip()
        outsider = dict(environment(), RAY_ADDRESS=address)
        joined = _run(_JOINS, outsider)
        os.kill(own.pid, signal.SIGTERM)
        assert own.wait(60) == 143
    assert joined.returncode == 2 and "Traceback" not in joined.stderr, joined.stderr
    assert f"baton: RAY_ADDRESS={address}: the Ray cluster can't be joined" in joined.stderr
    assert "RAY_AUTH_TOKEN" in joined.stderr


def test_one_that_prepares_has_a_token_too() -> None:
    env = environment()
    del env["RAY_AUTH_MODE"]
    done = _run(_PREPARES, env)
    assert done.returncode == 0, done.stderr


def test_what_is_no_address_of_a_cluster_is_told() -> None:
    done = _run(_JOINS, environment(RAY_ADDRESS="http://10.0.0.1:8265"))
    assert done.returncode == 2 and "RAY_ADDRESS=http://10.0.0.1:8265: the Ray cluster can't be joined" in done.stderr
    assert "Traceback" not in done.stderr
