"""What may pass is tried again for a while; what will not is raised at once."""

from __future__ import annotations

import errno
import logging

import pytest

from data_shards.retry import Patience, is_passing, with_retries

BUSY = "When reading information for key 'a' in bucket 'b': AWS Error UNKNOWN (HTTP status 503) during HeadObject"
FAST = Patience(total_s=0.5, first_pause_s=0.001, longest_pause_s=0.002)


@pytest.mark.parametrize(
    "error",
    [
        OSError(BUSY),
        OSError("AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 7, Couldn't connect to server"),
        OSError("AWS Error SLOW_DOWN during PutObject operation: Please reduce your request rate"),
        OSError("AWS Error UNKNOWN (HTTP status 500) during UploadPart operation"),
        OSError("google::cloud::Status(UNAVAILABLE: try again)"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        TimeoutError(errno.ETIMEDOUT, "timed out"),
    ],
)
def test_passing(error: OSError) -> None:
    assert is_passing(error)


@pytest.mark.parametrize(
    "error",
    [
        OSError("AWS Error ACCESS_DENIED during HeadObject operation: No response body."),
        OSError("AWS Error NO_SUCH_BUCKET during PutObject operation: The specified bucket does not exist"),
        OSError("AWS Error UNKNOWN (HTTP status 403) during HeadObject operation: in bucket 'timeout-5'"),
        FileNotFoundError(errno.ENOENT, "Path does not exist 'HTTP status 503'"),
        PermissionError(errno.EACCES, "no"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
)
def test_not_passing(error: OSError) -> None:
    assert not is_passing(error)


def test_an_incident_is_logged_when_it_begins_and_ends(caplog: pytest.LogCaptureFixture) -> None:
    left = [OSError(BUSY)] * 4

    def action() -> str:
        if left:
            raise left.pop()
        return "done"

    with caplog.at_level(logging.WARNING):
        assert with_retries(action, "reading s3://b/a", FAST) == "done"
    began, ended = caplog.messages
    assert began.startswith("reading s3://b/a failed, trying again for up to 0 s") and "503" in began
    assert ended.startswith("reading s3://b/a worked at try 5")


def test_patience_ends() -> None:
    tries = 0

    def action() -> None:
        nonlocal tries
        tries += 1
        raise OSError(BUSY)

    with pytest.raises(OSError, match=r"^writing x failed \d+ times in \d+ s; the last time: .*503"):
        with_retries(action, "writing x", Patience(total_s=0.05, first_pause_s=0.001, longest_pause_s=0.01))
    assert tries > 4


def test_a_try_that_takes_longer_than_the_patience_is_followed_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the upload of a large file that meets one 503; what it took before the first is not counted."""
    now, tries = 0.0, 0

    def passes(seconds: float) -> None:
        nonlocal now
        now += seconds

    def action(failures: int, each_s: float) -> int:
        nonlocal tries
        tries += 1
        passes(each_s)
        if tries <= failures:
            raise OSError(BUSY)
        return tries

    monkeypatch.setattr("time.monotonic", lambda: now)
    monkeypatch.setattr("time.sleep", passes)
    assert with_retries(lambda: action(1, 300.0), "writing x", Patience()) == 2
    tries = 0
    assert with_retries(lambda: action(3, 15.0), "writing x", Patience()) == 4
    tries = 0
    with pytest.raises(OSError, match="failed 2 times in 300 s"):
        with_retries(lambda: action(9, 300.0), "writing x", Patience())


def test_what_does_not_pass_is_tried_once() -> None:
    tries = 0

    def action() -> None:
        nonlocal tries
        tries += 1
        raise FileNotFoundError("x")

    with pytest.raises(FileNotFoundError):
        with_retries(action, "reading x", FAST)
    assert tries == 1


def test_pauses_double_up_to_the_longest_and_are_spread() -> None:
    pauses = Patience(first_pause_s=1, longest_pause_s=8).pauses()
    for longest in (1, 2, 4, 8, 8, 8):
        assert longest / 2 <= next(pauses) <= longest
    first = Patience(first_pause_s=1)
    assert len({next(first.pauses()) for _ in range(20)}) > 10
