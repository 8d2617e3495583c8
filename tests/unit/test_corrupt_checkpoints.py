"""Whatever happens to a file of a checkpoint, it is never accepted, it is named, and the older one is used."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_shards import signed_json
from tests.support.checkpoints import random_values, write_checkpoint
from tests.support.tiny import DRAFT
from trainer import checkpoint
from trainer.checkpoint import CheckpointRef, SliceReader, Wanted, hash_file, rank_file
from trainer.checkpoint_manifest import KIND, MANIFEST, VERSION, ParameterEntry, Progress
from trainer.errors import CheckpointCorrupt
from trainer.run_directory import RunDirectory
from trainer.slices import slice_bounds
from trainer.survey import NoUsableCheckpoint, newest_usable, quarantine, survey

WORLD_SIZE = 2
PARTS = ("fp32", "exp_avg", "exp_avg_sq")
PARAMETERS = (ParameterEntry("embed.weight", (100, 160)), ParameterEntry("norm.weight", (7,)))
FLIPS = 260
"""per rank file; they have 96 kB each, three blocks"""


def write(run: RunDirectory, attempt: str, step: int) -> str:
    """Rank files of random numbers, committed."""
    manifest = replace(
        DRAFT,
        attempt=attempt,
        world_size=WORLD_SIZE,
        parameters=PARAMETERS,
        optimizer={"name": "adamw", "step": step, "state_keys": list(PARTS[1:])},
        progress=Progress(step=step),
    )
    return write_checkpoint(run.checkpoints, manifest, random_values(seed=step)).name


def load(run: RunDirectory, ref: CheckpointRef, world_size: int) -> None:
    """As all ranks of an engine of this size would, one after the other."""
    for rank in range(world_size):
        with SliceReader(run.checkpoints.child(ref.name), ref) as reader:
            wanted = []
            for parameter, part in itertools.product(PARAMETERS, PARTS):
                start, stop = slice_bounds(parameter.numel, rank, world_size)
                wanted.append(Wanted(parameter.name, part, parameter.numel, start, torch.empty(stop - start)))
            reader.fill(wanted)


def resume(run: RunDirectory, world_size: int) -> tuple[int, str]:
    """The step that a submission ends up with, and what it said of those that it passed over."""
    said: list[str] = []
    while True:
        ref = newest_usable(run, said.append)
        assert ref is not None
        try:
            load(run, ref, world_size)
            return ref.step, "\n".join(said)
        except CheckpointCorrupt as error:
            assert error.checkpoint == ref.name
            said.append(str(error))
            quarantine(run, ref.name, str(error))


class Matrix:
    """A run with an older and a newer checkpoint, of which the newer is damaged again and again."""

    def __init__(self, root: Path) -> None:
        self.run = RunDirectory.at(str(root / "run"))
        self.attempt = self.run.start_attempt(None, None, ()).attempt
        self.older = write(self.run, self.attempt, 5)
        self.newer = write(self.run, self.attempt, 10)
        self.folder = root / "run" / "checkpoints" / self.newer
        self.tried: Counter[str] = Counter()

    @contextmanager
    def intact_afterwards(self, *names: str) -> Iterator[None]:
        saved = {name: (self.folder / name).read_bytes() for name in names}
        try:
            yield
        finally:
            for name, data in saved.items():
                (self.folder / name).write_bytes(data)
            (self.folder / "quarantine.json").unlink(missing_ok=True)

    def refused(self, kind: str, name: str, world_size: int) -> None:
        """The damage has been done: it must be seen, named, and the older one used."""
        step, said = resume(self.run, world_size)
        assert step == 5, f"{kind} of {name} was accepted"
        assert name in said and self.newer in said, f"{kind} of {name}: {said}"
        self.tried[kind] += 1

    def change(self, kind: str, name: str, change: Callable[[bytes], bytes], world_size: int = WORLD_SIZE) -> None:
        with self.intact_afterwards(name):
            path = self.folder / name
            path.write_bytes(change(path.read_bytes()))
            self.refused(kind, name, world_size)

    def tell(self, at_least: int) -> None:
        """How many cases were tried since the last time."""
        total = sum(self.tried.values())
        print(f"{total} cases: {dict(self.tried)}")
        assert total >= at_least
        self.tried.clear()


def flipped_in_place(matrix: Matrix, name: str, bit: int) -> None:
    """Without copying the file."""
    with (matrix.folder / name).open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ (1 << bit % 8)]))


def sampled_bits(size: int, header: int, number: int, draw: random.Random) -> list[int]:
    """A third each in the header, in the payload, and in the last kilobyte."""
    thirds = ((0, header), (header, size - 1024), (size - 1024, size))
    return [8 * draw.randrange(*thirds[i % 3]) + draw.randrange(8) for i in range(number)]


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Matrix]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)  # thousands of them, and no power will fail here
        yield Matrix(tmp_path_factory.mktemp("matrix"))


def test_undamaged_it_is_the_newer_one(matrix: Matrix) -> None:
    for world_size in (1, 2, 3):
        assert resume(matrix.run, world_size) == (10, "")


def test_rank_files(matrix: Matrix) -> None:
    draw = random.Random(5)
    for rank in range(WORLD_SIZE):
        name = rank_file(rank)
        whole = (matrix.folder / name).read_bytes()
        header = 8 + int.from_bytes(whole[:8], "little")
        for bit in sampled_bits(len(whole), header, FLIPS, draw):
            flipped_in_place(matrix, name, bit)
            matrix.refused("flipped bit", name, draw.choice((1, 2, 3)))
            (matrix.folder / "quarantine.json").unlink(missing_ok=True)
            flipped_in_place(matrix, name, bit)
        for cut in (1, 8, 4096, len(whole) // 2, len(whole) - 1):
            matrix.change("truncated", name, lambda data, cut=cut: data[:-cut])  # type: ignore[misc]
        matrix.change("empty", name, lambda data: b"")
        matrix.change("longer", name, lambda data: data + b"x")
        matrix.change("of another file's contents", name, lambda data: random.Random(1).randbytes(len(data)))
        matrix.change("all zeros", name, lambda data: bytes(len(data)))
        with matrix.intact_afterwards(name):
            (matrix.folder / name).unlink()
            matrix.refused("missing", name, WORLD_SIZE)
        with matrix.intact_afterwards(name):
            (matrix.folder / name).write_bytes((matrix.folder.parent / matrix.older / name).read_bytes())
            matrix.refused("of an older checkpoint", name, WORLD_SIZE)
        hashes = hash_file(rank)
        for bit in range(0, 8 * 3 * 16, 11):
            flipped_in_place(matrix, hashes, bit)
            matrix.refused("flipped bit of the hashes", hashes, draw.choice((1, 2, 3)))
            (matrix.folder / "quarantine.json").unlink(missing_ok=True)
            flipped_in_place(matrix, hashes, bit)
        matrix.change("truncated hashes", hashes, lambda data: data[:-16])
        matrix.change("empty hashes", hashes, lambda data: b"")
        with matrix.intact_afterwards(hashes):
            (matrix.folder / hashes).unlink()
            matrix.refused("missing hashes", hashes, WORLD_SIZE)
    names = [rank_file(0), rank_file(1)]
    with matrix.intact_afterwards(*names):
        zero, one = ((matrix.folder / name).read_bytes() for name in names)
        (matrix.folder / names[0]).write_bytes(one)
        (matrix.folder / names[1]).write_bytes(zero)
        matrix.refused("swapped", names[0], WORLD_SIZE)
    assert resume(matrix.run, 2) == (10, "")
    matrix.tell(at_least=600)


def test_manifest(matrix: Matrix) -> None:
    draw, harmless = random.Random(6), 0
    whole = (matrix.folder / MANIFEST).read_bytes()
    meaning = json.loads(whole)
    for bit in range(0, 8 * len(whole), 17):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            same = json.loads(flipped) == meaning
        except ValueError:
            same = False
        if same:  # between the values, where nothing is said
            harmless += 1
            continue
        matrix.change("flipped bit of the manifest", MANIFEST, lambda data, flipped=flipped: bytes(flipped))  # type: ignore[misc]
    assert harmless < 20
    for cut in sorted({1, 2, 65, 66, *(draw.randrange(1, len(whole)) for _ in range(60))}):
        if whole[:-cut].strip() == whole.strip():
            continue
        matrix.change("truncated manifest", MANIFEST, lambda data, cut=cut: data[:-cut])  # type: ignore[misc]
    matrix.change("empty manifest", MANIFEST, lambda data: b"")
    older = (matrix.folder.parent / matrix.older / MANIFEST).read_bytes()
    with matrix.intact_afterwards(MANIFEST):
        (matrix.folder / MANIFEST).write_bytes(older)
        step, said = resume(matrix.run, 2)
        assert step == 5 and f"its manifest is that of {matrix.older}" in said
    body = signed_json.decode(whole, KIND, VERSION, "here")
    newer_version = signed_json.encode(body, KIND, VERSION + 1)
    matrix.change("newer version", MANIFEST, lambda data: newer_version)
    other_kind = signed_json.encode(body, "something-else", VERSION)
    matrix.change("another kind", MANIFEST, lambda data: other_kind)
    unsigned = {**meaning, "world_size": 1}
    matrix.change("edited by hand", MANIFEST, lambda data: json.dumps(unsigned).encode())
    fewer = signed_json.encode({**body, "files": body["files"][:1]}, KIND, VERSION)
    matrix.change("fewer files", MANIFEST, lambda data: fewer)
    escaping = [{**body["files"][0], "path": "../" + matrix.older + "/" + rank_file(0)}, body["files"][1]]
    outside = signed_json.encode({**body, "files": escaping}, KIND, VERSION)
    matrix.change("names a file outside", MANIFEST, lambda data: outside)
    matrix.tell(at_least=500)
    with matrix.intact_afterwards(MANIFEST):
        (matrix.folder / MANIFEST).unlink()
        assert resume(matrix.run, 2) == (5, "") and matrix.newer in survey(matrix.run).unfinished
    assert resume(matrix.run, 2) == (10, "")


def test_folders(matrix: Matrix) -> None:
    """Copied under another step's name; of an attempt that the run does not know; of one that was superseded."""
    root = matrix.folder.parent
    for name, reason in (
        (checkpoint.directory_name(20, matrix.attempt), f"its manifest is that of {matrix.newer}"),
        (checkpoint.directory_name(20, "0123456789ab"), "no attempt of this run made it"),
    ):
        shutil.copytree(matrix.folder, root / name)
        step, said = resume(matrix.run, 2)
        assert step == 10 and name in said and reason in said
        shutil.rmtree(root / name)


def test_where_all_are_bad_nothing_starts_anew(matrix: Matrix) -> None:
    quarantine(matrix.run, matrix.older, "tried")
    quarantine(matrix.run, matrix.newer, "tried")
    with pytest.raises(NoUsableCheckpoint, match="baton checkpoints verify"):
        newest_usable(matrix.run, lambda line: None)


def test_a_reader_that_trusts_is_noticed(matrix: Matrix, monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrix can fail."""
    for name in (matrix.older, matrix.newer):
        (matrix.folder.parent / name / "quarantine.json").unlink(missing_ok=True)
    monkeypatch.setattr("data_shards.hashed_file.FileEntry.check_digest", lambda *_: None)
    with pytest.raises(AssertionError, match="was accepted"):
        matrix.change("zeros at the end", rank_file(0), lambda data: data[:-64] + bytes(64))
