"""Sources in an object store: found, read, entered in the middle and told apart as local ones are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow.fs as pafs
import pytest

from data_shards.errors import DataError
from data_shards.sources.batches import batches
from data_shards.sources.config import SourceConfig
from data_shards.sources.find import content_identity, resolve
from data_shards.sources.records import read_records
from tests.support.data_files import write_rows
from tests.support.object_store import CREDENTIALS, S3Server, create_bucket, s3_uri

KINDS = ("jsonl", "jsonl.gz", "json", "json.zst", "csv", "parquet", "arrow", "parquet.gz")


def rows_of(count: int) -> list[dict[str, Any]]:
    return [{"text": f"{number} " + "é" * 1000} for number in range(count)]


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with S3Server(tmp_path_factory.mktemp("s3") / "log") as server, pytest.MonkeyPatch.context() as environment:
        for name, value in CREDENTIALS.items():
            environment.setenv(name, value)
        create_bucket(server.port, "bucket")
        yield server.port


def upload(port: int, local: str | Path, path: str) -> str:
    uri = s3_uri("bucket", quote(path), port)
    filesystem, there = pafs.FileSystem.from_uri(uri)
    with filesystem.open_output_stream(there, compression=None) as stream:
        stream.write(Path(local).read_bytes())
    return uri


@pytest.mark.parametrize("kind", KINDS)
def test_file_is_read_as_a_local_one(kind: str, port: int, tmp_path: Path) -> None:
    local = write_rows(tmp_path / f"data.{kind}", rows_of(1500))
    uri = upload(port, local, f"kinds/data.{kind}")
    assert [(r.line, r.digest()) for r in read_records(uri)] == [(r.line, r.digest()) for r in read_records(local)]
    (file,) = resolve(SourceConfig(path=uri))
    found = list(batches(file))
    assert len(found) > 2 and list(batches(file, found[1].end)) == found[2:]


def test_folders_globs_and_what_is_not_there(port: int, tmp_path: Path) -> None:
    local = write_rows(tmp_path / "x.jsonl", rows_of(2))
    for name in ("a b/10.jsonl", "a b/2.jsonl", "a b/c/3.jsonl.gz", "other/1.jsonl"):
        upload(port, local if name.endswith("l") else write_rows(tmp_path / "x.jsonl.gz", rows_of(2)), f"tree/{name}")

    def found(path: str) -> list[str]:
        return [file.uri for file in resolve(SourceConfig(path=s3_uri("bucket", path, port)))]

    def uris(*names: str) -> list[str]:
        return [s3_uri("bucket", f"tree/{name}", port) for name in names]

    folder = uris("a%20b/10.jsonl", "a%20b/2.jsonl", "a%20b/c/3.jsonl.gz")
    assert found("tree/a%20b") == folder and found("tree/*/*.jsonl") == [*folder[:2], *uris("other/1.jsonl")]
    assert found("tree/a%20b/**/*.gz") == folder[2:]
    source = SourceConfig(path=s3_uri("bucket", "tree/a%20b", port), limit=5)
    assert source.name == "a%20b" and len(list(read_records(source))) == 5
    for path, message in (("tree/nothing", "no such file"), ("tree/a%20b/*.csv", "no file matches")):
        with pytest.raises(DataError, match=message):
            found(path)
    with pytest.raises(DataError, match=r"no such file|can't be looked up"):
        resolve(SourceConfig(path=s3_uri("elsewhere", "x.jsonl", port)))


def test_identity_survives_a_copy_and_sees_a_change(port: int, tmp_path: Path) -> None:
    def identity(uri: str) -> str:
        (file,) = resolve(SourceConfig(path=uri))
        return content_identity(file)

    local = write_rows(tmp_path / "x.jsonl", rows_of(3))
    first = identity(upload(port, local, "one.jsonl"))
    assert identity(upload(port, local, "one.jsonl")) == first == identity(upload(port, local, "two.jsonl"))
    changed = Path(local)
    changed.write_bytes(changed.read_bytes().replace(b"0 ", b"9 "))
    assert identity(upload(port, changed, "one.jsonl")) != first
