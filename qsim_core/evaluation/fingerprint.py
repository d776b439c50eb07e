"""What decides a number, value by value, for `qsim_core.transforms.checkpoint.sha256`: a model, code, libraries, the machine.

A model is its tensors' bytes as they were loaded, never a file's name or time: nothing else holds for a directory, a
hub and a model made in Python alike, and reading them takes less than any forward. Code counts by its text, not by its
version, so that an evaluator that is being written is run again once it has changed.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qsim_core.components.component import Component, components_in
from qsim_core.evaluation.result import Environment, version_of
from qsim_core.machine import processor
from qsim_core.transforms.offload import state


class Unknowable(Exception):
    """Something that decides a number cannot be told from another of its kind."""


def of_model(model: nn.Module) -> Iterator[Any]:
    """Every parameter and buffer, what the modules are and say of themselves, configurations, and the modules' code.

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


def of_preparation(thing: Any) -> Iterator[Any]:
    """A tokenizer or processor by the files that `save_pretrained` makes of it. Raises `Unknowable` without that."""
    if thing is None:
        return
    if not hasattr(thing, "save_pretrained"):
        raise Unknowable(f"{type(thing).__name__} cannot be saved")
    with tempfile.TemporaryDirectory(prefix="qsim-") as folder:
        thing.save_pretrained(folder)
        for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            yield from (str(file.relative_to(folder)), file.read_bytes())


def of_component(component: Component) -> Iterator[Any]:
    """A component's text, its code, and the size and time of each file that it names."""
    yield str(component)
    parts = list(components_in(component))
    yield from of_code(*map(type, parts))
    named = [value for part in parts for _, value in part if isinstance(value, Path)]
    for path in named:
        for file in sorted(p for p in (path, *path.rglob("*")) if p.is_file()):
            yield from (str(file), file.stat().st_size, file.stat().st_mtime_ns)


def of_code(*classes: type) -> Iterator[Any]:
    """The source of the packages in which classes are defined, and of the core. Raises `Unknowable` as above."""
    for top in sorted({"qsim_core", *(cls.__module__.partition(".")[0] for cls in classes)}):
        folders = list(getattr(sys.modules.get(top), "__path__", ()))
        files = [path for folder in folders for path in Path(folder).rglob("*.py")]
        for source in sorted(files) if folders else [_file(top)]:
            yield from (top, source.name, source.read_bytes())


def of_machine(device: str, dtype: str) -> Iterator[Any]:
    """Python, libraries, threads, processor, and the GPUs where one takes part."""
    yield Environment.here(device, dtype).model_dump_json()
    yield from (processor(), torch.backends.cpu.get_cpu_capability(), torch.get_float32_matmul_precision())
    if device != "cpu":
        yield from map(torch.cuda.get_device_name, range(torch.cuda.device_count()))


def of_requirements(distributions: Iterable[str]) -> Iterator[Any]:
    """The versions of distributions and of what they require."""
    for distribution in sorted(distributions):
        try:
            lines = requires(distribution) or []
        except PackageNotFoundError:
            continue
        names = {match[0] for line in lines if (match := re.match(r"[\w.-]+", line))}
        yield from ((name, version_of(name)) for name in sorted({distribution, *names}))


def _file(module: str) -> Path:
    """The file of a module's source."""
    file = Path(getattr(sys.modules.get(module), "__file__", None) or "")
    if not file.is_file():
        raise Unknowable(f"the code of {module} is in no file")
    return file
