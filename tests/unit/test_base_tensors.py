"""A base's tensors by ranges equal what safetensors gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trainer.base_tensors import BaseTensors
from trainer.base_weights import model_files
from trainer.errors import ModelError

TENSORS = {
    "a": torch.arange(30, dtype=torch.bfloat16).reshape(5, 6),
    "b": torch.randn(7, dtype=torch.float16),
    "c": torch.randn(2, 3, 4),
    "d": torch.randn(3, 3).to(torch.float8_e4m3fn),
    "empty": torch.empty(0, 4),
}


def test_ranges_are_the_files_elements(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "one.safetensors", {"format": "pt"})
    save_file({"other": torch.ones(2)}, tmp_path / "two.safetensors")
    weight_map = dict.fromkeys(TENSORS, "one.safetensors") | {"other": "two.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    base = BaseTensors(tmp_path)
    assert set(base.names()) == {*TENSORS, "other"}
    for name, tensor in TENSORS.items():
        assert base.shape(name) == tensor.shape
        for start, stop in ((0, tensor.numel()), (tensor.numel() // 3, tensor.numel() // 2)):
            part = base.read(name, start, stop)
            assert part.dtype == tensor.dtype
            assert torch.equal(part.float(), tensor.flatten()[start:stop].float())


def test_only_what_transformers_loads_is_read(tmp_path: Path) -> None:
    for name in ("consolidated", "model-00001-of-00002", "model-00002-of-00002"):
        save_file({"w": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ModelError, match="nothing says which files to load"):
        model_files(tmp_path)
    parts = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    (tmp_path / "model.safetensors.index.json").write_text(
        f'{{"weight_map": {{"a": "{parts[0]}", "b": "{parts[1]}"}}}}'
    )
    assert [path.name for path in model_files(tmp_path)] == parts
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert [path.name for path in model_files(tmp_path)] == ["model.safetensors"]


def test_cut_off_and_foreign_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"model\.safetensors has 471 bytes, and w should end at 472: it is cut off"):
        BaseTensors(tmp_path)
    for data in (b"", b"hello, this is no safetensors file", (2).to_bytes(8, "little") + b"[]"):
        path.write_bytes(data)
        with pytest.raises(ModelError, match=r"model\.safetensors.*safetensors (file|header)"):
            BaseTensors(tmp_path)
