"""Attention over packed sequences: each attends to itself, at the cost of its own length squared.

transformers' sdpa builds a dense mask over the whole flattened micro batch, T² for T tokens, most of it zeros between
sequences that never see each other. Here the bounds of the sequences (``cu_seq_lens``) are used instead: on a GPU by
torch's variable-length FlashAttention kernel, elsewhere sequence by sequence.
"""

from __future__ import annotations

from functools import cache
from inspect import signature
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F

from trainer.errors import ModelError

PACKED = "packed"
"""The name under which transformers finds it. No mask function is registered for it, so none is built."""

_KERNEL_DTYPES = (torch.bfloat16, torch.float16)
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sequence of one flattened row; an attention function of transformers.

    Args:
        query: [1, H, T, D]; ``key`` and ``value``: [1, H_kv, T, D], H a multiple of H_kv.
        attention_mask: must be None; the bounds say it all.
        sliding_window: a token sees itself and this many less one before it.
        cu_seq_lens_q: int32 [S + 1], bounds of the S sequences in T.

    Returns:
        [1, T, H, D], and no attention weights.

    Raises ModelError where the model wants what is not done here; another ``model.attention`` may do it.
    """
    asked = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if asked or attention_mask is not None or cu_seq_lens_q is None or max_length_q is None or query.shape[0] != 1:
        raise ModelError(
            f"model.attention=packed does not serve this model ({type(module).__name__} "
            f"{'asks for ' + ', '.join(asked) if asked else 'passes no sequence bounds, or a mask'}); set "
            "model.attention=sdpa or eager"
        )
    if query.is_cuda and query.dtype in _KERNEL_DTYPES and not dropout and "window_size" in _kernel_arguments():
        return _by_kernel(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window), None
    return _by_sequence(query, key, value, cu_seq_lens_q.tolist(), scaling, sliding_window, dropout), None


@cache
def _kernel_arguments() -> frozenset[str]:
    """What this torch's kernel can be asked for: 2.10 knew no scale and no window, 2.11 no grouped heads."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(signature(varlen_attn).parameters)


def _by_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # [1, H, T, D] -> [T, H, D]
    q, k, v = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    options: dict[str, Any] = {"window_size": (-1 if sliding_window is None else sliding_window - 1, 0)}
    if (groups := q.shape[1] // k.shape[1]) > 1:
        if "enable_gqa" in _kernel_arguments():
            options["enable_gqa"] = True
        else:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scaling, **options)
    return cast(torch.Tensor, out)[None]


def _by_sequence(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: list[int],
    scaling: float | None,
    sliding_window: int | None,
    dropout: float,
) -> torch.Tensor:
    lengths = [stop - start for start, stop in pairwise(bounds)]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """[S, H, L, D] to [S, L, H, D]."""
        mask = _window_mask(q.shape[2], sliding_window, q.device)
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        ).transpose(1, 2)

    if len(set(lengths)) == 1:  # Plain text fills each pack with one sequence; then nothing is copied.
        heads_apart = (tensor[0].unflatten(1, (len(lengths), -1)).transpose(0, 1) for tensor in (query, key, value))
        return attend(*heads_apart).flatten(0, 1)[None]
    # split, not slices: its backward is one concatenation, a slice's is a whole tensor of zeros per sequence.
    sequences = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    return torch.cat([attend(*sequence) for sequence in sequences], dim=1)


def _window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Bool [L, L]: causal, and no further back than the window; None where plain causality does."""
    if window is None or length <= window:
        return None
    whole = torch.ones(length, length, dtype=torch.bool, device=device)
    return whole.tril() & whole.triu(1 - window)


def register() -> None:
    """Make it known to transformers; may be called again."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED, packed_attention)
