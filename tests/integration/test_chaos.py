"""A sample of what ``make chaos`` tries: runs killed, and disks failing, at places where files are touched."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.support.command import ROOT, environment

SAMPLE, SEED = 4, 20261121


def test_a_sample_of_all_points_and_kinds() -> None:
    command = [sys.executable, "-m", "tests.support.chaos", "--sample", str(SAMPLE), "--seed", str(SEED)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(OMP_NUM_THREADS="1"), capture_output=True, text=True, check=False
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(rf"{SAMPLE} of (\d+) cases tried, 0 failed", done.stdout)
    assert found and int(found[1]) > 1000, done.stdout
