"""What released formats wrote is read by this one, and what is newer is refused."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_shards import signed_json
from data_shards.errors import CorruptFile
from data_shards.storage import Storage
from tests.support.checkpoints import committed
from tests.support.golden import LATER_PROGRESS, PARAMETERS, PROGRESS, STATE_KEYS, golden_values, write_golden
from trainer import checkpoint
from trainer.checkpoint_manifest import KIND, MANIFEST, VERSION
from trainer.config import LoraConfig, ModelConfig
from trainer.export import ADAPTER_FILE, ExportSource, export_adapter
from trainer.export_plan import MANIFEST as EXPORT_MANIFEST
from trainer.export_plan import ExportManifest
from trainer.slices import slice_bounds

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("version", range(1, VERSION + 1))
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_released_version_is_read_at_any_size(version: int, world_size: int) -> None:
    checkpoints = Storage.at(GOLDEN / f"version-{version}")
    (ref,) = committed(checkpoints)
    assert ref.manifest.parameters == PARAMETERS
    written = LATER_PROGRESS if version >= 5 else PROGRESS
    assert ref.manifest.progress == replace(written, eval_step=None if version == 1 else written.eval_step)
    with checkpoint.SliceReader(checkpoints.child(ref.name), ref) as reader:
        for parameter in PARAMETERS:
            for part in ("fp32", *STATE_KEYS):
                for rank in range(world_size):
                    start, stop = slice_bounds(parameter.numel, rank, world_size)
                    found = reader.read(parameter.name, part, parameter.numel, start, stop)
                    assert torch.equal(found, golden_values(parameter, part)[start:stop])


@pytest.mark.parametrize("version", range(1, VERSION + 1))
def test_every_released_version_is_exported(tmp_path: Path, version: int) -> None:
    """As an adapter, which may hold tensors of any names."""
    checkpoints, base, target = Storage.at(GOLDEN / f"version-{version}"), tmp_path / "base", tmp_path / "out"
    (ref,) = committed(checkpoints)
    export_adapter(ExportSource(checkpoints, ref, base, ModelConfig(base=str(base))), LoraConfig(), Storage.at(target))
    found = load_file(target / ADAPTER_FILE)
    assert found.keys() == {parameter.name for parameter in PARAMETERS}
    for parameter in PARAMETERS:
        assert torch.equal(found[parameter.name].flatten(), golden_values(parameter, "fp32"))
    request = ExportManifest.from_bytes((target / EXPORT_MANIFEST).read_bytes(), "here").request
    manifest = Path(checkpoints.uri) / ref.name / MANIFEST
    assert request["checkpoint_sha256"] == hashlib.sha256(manifest.read_bytes()).hexdigest()


@pytest.mark.parametrize("version", [3, 4, 5])
def test_what_is_written_today_is_golden(tmp_path: Path, version: int) -> None:
    """Byte for byte: a change of the format needs a new version and a new golden checkpoint."""
    name = write_golden(Storage.at(tmp_path), version)
    golden = GOLDEN / f"version-{version}" / name
    files = sorted(path.relative_to(golden) for path in golden.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*") if path.is_file())
    for file in files:
        assert (golden / file).read_bytes() == (tmp_path / name / file).read_bytes(), file


def test_a_newer_version_is_refused(tmp_path: Path) -> None:
    name = write_golden(Storage.at(tmp_path), VERSION)
    path = tmp_path / name / MANIFEST
    body = signed_json.decode(path.read_bytes(), KIND, VERSION, "here")
    path.write_bytes(signed_json.encode(body, KIND, VERSION + 1))
    with pytest.raises(CorruptFile, match="use a newer Baton"):
        checkpoint.read_manifest(Storage.at(tmp_path), name)
    shutil.rmtree(tmp_path / name)
