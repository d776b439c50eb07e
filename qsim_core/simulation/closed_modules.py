"""Refuse models whose products, or whose weights, cannot be met: scripted, exported, without parameters, flattened."""

from __future__ import annotations

import sys

from torch import fx, jit, nn
from torch._ops import OpOverload
from torch.nn.parameter import is_lazy

from qsim_core.errors import ModelError


def check_open(model: nn.Module) -> None:
    """Raise `ModelError` with the name of the first module that is scripted, traced, exported, lazy or sharded.

    Fully sharded modules whose parameters stay parameters, as `fully_shard` makes them, are not refused.
    """
    for path, module in model.named_modules():
        why = _why_closed(module)
        if why:
            raise ModelError(f"{path or 'the model'} {why}")


def _why_closed(module: nn.Module) -> str:
    if isinstance(module, jit.ScriptModule):
        return "is scripted or traced by torch.jit, which hides its products; give the module that it was made of"
    if isinstance(module, fx.GraphModule) and any(isinstance(node.target, OpOverload) for node in module.graph.nodes):
        return "is exported by torch.export, which hides its products; give the module that it was made of"
    parameters = dict(module.named_parameters(recurse=False))
    if lazy := next((name for name, p in parameters.items() if is_lazy(p)), None):
        return f"is lazy, and its {lazy} has no shape yet; run it once before"
    if isinstance(module, getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())):
        return "is in FullyShardedDataParallel, which makes one flat parameter of all its weights; use fully_shard"
    if any(hasattr(parameter, "ds_id") for parameter in parameters.values()):
        return "has weights that DeepSpeed's ZeRO-3 empties between forwards; simulate before deepspeed.initialize"
    return ""
