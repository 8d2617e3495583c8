"""Floating-point operations of an optimizer step, from shapes alone (pure). ``docs/gpu.md`` gives the formulas.

Only matrix products count, a multiply and an add as two; what is recomputed in backward does not (Chowdhery et al.,
arXiv 2204.02311, appendix B). What is not computed is not counted either: the head runs on trained tokens only,
attention stays inside a sequence and is causal, and LoRA computes no weight gradient of the frozen base.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from data_shards.pack import Pack
from trainer.config import Method
from trainer.model_shape import ModelShape, ParameterShape, count

_READS_EMBEDDING = ("q_proj", "k_proj", "v_proj")
"""of the first layer: without a trained embedding, nothing asks for the gradient of their input"""


class StepSize(NamedTuple):
    """How much one step computes, over all ranks."""

    tokens: int
    trained_tokens: int
    squared_lengths: int
    """sum over sequences of their length squared"""

    @classmethod
    def of(cls, packs: Iterable[Pack]) -> StepSize:
        packs = list(packs)
        trained = [pack.trained.copy() for pack in packs]
        for mask, pack in zip(trained, packs, strict=True):
            mask[[0, *pack.sequence_lengths.cumsum()[:-1]]] = False  # nothing predicts a sequence's first token
        return cls(
            sum(pack.input_ids.size for pack in packs),
            sum(int(mask.sum()) for mask in trained),
            sum(int((pack.sequence_lengths.astype("int64") ** 2).sum()) for pack in packs),
        )


class StepFlops(NamedTuple):
    layers: int
    """linear layers of the decoder, adapters included"""
    head: int
    attention: int
    """scores and weighted values, the causal half"""

    @property
    def total(self) -> int:
        return sum(self)


def step_flops(shape: ModelShape, size: StepSize) -> StepFlops:
    """Forward and backward of one step.

    A linear layer of n parameters takes 2 n a token forward, 2 n for the gradient of its input and 2 n for that of its
    weights (Kaplan et al., arXiv 2001.08361, table 1); causal attention over a sequence of length s takes 2 s² times
    its width forward and twice that backward (Dao, arXiv 2307.08691, section 4.1).
    """
    matrices = [p for p in shape.parameters if p.layer is not None and len(p.shape) == 2]
    head = shape.widths.vocab * shape.widths.hidden
    lora = shape.method == Method.LORA
    layers = sum((6 if p.trained else 4) * p.numel for p in matrices)
    if lora:
        layers -= 2 * count([p for p in matrices if _reads_embedding(p)])
    return StepFlops(
        layers=layers * size.tokens,
        head=(4 if lora else 6) * head * size.trained_tokens,
        attention=6 * size.squared_lengths * shape.widths.attention * shape.widths.layers,
    )


def _reads_embedding(parameter: ParameterShape) -> bool:
    """LoRA's B reads what A gives, which always has a gradient."""
    reads = any(f".{name}." in parameter.name for name in _READS_EMBEDDING)
    return parameter.layer == 0 and reads and ".lora_B." not in parameter.name
