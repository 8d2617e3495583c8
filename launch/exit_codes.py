"""What the command's exit status says. docs/exit-codes.md tells users."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    DONE = 0
    """everything asked for is done"""
    FAILED = 1
    """failed, with the reason; running the same command again is not expected to help"""
    BAD_INPUT = 2
    """something given is wrong; nothing was started"""
    HELD = 69
    """another launcher holds the run, from the start or since it took it over (EX_UNAVAILABLE of sysexits.h)"""
    STOPPED = 75
    """stopped with progress saved; run the same command again (EX_TEMPFAIL of sysexits.h)"""
    INTERRUPTED = 130
    """by SIGINT while there was nothing to save; as shells tell it"""
    TERMINATED = 143
    """by SIGTERM while there was nothing to save; as shells tell it"""
