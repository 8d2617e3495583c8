"""What a command raises becomes an exit code, and a message that says what to do."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

import pytest

from data_shards.errors import BadInput, BatonError
from launch.cli import run_verb
from trainer.errors import DiskFull, RunHeld, SaveFailed


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (BadInput("data.train: no such file"), 2, "baton: data.train: no such file"),
        (RunHeld("held by another"), 69, "baton: held by another"),
        (DiskFull("the disk of /runs is full"), 75, "baton: the disk of /runs is full"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/runs/x"), 75, "'/runs/x'. Make room, and run the command"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "/runs/x"), 75, "'/runs/x'. Make room, and run the command"),
        (OSError(errno.EIO, os.strerror(errno.EIO), "/runs/x"), 1, "'/runs/x'. Nothing committed is lost"),
        (SaveFailed("the storage hangs"), 1, "baton: SaveFailed: the storage hangs"),
        (BatonError("wrong"), 1, "baton: BatonError: wrong"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_errors(error: Exception, code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    def main(arguments: Sequence[str]) -> int:
        assert arguments == ["--config", "x"]
        raise error

    assert run_verb(main, ["--config", "x"]) == code
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_a_full_disk_is_seen_behind_another_error(capsys: pytest.CaptureFixture[str]) -> None:
    """And where no file is named, the traceback says which it was."""

    def main(_: Sequence[str]) -> int:
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise OSError("writing x failed 3 times") from error

    assert run_verb(main, []) == 75
    said = capsys.readouterr().err
    assert "baton: writing x failed 3 times. Make room" in said and "Traceback" in said


def test_what_a_command_returns_is_its_exit_code() -> None:
    assert run_verb(lambda _: 0, []) == 0 and run_verb(lambda _: 75, []) == 75
