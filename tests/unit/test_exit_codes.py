"""What a command raises becomes an exit code, and a message that says what to do."""

from __future__ import annotations

import ast
import errno
import os
import re
from collections.abc import Sequence

import pytest

from data_shards.errors import BadInput, BatonError
from launch.cli import run_verb
from launch.exit_codes import ExitCode
from tests.support.command import ROOT
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
        (KeyboardInterrupt(), 130, "baton: interrupted"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_errors(error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
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


KILLED = 137
"""SIGKILL: nobody is left to choose a code."""
REACHED = {
    ExitCode.DONE: ("integration/test_operating.py", "test_it_is_stopped_from_elsewhere"),
    ExitCode.FAILED: ("integration/test_recovery.py", "test_corrupt_checkpoints_are_named_and_left_out"),
    ExitCode.BAD_INPUT: ("integration/test_operating.py", "test_nothing_is_left_to_stop"),
    ExitCode.HELD: ("integration/test_second_launcher.py", "test_one_launcher_after_another"),
    ExitCode.STOPPED: ("integration/test_recovery.py", "test_sigterm_saves_and_the_same_command_resumes"),
    ExitCode.INTERRUPTED: ("integration/test_operating.py", "test_signals_before_there_is_anything_to_save"),
    ExitCode.TERMINATED: ("integration/test_operating.py", "test_signals_before_there_is_anything_to_save"),
    KILLED: ("integration/test_operating.py", "test_signals_before_there_is_anything_to_save"),
}
"""By code a test in which a command, started as users start it, ends with it."""


def rows() -> dict[int, list[str]]:
    """Of the table in docs/exit-codes.md, by code: name, when, what to do."""
    text = (ROOT / "docs" / "exit-codes.md").read_text()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\| \d.*$", text, re.M)]
    return {int(code): rest for code, *rest in cells}


def test_the_table_has_every_code_and_no_other() -> None:
    assert {code: row[0] for code, row in rows().items()} == {code: code.name for code in ExitCode} | {KILLED: "-"}
    assert all(len(row) == 3 and all(row) for row in rows().values())
    readme = (ROOT / "README.md").read_text()
    told = re.findall(r"^\| ([\d, ]+) \|", readme[readme.index("## Exit codes") :], re.M)
    assert {int(code) for cell in told for code in cell.split(",")} == set(ExitCode)
    assert "(docs/exit-codes.md)" in readme


@pytest.mark.parametrize("code", REACHED, ids=lambda code: str(int(code)))
def test_every_code_is_reached_by_a_test(code: int) -> None:
    assert set(REACHED) == set(rows())
    file, name = REACHED[code]
    source = (ROOT / "tests" / file).read_text()
    functions = {node.name: node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}
    assert name in functions
    numbers = [node.value for node in ast.walk(functions[name]) if isinstance(node, ast.Constant)]
    signalled = {130: "SIGINT", 143: "SIGTERM", KILLED: "SIGKILL"}
    attributes = [node.attr for node in ast.walk(functions[name]) if isinstance(node, ast.Attribute)]
    assert int(code) in numbers or signalled.get(code) in attributes, f"{name} does not look for {code}"
