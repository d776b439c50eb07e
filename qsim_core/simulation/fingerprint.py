"""Everything that decides a number, value by value, for `qsim_core.transforms.checkpoint.sha256`.

A model is its tensors' bytes as they were loaded, not a file's name or time. That holds for a directory, a hub and a
model made in Python alike, and reading the bytes takes less time than a forward. Code counts by its text and not by its
version: an evaluator that was edited is run again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qsim_core.components.component import Component
from qsim_core.machine import processor
from qsim_core.simulation.environment import Environment
from qsim_core.transforms.offload import state


class Unknowable(Exception):
    """Something that decides a number cannot be told from another of its kind."""


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
    for source in sorted({_file(type(module).__module__) for module in modules.values()}):
        yield from (source.name, source.read_bytes())


def of_code(*classes: type) -> Iterator[Any]:
    """The source of the packages that define classes and the components they derive from, and of the core.

    Raises `Unknowable` as `of_model` does.
    """
    deriving = [base for cls in classes for base in cls.__mro__ if base is cls or issubclass(base, Component)]
    for top in sorted({"qsim_core", *(cls.__module__.partition(".")[0] for cls in deriving)}):
        folders = list(getattr(sys.modules.get(top), "__path__", ()))
        files = [path for folder in folders for path in Path(folder).rglob("*.py")]
        for source in sorted(files) if folders else [_file(top)]:
            yield from (top, source.name, source.read_bytes())


def of_machine(device: str, dtype: str, model: nn.Module) -> Iterator[Any]:
    """Python, libraries, threads, processor, and the GPUs where one takes part."""
    yield Environment.here(device, dtype, model).model_dump_json()
    yield from (processor(), torch.backends.cpu.get_cpu_capability(), torch.get_float32_matmul_precision())
    if device != "cpu":
        yield from map(torch.cuda.get_device_name, range(torch.cuda.device_count()))


def _file(module: str) -> Path:
    """The file of a module's source."""
    file = Path(getattr(sys.modules.get(module), "__file__", None) or "")
    if not file.is_file():
        raise Unknowable(f"the code of {module} is not in a file")
    return file
