"""What a launcher leaves word of while no attempt runs: when, what of it is told, and that nothing hangs on it."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster import doing
from cluster.attempts import run_attempts
from cluster.doing import Doing, DoingKind, read_doing, write_doing
from cluster.failures import Action
from cluster.lease import holding
from cluster.story import Story
from launch import status
from tests.unit.test_run_directory import commit
from trainer.events import EventKind
from trainer.run_directory import RunDirectory, write_json

NEEDS = "waiting for room: cluster.num_workers=2 with 1 GPU each; the cluster has no node"


def silent(line: str) -> None:
    pass


def told(run: RunDirectory) -> Story:
    return status.look(run).story


class Crowded:
    """Stands in for a launcher: there is room once that was waited for, the first attempt fails and the last does not.
    What is told of the run meanwhile it keeps."""

    def __init__(self, run: RunDirectory, waits: tuple[bool, ...]) -> None:
        self._run = run
        self._waits = list(waits)
        self.seen: list[Story] = []

    def wait_for_room(self, cancelled: Callable[[], bool], say: Callable[[str], None]) -> int:
        if self._waits.pop(0):
            say(NEEDS)
        self.seen.append(told(self._run))
        return 2

    def run(self, spec: Any, num_workers: int, notify: Any) -> str:
        self.seen.append(told(self._run))
        if self._waits:
            return "rank 0 was killed by SIGKILL"
        commit(self._run, spec, 7)
        write_json(self._run.attempt(spec), "end.json", {"outcome": "finished"})
        return ""


def attempted(run: RunDirectory, *waits: bool, say: Callable[[str], None] = silent) -> list[Story]:
    """What was told of it before each attempt, while it ran, and in the end."""
    launcher = Crowded(run, waits)
    with holding(run, silent) as lease:
        submission = run_attempts(
            run,
            launcher,  # type: ignore[arg-type]
            lambda attempt, resume_from: attempt,  # type: ignore[arg-type, return-value]
            lease=lease,
            max_failures_without_progress=100,
            say=say,
        )
        launcher.seen.append(told(run))
    assert submission.decision.action == Action.FINISH
    return launcher.seen


def test_a_wait_for_room_is_told_before_the_first_attempt_too(tmp_path: Path) -> None:
    run = RunDirectory.at(str(tmp_path))
    said: list[str] = []
    waiting, first, waiting_again, second, finished = attempted(run, True, True, say=said.append)
    assert said.count(NEEDS) == 2
    assert [story.state for story in (waiting, first, waiting_again, second)] == ["waiting", "starting"] * 2
    for story, attempts in ((waiting, 0), (waiting_again, 1)):
        assert story.doing is not None and story.doing.text == NEEDS and len(story.attempts) == attempts
    assert first.doing is second.doing is finished.doing is None
    assert finished.state == "finished", "though its launcher has yet to write the result, and to let it go"
    waits = [event for event in finished.events if event.kind == EventKind.WAITING]
    assert len(waits) == 2 and all(re.fullmatch(rf"\d+s {NEEDS}", event.text) for event in waits)
    assert [event.attempt for event in waits] == [attempt.id for attempt in finished.attempts]


def test_what_was_waited_for_is_no_longer_told_where_there_is_room(tmp_path: Path) -> None:
    waiting, _, between, *_ = attempted(RunDirectory.at(str(tmp_path)), True, False)
    assert waiting.doing is not None
    assert (between.state, between.doing) == ("waiting", None)


def test_that_an_attempt_ended_is_told_while_the_next_one_is_put_off(tmp_path: Path) -> None:
    run, seen = RunDirectory.at(str(tmp_path)), []

    def look(line: str) -> None:
        if "the next one starts in" in line:
            seen.append(told(run))

    attempted(run, False, False, say=look)
    (story,) = seen
    assert story.state == "waiting" and story.attempts[0].state == "failed"
    assert story.attempts[0].reason == "rank 0 was killed by SIGKILL"


def test_without_a_wait_nothing_is_left(tmp_path: Path) -> None:
    preparing, *_, finished = attempted(RunDirectory.at(str(tmp_path)), False)
    assert preparing.state == "preparing" and not (tmp_path / doing.FILE).exists()
    assert not any(event.kind == EventKind.WAITING for event in finished.events)


def test_where_it_can_not_be_written_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = []

    def fail(*_: Any) -> None:
        failed.append(True)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(doing, "write_json", fail)
    preparing, starting, finished = attempted(RunDirectory.at(str(tmp_path)), True)
    assert failed
    assert [story.state for story in (preparing, starting, finished)] == ["preparing", "starting", "finished"]


def test_what_can_not_be_read_is_none(tmp_path: Path) -> None:
    run = RunDirectory.at(str(tmp_path))
    assert read_doing(run) is None
    left = Doing(DoingKind.EXPORTING, 1.5, "step 7", "c1")
    write_doing(run, left)
    assert read_doing(run) == left
    for text in ('{"kind": "wai', '{"kind": "waiting", "of": "a later release"}', "[]", "7"):
        (tmp_path / doing.FILE).write_text(text)
        assert read_doing(run) is None
