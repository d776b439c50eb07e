"""Refuse models whose products no hook and no function mode can meet: compiled, exported, or without parameters yet."""

from __future__ import annotations

from torch import fx, jit, nn
from torch._ops import OpOverload
from torch.nn.parameter import is_lazy

from qsim_core.errors import ModelError


def check_open(model: nn.Module) -> None:
    """Raise `ModelError` with the name of the first module that is scripted, traced, exported or lazy."""
    for path, module in model.named_modules():
        why = _why_closed(module)
        if why:
            raise ModelError(f"{path or 'the model'} {why}")


def _why_closed(module: nn.Module) -> str:
    if isinstance(module, jit.ScriptModule):
        return "is scripted or traced by torch.jit, which hides its products; give the module that it was made of"
    if isinstance(module, fx.GraphModule) and any(isinstance(node.target, OpOverload) for node in module.graph.nodes):
        return "is exported by torch.export, which hides its products; give the module that it was made of"
    parameters = module.named_parameters(recurse=False)
    if lazy := next((name for name, p in parameters if is_lazy(p)), None):
        return f"is lazy, and its {lazy} has no shape yet; run it once before"
    return ""
