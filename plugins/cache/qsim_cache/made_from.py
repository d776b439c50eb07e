"""The values that decide what is kept: those of a model, of components, of the machine, and of the data.

A model is its tensors' bytes as they were loaded, not a file's name or time. That holds for a directory, a hub and a
model made in Python alike, and reading the bytes takes less time than a forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from qsim_cache.fingerprint import Unknowable, file_of, of_code
from qsim_core.components.component import components_in
from qsim_core.formats.quantizer import Function
from qsim_core.machine import processor
from qsim_core.simulation.environment import Environment
from qsim_core.transforms.offload import state

SETTINGS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
"""Values of modules that say all about themselves."""


def of_model(model: nn.Module) -> Iterator[Any]:
    """Every parameter and buffer, the modules' classes, settings and descriptions, configurations, and their code.

    Raises `Unknowable` for a class that was typed in.
    """
    for name, tensor in state(model):
        yield from (name, tensor)
    modules = dict(model.named_modules())
    for path, module in modules.items():
        yield from (path, f"{type(module).__module__}.{type(module).__qualname__}", type(module).extra_repr(module))
        yield from _settings(module)
    for kind in ("config", "generation_config"):
        found = [getattr(module, kind, None) for module in modules.values()]
        for config in {id(config): config for config in found if config is not None}.values():
            yield from (repr(config), getattr(config, "_attn_implementation", None))
    for source in sorted({file_of(type(module).__module__) for module in modules.values()}):
        yield from (source.name, source.read_bytes())


def of_components(*values: Any) -> Iterator[Any]:
    """Every component in values: its text, its code, and the size and time of each file that it names.

    Raises `Unknowable` for a plain function, whose text does not say what it computes.
    """
    parts = list(components_in(values))
    if any(isinstance(part, Function) for part in parts):
        raise Unknowable("the code of a plain function is not known")
    yield from map(str, parts)
    yield from of_code(*map(type, parts))
    for path in [value for part in parts for _, value in part if isinstance(value, Path)]:
        for file in sorted(p for p in (path, *path.rglob("*")) if p.is_file()):
            yield from (str(file), file.stat().st_size, file.stat().st_mtime_ns)


def of_machine(device: str, dtype: str, model: nn.Module) -> Iterator[Any]:
    """Python, libraries, threads, processor, and the GPUs where one takes part."""
    yield Environment.here(device, dtype, model).model_dump_json()
    yield from (processor(), torch.backends.cpu.get_cpu_capability(), torch.get_float32_matmul_precision())
    if device != "cpu":
        yield from map(torch.cuda.get_device_name, range(torch.cuda.device_count()))


def _settings(module: nn.Module) -> Iterator[Any]:
    """The plain values and the functions that a module's forward may read, with their names."""
    for name in sorted(vars(module).keys() - vars(nn.Module())):
        value = vars(module)[name]
        if isinstance(value, FunctionType | BuiltinFunctionType):
            yield from (name, value.__module__, value.__qualname__)
        elif is_dataclass(value) or all(isinstance(leaf, SETTINGS) for leaf in tree_leaves(value)):
            yield from (name, value)


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
