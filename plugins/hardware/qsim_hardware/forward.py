"""One forward of a simulation: its products, with keys and values read once, and the operations between them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from qsim_core import Cost, Hardware, Simulation, SiteWork
from qsim_core.simulation.work import TensorWork
from qsim_hardware.between import OperationWork, counted

CACHED = ("keys", "values")


@dataclass(frozen=True)
class Phase:
    """One forward, and its work at each site."""

    name: str
    work: Sequence[SiteWork]
    between: Sequence[OperationWork] = ()
    """The operations between the products."""


class CountedHardware(Hardware):
    """Hardware that prices a forward by `forward`, which counts keys and values once, and by `cost_of`."""

    def price(self, simulation: Simulation, example: Any) -> Cost:
        """Compute the cost of a forward of a simulation."""
        inputs = example
        if isinstance(example, Mapping) and generates(simulation.model):
            inputs = {**example, "use_cache": True}  # the cache tells how many heads keys and values have
        return self.cost_of(forward("forward", simulation, inputs)[0])

    def cost_of(self, phase: Phase) -> Cost:
        """Compute the cost of a counted forward: that of its products, unless hardware prices more."""
        return self.cost(phase.work)


def generates(model: Any) -> bool:
    """True for a language model that makes text, and keeps the keys and values of what it has read."""
    return main_input(model) == "input_ids" and bool(model.can_generate())


def forward(name: str, simulation: Simulation, inputs: Any, operations: bool = True) -> tuple[Phase, Any]:
    """Count the work of a forward, and give its output if it has a cache."""
    model: Any = simulation.model
    caught: list[Any] = []
    handle = model.register_forward_hook(lambda module, arguments, output: caught.append(output))
    watched: AbstractContextManager[list[OperationWork]] = counted(simulation) if operations else nullcontext([])
    try:
        with watched as between:
            work = simulation.work(inputs)
    finally:
        handle.remove()
    cache = cache_of(model, caught[-1])
    return Phase(name, _read_once(work, cache), between), None if cache is None else caught[-1]


def _read_once(work: Sequence[SiteWork], cache: Any) -> list[SiteWork]:
    """Count the keys and values of each layer as its cache holds them: once, not for each head that reads them."""
    held = [layer for layer in getattr(cache, "layers", ()) if getattr(layer, "keys", None) is not None]
    found: list[SiteWork] = []
    met = dict.fromkeys(CACHED, 0)
    for one in work:
        left, right = one.operands
        if right.role in CACHED and met[right.role] < len(held):
            tensor: torch.Tensor = getattr(held[met[right.role]], right.role)
            met[right.role] += 1
            right = _limited(right, tensor.numel())
        found.append(replace(one, operands=(left, right)))
    return found


def _limited(tensor: TensorWork, elements: int) -> TensorWork:
    return replace(tensor, elements=min(tensor.elements, elements))


def main_input(model: Any) -> str:
    """The name of the model's main argument; empty: the model has none."""
    return str(getattr(model, "main_input_name", ""))


def cache_argument(model: Any) -> str:
    """The name of the cache in the arguments and the result of a forward; transformers 5.24 has shortened it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def cache_of(model: Any, output: Any) -> Any:
    """The keys and values that a forward gave; None: it keeps none."""
    return getattr(output, cache_argument(model), None) if generates(model) else None
