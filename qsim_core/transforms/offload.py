"""Weights that accelerate keeps elsewhere (in another memory, on disk) and brings to a module for its forward.

Outside of a forward such parameters are on the `meta` device and hold nothing. Who reads or changes weights does it
through here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qsim_core.snapshots import Snapshot


@contextlib.contextmanager
def at_hand(*modules: nn.Module, inside: bool = True) -> Iterator[None]:
    """Here, the tensors of these modules and of all inside them are there; what is changed in place stays changed.

    Modules whose tensors are where they belong are left alone.
    """
    loaded: list[tuple[nn.Module, Any, dict[str, Snapshot]]] = []
    try:
        for module, hook in _offloading(modules, inside):
            hook.pre_forward(module)
            hook.offload = False  # a forward inside finds the tensors and leaves them there
            loaded.append((module, hook, {name: Snapshot(tensor, whole=True) for name, tensor in _own(module)}))
        yield
    finally:
        for module, hook, marks in loaded:
            for name, tensor in _own(module):
                if name not in marks or _changed(marks[name], tensor):
                    _put_back(hook.weights_map, name, tensor.detach().cpu())
            hook.offload = True
            hook.post_forward(module, None)


@contextlib.contextmanager
def editing(model: nn.Module, *names: str) -> Iterator[dict[str, nn.Parameter]]:
    """Parameters by their full names, there to be changed in place, and without a gradient."""
    owners = (model.get_submodule(name.rpartition(".")[0]) for name in names)
    with torch.no_grad(), at_hand(*owners, inside=False):
        yield {name: model.get_parameter(name) for name in names}


def state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer by its full name, one after another, wherever it is kept."""
    for path, module in model.named_modules():
        maps = [hook.weights_map for _, hook in _offloading([module], inside=False)]
        for name, tensor in _own(module):
            kept = maps[0][name] if maps and tensor.is_meta else tensor.detach()
            yield f"{path}.{name}" if path else name, kept


def computes_on(model: nn.Module) -> torch.device:
    """The device of a model's inputs: where accelerate computes its first module, else where its parameters are."""
    for module in model.modules():
        for part in _hooks(module):
            if getattr(part, "execution_device", None) is not None:
                return torch.device(part.execution_device)
    return next(model.parameters()).device


def _hooks(module: nn.Module) -> Sequence[Any]:
    """accelerate's hooks on one module."""
    hook = getattr(module, "_hf_hook", None)
    return list(getattr(hook, "hooks", [hook]))


def _offloading(modules: Any, inside: bool) -> Iterator[tuple[nn.Module, Any]]:
    """The modules that are offloaded at the moment, with accelerate's hook on each."""
    for root in modules:
        for module in root.modules() if inside else [root]:
            for part in _hooks(module):
                if getattr(part, "offload", False) and getattr(part, "weights_map", None) is not None:
                    yield module, part


def _own(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _changed(seen: Snapshot, tensor: Tensor) -> bool:
    seen.doubt()
    return not seen.holds(tensor)


def _put_back(weights: Any, name: str, tensor: Tensor) -> None:
    """Write a tensor where accelerate takes it from: mappings in mappings, of which the innermost may be files."""
    while hasattr(weights, "dataset"):
        weights, name = weights.dataset, f"{weights.prefix}{name}"
    getattr(weights, "state_dict", weights)[name] = tensor
