"""What a plan says about memory and disk equals what two real ZeRO-3 workers hold and write."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from data_shards.pack import Pack
from data_shards.storage import Storage
from tests.support.distributed import run_workers
from tests.support.tiny import DRAFT, VOCAB, save_now, save_tiny_model
from trainer import activation_memory as activations
from trainer.activation_memory import Device, MicroBatchSize
from trainer.batch import collate
from trainer.config import (
    STATE_KEYS,
    Attention,
    LoraConfig,
    Method,
    ModelConfig,
    OptimizerConfig,
    Precision,
    ZeroConfig,
)
from trainer.deepspeed_config import deepspeed_config
from trainer.disk_plan import rank_file_bytes, staging_bytes
from trainer.engine import ZeroEngine, build_optimizer
from trainer.gathered_parameters import MAX_REUSE_DISTANCE, gathered
from trainer.memory_plan import Moment, RankState, Workload, largest_sub_group, memory_plan, rank_state
from trainer.model import build_trained_model, model_config
from trainer.model_shape import ModelShape, model_shape
from trainer.saving import Saver

WORLD_SIZE = 2
LORA = LoraConfig(rank=3, target_modules="all-linear")
OPTIMIZER = OptimizerConfig(lr=1e-3)
ODD = {"hidden_size": 33, "intermediate_size": 55, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8}
"""Sizes that two workers can't share evenly, so that padding counts"""
ZERO = ZeroConfig(param_persistence_threshold=100, sub_group_size=4000)
TIGHT = ZeroConfig(param_persistence_threshold=100, prefetch_bucket_size=500, max_live_parameters=6000)
REUSE_DISTANCE = 2000
"""DeepSpeed's own, 1e9 elements, would keep a whole tiny model gathered"""
LENGTHS = (90, 38)
SCALARS = 1024
"""Bytes of norms, counters and factors, which no plan counts"""


class Case(NamedTuple):
    method: Method
    precision: Precision
    attention: Attention = Attention.PACKED
    checkpointing: bool = False
    dropout: float = 0.0

    @property
    def lora(self) -> LoraConfig:
        return LORA.model_copy(update={"dropout": self.dropout})


CASES = [Case(method, precision) for method in Method for precision in Precision]
CASES += [case._replace(checkpointing=True) for case in CASES]
CASES += [
    Case(Method.FULL, Precision.BF16, Attention.SDPA),
    Case(Method.FULL, Precision.BF16, Attention.EAGER),
    Case(Method.LORA, Precision.BF16, dropout=0.1),
]


class Measured(NamedTuple):
    state: RankState
    persistent: int
    saved: int
    sub_groups: list[int]
    """elements of each, as DeepSpeed cut them"""
    rank_file: int
    staging: int
    """host memory for saves"""


class Storages:
    """Bytes of the distinct storages behind tensors."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}
        self._alive: list[torch.Tensor] = []

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self.sizes[storage.data_ptr()] = storage.nbytes()
        self._alive.append(tensor)  # else a freed address could come again

    def bytes_beside(self, *others: Storages) -> int:
        known = set().union(*(other.sizes for other in others))
        return sum(size for address, size in self.sizes.items() if address not in known)


def storages(tensors: Any) -> Storages:
    found = Storages()
    for tensor in tensors:
        if tensor.numel():
            found.add(tensor)
    return found


def held_state(engine: ZeroEngine) -> RankState:
    """As the tensors lie in memory after a step."""
    zero = engine._zero
    weights = storages(p.ds_tensor for p in engine.module.parameters())
    flats = zero.fp32_partitioned_groups_flat
    masters = storages(flats)
    states = storages(v for flat in flats for v in zero.optimizer.state[flat].values() if v.numel() == flat.numel())
    gradients = storages([zero.grad_partitions_flat_buffer])
    return RankState(
        weights.bytes_beside(), masters.bytes_beside(weights), gradients.bytes_beside(), states.bytes_beside()
    )


def micro_batch() -> Any:
    tokens = sum(LENGTHS)
    return collate([Pack(np.arange(tokens, dtype=np.int32) % VOCAB, np.ones(tokens, bool), np.array(LENGTHS))])


def step_watching_saved(engine: ZeroEngine) -> int:
    """One step; bytes of distinct tensors that forward saved, parameters aside."""
    seen = Storages()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            seen.add(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        engine.train_micro_batch(micro_batch(), 100, is_last=True)
    engine.apply_step(1e-3)
    return seen.bytes_beside()


def step_watching_gathered(engine: ZeroEngine) -> int:
    """One step; elements of parameters that were whole at once, small persistent ones aside."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    coordinator = engine._zero._get_param_coordinator()
    original, largest = coordinator.release_sub_module, 0

    def watch(*args: Any, **kwargs: Any) -> None:
        nonlocal largest
        parameters = [p for p in engine.module.parameters() if not p.ds_persist]
        whole = sum(p.ds_numel for p in parameters if p.ds_status != ZeroParamStatus.NOT_AVAILABLE)
        largest = max(largest, whole)
        original(*args, **kwargs)

    coordinator.release_sub_module = watch
    engine.train_micro_batch(micro_batch(), 100, is_last=True)
    engine.apply_step(1e-3)
    coordinator.release_sub_module = original
    return largest


def make_engine(base: str, case: Case, zero: ZeroConfig, **knobs: int) -> ZeroEngine:
    config = deepspeed_config(case.precision, OPTIMIZER.max_grad_norm, zero)
    config["zero_optimization"] |= knobs
    model = build_trained_model(Path(base), model_of(base, case), case.method, case.lora, config, seed=0)
    return ZeroEngine(model, build_optimizer(model, OPTIMIZER), config)


def measure(base: str, case: Case, folder: str) -> Measured:
    engine = make_engine(base, case, ZERO)
    saved = step_watching_saved(engine)
    persistent = sum(p.numel() * p.element_size() for p in engine.module.parameters() if p.ds_persist)
    sub_groups = [sum(p.partition_numel() for p in group) for group in engine._zero.fp16_groups]
    ref = save_now(engine, Storage.at(folder), DRAFT)
    saver = Saver(engine, Storage.at(folder), commit_timeout_s=60)
    saver.staging.reserve(engine.num_local_elements * (1 + len(STATE_KEYS[OPTIMIZER.name])))
    file = ref.manifest.files[engine.rank].size
    return Measured(held_state(engine), persistent, saved, sub_groups, file, saver.staging.nbytes)


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations allocate inside, at their worst moment; what was there before is free."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._live: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage._cdata for storage in _storages_in((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for storage in _storages_in(result):
            if storage._cdata not in self._live and storage._cdata not in given:
                self._live[storage._cdata] = storage.nbytes()
                self._now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata)
        self.peak = max(self.peak, self._now)
        return result

    def _freed(self, key: int) -> None:
        self._now -= self._live.pop(key)


def _storages_in(values: Any) -> list[torch.UntypedStorage]:
    return [value.untyped_storage() for value in tree_flatten(values)[0] if isinstance(value, torch.Tensor)]


class Temporary(NamedTuple):
    gathered_elements: int
    backward: int
    """bytes allocated at once in forward and backward"""
    update: int


def temporaries(base: str, cases: list[Case]) -> tuple[list[Temporary], int]:
    """(what comes and goes, by case; DeepSpeed's own reuse distance)."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    found = []
    for case in cases:
        engine = make_engine(base, case, TIGHT, stage3_max_reuse_distance=REUSE_DISTANCE)
        for _ in range(2):  # DeepSpeed prefetches from the third pass on
            engine.train_micro_batch(micro_batch(), 100, is_last=True)
        elements = step_watching_gathered(engine)
        with LiveBytes() as backward:
            engine.train_micro_batch(micro_batch(), 100, is_last=True)
        with LiveBytes() as update:
            engine.apply_step(1e-3)
        found.append(Temporary(elements, backward.peak, update.peak))
    return found, DeepSpeedZeroConfig().max_reuse_distance


def measure_all(base: str, cases: list[Case], folder: str) -> list[Measured]:
    return [measure(base, case, f"{folder}/{index}") for index, case in enumerate(cases)]


def model_of(base: str, case: Case) -> ModelConfig:
    return ModelConfig(
        base=base,
        precision=case.precision,
        attention=case.attention,
        activation_checkpointing=case.checkpointing,
    )


def shape_of(base: str, case: Case) -> ModelShape:
    return model_shape(model_config(Path(base), model_of(base, case)), case.precision, case.method, case.lora)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("base"), **ODD))


@pytest.fixture(scope="module")
def measured(base: str, tmp_path_factory: pytest.TempPathFactory) -> dict[Case, list[Measured]]:
    """By case, of both ranks."""
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    by_rank = run_workers(measure_all, WORLD_SIZE, base, CASES, folder)
    return {case: [results[index] for results in by_rank] for index, case in enumerate(CASES)}


def name_of(case: Case) -> str:
    return "-".join(str(value) for value in case)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_what_a_rank_holds_is_exact_to_the_byte(base: str, measured: dict[Case, list[Measured]], case: Case) -> None:
    shape = shape_of(base, case)
    planned = rank_state(shape.parameters, WORLD_SIZE, OPTIMIZER.name)
    for rank, seen in enumerate(measured[case]):
        print(f"{name_of(case)} rank {rank}: planned {planned}, measured {seen.state}")
        assert seen.state == planned
        assert max(seen.sub_groups) == largest_sub_group(shape.trained, WORLD_SIZE, ZERO.sub_group_size)
        assert seen.persistent == gathered(shape, ZERO, WORLD_SIZE, recompute=False).persistent_bytes
    unpadded = sum(p.numel for p in shape.trained) * 4
    assert planned.gradients * WORLD_SIZE > unpadded, "padding must be at work"


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_activations_are_what_forward_saves(base: str, measured: dict[Case, list[Measured]], case: Case) -> None:
    shape = shape_of(base, case)
    size = MicroBatchSize(sum(LENGTHS), sum(LENGTHS) - len(LENGTHS))
    planned = activations.saved_bytes(shape, case.attention, Device.CPU, size, checkpointing=case.checkpointing)
    for seen in measured[case]:
        print(f"{name_of(case)}: planned {planned:,}, measured {seen.saved:,} ({planned / seen.saved - 1:+.2%})")
        assert planned == pytest.approx(seen.saved, rel=0.15)


def test_checkpointing_keeps_much_less(measured: dict[Case, list[Measured]]) -> None:
    """The measurement itself sees the difference."""
    for case in CASES:
        if case.checkpointing:
            assert measured[case][0].saved < 0.5 * measured[case._replace(checkpointing=False)][0].saved


def test_what_comes_and_goes(tmp_path: Path) -> None:
    """A deeper model under knobs so tight that not all of it is ever whole."""
    base = str(save_tiny_model(tmp_path, num_hidden_layers=4, **ODD))
    cases = [Case(Method.FULL, Precision.BF16), Case(Method.LORA, Precision.BF16, checkpointing=True)]
    for found, own_distance in run_workers(temporaries, WORLD_SIZE, base, cases):
        assert own_distance == MAX_REUSE_DISTANCE
        for case, seen in zip(cases, found, strict=True):
            shape = shape_of(base, case)
            recompute = case.checkpointing
            whole = gathered(shape, TIGHT, WORLD_SIZE, recompute=recompute, max_reuse_distance=REUSE_DISTANCE)
            plan = memory_plan(workload_of(shape, case)).moments
            backward = plan[Moment.BACKWARD] | {"gathered parameters": whole.peak_bytes}
            planned = Temporary(whole.peak_elements, sum(backward.values()), sum(plan[Moment.UPDATE].values()))
            everything = sum(p.numel for p in shape.parameters)
            print(f"{name_of(case)}: planned {planned}, measured {seen}; {everything:,} parameters")
            assert seen.gathered_elements < 0.6 * everything
            assert planned.gathered_elements == pytest.approx(seen.gathered_elements, rel=0.05)
            assert seen.backward <= planned.backward + SCALARS and planned.backward <= 1.6 * seen.backward
            assert seen.update <= planned.update + SCALARS and planned.update <= 1.6 * seen.update


def workload_of(shape: ModelShape, case: Case) -> Workload:
    return Workload(
        shape=shape,
        world_size=WORLD_SIZE,
        seq_len=sum(LENGTHS),
        micro_batch=1,
        eval_micro_batch=None,
        attention=case.attention,
        activation_checkpointing=case.checkpointing,
        optimizer=OPTIMIZER.name,
        zero=TIGHT,
        device=Device.CPU,
    )


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_checkpoint_files_are_exact_to_the_byte(base: str, measured: dict[Case, list[Measured]], case: Case) -> None:
    shape = shape_of(base, case)
    for rank, seen in enumerate(measured[case]):
        assert seen.rank_file == rank_file_bytes(shape.trained, rank, WORLD_SIZE, ("exp_avg", "exp_avg_sq"))
    room = staging_bytes(shape.trained, WORLD_SIZE, ("exp_avg", "exp_avg_sq"))
    assert room == measured[case][0].staging == max(seen.staging for seen in measured[case])
