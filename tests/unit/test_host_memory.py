"""What is freed stays with the process, so that the next step's tensors cost no page faults."""

from __future__ import annotations

import resource
import subprocess
import sys

PROBE = """
import resource, sys
from trainer.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def step():
    held = [b"x" * 48_000_000 for _ in range(4)]  # 48 MB each, more than glibc ever keeps by itself
for _ in range(8):  # until the heap has grown and found its order
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROBE, how], text=True, capture_output=True, check=True)
    return int(done.stdout)


def test_memory_is_reused() -> None:
    num_pages = 4 * 48_000_000 // resource.getpagesize()
    assert faults("keep") < num_pages / 100 < num_pages / 2 < faults("as it is")
