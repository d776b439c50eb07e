"""A simulated model as plain modules: its quantizers are graphs of torch's operators, without hooks and without a mode.

A layer that is one matmul becomes a `QuantizedLayer`, which holds the quantized weight. What no such layer holds is
refused by name: products of activations, arithmetics of devices, random numbers, operations.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from qsim_core.errors import QsimError, RecipeError, one_line
from qsim_core.formats.accelerator import accelerated_by
from qsim_core.matmuls.call import Call
from qsim_core.matmuls.layout import LAST, Layout
from qsim_core.simulation.simulation import Simulation
from qsim_core.sites.site import Site
from qsim_core.sites.sites import Sites
from qsim_core.transforms.forward import as_in_evaluation
from qsim_core.transforms.forward import call as run

SIZES = (17, 19, 23, 29, 31, 37, 41, 43, 47, 53)
"""Sizes of axes that a graph leaves open. They differ, so that tracing takes none of them for another one."""


def materialize(simulation: Simulation) -> nn.Module:
    """Make a copy of a simulated model that computes the same without hooks and modes: torch exports and compiles it.

    Weights are quantized, and quantizers are graphs of torch's operators. Outputs have the simulation's bits under
    `arithmetic: float32`; a compiler may round in other places. Raises `RecipeError` for what no layer holds:
    quantizers of attention's products, arithmetics of devices, random numbers, rotations. Raises `QsimError` without an
    example, after hooks of transforms, and after `keep=False`.
    """
    model, sites = simulation.model, simulation.sites
    if simulation.needed_beside:
        raise QsimError(f"{simulation.needed_beside}, and the weights need them; a plain model cannot have them")
    if simulation.example is None:
        raise QsimError("give simulate an example: it tells which weights are multiplied")
    simulation.refresh()
    met = MetLayers()
    sites.watcher, sites.observer = met.watch, met
    try:
        with as_in_evaluation(model), sites.uncounted():
            run(model, simulation.example)
    finally:
        sites.watcher = sites.observer = None
    state, plain = model.state_dict(), copy.deepcopy(simulation).restore()
    plain.load_state_dict(state)
    return _with_quantized_layers(plain, sites, met).eval()


class QuantizedLayer(nn.Module):
    """A layer with a quantized weight, between graphs that quantize its input and its result."""

    def __init__(self, layer: nn.Module, input: nn.Module, output: nn.Module) -> None:
        super().__init__()
        self.input = input
        self.layer = layer
        self.output = output

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.output(self.layer(self.input(x)))
        return result

    def __getattr__(self, name: str) -> Any:
        """Give the layer's attributes too: code that looks at `weight.dtype` finds it."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)


class QuantizerGraph(nn.Module):
    """A quantizer as a graph of torch's operators, for tensors of so many axes; axes before these become rows."""

    def __init__(self, graph: GraphModule, axes: int) -> None:
        super().__init__()
        self.graph = graph
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, x.dim() - self.axes) if x.dim() > self.axes else x
        quantized: Tensor = self.graph(rows.contiguous())
        return quantized.reshape(x.shape)


@dataclass
class MetLayers:
    """The watcher and the observer of a forward: the call and the quantized weight of each site."""

    calls: dict[str, Call] = field(default_factory=dict)
    """The calls by the names of their sites; their operands are on torch's `meta` device."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """The weights that the sites multiply."""

    def watch(self, site: Site, call: Call) -> None:
        """Note a call, without the numbers that it multiplies."""
        operands = tuple(operand.detach().to("meta") for operand in call.operands)
        by_place = dict(zip(call.places, operands, strict=True))
        args = tuple(by_place.get(place, value) for place, value in enumerate(call.args))
        kwargs = {key: by_place.get(key, value) for key, value in call.kwargs.items()}
        self.calls[site.name] = replace(call, args=args, kwargs=kwargs, operands=operands)

    def __call__(self, site: Site, role: str, before: Tensor, after: Tensor, quantizer: Any) -> None:
        """Note a weight."""
        call = self.calls[site.name]
        if role == "weight" and call.weight is not None:
            self.weights[site.name] = call.layouts[call.weight].back(after.detach())


def _with_quantized_layers(model: nn.Module, sites: Sites, met: MetLayers) -> nn.Module:
    """Put quantized layers into a model that is not simulated, in place of those that the sites quantize.

    Raises `RecipeError` for what the sites do and no layer holds.
    """
    changing = [site for site in sites.table.values() if _changes(site)]
    for site in changing:
        if why := _why_not(site, met):
            raise RecipeError(f"{site.aliases[0] if site.aliases else site.name}: {why}")
    for operation in sites.operations.table.values():
        if operation.plan.changes:
            raise RecipeError(f"{operation.name} is not torch's own operation; leave `operations` out")
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    for site in changing:
        layer = model.get_submodule(str(site.weight).rpartition(".")[0])
        quantized = _quantized_layer(layer, site, met)
        for path in paths[id(layer)]:
            if not path:
                return quantized
            model.set_submodule(path, quantized)
    return model


def _changes(site: Site) -> bool:
    """Tell if a site computes anything else than torch does."""
    return site.changes_products or site.standing("weight") is not None or bool(site.rotations)


def _why_not(site: Site, met: MetLayers) -> str:
    """The reason why no layer holds what a site does; empty if one does."""
    if site.weight is None:
        pattern = f"*{site.aliases[0][-3:]}" if site.aliases else site.name
        return f"it multiplies activations, and no layer holds their quantizers; skip {pattern!r}"
    if site.plan.arithmetic.simulates:
        return f"it is computed in {site.plan.arithmetic}, which is not an operator of torch; leave the arithmetic out"
    if site.rotations:
        return "a transform rotates its operands in each forward; leave the transform out"
    if any(site.standing(role) is not None and site.quantizer(role).draws for role in ("input", "output")):
        return "its quantizers draw random numbers in each forward; round to nearest"
    if site.computed or not site.weight.endswith("weight") or site.name not in met.weights:
        return f"{site.weight} is computed in each forward, is not the weight of a layer, or is not reached; skip it"
    return ""


def _quantized_layer(layer: nn.Module, site: Site, met: MetLayers) -> QuantizedLayer:
    """The layer with its quantized weight and its quantizers. Raises `RecipeError` if it is more than the matmul."""
    call, weight = met.calls[site.name], met.weights[site.name]
    place = 1 - (call.weight or 0)
    layout = call.layouts[place]
    x, original = _numbers(_open(call.operands[place].shape, layout), weight), layer.get_parameter("weight")
    operands = [x, original] if place == 0 else [original, x]
    with torch.no_grad():
        result = call.run(operands)
        alone = not [*layer.children()] and original.shape == weight.shape and torch.equal(layer(x), result)
    if not alone:
        raise RecipeError(
            f"{site.name}: a {type(layer).__name__} computes more than the product with its weight, so its quantizers "
            f"have no place in it; skip it"
        )
    graphs = [
        _graph(site, site.quantizer(role), at, tensor)
        for role, at, tensor in (("input", layout, x), ("output", call.result, result))
    ]
    layer.weight = nn.Parameter(torch.empty_like(original).copy_(weight), requires_grad=False)
    return QuantizedLayer(layer, *graphs)


def _open(shape: torch.Size, layout: Layout) -> list[int]:
    """A shape in which each axis that rows are counted along has a size of its own."""
    count = len(shape) - 1 if layout is LAST else 1
    sizes = itertools.islice((size for size in SIZES if size not in shape), count)
    return [*sizes, *shape[count:]]


def _numbers(shape: list[int], like: Tensor) -> Tensor:
    """Numbers of both signs, in the dtype and on the device of a tensor."""
    count = torch.Size(shape).numel()
    return torch.linspace(-2, 3, count, device=like.device).to(like.dtype).reshape(shape)


def _graph(site: Site, quantizer: Any, layout: Layout, like: Tensor) -> nn.Module:
    """The quantizer of a tensor as a graph; the identity without a quantizer. Raises `RecipeError`."""
    if quantizer is None:
        return nn.Identity()

    def quantized(x: Tensor) -> Tensor:
        rounded: Tensor = layout.back(quantizer.quantize(layout.rows(x)))
        return rounded

    try:
        with accelerated_by(), torch.no_grad():
            quantized(like)  # tables of formats are made here, and not while a graph is traced
            graph = make_fx(quantized, tracing_mode="symbolic", _allow_non_fake_inputs=True)(like)
    except Exception as error:  # of any class: a quantizer's own code is traced
        raise RecipeError(f"{site.name}: {quantizer} is not a graph of operators: {one_line(error)}") from None
    return QuantizerGraph(copy.deepcopy(graph).requires_grad_(False), like.dim())
