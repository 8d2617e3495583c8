"""Attention by sequence: what it computes is compared in test_packing_equality.py; here, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainer.attention import packed_attention
from trainer.errors import ModelError

BOUNDS = torch.tensor([0, 3, 8], dtype=torch.int32)


def attend(**changes: Any) -> torch.Tensor:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 8, 4) for heads in (4, 2, 2))
    options = {"attention_mask": None, "cu_seq_lens_q": BOUNDS, "max_length_q": 5} | changes
    return packed_attention(torch.nn.Identity(), query, key, value, **options)[0]


def test_each_sequence_sees_itself_alone() -> None:
    """The second sequence is the same whatever the first one is; under one long sequence it is not."""
    together = attend()
    assert together.shape == (1, 8, 4, 4)
    whole = attend(cu_seq_lens_q=torch.tensor([0, 8], dtype=torch.int32), max_length_q=8)
    assert torch.allclose(together[:, :3], whole[:, :3]) and not torch.allclose(together[:, 3:], whole[:, 3:])
    windowed = attend(sliding_window=2)
    assert torch.allclose(together[:, 3:5], windowed[:, 3:5]) and not torch.allclose(together[:, 5:], windowed[:, 5:])


@pytest.mark.parametrize("window", [None, 2])
def test_sequences_of_one_length_are_done_at_once_and_alike(window: int | None) -> None:
    """The same batch with two more tokens has sequences of two lengths, which are done one by one."""
    torch.manual_seed(0)
    tensors = [torch.randn(1, heads, 14, 4) for heads in (4, 2, 2)]

    def attended(bounds: list[int]) -> list[torch.Tensor]:
        given = [tensor[:, :, : bounds[-1]].clone().requires_grad_() for tensor in tensors]
        lengths = torch.tensor(bounds, dtype=torch.int32)
        options = {"cu_seq_lens_q": lengths, "max_length_q": 4, "sliding_window": window}
        out = packed_attention(torch.nn.Identity(), *given, None, **options)[0][:, :12]
        gradients = torch.autograd.grad((out * torch.arange(out.numel()).view_as(out)).sum(), given)
        return [out, *(gradient[:, :, :12] for gradient in gradients)]

    for at_once, one_by_one in zip(attended([0, 4, 8, 12]), attended([0, 4, 8, 12, 14]), strict=True):
        assert at_once.shape == one_by_one.shape and torch.allclose(at_once, one_by_one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"softcap": 30.0}, "asks for softcap"),
        ({"s_aux": torch.zeros(4)}, "asks for s_aux"),
        ({"attention_mask": torch.ones(1, 8)}, "no sequence bounds, or a mask"),
        ({"cu_seq_lens_q": None}, "no sequence bounds, or a mask"),
    ],
)
def test_what_it_does_not_do_is_refused_with_the_setting(changes: dict[str, Any], reason: str) -> None:
    """As bad input, which no retry can help; never by computing something else."""
    with pytest.raises(ModelError, match=rf"model\.attention=packed .*{reason}.*set model\.attention=sdpa or eager"):
        attend(**changes)
