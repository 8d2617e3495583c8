"""DeepSpeed ZeRO-3 behind a small surface, for training; ``docs/architecture.md`` lists who else imports deepspeed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from data_shards.errors import BadInput
from trainer.batch import MicroBatch
from trainer.config import OptimizerConfig, OptimizerName
from trainer.errors import StepInvariantBroken
from trainer.loss import token_loss_sum, token_scores
from trainer.slices import slice_bounds


class TrainedParameter(NamedTuple):
    name: str
    shape: tuple[int, ...]
    parameter: torch.nn.Parameter

    @property
    def numel(self) -> int:
        return self.parameter.ds_numel  # type: ignore[attr-defined]


def build_optimizer(model: torch.nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """A group for each learning rate, of matrices, which decay, and of vectors (norms, biases), which do not.

    Raises BadInput where ``lr_ratios`` names what no trained parameter's name holds.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if idle := [text for text in config.lr_ratios if not any(text in name for name in named)]:
        raise BadInput(
            f"optimizer.lr_ratios.{idle[0]}: no trained parameter's name holds it; they are called {list(named)[:3]}, …"
        )
    groups: dict[tuple[float, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in named.items():
        fitting = [text for text in config.lr_ratios if text in name]
        ratio = config.lr_ratios[max(fitting, key=len)] if fitting else 1.0  # whatever order they are written in
        decays = len(getattr(parameter, "ds_shape", parameter.shape)) >= 2  # ``ds_shape``: the one that ZeRO-3 hides
        groups.setdefault((ratio, decays), []).append(parameter)
    given = [
        {
            "params": groups[ratio, decays],
            "lr": config.lr * ratio,
            "lr_ratio": ratio,
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for ratio, decays in sorted(groups, key=lambda key: (key[0], not key[1]))
    ]
    match config.name:
        case OptimizerName.ADAMW:
            return torch.optim.AdamW(given, lr=config.lr, betas=config.betas, eps=config.eps)
        case OptimizerName.SGD:
            return torch.optim.SGD(given, lr=config.lr)


class ZeroEngine:
    """One model under ZeRO-3 on this rank. Every method is collective: all ranks call it in the same order."""

    def __init__(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, deepspeed_config: dict[str, Any]
    ) -> None:
        import deepspeed

        names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._engine, *_ = deepspeed.initialize(
            model=model, model_parameters=trained, optimizer=optimizer, config=deepspeed_config
        )
        self._zero = self._engine.optimizer
        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()
        self.device = torch.device(self._engine.device)
        self.trained = [TrainedParameter(names[id(p)], tuple(p.ds_shape), p) for p in trained]  # type: ignore[attr-defined]
        self._gradients_checked = False
        self._before_update: Callable[[], object] = lambda: None

    @property
    def module(self) -> Any:
        return self._engine.module

    def train_micro_batch(self, batch: MicroBatch, global_trained_tokens: int, *, is_last: bool) -> torch.Tensor:
        """Forward and backward of one micro batch of a step whose ranks train on ``global_trained_tokens`` in all.

        Returns:
            The micro batch's own sum of losses, detached: fp32 scalar.
        """
        self._engine.train()
        self._engine.set_gradient_accumulation_boundary(is_last)
        batch = batch.to(self.device)
        with self._every_parameter_gets_a_gradient():
            loss_sum = token_loss_sum(self._engine, batch)
            # ZeRO-3 averages gradients over ranks; the factor makes that a sum, and nothing else may scale it.
            scaled = loss_sum * (self.world_size / global_trained_tokens)
            self._engine.backward(scaled, scale_wrt_gas=False)
        return loss_sum.detach()

    def before_update(self, wait: Callable[[], object]) -> None:
        """Have ``wait`` called before each update: it returns once nobody reads ``local_slices`` any more."""
        self._before_update = wait

    def await_readers(self) -> None:
        """Until an update may change ``local_slices``. ``apply_step`` does it, too."""
        self._before_update()

    def apply_step(self, learning_rate: float, loss: torch.Tensor | None = None) -> float | None:
        """Clip and update. Returns the global gradient norm before clipping; None where the update was left out, on all
        ranks, because a gradient, or the loss on some rank, is inf or NaN. The optimizer then counts no step.

        Args:
            loss: this rank's of the step, a scalar.
        """
        if loss is not None:
            self._spoil_gradients_unless_finite(loss)
        self.await_readers()
        for group in self._zero.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_ratio"]
        self._engine.step()
        if not self._engine.was_step_applied():
            return None
        return float(self._engine.get_global_grad_norm())

    @torch.no_grad()
    def _spoil_gradients_unless_finite(self, loss: torch.Tensor) -> None:
        """A loss of inf may have finite gradients (a logit of -inf has), and before the update the ranks agree on the
        norm of gradients alone. This makes it tell of the loss, too, without a wait or one more collective."""
        first = self._zero.averaged_gradients[0][0].view(-1)[:1]
        first.copy_(torch.where(torch.isfinite(loss), first, torch.full_like(first, torch.nan)))

    @torch.no_grad()
    def evaluate_micro_batch(self, batch: MicroBatch) -> torch.Tensor:
        """Sum of losses and number of tokens predicted right of one micro batch, without dropout: fp64 [2]."""
        self._engine.eval()
        return token_scores(self._engine, batch.to(self.device))

    def bounds(self, parameter: TrainedParameter) -> tuple[int, int]:
        """The elements of the flattened parameter that this rank holds."""
        return slice_bounds(parameter.numel, self.rank, self.world_size)

    @property
    def num_local_elements(self) -> int:
        """Of all trained parameters, those that this rank holds."""
        return sum(stop - start for start, stop in map(self.bounds, self.trained))

    def state_keys(self) -> list[str]:
        """Names of the optimizer's per-element states (``exp_avg``, …); none before the first step or for plain SGD."""
        for flat in self._zero.fp32_partitioned_groups_flat:
            state = self._zero.optimizer.state.get(flat, {})
            return sorted(k for k, v in state.items() if k != "step" and torch.is_tensor(v) and v.shape == flat.shape)
        return []

    def optimizer_step(self) -> int:
        """Updates that the optimizer counts (Adam's bias correction depends on it)."""
        for flat in self._zero.fp32_partitioned_groups_flat:
            return int(self._zero.optimizer.state.get(flat, {}).get("step", 0))
        return 0

    def local_slices(self) -> Iterator[tuple[str, torch.Tensor]]:
        """``(name/part, 1-D fp32 slice)`` of everything that this rank holds and a resume needs, without padding: views
        of the engine's own memory, which only an update or a load changes."""
        for entry, part, partition in self._partitions(self.state_keys()):
            start, stop = self.bounds(entry)
            if start < stop:
                yield f"{entry.name}/{part}", partition[: stop - start]

    def slices_to_load(self, optimizer_step: int, state_keys: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """The same of a fresh engine, for the caller to fill; then it calls ``slices_loaded``.

        Args:
            state_keys: of the optimizer; none leaves it fresh.
        """
        if state_keys:
            # The state must exist before it can be set: torch creates it at the first step only.
            for flat in self._zero.fp32_partitioned_groups_flat:
                self._zero.optimizer.state[flat] = {
                    "step": torch.tensor(float(optimizer_step)),
                    **{key: torch.empty_like(flat, requires_grad=False) for key in state_keys},
                }
        for entry, part, partition in self._partitions(state_keys):
            start, stop = self.bounds(entry)
            partition[stop - start :].zero_()  # padding; no checkpoint has it
            yield f"{entry.name}/{part}", partition[: stop - start]

    def slices_loaded(self) -> None:
        """Copy the fp32 masters to what the forward uses; else the next loss is silently that of the old weights."""
        for index in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(index)
        persistent = self._zero.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)

    def _partitions(self, state_keys: list[str]) -> Iterator[tuple[TrainedParameter, str, torch.Tensor]]:
        """This rank's part of each trained parameter and of its states, with padding."""
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        for entry in self.trained:
            yield entry, "fp32", safe_get_local_fp32_param(entry.parameter).detach()
            for key in state_keys:
                yield entry, key, safe_get_local_optimizer_state(entry.parameter, key).detach()

    def _every_parameter_gets_a_gradient(self) -> _GradientCheck:
        """On the first micro batch only: ZeRO-3 reuses the last step's gradient where none comes."""
        check = _GradientCheck([] if self._gradients_checked else self.trained)
        self._gradients_checked = True
        return check


class _GradientCheck:
    """Context in which every given parameter must receive a gradient."""

    def __init__(self, entries: list[TrainedParameter]) -> None:
        self._missing = {entry.name for entry in entries}
        self._handles = [
            entry.parameter.register_hook(lambda _grad, name=entry.name: self._missing.discard(name))
            for entry in entries
        ]

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        if kind is None and self._missing:
            raise StepInvariantBroken(
                f"{len(self._missing)} trained parameters got no gradient, first {sorted(self._missing)[:3]}; ZeRO-3 "
                "would apply stale gradients to them. Freeze them, or leave them out of training.lora.target_modules."
            )
