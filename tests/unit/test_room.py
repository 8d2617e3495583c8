"""Making room on a full disk goes on, whatever removing old checkpoints ends with."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest

from data_shards.errors import BatonError, CorruptFile
from trainer.room import Room


@pytest.mark.parametrize("error", [OSError("the storage is away"), CorruptFile("start.json: not valid JSON")])
def test_what_can_not_be_removed_is_told_and_tried_again(error: OSError | BatonError) -> None:
    free, said, errors = 0, [], [error]

    def remove() -> Sequence[str]:
        nonlocal free
        if errors:
            raise errors.pop()
        free = 10
        return ["00000005-a"]

    room = Room(10, lambda: free, lambda: None, remove, said.append)
    room.watch()
    try:
        room.want()
        until = time.monotonic() + 10
        while not room.exhausted and time.monotonic() < until:
            time.sleep(0.01)
        assert room.exhausted and str(error) in said[0]
        room.want()
        while room.short and time.monotonic() < until:
            room.want()
            time.sleep(0.01)
        assert not room.short and "removed 00000005-a" in said[1]
    finally:
        room.close()
