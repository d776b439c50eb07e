"""The values that decide what is kept: those of a model, of the machine, and of the data.

A model is its tensors' bytes as they were loaded, not a file's name or time. That holds for a directory, a hub and a
model made in Python alike, and reading the bytes takes less time than a forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from qsim_core.machine import processor
from qsim_core.simulation.environment import Environment
from qsim_core.simulation.fingerprint import file_of
from qsim_core.transforms.offload import state


def of_model(model: nn.Module) -> Iterator[Any]:
    """Every parameter and buffer, the modules' classes and descriptions, configurations, and the modules' code.

    Raises `Unknowable` for a class that was typed in.
    """
    for name, tensor in state(model):
        yield from (name, tensor)
    modules = dict(model.named_modules())
    for path, module in modules.items():
        yield from (path, f"{type(module).__module__}.{type(module).__qualname__}", type(module).extra_repr(module))
    for kind in ("config", "generation_config"):
        found = [getattr(module, kind, None) for module in modules.values()]
        for config in {id(config): config for config in found if config is not None}.values():
            yield from (repr(config), getattr(config, "_attn_implementation", None))
    for source in sorted({file_of(type(module).__module__) for module in modules.values()}):
        yield from (source.name, source.read_bytes())


def of_machine(device: str, dtype: str, model: nn.Module) -> Iterator[Any]:
    """Python, libraries, threads, processor, and the GPUs where one takes part."""
    yield Environment.here(device, dtype, model).model_dump_json()
    yield from (processor(), torch.backends.cpu.get_cpu_capability(), torch.get_float32_matmul_precision())
    if device != "cpu":
        yield from map(torch.cuda.get_device_name, range(torch.cuda.device_count()))


def leaves(tree: Any) -> Iterator[Any]:
    """Give all that mappings (transformers' too), lists and tuples hold, with the keys."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield key
            yield from leaves(value)
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from leaves(item)
    else:
        yield tree
