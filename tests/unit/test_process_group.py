"""A worker that was given a GPU and can't use it says so at once."""

from __future__ import annotations

import pytest
import torch

from data_shards.errors import BadInput
from trainer.process_group import GPUS_GIVEN, NODE_ID, start_process_group


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to use")
def test_a_gpu_that_torch_can_not_use_is_no_reason_to_train_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GPUS_GIVEN, "0,1")
    monkeypatch.setenv(NODE_ID, "node-7")
    with pytest.raises(BadInput, match=r"node-7: the worker was given a GPU there \(0,1\), and torch .* can't use it"):
        start_process_group()
