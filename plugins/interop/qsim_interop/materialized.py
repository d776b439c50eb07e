"""A simulated model as plain modules: its quantizers are graphs of torch's operators, without hooks and without a mode.

A layer that is one matmul becomes a `QuantizedLayer`, which holds the quantized weight. Where products of activations
are quantized, as in attention, the whole model becomes a graph. What neither holds is refused by name: arithmetics of
devices, random numbers, operations.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
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
from qsim_core.simulation.simulation import Simulation, simulate
from qsim_core.sites.site import Site
from qsim_core.sites.sites import Sites
from qsim_core.transforms.forward import as_in_evaluation
from qsim_core.transforms.forward import call as run

SIZES = (17, 19, 23, 29, 31, 37, 41, 43, 47, 53)
"""Sizes of axes that a graph leaves open. They differ, so that tracing takes none of them for another one."""


def materialize(simulation: Simulation) -> nn.Module:
    """Make a copy of a simulated model that computes the same without hooks and modes: torch exports and compiles it.

    Weights are quantized, and quantizers are graphs of torch's operators. Outputs have the simulation's bits under
    `arithmetic: float32`; a compiler may round in other places. Where products of activations are quantized, the copy
    is one graph, which takes arguments as the example has them, in any batch and length. Raises `RecipeError` for what
    no layer or graph holds: arithmetics of devices, random numbers. Raises `QsimError` without an example, after hooks
    of transforms, and after `keep=False`.
    """
    model, sites = simulation.model, simulation.sites
    if simulation.hooks_left:
        raise QsimError(
            f"a transform has left {simulation.hooks_left} hooks on the model, and the weights need them; a plain "
            f"model cannot have them"
        )
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
    products = [site for site in sites.table.values() if site.weight is None and _changes(site)]
    layered = _with_quantized_layers(plain, sites, met, Untraced if products else _graph).eval()
    return _graph_of_all(layered, products, simulation.example) if products else layered


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


class Untraced(nn.Module):
    """A change of tensors that is traced with the rest of the model."""

    def __init__(self, change: Change, like: Tensor) -> None:
        super().__init__()
        self.change = change
        with accelerated_by(), torch.no_grad():
            change(like)  # tables of formats are made here, and not while the model is traced

    def forward(self, x: Tensor) -> Tensor:
        return self.change(x)


Change = Callable[[Tensor], Tensor]
"""A rotation, a quantizer, or both, of a tensor."""
HeldAs = Callable[[Change, Tensor], nn.Module]
"""Makes a module of a change, with a tensor for which it is."""


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


def _with_quantized_layers(model: nn.Module, sites: Sites, met: MetLayers, held: HeldAs) -> nn.Module:
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
        if site.weight is None:
            continue
        layer = model.get_submodule(str(site.weight).rpartition(".")[0])
        quantized = _quantized_layer(layer, site, met, held)
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
    if site.plan.arithmetic.simulates:
        return f"it is computed in {site.plan.arithmetic}, which is not an operator of torch; leave the arithmetic out"
    roles = (*site.input_roles, "output")
    if any(site.standing(role) is not None and site.quantizer(role).draws for role in roles):
        return "its quantizers draw random numbers in each forward; round to nearest"
    if site.beside is not None:
        return f"a transform has left {site.beside} beside its weight, which no layer holds; leave the transform out"
    if site.weight is None:
        return ""
    if site.computed or not site.weight.endswith("weight") or site.name not in met.weights:
        return f"{site.weight} is computed in each forward, is not the weight of a layer, or is not reached; skip it"
    return ""


def _quantized_layer(layer: nn.Module, site: Site, met: MetLayers, held: HeldAs) -> QuantizedLayer:
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
    changes = [
        held(change, tensor) if (change := _change(site, role, at)) is not None else nn.Identity()
        for role, at, tensor in (("input", layout, x), ("output", call.result, result))
    ]
    layer.weight = nn.Parameter(torch.empty_like(original).copy_(weight), requires_grad=False)
    return QuantizedLayer(layer, *changes)


def _open(shape: torch.Size, layout: Layout) -> list[int]:
    """A shape in which each axis that rows are counted along has a size of its own."""
    count = len(shape) - 1 if layout is LAST else 1
    sizes = itertools.islice((size for size in SIZES if size not in shape), count)
    return [*sizes, *shape[count:]]


def _numbers(shape: list[int], like: Tensor) -> Tensor:
    """Numbers of both signs, in the dtype and on the device of a tensor."""
    count = torch.Size(shape).numel()
    return torch.linspace(-2, 3, count, device=like.device).to(like.dtype).reshape(shape)


def _change(site: Site, role: str, layout: Layout) -> Change | None:
    """The rotation and the quantizer of a role as a function; None without either."""
    quantizer, rotation = copy.deepcopy(site.quantizer(role)), site.rotations.get(role)
    if quantizer is None and rotation is None:
        return None

    def change(x: Tensor) -> Tensor:
        rows = layout.rows(x)
        rows = rows if rotation is None else rotation(rows)
        return layout.back(rows if quantizer is None else quantizer.quantize(rows))

    change.__name__ = f"{site.name}: " + " after ".join(str(one) for one in (quantizer, rotation) if one is not None)
    return change


def _graph(change: Change, like: Tensor) -> nn.Module:
    """A change of tensors as a graph. Raises `RecipeError`."""
    try:
        with accelerated_by(), torch.no_grad():
            change(like)  # tables of formats are made here, and not while a graph is traced
            graph = make_fx(change, tracing_mode="symbolic", _allow_non_fake_inputs=True)(like)
    except Exception as error:  # of any class: a quantizer's own code is traced
        raise RecipeError(f"{change.__name__} is not a graph of operators: {one_line(error)}") from None
    return QuantizerGraph(copy.deepcopy(graph).requires_grad_(False), like.dim())


def _graph_of_all(model: nn.Module, products: list[Site], example: Any) -> nn.Module:
    """A model as one graph, with the quantizers of products of activations in it. Raises `RecipeError`."""
    args, kwargs = _arguments(model, example)
    inner = simulate(model, arithmetic="float32", example=example)
    for site in products:
        found = inner.sites.table[site.name]
        found.plan, found.rotations = site.plan, site.rotations
        found.fixed = copy.deepcopy(site.fixed)
    shapes: Any = tuple(map(_any_size, args)) if args else {name: _any_size(value) for name, value in kwargs.items()}
    try:
        with accelerated_by(), torch.no_grad():
            program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # of any class: the model's own code is traced
        raise RecipeError(
            f"{products[0].name} multiplies activations, and the model is not one graph: {one_line(error)}; skip such "
            f"products"
        ) from None
    return program.module()


def _arguments(model: nn.Module, example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example as positional and named arguments, two rows of each tensor at least: torch opens no axis of 1."""
    if isinstance(example, Mapping):
        cached = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
        return (), {name: _doubled(value) for name, value in (dict(example) | cached).items()}
    return tuple(map(_doubled, example if isinstance(example, tuple) else (example,))), {}


def _doubled(value: Any) -> Any:
    single = isinstance(value, Tensor) and value.dim() and len(value) == 1
    return torch.cat([value, value]) if single else value


def _any_size(value: Any) -> Any:
    """Leave the size of each axis open, where the model's own code does; None for what is not a tensor."""
    return dict.fromkeys(range(value.dim()), torch.export.Dim.AUTO) if isinstance(value, Tensor) else None
