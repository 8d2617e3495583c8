"""Which ranks are slow, from what all have measured."""

from __future__ import annotations

import pytest
import torch

from trainer.stragglers import Cause, Look, Probe, ratios, slow


def test_with_two_ranks_one_can_be_slow() -> None:
    assert ratios([1.0, 3.0]) == [1.0, 3.0] and ratios([2.0, 2.0]) == [1.0, 1.0]
    assert ratios([1.0, 1.0, 2.0, 1.0]) == [1.0, 1.0, 2.0, 1.0] and ratios([0.0, 0.0]) == [1.0, 1.0]


def test_only_what_is_slow_and_matters_is_named() -> None:
    fine = Look(0.002, 0.1, 10.0)
    assert slow([fine] * 4, 1.5) == {} and slow([fine, fine._replace(probe_s=0.0029)], 1.5) == {}
    assert slow([fine, fine._replace(probe_s=0.004), fine], 1.5) == {1: (Cause.COMPUTING, pytest.approx(2.0))}
    assert slow([fine, fine._replace(data_s=0.5), fine], 1.5) == {}, "a twentieth of its steps"
    assert slow([fine, fine, fine._replace(data_s=4.0)], 1.5) == {2: (Cause.READING, pytest.approx(40.0))}


def test_a_probe_is_short_and_leaves_random_numbers_alone() -> None:
    probe, state = Probe(torch.device("cpu")), torch.get_rng_state()
    assert 0 < min(probe.seconds() for _ in range(5)) < 0.5
    assert torch.equal(torch.get_rng_state(), state)
