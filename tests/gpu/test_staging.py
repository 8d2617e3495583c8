"""The copy that saves write: equal to what is on the device, in page-locked memory of just its size."""

from __future__ import annotations

from collections.abc import Mapping

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


def test_a_load_fills_the_device_through_the_same_memory() -> None:
    device = torch.device("cuda")
    staging = Staging(device)
    staging.reserve(3_000_008)
    reserved = staging.nbytes
    targets = {"a": torch.zeros(3_000_001, device=device), "b": torch.zeros(7, device=device)}
    wanted = {name: torch.rand(value.numel()) for name, value in targets.items()}

    def read(places: Mapping[str, torch.Tensor]) -> None:
        for name, place in places.items():
            assert place.is_pinned()
            place.copy_(wanted[name])

    staging.fill(targets, read)
    assert all(torch.equal(targets[name].cpu(), value) for name, value in wanted.items())
    assert staging.nbytes == reserved
