"""From a module without memory to this rank's empty ZeRO-3 slices, for whoever fills them."""

from __future__ import annotations

from typing import Any

import torch


def partition_meta_model(model: torch.nn.Module, dtype: torch.dtype, deepspeed_config: dict[str, Any]) -> None:
    """Give every parameter of a module on the meta device its slice, in ``dtype`` and not yet filled; and its buffers
    memory. Tied parameters stay tied. A whole parameter is allocated at a time, and no value of it is written.

    ``zero.Init`` as a context would build the same, but broadcast every parameter from rank 0 first
    (deepspeed/runtime/zero/partition_parameters.py, ``_zero_init_param``): the whole model over the network for values
    that nobody keeps.
    """
    import deepspeed

    zero = deepspeed.zero.Init(module=torch.nn.Module(), config_dict_or_path=deepspeed_config)
    partitioned: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            if id(old) not in partitioned:
                empty = torch.empty(old.shape, dtype=dtype, device=zero.local_device)
                new = torch.nn.Parameter(empty, requires_grad=old.requires_grad)
                zero._convert_to_deepspeed_param(new)
                new.partition()  # type: ignore[attr-defined]
                partitioned[id(old)] = new
            setattr(module, name, partitioned[id(old)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty_like(buffer, device=zero.local_device))
