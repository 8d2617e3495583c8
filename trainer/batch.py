"""Packs to the tensors that reach the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from data_shards.pack import Pack

EMPTY_PACK = Pack(np.zeros(2, np.int32), np.zeros(2, bool), np.full(1, 2, np.int32))
"""Stands in where a rank has no rows: it runs every module and trains on nothing."""


@dataclass(frozen=True)
class MicroBatch:
    """A micro batch flattened to one row of T tokens holding S sequences, N of whose tokens are trained.

    One row, because FlashAttention finds packs by itself only at batch size 1; positions restart at 0 in each sequence,
    from which sdpa, eager and flex build their masks; ``cu_seq_lens`` serves the varlen kernels.
    """

    input_ids: torch.Tensor
    """int64 [1, T]"""
    position_ids: torch.Tensor
    """int64 [1, T]"""
    cu_seq_lens: torch.Tensor
    """int32 [S + 1]"""
    max_seq_len: int
    target_positions: torch.Tensor
    """int64 [N]: positions whose next token is trained; logits are computed only there"""
    targets: torch.Tensor
    """int64 [N]"""

    @property
    def num_trained(self) -> int:
        return self.targets.numel()

    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments of a transformers causal LM. ``attention_mask`` must stay None and ``use_cache`` False:
        a mask of ones silently turns packing off."""
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "attention_mask": None,
            "use_cache": False,
            "logits_to_keep": self.target_positions,
            "cu_seq_lens_q": self.cu_seq_lens,
            "cu_seq_lens_k": self.cu_seq_lens,
            "max_length_q": self.max_seq_len,
            "max_length_k": self.max_seq_len,
        }

    def to(self, device: torch.device) -> MicroBatch:
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)


def collate(packs: Sequence[Pack]) -> MicroBatch:
    """Flatten packs into one row. No packs give a micro batch that trains on nothing.

    The target of position t is token t + 1 where that token is trained and in the same sequence, so a sequence's first
    token is never a target.
    """
    packs = packs or [EMPTY_PACK]
    # Each array is made in one pass: this takes longer than to read the packs.
    input_ids = np.concatenate([pack.input_ids for pack in packs], dtype=np.int64)  # [T]
    is_target = np.concatenate([pack.trained for pack in packs], dtype=bool, casting="unsafe")  # [T]
    lengths = np.concatenate([pack.sequence_lengths for pack in packs], dtype=np.int64)  # [S]
    bounds = np.zeros(len(lengths) + 1, np.int64)  # [S + 1]
    np.cumsum(lengths, out=bounds[1:])
    longest = int(lengths.max())
    counted = np.arange(longest)
    position_ids = np.concatenate([counted[:length] for length in lengths.tolist()])  # [T]
    is_target[bounds[:-1]] = False
    targets = np.flatnonzero(is_target)  # [N]
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids)[None],
        position_ids=torch.from_numpy(position_ids)[None],
        cu_seq_lens=torch.from_numpy(bounds.astype(np.int32)),
        max_seq_len=longest,
        target_positions=torch.from_numpy(targets - 1),
        targets=torch.from_numpy(input_ids[targets]),
    )
