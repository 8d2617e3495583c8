"""The story of a run, as files."""

from __future__ import annotations

from pathlib import Path

from trainer.events import EventKind, EventLog, has_trained_on_gpus, read_events
from trainer.run_directory import RunDirectory


def test_events_come_back_in_their_order(tmp_path: Path) -> None:
    run = RunDirectory.at(str(tmp_path))
    EventLog(run, "a1").record(EventKind.STARTED, "attempt 1 begins", num_workers=4)
    EventLog(run, "a1", rank=2).record(EventKind.HANG, "no step for 60 s", step=7)
    EventLog(run, "a2").record(EventKind.STARTED, "attempt 2 begins")
    first, second = read_events(run, "a1")
    assert (first.kind, first.rank, first.details) == ("started", None, {"num_workers": 4})
    assert (second.kind, second.rank, second.text, second.details) == ("hang", 2, "no step for 60 s", {"step": 7})
    assert first.at <= second.at and [event.attempt for event in read_events(run, "a2")] == ["a2"]
    assert read_events(run, "a3") == []


def test_the_newest_attempt_that_trained_tells_on_what(tmp_path: Path) -> None:
    run = RunDirectory.at(str(tmp_path))
    assert has_trained_on_gpus(run) is None
    parent = None
    for device in ("cpu", "cuda", None):  # the last one came to nothing
        parent = run.start_attempt(parent, None, ())
        if device:
            EventLog(run, parent.attempt).record(EventKind.TRAINING, "from step 0", device=device)
    assert has_trained_on_gpus(run)
    parent = run.start_attempt(parent, None, ())
    EventLog(run, parent.attempt).record(EventKind.TRAINING, "from step 0", device="cpu")
    assert has_trained_on_gpus(run) is False


def test_what_is_damaged_or_unknown_is_left_out(tmp_path: Path) -> None:
    run = RunDirectory.at(str(tmp_path))
    EventLog(run, "a1").record(EventKind.ENDED, "over")
    folder = tmp_path / "attempts" / "a1" / "events"
    (folder / "0000000000001-started-aaaaaa.json").write_text('{"at": 1')
    (folder / "0000000000002-started-aaaaaa.json").write_text('{"at": 2, "of a later release": 3}')
    assert [event.text for event in read_events(run, "a1")] == ["over"]


def test_a_log_that_can_not_be_written_disturbs_nobody(tmp_path: Path) -> None:
    (tmp_path / "attempts").write_text("not a folder")
    EventLog(RunDirectory.at(str(tmp_path)), "a1").record(EventKind.ENDED, "over")
