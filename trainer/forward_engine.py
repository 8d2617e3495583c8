"""A model under ZeRO-3 for evaluation alone: no optimizer, no masters; a rank holds its slices of the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from trainer.batch import MicroBatch
from trainer.loss import token_scores
from trainer.slices import slice_bounds

ReadSlice = Callable[[str, int, int], torch.Tensor]
"""``(parameter name, start, stop)`` to elements ``[start, stop)`` of the flattened parameter: 1-D, fp32."""


class ForwardEngine:
    """Every method is collective: all ranks call it in the same order."""

    def __init__(self, model: torch.nn.Module, deepspeed_config: dict[str, Any], trained: ReadSlice | None) -> None:
        """
        Args:
            model: as ``build_trained_model`` gives it.
            trained: the weights of the parameters that require a gradient; None leaves them as they are.
        """
        import deepspeed

        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()
        if trained is not None:
            # Before initialize, which gathers the small parameters that stay whole on every rank.
            self._fill(model, trained)
        self._engine, *_ = deepspeed.initialize(model=model, config=deepspeed_config)
        self._engine.eval()
        self.device = torch.device(self._engine.device)

    def _fill(self, model: torch.nn.Module, trained: ReadSlice) -> None:
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if (part := getattr(parameter, "ds_tensor", None)) is None:  # not partitioned before initialize: adapters
                whole = trained(name, 0, parameter.numel())
                parameter.data.copy_(whole.reshape(parameter.shape))
                continue
            numel: int = parameter.ds_numel  # type: ignore[attr-defined]
            start, stop = slice_bounds(numel, self.rank, self.world_size)
            part.data[: stop - start].copy_(trained(name, start, stop))

    @torch.no_grad()
    def evaluate_micro_batch(self, batch: MicroBatch) -> torch.Tensor:
        """Sum of losses and number of tokens predicted right of one micro batch: fp64 [2]."""
        return token_scores(self._engine, batch.to(self.device))
