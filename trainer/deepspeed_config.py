"""From our configuration to DeepSpeed's dictionary (pure)."""

from __future__ import annotations

from typing import Any

from trainer.config import Precision, ZeroConfig


def deepspeed_config(precision: Precision, max_grad_norm: float, zero: ZeroConfig) -> dict[str, Any]:
    """ZeRO-3, gradients reduced and accumulated in fp32.

    Accumulation is ours: DeepSpeed sees steps of one micro batch and is told where each real boundary is, because the
    number of micro batches varies (a short last step) and its 1/accumulation scaling must not touch an exact loss.
    """
    zero_optimization: dict[str, Any] = {
        "stage": 3,
        "overlap_comm": zero.overlap_comm,
        "reduce_bucket_size": zero.reduce_bucket_size,
        "stage3_prefetch_bucket_size": zero.prefetch_bucket_size,
        "stage3_param_persistence_threshold": zero.param_persistence_threshold,
        "stage3_max_live_parameters": zero.max_live_parameters,
        "sub_group_size": zero.sub_group_size,
    }
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": zero_optimization,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": precision == Precision.BF16},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
