"""An export that is killed, damaged or changed ends in the bytes of an undisturbed one, and its memory is bounded."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_shards.errors import BadInput
from data_shards.storage import Storage, content_hash
from tests.support.checkpoints import masters_of, random_values, trained_shapes, write_checkpoint
from tests.support.distributed import new_queue, start_process
from tests.support.peak_memory import peak_growth
from tests.support.tiny import save_tiny_model, tiny_config
from trainer import export_plan, export_writer
from trainer.checkpoint import read_manifest
from trainer.config import LoraConfig, ModelConfig
from trainer.export import ExportSource, export_adapter, export_full, export_merged
from trainer.export_plan import MANIFEST, ExportKind, ExportManifest

KILLS = 4
MAX_FILE_BYTES = 60_000
LORA = LoraConfig(rank=4)
KINDS = (ExportKind.MODEL, ExportKind.MERGED)
FAMILY = "mistral"
"""One that the forks have imported."""
SHAPE = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 12, "vocab_size": 1001}


@dataclass(frozen=True)
class Place:
    """A base, checkpoints of it by either method, and exports beside them."""

    folder: Path

    def export(
        self,
        kind: ExportKind,
        name: str,
        dtype: torch.dtype = torch.bfloat16,
        report: Callable[[str], None] = print,
        template: str | None = None,
    ) -> Path:
        base = self.folder / "base"
        checkpoints = Storage.at(self.folder / ("full" if kind == ExportKind.MODEL else "lora"))
        ref = read_manifest(checkpoints, *checkpoints.list())
        source = ExportSource(checkpoints, ref, base, ModelConfig(base=str(base)), template)
        target = Storage.at(self.folder / name)
        match kind:
            case ExportKind.MODEL:
                export_full(source, target, dtype, max_file_bytes=MAX_FILE_BYTES, report=report)
            case ExportKind.MERGED:
                export_merged(source, LORA, target, dtype, max_file_bytes=MAX_FILE_BYTES, report=report)
            case ExportKind.ADAPTER:
                export_adapter(source, LORA, target, report=report)
        return self.folder / name


def make_place(folder: Path, base: Path, world_size: int = 4) -> Place:
    write_checkpoint(Storage.at(folder / "full"), masters_of(trained_shapes(base), world_size), random_values())
    write_checkpoint(Storage.at(folder / "lora"), masters_of(trained_shapes(base, LORA), world_size), random_values())
    return Place(folder)


def digest(folder: Path) -> str:
    """Of names and contents, hidden files too."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return " ".join([content_hash(paths), *(str(path.relative_to(folder)) for path in paths)])


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Of files of weights: inode and time of writing, which differ for a file that is written again."""
    stats = {path.name: path.stat() for path in folder.glob("*.safetensors")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def num_files(folder: Path) -> int:
    return len(list(folder.glob("*.safetensors")))


def recorded(folder: Path) -> set[str]:
    """Files of weights that the manifest says are finished; none where there is no manifest yet."""
    path = folder / MANIFEST
    files = ExportManifest.from_bytes(path.read_bytes(), MANIFEST).files if path.exists() else ()
    return {entry.path for entry in files if entry.path.endswith(".safetensors")}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("exports")
    made = make_place(folder, save_tiny_model(folder / "base", FAMILY, **SHAPE))
    for kind in KINDS:
        made.export(kind, f"undisturbed-{kind}")
        assert len(stamps(folder / f"undisturbed-{kind}")) > 10
    return made


@pytest.fixture
def folder(place: Place) -> Any:
    """Of an export that a test makes."""
    yield place.folder / "export"
    shutil.rmtree(place.folder / "export", ignore_errors=True)


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_random_moments(place: Place, folder: Path, kind: ExportKind) -> None:
    expected = digest(place.folder / f"undisturbed-{kind}")
    total = len(stamps(place.folder / f"undisturbed-{kind}"))
    rng = random.Random()
    fired = partly = 0
    while fired < KILLS:
        until = min(num_files(folder) + rng.randint(1, total // KILLS), total - 1)
        child = start_process(place.export, kind, folder.name)
        while child.exitcode is None and num_files(folder) < until:
            time.sleep(0.0005)
        child.join(rng.uniform(0, 0.02))
        child.kill()
        child.join()
        if child.exitcode == 0:  # it was faster
            assert digest(folder) == expected
            shutil.rmtree(folder)
            continue
        assert child.exitcode == -signal.SIGKILL
        fired += 1
        partly += 0 < len(recorded(folder)) < total
    before, whole, lines = stamps(folder), recorded(folder), []
    place.export(kind, folder.name, report=lines.append)
    print(f"{fired} kills, {partly} of them between files; at the end {len(whole)} of {total} were finished")
    assert partly > 0
    assert digest(folder) == expected
    assert not whole or f": {len(whole)} of {total} files" in lines[-1]
    assert {name: stamps(folder)[name] for name in whole} == {name: before[name] for name in whole}


class Stopped(Exception):
    """What ends an export in this process."""


def stop(*_: Any) -> None:
    raise Stopped


def stop_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let the export end before it writes its file of this number, from 0."""
    count = iter(range(number))
    write_parts = export_writer.write_parts

    def counted(*arguments: Any) -> Any:
        if next(count, None) is None:
            raise Stopped
        return write_parts(*arguments)

    monkeypatch.setattr(export_writer, "write_parts", counted)


def test_another_dtype_does_not_go_on_with_what_is_there(
    place: Place, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.export(ExportKind.MODEL, "other", torch.float16)
    place.export(ExportKind.MODEL, folder.name)
    before, lines = stamps(folder), []
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        stop_at(patched, 3)
        place.export(ExportKind.MODEL, folder.name, torch.float16)
    assert not (folder / "config.json").exists(), "half an export counts as one"
    assert len(stamps(folder)) == 3, "what loads it may take old files for new ones"
    place.export(ExportKind.MODEL, folder.name, torch.float16, lines.append)
    assert digest(folder) == digest(place.folder / "other")
    assert ": 3 of " in lines[-1] and not set(before.values()) & set(stamps(folder).values())


@pytest.mark.parametrize("changed", ["checkpoint", "lora", "base"])
def test_what_weights_depend_on_is_part_of_the_request(
    place: Place, folder: Path, changed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Same names, shapes and dtype, other values."""
    place.export(ExportKind.MERGED, folder.name)
    before, weights = stamps(folder), place.folder / "base" / "model.safetensors"
    if changed == "lora":
        monkeypatch.setitem(globals(), "LORA", LORA.model_copy(update={"alpha": 64}))
    elif changed == "base":
        weights.write_bytes(weights.read_bytes())
    else:  # one of the same name
        (tmp_path / "base").symlink_to(weights.parent)
        adapter = masters_of(trained_shapes(weights.parent, LORA), 4)
        write_checkpoint(Storage.at(tmp_path / "lora"), adapter, random_values(seed=1))
        place = Place(tmp_path)
    place.export(ExportKind.MERGED, str(folder))
    assert not set(before.values()) & set(stamps(folder).values())


def test_a_damaged_file_is_written_again_and_no_other(place: Place, folder: Path) -> None:
    expected, lines = digest(place.folder / "undisturbed-model"), []
    place.export(ExportKind.MODEL, folder.name)
    before = stamps(folder)
    damaged, cut, gone = random.Random().sample(sorted(folder.glob("*.safetensors")), 3)
    data = bytearray(damaged.read_bytes())
    data[-5] ^= 1
    damaged.write_bytes(data)
    cut.write_bytes(cut.read_bytes()[:-1])
    gone.unlink()
    (folder / f".{gone.name}.{'0' * 32}.tmp").write_bytes(b"of a killed writer")
    (folder / "model.safetensors").write_bytes(b"transformers would load this one")
    place.export(ExportKind.MODEL, folder.name, report=lines.append)
    after = stamps(folder)
    assert digest(folder) == expected
    assert {name for name in after if after[name] != before[name]} >= {gone.name}
    assert sum("written again" in line for line in lines) == 3 and any(damaged.name in line for line in lines)
    assert {name for name in after if after[name] != before[name]} <= {damaged.name, cut.name, gone.name}


def test_whole_export_is_left_alone(place: Place, folder: Path) -> None:
    for kind in (ExportKind.ADAPTER, *KINDS):
        place.export(kind, folder.name)
        before, expected = stamps(folder), digest(folder)
        place.export(kind, folder.name)
        assert stamps(folder) == before and digest(folder) == expected
        shutil.rmtree(folder)


def test_kept_manifest_lists_all_files(place: Place) -> None:
    folder = place.folder / "undisturbed-merged"
    manifest = ExportManifest.from_bytes((folder / MANIFEST).read_bytes(), MANIFEST)
    assert {entry.path: entry.size for entry in manifest.files} == {
        path.name: path.stat().st_size for path in folder.iterdir() if path.name != MANIFEST
    }
    assert manifest.request["kind"] == "merged" and manifest.request["dtype"] == "bfloat16"


@pytest.mark.parametrize("kind", [ExportKind.ADAPTER, *KINDS])
def test_what_is_no_longer_part_of_it_is_removed(
    place: Place, folder: Path, kind: ExportKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template that replaced the tokenizer's; what Baton did not write stays."""
    place.export(kind, folder.name)
    expected = digest(folder)
    place.export(kind, folder.name, template="{{ messages }}")
    assert (folder / "chat_template.jinja").read_text() == "{{ messages }}"
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(export_writer, "_finish", stop)
        place.export(kind, folder.name, template="other")
    assert not (folder / kind.mark).exists(), "half of it would be the other's"
    place.export(kind, folder.name, template="{{ messages }}")
    (folder / "README.md").write_text("mine")
    before = stamps(folder)
    place.export(kind, folder.name)
    assert stamps(folder) == before and (folder / "README.md").read_text() == "mine"
    (folder / "README.md").unlink()
    assert digest(folder) == expected


Usage = namedtuple("Usage", "free")


def test_room_is_checked_before_anything_is_touched(
    place: Place, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk: an export of twice the size has no room; one that takes the place of the old one has."""
    place.export(ExportKind.MODEL, folder.name)
    expected = digest(folder)
    held = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    monkeypatch.setattr(export_writer.shutil, "disk_usage", lambda path: Usage(free=100_000))
    with pytest.raises(BadInput, match=r"needs 2,\d{3},\d{3} bytes.* and 1,\d{3},\d{3} .* are free"):
        place.export(ExportKind.MODEL, folder.name, torch.float32)
    assert digest(folder) == expected and 1_000_000 < held < 2_000_000
    place.export(ExportKind.MODEL, folder.name, torch.float16)
    assert digest(folder) != expected


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_ranges_make_no_difference(
    place: Place, folder: Path, monkeypatch: pytest.MonkeyPatch, kind: ExportKind
) -> None:
    """Ranges of some rows give whole tensors; the ranks' bounds lie within rows. (A product of matrices may differ in
    its last bit by the number of its rows.)"""
    expected = tensors(place.export(kind, "whole", torch.float32))
    monkeypatch.setattr(export_plan, "RANGE_ELEMENTS", 700)
    found = tensors(place.export(kind, folder.name, torch.float32))
    assert found.keys() == expected.keys()
    for name, value in found.items():
        if kind == ExportKind.MODEL:
            assert torch.equal(value, expected[name])
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)


LARGE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 60_000}
"""250 MB in fp32, of which the embedding is 123."""


def tell_growth(place: Place, tiny: Place, kind: ExportKind, results: Any) -> None:
    tiny.export(kind, "export")  # what libraries load at first use
    results.put(peak_growth(lambda: place.export(kind, str(kind)))[1])


def test_memory_is_that_of_ranges(place: Place, tmp_path: Path) -> None:
    config = tiny_config(FAMILY, tied=True, **LARGE)
    config.save_pretrained(tmp_path / "base")
    shapes = trained_shapes(tmp_path / "base")
    base = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(base, tmp_path / "base" / "model.safetensors")
    del base
    large = make_place(tmp_path, tmp_path / "base")
    results = new_queue()
    largest = 2 * LARGE["vocab_size"] * LARGE["hidden_size"]
    for kind in KINDS:
        child = start_process(tell_growth, large, place, kind, results)
        grown = results.get(timeout=60)
        child.join()
        print(f"{kind}: {grown / 1e6:.0f} MB, largest tensor {largest / 1e6:.0f} MB")
        assert grown < largest + 256e6, "what is promised"
        assert grown < 100e6, "what ranges take; a whole fp32 embedding alone is 123 MB"
    shutil.rmtree(place.folder / "export")
