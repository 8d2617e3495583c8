"""The plan of a worker's memory against what the allocator saw."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.gpu_step import build_engine, make_packs, run_steps
from tests.support.gpu import needs_gpu
from tests.support.tiny import tiny_config
from trainer.activation_memory import Device
from trainer.config import LoraConfig, Method, ModelConfig, Precision, TrainerConfig, TrainingConfig
from trainer.memory_plan import GIB, Workload, memory_plan
from trainer.model_shape import model_shape

pytestmark = needs_gpu

SEQ_LEN = 2048
SIZES = {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8,
         "num_attention_heads": 16, "num_key_value_heads": 8, "max_position_embeddings": SEQ_LEN}  # fmt: skip


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("method", list(Method))
def test_the_peak_stays_below_the_plan_and_not_far_below(tmp_path: Path, method: Method, recompute: bool) -> None:
    hf_config = tiny_config(**SIZES)
    hf_config.save_pretrained(tmp_path)
    config = TrainerConfig(
        model=ModelConfig(
            base=str(tmp_path), random_init=True, precision=Precision.BF16, activation_checkpointing=recompute
        ),
        training=TrainingConfig(method=method, global_batch=4, micro_batch=2, steps=3),
    )
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    engine = build_engine(config)
    results = run_steps(engine, config, make_packs(4, SEQ_LEN, 4, SIZES["vocab_size"]))
    assert np.isfinite([result.loss for _, result in results]).all()
    measured = torch.cuda.max_memory_allocated() - before
    shape = model_shape(hf_config, Precision.BF16, method, LoraConfig())
    workload = Workload.of(config, shape, world_size=1, seq_len=SEQ_LEN, evaluates=False, device=Device.GPU)
    plan = memory_plan(workload)
    allocated = plan.required_bytes - plan.runtime  # the context is none of the allocator's
    print(f"{method.value}: measured {measured / GIB:.2f} GiB, planned {allocated / GIB:.2f} GiB")
    assert 0.5 * allocated <= measured <= allocated
