"""The copy that saves write: equal to what is on the device, in page-locked memory of just its size."""

from __future__ import annotations

import torch

from tests.support.gpu import needs_gpu
from trainer.staging import Staging

pytestmark = needs_gpu


def test_copies_are_equal_and_pages_are_locked() -> None:
    device = torch.device("cuda")
    staging = Staging(device)
    for numel in (1_000, 3_000_001):  # grows once
        slices = [("a", torch.rand(numel, device=device)), ("b", torch.rand(7, device=device))]
        for _ in range(2):
            copies = staging.copy(slices)
            assert all(torch.equal(copies[name], value.cpu()) and copies[name].is_pinned() for name, value in slices)
        assert staging.nbytes == 4 * (numel + 7)
