"""Published shapes of a few bases, so that they can be planned for without network, licence or weights.

The values are those of each repository's config.json on the Hugging Face hub; the parameter counts that they give equal
the published ones (``tests/unit/test_memory_plan.py``). A base's real config is used wherever it is at hand.
"""

from __future__ import annotations

from typing import Any

_LLAMA_31: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_LLAMA_31_8B = _LLAMA_31 | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
_LLAMA_31_70B = _LLAMA_31 | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
_QWEN_25_7B: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}

PUBLISHED: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-3.1-8B": _LLAMA_31_8B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_31_8B,
    "meta-llama/Llama-3.1-70B": _LLAMA_31_70B,
    "meta-llama/Llama-3.1-70B-Instruct": _LLAMA_31_70B,
    "meta-llama/Llama-3.3-70B-Instruct": _LLAMA_31_70B,
    "Qwen/Qwen2.5-7B": _QWEN_25_7B,
    "Qwen/Qwen2.5-7B-Instruct": _QWEN_25_7B | {"max_position_embeddings": 32768},
}
"""Fields of config.json by hub id"""
