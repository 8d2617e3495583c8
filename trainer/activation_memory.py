"""Bytes that forward keeps for backward in a decoder of the Llama kind (pure). ``docs/memory.md`` derives the terms.

They follow what each operation saves for its backward in transformers' ``models/llama/modeling_llama.py``, peft's
``tuners/lora/layer.py``, DeepSpeed's ``runtime/zero/linear.py`` and ``trainer/loss.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from trainer.config import Attention, Method
from trainer.model_shape import FP32, ModelShape, ParameterShape

_INT64 = 8


class Device(StrEnum):
    GPU = "gpu"
    CPU = "cpu"


@dataclass(frozen=True)
class MicroBatchSize:
    """One flattened micro batch on one rank."""

    tokens: int
    """T"""
    trained: int
    """N; at most T"""


def attention_bytes(shape: ModelShape, attention: Attention, device: Device, tokens: int) -> int:
    """What one layer's attention saves: inputs, output, and what the softmax leaves."""
    w, b = shape.widths, shape.itemsize
    repeated = w.attention if w.kv_heads > 1 else w.key  # keys and values for all heads; a view where there is but one
    statistics = FP32 * w.heads * tokens  # log-sum-exp of each row (Dao et al., arXiv 2205.14135, algorithm 1)
    match attention:
        case Attention.EAGER:
            scores = w.heads * tokens**2 * (FP32 + (b if b != FP32 else 0))  # softmax in fp32, then its cast
            return 2 * (w.attention + repeated) * tokens * b + scores
        case Attention.SDPA:
            # Each layer converts the boolean mask to b bytes an element.
            return 2 * (w.attention + repeated) * tokens * b + statistics + tokens**2 * b
        case _:
            # On a CPU each sequence's output is kept by its kernel call, and once more joined to one row.
            outputs = 2 if device == Device.CPU and attention == Attention.PACKED else 1
            return ((1 + outputs) * w.attention + 2 * w.key) * tokens * b + statistics


def adapter_bytes(shape: ModelShape, adapters: list[ParameterShape], device: Device, tokens: int) -> int:
    """What LoRA's branches save: their input in fp32 where that is not the base's own, dropout's mask, and A's output.

    Args:
        adapters: the A matrices, [rank, features].
    """
    dropped = shape.lora_dropout > 0
    mask = (1 if device == Device.GPU else FP32) if dropped else 0  # on a CPU it is a factor
    own_input = FP32 if dropped or shape.itemsize != FP32 else 0  # dropped, or cast
    per_token = sum((own_input + mask) * adapter.shape[1] + FP32 * adapter.shape[0] for adapter in adapters)
    return tokens * per_token


def layer_bytes(shape: ModelShape, attention: Attention, device: Device, tokens: int) -> int:
    """What one decoder layer saves. One whose input needs no gradient (a frozen first one) saves a little less."""
    w, b = shape.widths, shape.itemsize
    layers: dict[int, list[ParameterShape]] = {}
    for parameter in shape.parameters:
        if ".lora_A." in parameter.name and parameter.layer is not None:
            layers.setdefault(parameter.layer, []).append(parameter)
    adapters = max((adapter_bytes(shape, each, device, tokens) for each in layers.values()), default=0)
    norms = 2 * (norm_bytes(shape, tokens) + w.hidden * tokens * b)  # and their outputs, which the linears save
    mlp = 4 * w.ffn * tokens * b  # gate, its activation, up, their product
    return norms + attention_bytes(shape, attention, device, tokens) + mlp + adapters


def norm_bytes(shape: ModelShape, tokens: int) -> int:
    """RMSNorm: its input in fp32, the reciprocal root per token, and, where its weight is trained, the normed input."""
    normed = shape.widths.hidden * shape.itemsize if shape.method == Method.FULL else 0
    return tokens * (FP32 * shape.widths.hidden + FP32 + normed)


def frozen_input_bytes(shape: ModelShape, tokens: int) -> int:
    """What the first layer saves less where the embedding is frozen: its norm, and the linears' own input."""
    if shape.method == Method.FULL:
        return 0
    own_input = shape.widths.hidden * tokens * shape.itemsize if shape.itemsize != FP32 else 0
    return norm_bytes(shape, tokens) + own_input


def outside_layers_bytes(shape: ModelShape, size: MicroBatchSize) -> int:
    """Ids, rotary tables, the last norm, and the head's input at the trained positions."""
    w, b = shape.widths, shape.itemsize
    ids = _INT64 * size.tokens if shape.method == Method.FULL else 0
    rotary = 2 * w.head * size.tokens * b
    return ids + rotary + norm_bytes(shape, size.tokens) + size.trained * (w.hidden * b + _INT64)


def loss_bytes(shape: ModelShape, size: MicroBatchSize) -> int:
    """What the loss saves: the log-probabilities in fp32, and the targets."""
    return size.trained * (FP32 * shape.widths.vocab + _INT64)


def loss_peak_bytes(shape: ModelShape, size: MicroBatchSize) -> int:
    """While the loss is computed: logits, their fp32 copy (if they are not fp32), and the log-probabilities.

    Backward needs as much: log-probabilities, their gradient, and the gradient of the logits.
    """
    copies = shape.itemsize + FP32 + (FP32 if shape.itemsize != FP32 else 0)
    return size.trained * shape.widths.vocab * copies


def saved_bytes(
    shape: ModelShape, attention: Attention, device: Device, size: MicroBatchSize, *, checkpointing: bool
) -> int:
    """What a whole forward keeps until backward.

    Args:
        checkpointing: keep the layers' inputs only; backward then computes one layer anew at a time.
    """
    w = shape.widths
    if checkpointing:
        layers = w.layers * w.hidden * size.tokens * shape.itemsize
    else:
        layers = w.layers * layer_bytes(shape, attention, device, size.tokens) - frozen_input_bytes(shape, size.tokens)
    rotary_inside = 2 * w.head * size.tokens * shape.itemsize if checkpointing else 0  # held, but by no saved tensor
    return layers + outside_layers_bytes(shape, size) - rotary_inside + loss_bytes(shape, size)


def layer_work_bytes(shape: ModelShape, attention: Attention, tokens: int) -> int:
    """The largest gradients that live at once while one layer goes backward: an estimate.

    Three of the MLP's width, three in fp32 and two in the model's dtype of the hidden width; with adapters in fp32
    beside a base that is not, the gradient of the widest input and its sum in fp32 too; with eager attention, two of
    the scores.
    """
    w, b = shape.widths, shape.itemsize
    work = tokens * (3 * w.ffn * b + w.hidden * (3 * FP32 + 2 * b))
    if shape.method == Method.LORA and b != FP32:
        work += 2 * tokens * max(w.ffn, w.hidden) * FP32
    if attention == Attention.EAGER:
        work += 2 * w.heads * tokens**2 * FP32
    return work
