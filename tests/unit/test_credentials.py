"""Secrets in URIs are refused before anything could print or record them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from data_shards.credentials import secret_in
from data_shards.errors import BadInput
from data_shards.storage import Storage
from launch import finetune
from launch.config import load_config
from tests.support.command import run_here

SECRET = "wJalrXUtnFEMI-K7MDENG"


@pytest.mark.parametrize(
    ("uri", "part"),
    [
        (f"s3://AKIA123:{SECRET}@bucket/runs", "a password before the @"),
        (f"https://user:{SECRET}@host/x.jsonl", "a password before the @"),
        (f"s3://AKIA123:{SECRET}@bucket", "a password before the @"),
        ("s3://AKIA123:wJal/rXUtn+FEMI@bucket/runs", "a password before the @"),
        (f"abfss://account:{SECRET}@host/x", "a password before the @"),
        (f"s3://bucket/x?secret_key={SECRET}", "the option secret_key"),
        (f"https://host/x.jsonl?X-Amz-Signature={SECRET}&X-Amz-Date=1", "the option X-Amz-Signature"),
        (f"https://host/x?sv=1&sig={SECRET}", "the option sig"),
        ("s3://bucket/runs?endpoint_override=127.0.0.1:9000&scheme=http&region=us-east-1", None),
        ("gs://anonymous@bucket/x", None),
        ("abfss://container@account.dfs.core.windows.net/x", None),
        ("s3://bucket/a@b:c/x", None),
        ("http://127.0.0.1:8265/a@b", None),
        ("hf://owner/name@main", None),
        ("/shared/user:word@x/runs", None),
        ("s3://bucket/x?access_key=", None),
    ],
)
def test_what_is_a_secret(uri: str, part: str | None) -> None:
    assert secret_in(uri) == part


@pytest.mark.parametrize(
    ("override", "key"),
    [
        (f"run.storage=s3://AKIA123:{SECRET}@bucket/runs", "run.storage"),
        (f"data.train=s3://AKIA123:{SECRET}@bucket/x.jsonl", "data.train"),
        (f"data.train=[a.jsonl, {{path: 's3://b/x?secret_key={SECRET}'}}]", r"data.train\[1\].path"),
        (f"init_from=s3://AKIA123:{SECRET}@bucket/runs/other", "init_from"),
        (f"unknown.key=s3://AKIA123:{SECRET}@bucket", "unknown.key"),
    ],
)
def test_a_configuration_with_one_is_refused_without_it(tmp_path: Path, override: str, key: str) -> None:
    config = tmp_path / "my.yaml"
    config.write_text(yaml.safe_dump({"model": {"base": "x"}, "data": {"train": "x.jsonl"}, "training": {"steps": 1}}))
    with pytest.raises(BadInput, match=rf"^{key}: the URI \(s3://…\) holds .*AWS_SECRET_ACCESS_KEY"):
        load_config(str(config), [override])
    done = run_here(finetune.main, "--config", str(config), override)
    assert done.code == 2 and SECRET not in done.output


def test_a_storage_with_one_is_refused() -> None:
    with pytest.raises(BadInput, match="storage: the URI") as refused:
        Storage.at(f"s3://AKIA123:{SECRET}@bucket/runs")
    assert SECRET not in str(refused.value)
