"""What a model is made of, without its weights: parameters with shapes and dtypes, and the widths of its layers.

It is built on torch's meta device by the same calls that build it for training, so counts are exact, adapters included.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trainer.config import LoraConfig, Method, Precision
from trainer.errors import ModelError
from trainer.model import DTYPES, add_lora

FP32 = torch.float32.itemsize
"""Bytes of an element of masters, gradients and optimizer states."""

_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")
_CONTAINERS = (torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.ParameterDict)


@dataclass(frozen=True)
class ParameterShape:
    name: str
    shape: tuple[int, ...]
    itemsize: int
    """bytes of an element as it is held for forward and backward"""
    trained: bool

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def layer(self) -> int | None:
        return layer_index(self.name)

    def partition(self, world_size: int) -> int:
        """Elements that every rank holds of it, padding included: ceil(n / W) (``trainer/slices.py``)."""
        return -(-self.numel // world_size)


@dataclass(frozen=True)
class ModuleShape:
    """A module that runs, and the parameters that are its own."""

    name: str
    parameters: tuple[ParameterShape, ...]

    @property
    def layer(self) -> int | None:
        return layer_index(self.name)


@dataclass(frozen=True)
class DecoderWidths:
    """Features per token inside a decoder of the Llama kind."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head: int
    """features of one head"""
    ffn: int
    vocab: int

    @property
    def attention(self) -> int:
        return self.heads * self.head

    @property
    def key(self) -> int:
        return self.kv_heads * self.head


@dataclass(frozen=True)
class ModelShape:
    kind: str
    """the architecture's class, such as LlamaForCausalLM"""
    parameters: tuple[ParameterShape, ...]
    """each once, in the order of definition; tied ones are one"""
    modules: tuple[ModuleShape, ...]
    """outer before inner, otherwise in the order of definition; without lists of modules, which do not run"""
    widths: DecoderWidths
    precision: Precision
    method: Method
    lora_dropout: float
    like_llama: bool
    """whether its layers are those that the activation formulas were made for"""

    @property
    def itemsize(self) -> int:
        """Bytes of an activation's element."""
        return DTYPES[self.precision].itemsize

    @property
    def trained(self) -> list[ParameterShape]:
        return [parameter for parameter in self.parameters if parameter.trained]

    @property
    def num_parameters(self) -> int:
        return count(self.parameters)

    @property
    def base(self) -> list[ParameterShape]:
        """Without adapters."""
        return [parameter for parameter in self.parameters if ".lora_" not in parameter.name]


def count(parameters: Sequence[ParameterShape]) -> int:
    return sum(parameter.numel for parameter in parameters)


def layer_index(name: str) -> int | None:
    """Of the decoder layer that a parameter or module belongs to; None for embedding, last norm and head."""
    found = _LAYER.search(f".{name}.")
    return int(found[1]) if found else None


_LIKE_LLAMA = frozenset({"llama", "mistral", "qwen2"})


def model_shape(hf_config: Any, precision: Precision, method: Method, lora: LoraConfig) -> ModelShape:
    """Build the model that training would build, on the meta device.

    Args:
        hf_config: a transformers config (``trainer.model.model_config``).

    Raises:
        ModelError: an architecture whose config does not name the widths that a plan needs.
    """
    from transformers import AutoModelForCausalLM

    widths = decoder_widths(hf_config)
    hf_config._attn_implementation = "eager"  # the others ask for packages that a plan does not need
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config, dtype=DTYPES[precision])
        kind = type(model).__name__
        if method == Method.LORA:
            model = add_lora(model, lora, seed=0)
    parameters = {
        id(p): ParameterShape(name, tuple(p.shape), p.dtype.itemsize, p.requires_grad)
        for name, p in model.named_parameters()
    }
    return ModelShape(
        kind=kind,
        parameters=tuple(parameters.values()),
        modules=tuple(
            ModuleShape(name, tuple(parameters[id(p)] for p in module.parameters(recurse=False)))
            for name, module in model.named_modules()
            if not isinstance(module, _CONTAINERS)
        ),
        widths=widths,
        precision=precision,
        method=method,
        lora_dropout=lora.dropout if method == Method.LORA else 0.0,
        like_llama=hf_config.model_type in _LIKE_LLAMA,
    )


def decoder_widths(hf_config: Any) -> DecoderWidths:
    """Raises ModelError naming the field that the config lacks."""

    def field(name: str) -> int:
        value = getattr(hf_config, name, None)
        if not isinstance(value, int):
            raise ModelError(
                f"a plan needs {name}, and {type(hf_config).__name__} does not name it; baton plan serves decoders "
                "that are described like Llama"
            )
        return value

    heads = field("num_attention_heads")
    head = getattr(hf_config, "head_dim", None) or field("hidden_size") // heads
    return DecoderWidths(
        layers=field("num_hidden_layers"),
        hidden=field("hidden_size"),
        heads=heads,
        kv_heads=getattr(hf_config, "num_key_value_heads", None) or heads,
        head=int(head),
        ffn=field("intermediate_size"),
        vocab=field("vocab_size"),
    )
