"""What reaches the model."""

from __future__ import annotations

import numpy as np
import torch

from data_shards.pack import Pack
from trainer.batch import collate


def test_micro_batch_is_one_row_with_restarting_positions() -> None:
    first = Pack(np.array([5, 6, 7, 8]), np.array([1, 0, 1, 1], bool), np.array([3, 1]))
    second = Pack(np.array([9, 10]), np.array([0, 1], bool), np.array([2]))
    batch = collate([first, second])
    inputs = batch.model_inputs()
    assert inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert inputs["cu_seq_lens_q"].tolist() == inputs["cu_seq_lens_k"].tolist() == [0, 3, 4, 6]
    assert inputs["cu_seq_lens_q"].dtype == torch.int32
    assert inputs["max_length_q"] == inputs["max_length_k"] == 3
    assert inputs["attention_mask"] is None and inputs["use_cache"] is False
    # 7 is predicted at position 1, 10 at 4; 5 and 8 are first of their sequences and never targets.
    assert inputs["logits_to_keep"].tolist() == [1, 4]
    assert batch.targets.tolist() == [7, 10]


def test_no_packs_train_on_nothing_but_run_everything() -> None:
    batch = collate([])
    assert batch.num_trained == 0 and batch.input_ids.numel() > 0
    assert batch.model_inputs()["logits_to_keep"].numel() == 0
