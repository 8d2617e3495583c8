"""Files appear whole or not at all, and are verified block by block."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from data_shards import signed_json
from data_shards.errors import BadInput, CorruptFile
from data_shards.hashed_file import BLOCK_BYTES, FileEntry
from data_shards.storage import Storage
from data_shards.verified_reader import VerifiedReader
from tests.support.disk import disk_of
from trainer.tensor_files import TensorFile, TensorSpec, write_tensors


def test_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def chunks():  # type: ignore[no-untyped-def]
        yield b"half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Storage.at(tmp_path).write("file", chunks())
    assert list(tmp_path.iterdir()) == []


def test_blocks_are_verified_where_they_are_touched(tmp_path: Path) -> None:
    storage = Storage.at(tmp_path)
    data = bytes(range(256)) * (BLOCK_BYTES // 256) * 2 + b"tail"
    entry = storage.write("file", [data[:100], data[100:]])
    assert entry.size == len(data) and len(entry.block_hashes) == 3
    damaged = bytearray(data)
    damaged[BLOCK_BYTES + 5] ^= 1
    (tmp_path / "file").write_bytes(damaged)
    reader = VerifiedReader(storage, entry)
    assert reader.read(10, 20) == data[10:20]
    assert reader.read(2 * BLOCK_BYTES, len(data)) == b"tail"
    with pytest.raises(CorruptFile, match="block 1"):
        reader.read(BLOCK_BYTES - 5, BLOCK_BYTES + 1)
    (tmp_path / "file").write_bytes(data[:-1])
    with pytest.raises(CorruptFile, match="its manifest says"):
        VerifiedReader(storage, entry)


@pytest.mark.parametrize("path", ["/etc/passwd", "../other", "a/../../b", "s3://x/y", "", "a\\..\\b"])
def test_manifest_cannot_name_files_outside(path: str) -> None:
    with pytest.raises(CorruptFile, match=r"^here: .* outside its own directory"):
        FileEntry.from_json({"path": path, "size": 1, "block_hashes": []}, "here")


def test_relative_root_and_unknown_scheme_are_refused() -> None:
    with pytest.raises(BadInput, match="relative"):
        Storage.at("runs/here")
    with pytest.raises(BadInput, match="can't be used"):
        Storage.at("ftp9://host/x")


def test_unwritable_storage_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"can't be written.*permissions"):
        Storage.at(tmp_path / "file" / "below").check_writable()


def test_signed_json_refuses_what_was_changed() -> None:
    data = signed_json.encode({"a": [1, 2.5, "ü"]}, "thing", 2)
    assert signed_json.decode(data, "thing", 2, "here") == {"a": [1, 2.5, "ü"]}
    for damaged, reason in (
        (data[:-10], "not a complete"),
        (data.replace(b"2.5", b"2.6"), "cut off or edited"),
        (signed_json.encode({}, "other", 1), "is not a thing"),
        (signed_json.encode({}, "thing", 3), "newer Baton"),
        (b"", "not a complete"),
        (b"[]", "not a complete"),
        (b'{"sha256": "", "version": 2, "a": NaN}', "not a complete"),
        (b'{"sha256": "", "version": 1e400}', "not a complete"),
        (b'{"sha256": "", "version": 2, "a": "\\ud800"}', "not a complete"),
        (b'{"sha256": "", "version": 2, "a": ' + 100_000 * b"[" + 100_000 * b"]" + b"}", "not a complete"),
    ):
        with pytest.raises(CorruptFile, match=reason):
            signed_json.decode(damaged, "thing", 2, "here")


def test_tensor_file_is_safetensors_and_reads_ranges(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5, dtype=torch.bfloat16), "c": torch.empty(0)}
    specs = {name: TensorSpec(tuple(value.shape), value.dtype) for name, value in tensors.items()}
    storage = Storage.at(tmp_path)
    entry = write_tensors(storage, "x.safetensors", specs, tensors.__getitem__, {"format": "pt"})
    loaded = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())
    file = TensorFile(storage, entry)
    assert file.read("a", 3, 7).tolist() == [3, 4, 5, 6]
    assert file.read("b", 4, 5).dtype == torch.bfloat16 and file.read("c", 0, 0).numel() == 0
    for name, start, stop in (("a", 10, 13), ("z", 0, 1)):
        with pytest.raises(CorruptFile):
            file.read(name, start, stop)


def test_leftovers_of_killed_writers_are_removed(tmp_path: Path) -> None:
    storage = Storage.at(tmp_path)
    storage.write("folder/kept", [b"x"])
    hex32 = "0123456789abcdef" * 2
    leftovers = [f".probe-{hex32}", f".shard.arrow.{hex32}.tmp"]
    for name in (*leftovers, ".hidden", f".other.{hex32[:-1]}.tmp"):
        (tmp_path / "folder" / name).write_bytes(b"half")
    assert storage.remove_leftovers("folder") == tuple(leftovers)
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {"kept", ".hidden", f".other.{hex32[:-1]}.tmp"}
    assert storage.remove_leftovers("folder") == () == storage.remove_leftovers("nowhere")


def test_a_killed_writer_leaves_what_is_recognised(tmp_path: Path) -> None:
    """By the name that writing really gives: the pattern and the writer must not drift apart."""
    seen: list[str] = []

    def chunks():  # type: ignore[no-untyped-def]
        yield b"half"
        seen.extend(path.name for path in tmp_path.iterdir())
        raise KeyboardInterrupt

    storage = Storage.at(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        storage.write("file", chunks())
    (name,) = seen
    (tmp_path / name).write_bytes(b"half")
    assert storage.remove_leftovers() == (name,)


def test_options_of_a_store_stay_at_the_end_of_its_names() -> None:
    storage = Storage.at("s3://bucket/runs?region=us-east-1&endpoint_override=127.0.0.1:1")
    below = storage.child("a").child("b")
    assert below.uri == "s3://bucket/runs/a/b?region=us-east-1&endpoint_override=127.0.0.1:1"
    assert Storage.at(below.uri) == below
    assert Storage.at("/data/what?").child("x").uri == "/data/what?/x"
    assert Storage.holding(below.uri) == (storage.child("a"), "b")
    assert Storage.holding("/data/what?/x") == (Storage.at("/data/what?"), "x")


def test_sizes_come_with_one_listing(tmp_path: Path) -> None:
    storage = Storage.at(tmp_path)
    storage.write("a", [b"123"])
    storage.write("folder/b", [b"1"])
    assert storage.sizes() == {"a": 3} and storage.sizes("folder") == {"b": 1} and storage.sizes("none") == {}


def test_a_full_disk_is_no_wrong_input_and_is_named(tmp_path: Path) -> None:
    with disk_of(tmp_path / "disk", 64 * 1024) as root:
        with (root / "others").open("wb") as file, suppress(OSError):
            while True:
                os.write(file.fileno(), bytes(4096))
        for refused in (Storage.at(root).check_writable, lambda: Storage.at(root).write("mine", [bytes(9)])):
            with pytest.raises(OSError, match=r"No space left on device: '.*/disk/") as told:
                refused()
            assert told.value.errno == errno.ENOSPC
        assert Storage.at(root).list() == ["others"]
