"""Doing it again where storage fails for a moment: an overloaded server, a connection that breaks."""

from __future__ import annotations

import errno
import logging
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

log = logging.getLogger(__name__)

Result = TypeVar("Result")

_PASSING_ERRNO = {
    errno.ECONNRESET,
    errno.ECONNREFUSED,
    errno.ECONNABORTED,
    errno.EPIPE,
    errno.ETIMEDOUT,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.ESTALE,
}
# The texts of the object stores' clients, which reach Python as an OSError without a number: the AWS SDK's names of
# errors (aws/core/client/CoreErrors.h), curl's codes (curl.se/libcurl/c/libcurl-errors.html), gRPC's (Google Cloud).
_PASSING_TEXT = re.compile(
    r"HTTP status (?:408|429|5\d\d)"
    r"|AWS Error (?:NETWORK_CONNECTION|SLOW_DOWN|INTERNAL_FAILURE|SERVICE_UNAVAILABLE|REQUEST_TIMEOUT|THROTTLING)"
    r"|curlCode: (?:5|6|7|16|18|28|35|52|55|56|92)\b"
    r"|Connection (?:reset|refused|aborted|timed out)"
    r"|UNAVAILABLE|DEADLINE_EXCEEDED"
)


@dataclass(frozen=True)
class Patience:
    """How long, and how often, an operation that fails is tried again."""

    total_s: float = 60.0
    """from its first failure on: a try may itself take longer than that, as the upload of a rank file does"""
    first_pause_s: float = 0.25
    longest_pause_s: float = 8.0

    def pauses(self) -> Iterator[float]:
        """Seconds between tries, without end: doubling up to the longest, each drawn from its upper half, so that many
        workers which failed together do not come back together."""
        pause = self.first_pause_s
        while True:
            yield pause * random.uniform(0.5, 1.0)
            pause = min(2 * pause, self.longest_pause_s)


ONE_MINUTE = Patience()
A_MOMENT = Patience(total_s=3.0, first_pause_s=0.5, longest_pause_s=2.0)
"""For I/O errors while reading: a network mount answers so while its server is away, a broken disk for good."""


def is_passing(error: OSError) -> bool:
    """Whether the same call may succeed a moment later (pure); where a file is missing or refused, it will not."""
    if isinstance(error, (FileNotFoundError, PermissionError)):
        return False
    return error.errno in _PASSING_ERRNO or bool(_PASSING_TEXT.search(str(error)))


def is_io_error(error: OSError) -> bool:
    return error.errno == errno.EIO


def with_retries(
    action: Callable[[], Result],
    what: str,
    patience: Patience,
    may_pass: Callable[[OSError], bool] = is_passing,
) -> Result:
    """What ``action`` returns, calling it again after an error that may pass.

    However long a try takes, there is a second one. An incident is logged when it begins and when it ends, not at every
    try.

    Raises:
        OSError: of another kind, at once; or, with the number of the last one, once ``patience`` is spent.
    """
    first_failed = 0.0
    for tries, pause in enumerate(patience.pauses(), 1):
        try:
            result = action()
        except OSError as error:
            if not may_pass(error):
                raise
            if tries == 1:
                first_failed = time.monotonic()
                log.warning("%s failed, trying again for up to %.0f s: %s", what, patience.total_s, error)
            elif (elapsed := time.monotonic() - first_failed) + pause > patience.total_s:
                spent = OSError(f"{what} failed {tries} times in {elapsed:.0f} s; the last time: {error}")
                spent.errno = error.errno
                raise spent from error
            time.sleep(pause)
        else:
            if tries > 1:
                elapsed = time.monotonic() - first_failed
                log.warning("%s worked at try %d, %.1f s after it had failed", what, tries, elapsed)
            return result
    raise AssertionError("pauses never end")
