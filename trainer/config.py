"""What can be chosen about model, optimizer, training and checkpoints. Validation does no I/O."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from pydantic import Field, PositiveFloat, field_validator, model_validator

from data_shards.config import ConfigModel
from data_shards.order.permutation import Order


class Method(StrEnum):
    FULL = "full"
    LORA = "lora"


class Precision(StrEnum):
    BF16 = "bf16"
    FP32 = "fp32"


class Attention(StrEnum):
    PACKED = "packed"
    SDPA = "sdpa"
    EAGER = "eager"
    FLASH = "flash_attention_2"


class ModelConfig(ConfigModel):
    base: str = Field(description="Local directory or hub id of the base model.")
    revision: str | None = Field(None, description="Hub revision; the commit that it resolves to is recorded.")
    random_init: bool = Field(False, description="Random weights from the base's config.json, seeded by `seed`.")
    precision: Precision = Field(Precision.BF16, description="Compute dtype; master weights are fp32 either way.")
    attention: Attention = Field(
        Attention.PACKED,
        description="packed: each sequence by itself, on GPUs by torch's own FlashAttention. sdpa, eager: dense over "
        "the micro batch. flash_attention_2: the flash-attn package.",
    )
    activation_checkpointing: bool = Field(False, description="Recompute layers in backward to save memory.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model. Off unless asked.")
    config_overrides: dict[str, Any] = Field(
        default_factory=dict,
        description="Fields of the model's config.json to change, such as attention_dropout.",
    )


class LoraConfig(ConfigModel):
    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | tuple[str, ...] = Field(
        "all-linear", description="Module names, or all-linear: every linear layer but the head."
    )


class OptimizerName(StrEnum):
    ADAMW = "adamw"
    SGD = "sgd"


STATE_KEYS = {OptimizerName.ADAMW: ("exp_avg", "exp_avg_sq"), OptimizerName.SGD: ()}
"""Per-element fp32 states of each optimizer (``trainer.engine.build_optimizer``)"""


class Schedule(StrEnum):
    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"


class OptimizerConfig(ConfigModel):
    name: OptimizerName = OptimizerName.ADAMW
    lr: float = Field(2e-5, gt=0, description="Peak learning rate.")
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0, description="On matrices only; norms and biases never decay.")
    lr_ratios: dict[str, PositiveFloat] = Field(
        {},
        description="Multiples of lr for parameters whose names hold a text, the longest one. {lora_B: 16} is "
        "LoRA+ (arXiv 2402.12354).",
    )
    max_grad_norm: float = Field(1.0, ge=0, description="Clip the global gradient norm to this; 0 turns it off.")
    schedule: Schedule = Schedule.COSINE
    warmup_steps: int = Field(0, ge=0)
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="The schedule ends at lr times this.")


class OnNonFinite(StrEnum):
    STOP = "stop"
    SKIP = "skip"
    ROLLBACK = "rollback"


class TrainingConfig(ConfigModel):
    method: Method = Method.FULL
    lora: LoraConfig = LoraConfig()
    global_batch: int = Field(32, ge=1, description="Packs per optimizer step, whatever the number of workers.")
    micro_batch: int = Field(1, ge=1, description="Packs per worker per forward.")
    steps: int | None = Field(None, ge=1, description="Optimizer steps. Give this or epochs.")
    epochs: float | None = Field(None, gt=0, description="Passes over the packs. Give this or steps.")
    log_every: int = Field(1, ge=1, description="Steps between progress lines.")
    deterministic: bool = Field(False, description="Bit-equal runs on GPU, at some cost.")
    on_nonfinite: OnNonFinite = Field(
        OnNonFinite.STOP,
        description="When loss or gradients are inf or NaN: stop; skip the update; or rollback to the last checkpoint, "
        "and stop if the same step is so again.",
    )
    max_skipped_in_a_row: int = Field(10, ge=1, description="Of on_nonfinite=skip; one more stops the run.")

    @model_validator(mode="after")
    def _one_length(self) -> TrainingConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of training.steps and training.epochs")
        return self


class EvaluationConfig(ConfigModel):
    at_start: bool = Field(False, description="Also evaluate before the first step.")
    every_steps: int | None = Field(None, ge=1, description="Steps between evaluations; always once at the end.")
    micro_batch: int = Field(4, ge=1, description="Packs per worker per forward while evaluating.")
    patience: int | None = Field(
        None, ge=1, description="Early stopping: end after so many evaluations in a row without a lower loss; null: no."
    )
    min_improvement: float = Field(0.0, ge=0, description="By how much it must be lower than the last loss that was.")

    @model_validator(mode="after")
    def _patience_needs_evaluations(self) -> EvaluationConfig:
        if self.patience is not None and self.every_steps is None:
            raise ValueError(f"patience={self.patience} needs every_steps: else the only evaluation is that of the end")
        return self


class WatchdogConfig(ConfigModel):
    """Ends an attempt whose workers hang, so that it is begun again, and names slow workers; docs/failures.md."""

    enabled: bool = True
    factor: float = Field(
        10, ge=2, description="A worker hangs once it has gone without progress for this many usual steps …"
    )
    at_least_s: float = Field(300, gt=0, description="… and for so many seconds.")
    first_step_s: float = Field(
        3600, gt=0, description="Seconds from a worker's start, through loading, to the end of its first step."
    )
    probe_every_steps: int | None = Field(
        50, ge=1, description="Steps between looks at how fast each worker is; null: never."
    )
    slow_ratio: float = Field(1.5, gt=1, description="A worker is slow that takes this many times the median …")
    slow_looks: int = Field(3, ge=1, description="… at so many looks in a row.")


class FastTierConfig(ConfigModel):
    """Checkpoints on the nodes' own disks, beside those under run.storage and more often."""

    path: str = Field(
        description="Folder on each node's own disk (or in memory, /dev/shm); each run has one of its own in it."
    )
    every_steps: int = Field(ge=1, description="Steps between them; a divisor of checkpoint.every_steps.")
    keep_last: int = Field(1, ge=1, description="Newest to keep on each node; none once the run is finished.")

    @field_validator("path")
    @classmethod
    def _absolute(cls, path: str) -> str:
        if "://" in path or not path.startswith("/"):
            raise ValueError("give an absolute path; an object store belongs in run.storage")
        return path


class CheckpointConfig(ConfigModel):
    every_steps: int = Field(100, ge=1, description="Steps between commits; always one at the end.")
    keep_last: int = Field(2, ge=1, description="Newest checkpoints to keep.")
    keep_every: int | None = Field(None, ge=1, description="Also keep, of each so many steps, the first.")
    keep_best: int = Field(0, ge=0, description="Also keep so many with the lowest evaluation loss at their own step.")
    commit_timeout_s: float = Field(
        600, gt=0, description="Seconds that a commit waits for what all workers write; then the save is given up."
    )
    fast: FastTierConfig | None = Field(
        None, description="More checkpoints, on the nodes' own disks; docs/fast-tier.md."
    )

    @model_validator(mode="after")
    def _fast_is_more_often(self) -> CheckpointConfig:
        if self.fast is None:
            return self
        if self.fast.every_steps >= self.every_steps or self.every_steps % self.fast.every_steps:
            raise ValueError(
                f"every_steps={self.every_steps} is not a multiple, and more, of fast.every_steps="
                f"{self.fast.every_steps}; otherwise a durable checkpoint would often wait for a fast one"
            )
        return self


class ZeroConfig(ConfigModel):
    """DeepSpeed ZeRO-3 knobs that matter for speed and memory; everything else is derived."""

    overlap_comm: bool = True
    reduce_bucket_size: int = Field(50_000_000, ge=1, description="Elements.")
    prefetch_bucket_size: int = Field(50_000_000, ge=0, description="Elements.")
    param_persistence_threshold: int = Field(100_000, ge=0, description="Parameters with fewer elements stay gathered.")
    max_live_parameters: int = Field(1_000_000_000, ge=1, description="Elements.")
    sub_group_size: int = Field(1_000_000_000, ge=1, description="Elements.")


class TrainerConfig(ConfigModel):
    """Everything that the training loop itself depends on."""

    model: ModelConfig
    training: TrainingConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    zero: ZeroConfig = ZeroConfig()
    seed: int = Field(0, ge=0, lt=2**32, description="Of row order, random weights, adapters and dropout.")


class EvaluationTask(ConfigModel):
    """What workers do that evaluate instead of training: score one split with the weights of ``WorkerSpec.init_from``
    or of a peft adapter, else with the base as it is."""

    split: str
    result: str = Field(description="JSON file under run_uri that rank 0 writes.")
    adapter: str | None = Field(None, description="Folder of a peft adapter whose weights to use.")
    about: dict[str, Any] = Field(description="What the result says about the model.")


class WorkerSpec(ConfigModel):
    """What one attempt's workers are told; plain JSON, so that any launcher can carry it."""

    run_uri: str
    attempt: str
    resume_from: str | None = Field(description="Name of the checkpoint to continue from.")
    trainer: TrainerConfig
    base_identity: str
    other_base: bool = Field(False, description="Whether a checkpoint of another base may be loaded, on purpose.")
    dataset_uri: str
    fingerprint: str
    order: Order = Field(Order.SHUFFLED, description="Of the rows.")
    weights: dict[str, float] = Field({}, description="Of the data's sources, by name.")
    init_from: str | None = Field(None, description="URI of a checkpoint of another run whose weights to begin with.")
    collective_timeout_s: float = Field(1800, gt=0, description="Seconds until a hung collective fails.")
    notice_file: str | None = Field(None, description="Made on a node that will be taken away.")
    resolved_config: dict[str, Any] = Field(description="The whole run's configuration, kept in every checkpoint.")
    evaluation: EvaluationTask | None = Field(None, description="Evaluate instead of training.")
