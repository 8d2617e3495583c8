"""Which bytes of a base a rank reads, who must read it, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.tiny import save_tiny_model, tiny_config
from trainer import base_weights
from trainer.base_loader import reason_in_config, reason_in_tensors, shapes_of, skeleton
from trainer.base_weights import (
    StoredTensor,
    check_complete,
    model_files,
    pieces_of_rank,
    read_pieces,
    stored_tensors,
)
from trainer.config import ModelConfig
from trainer.errors import ModelError
from trainer.model import build_model, model_config
from trainer.slices import slice_bounds

Tensors = dict[str, torch.Tensor]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("piece_bytes", [8, 40, 1 << 20])
def test_slices_are_those_of_the_whole_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: int, piece_bytes: int
) -> None:
    monkeypatch.setattr(base_weights, "PIECE_BYTES", piece_bytes)
    torch.manual_seed(0)
    tensors = {"a": torch.randn(5, 7), "b": torch.randn(3).bfloat16(), "c": torch.randn(2, 2, 4).half()}
    save_file(tensors, tmp_path / "model.safetensors")
    stored = stored_tensors(tmp_path)
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    for rank in range(world_size):
        pieces = pieces_of_rank(shapes, stored, rank, world_size)
        assert all(0 < piece.nbytes <= piece_bytes for piece in pieces)
        slices = {name: torch.full((-(-math.prod(s) // world_size),), 9.0) for name, s in shapes.items()}
        read_pieces(pieces, slices)
        for name, value in tensors.items():
            start, stop = slice_bounds(value.numel(), rank, world_size)
            assert torch.equal(slices[name][: stop - start], value.flatten()[start:stop].float())
            assert torch.all(slices[name][stop - start :] == 9.0), "padding is nobody's"


def test_a_file_that_shrinks_meanwhile_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.randn(64)}, tmp_path / "model.safetensors")
    pieces = pieces_of_rank({"a": (64,)}, stored_tensors(tmp_path), 0, 1)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(200)
    with pytest.raises(ModelError, match=r"model\.safetensors: ended at byte 200, while a was being read"):
        read_pieces(pieces, {"a": torch.zeros(64)})


def cut(base: Path) -> None:
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def nonsense(base: Path) -> None:
    (base / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\n")


def no_header(base: Path) -> None:
    (base / "model.safetensors").write_bytes((16).to_bytes(8, "little") + b'{"a": {"dtype": ')


def wrong_size(base: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    (base / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))


def other_name(base: Path) -> None:
    (base / "model.safetensors").rename(base / "weights.safetensors")


def absent_part(base: Path) -> None:
    other_name(base)
    index = {"weight_map": {"a": "weights.safetensors", "b": "more.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


def bad_index(base: Path) -> None:
    other_name(base)
    (base / "model.safetensors.index.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (cut, r"model\.safetensors has \d+ bytes, and a should end at \d+: it is cut off"),
        (nonsense, "is not a safetensors file"),
        (no_header, "its safetensors header can't be read"),
        (wrong_size, r"a of shape \(3,\) in F32 can't have 8 bytes"),
        (other_name, r"neither model\.safetensors nor model\.safetensors\.index\.json"),
        (absent_part, r"names \['more\.safetensors'\], which are not there"),
        (bad_index, "is not an index"),
    ],
)
def test_damaged_bases_are_refused(tmp_path: Path, damage: Callable[[Path], None], problem: str) -> None:
    save_file({"a": torch.randn(6)}, tmp_path / "model.safetensors")
    assert list(stored_tensors(tmp_path)) == ["a"]
    damage(tmp_path)
    with pytest.raises(ModelError, match=problem):
        stored_tensors(tmp_path)


def test_one_file_goes_before_an_index(tmp_path: Path) -> None:
    """As transformers has it."""
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "other.safetensors"}}')
    assert model_files(tmp_path) == [tmp_path / "model.safetensors"]


def stored_as(shapes: dict[str, tuple[int, ...]]) -> dict[str, StoredTensor]:
    return {name: StoredTensor(Path("f"), 0, torch.float32, shape) for name, shape in shapes.items()}


def test_missing_and_misshapen_parameters_are_named() -> None:
    wanted = {"a": (2, 3), "b": (4,)}
    check_complete(wanted, stored_as(wanted))
    with pytest.raises(ModelError, match=r"lack 1 parameters of the model, first \['b'\]"):
        check_complete(wanted, stored_as({"a": (2, 3)}))
    with pytest.raises(ModelError, match=r"f: a has shape \(3, 2\), and the model of config.json wants \(2, 3\)"):
        check_complete(wanted, stored_as(wanted | {"a": (3, 2)}))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base"), "qwen2", tied=True)


def test_who_reads_the_base_and_why(base: Path) -> None:
    model = skeleton(model_config(base, ModelConfig(base=str(base))))
    plain = stored_as(shapes_of(model))
    assert "lm_head.weight" not in plain and reason_in_tensors(model, plain) is None
    assert "lm_head.weight, which is tied" in str(reason_in_tensors(model, plain | stored_as({"lm_head.weight": (1,)})))
    assert reason_in_tensors(model, plain | stored_as({"extra": (1,)})) is None, "left out, as transformers does"
    fewer = {name: tensor for name, tensor in plain.items() if name != "model.norm.weight"}
    assert reason_in_tensors(model, fewer) is None, "missing is an error, not another loader's business"
    renamed = fewer | stored_as({"norm.weight": (32,)})
    assert "(norm.weight, and no model.norm.weight)" in str(reason_in_tensors(model, renamed))
    odd = plain | {"model.norm.weight": plain["model.norm.weight"]._replace(dtype=None)}
    assert "model.norm.weight is not stored as plain" in str(reason_in_tensors(model, odd))
    model.register_buffer("counts", torch.zeros(1))
    assert "buffers too, such as counts" in str(reason_in_tensors(model, plain))


def test_fused_experts_are_left_to_transformers() -> None:
    from transformers import MixtralConfig

    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = skeleton(MixtralConfig(vocab_size=97, num_key_value_heads=2, num_local_experts=2, **sizes))
    reason = reason_in_tensors(model, stored_as(shapes_of(model)))
    assert reason == "files of MixtralForCausalLM name or cut tensors otherwise than the model does"


def test_what_config_json_asks_for_is_left_to_transformers(tmp_path: Path) -> None:
    def reason(*, trusted: bool = False, **fields: Any) -> str | None:
        config = tiny_config()
        for name, value in fields.items():
            setattr(config, name, value)
        return reason_in_config(tmp_path, config, trusted)

    assert reason() is None and reason(auto_map={"AutoModelForCausalLM": "m.M"}) is None
    assert reason(trusted=True, auto_map={"AutoModelForCausalLM": "m.M"}) == "its code comes with it"
    assert reason(quantization_config={"quant_method": "fp8"}) == "its weights are quantised"
    assert reason(transformers_weights="w.safetensors") == "its config.json sets transformers_weights"
    (tmp_path / "adapter_config.json").write_text("{}")
    assert reason() == "an adapter lies beside its weights"


def test_transformers_own_loader_may_not_invent_parameters_either(base: Path, tmp_path: Path) -> None:
    """It would draw them at random and warn."""
    tensors = load_file(base / "model.safetensors")
    build_model(base, ModelConfig(base=str(base)), None, seed=0)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    with pytest.raises(ModelError, match=r"first \['model\.layers\.1\.mlp\.up_proj\.weight'\]; they would be random"):
        build_model(tmp_path, ModelConfig(base=str(tmp_path)), None, seed=0)
