"""A simulated model as plain modules: its quantizers are graphs of torch's operators, without hooks and without a mode.

A layer that is one matmul becomes a `QuantizedLayer`, which holds the quantized weight. A weight whose product is not
changed otherwise, such as a stack of experts, is a parameter with the quantized values. Any other simulation becomes
one graph of the whole model: that of attention, of operations, of experts' inputs. What no graph holds is refused by
name.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from qsim_core.errors import QsimError, RecipeError, one_line
from qsim_core.formats.accelerator import accelerated_by
from qsim_core.matmuls.call import Call
from qsim_core.matmuls.layout import LAST, Layout, holds_experts, layout_of
from qsim_core.quantizers.stacked import Stacked
from qsim_core.simulation.simulation import Simulation, simulate
from qsim_core.sites.quantized_weights import Weights
from qsim_core.sites.site import Site
from qsim_core.transforms.forward import as_in_evaluation
from qsim_core.transforms.forward import call as run

SIZES = (17, 19, 23, 29, 31, 37, 41, 43, 47, 53)
"""Sizes of axes that a graph leaves open. They differ, so that tracing takes none of them for another one."""


def materialize(simulation: Simulation) -> nn.Module:
    """Make a copy of a simulated model that computes the same without hooks and modes: torch exports and compiles it.

    Weights are quantized, and quantizers are graphs of torch's operators. Outputs have the simulation's bits under
    `arithmetic: float32`, which is tried with the example; a compiler may round in other places. Where something else
    than layers is changed (products of activations, operations, the inputs of experts), the copy is one graph. It
    takes arguments as the example has them, in any batch and length. Raises `RecipeError` for what no graph holds:
    arithmetics of devices, random numbers. Raises `QsimError` without an example, and after hooks of transforms.
    """
    model, sites = simulation.model, simulation.sites
    if simulation.hooks_left:
        raise QsimError(
            f"a transform has left {simulation.hooks_left} hooks on the model, and the weights need them; a plain "
            f"model cannot have them"
        )
    if simulation.example is None:
        raise QsimError("give simulate an example: it tells which weights are multiplied")
    for site in sites.table.values():
        if why := _held_by_nothing(site):
            raise RecipeError(f"{_name(site)}: {why}")
    for operation in sites.operations.table.values():
        if any(one is not None and one.draws for one in (operation.plan.input, operation.plan.output)):
            raise RecipeError(f"{operation.name}: {RANDOM}")
    simulation.refresh()
    met, example = MetWeights(model, sites.weights), _uncached(model, simulation.example)
    exact, sites.exact = sites.exact, ()
    try:
        with as_in_evaluation(model), sites.uncounted(), accelerated_by():
            expected = run(model, example)
            sites.watcher, sites.observer = met.watch, met
            run(model, example)
    finally:
        sites.watcher, sites.observer, sites.exact = None, None, exact
    plain = _in_layers(simulation, met)
    if isinstance(plain, str):
        plain = _graph_of_all(simulation, met, plain)
    _check_bits(plain, expected, example)
    return plain


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


Change = Callable[[Tensor], Tensor]
"""A rotation, a quantizer, or both, of a tensor."""
RANDOM = "its quantizers draw random numbers in each forward, and a graph would draw them once; round to nearest"


@dataclass
class MetWeights:
    """The watcher and the observer of a forward: the call and the quantized weight of each site."""

    model: nn.Module
    held: Weights
    calls: dict[str, Call] = field(default_factory=dict)
    """The calls by the names of their sites; their operands are on torch's `meta` device."""
    found: dict[str, Tensor | None] = field(default_factory=dict)
    """The parameters of sites with quantized values; None: no single tensor has them."""
    weight: Tensor | None = None
    """The weight that the site at work has quantized."""

    def __call__(self, site: Site, role: str, before: Tensor, after: Tensor, quantizer: Any) -> None:
        """Note a weight. Its call is shown once it has been computed."""
        if role == "weight":
            self.weight = after.detach()

    def watch(self, site: Site, call: Call) -> None:
        """Note a call, without the numbers that it multiplies, and the weight of its site."""
        value, self.weight = self.weight, None
        if value is not None and call.weight is not None and site.weight is not None and not site.computed:
            self._note(site, call.operands[call.weight].detach(), call.layouts[call.weight], value)
        operands = tuple(operand.detach().to("meta") for operand in call.operands)
        by_place = dict(zip(call.places, operands, strict=True))
        args = tuple(by_place.get(place, value) for place, value in enumerate(call.args))
        kwargs = {key: by_place.get(key, value) for key, value in call.kwargs.items()}
        self.calls[site.name] = replace(call, args=args, kwargs=kwargs, operands=operands)

    def _note(self, site: Site, operand: Tensor, layout: Layout, rows: Tensor) -> None:
        """Note a parameter with quantized values, and see that each part that is multiplied has the same ones."""
        parameter = self.model.get_parameter(str(site.weight)).detach()
        value = layout.back(rows)
        if site.name not in self.found:
            self.found[site.name] = self._whole(site, parameter, operand, layout, value)
        known = self.found[site.name]
        if known is not None and not torch.equal(_part(known, parameter, operand), value):
            self.found[site.name] = None

    def _whole(self, site: Site, parameter: Tensor, operand: Tensor, layout: Layout, value: Tensor) -> Tensor | None:
        """The parameter with quantized values, of which an operand is a part, as one expert is of a stack."""
        quantizer = site.standing("weight")
        if quantizer is None or site.weight in self.held.pinned:
            return parameter.clone()
        if operand.numel() == parameter.numel():
            found = torch.empty_like(parameter)
            _part(found, parameter, operand).copy_(value)
            return found
        whole = layout_of(parameter, operand, layout)
        if whole is None:
            return None
        stacked = not quantizer.by_rows and holds_experts(parameter, whole)
        rows = (Stacked(each=quantizer) if stacked else quantizer).quantize(whole.rows(parameter))
        return torch.empty_like(parameter).copy_(whole.back(rows))


def _part(of: Tensor, parameter: Tensor, operand: Tensor) -> Tensor:
    """The part of a tensor that an operand is of a parameter."""
    begin = operand.storage_offset() - parameter.storage_offset() + of.storage_offset()
    return of.as_strided(operand.shape, operand.stride(), begin)


def _name(site: Site) -> str:
    return site.aliases[0] if site.aliases else site.name


def _changes(site: Site) -> bool:
    """Tell if a site computes anything else than torch does."""
    return (
        site.changes_products or site.standing("weight") is not None or bool(site.rotations) or site.beside is not None
    )


def _held_by_nothing(site: Site) -> str:
    """The reason why neither a layer nor a graph holds what a site does; empty if one may."""
    if site.plan.arithmetic.simulates:
        return f"it is computed in {site.plan.arithmetic}, which is not an operator of torch; leave the arithmetic out"
    if site.computed and site.standing("weight") is not None:
        return (
            f"{site.weight} is not its weight, which is computed of it in each forward; make the weight a parameter "
            f"(torch.nn.utils.parametrize.remove_parametrizations), or skip it"
        )
    if any(one is not None and one.draws for one in map(site.quantizer, (*site.input_roles, "output"))):
        return RANDOM
    return ""


def _copied(simulation: Simulation) -> nn.Module:
    """A copy of the model without the simulation, with the weights as transforms have left them."""
    copied = copy.deepcopy(simulation)
    copied.keep = True  # nothing of the original weights is needed
    plain = copied.restore()
    plain.load_state_dict(simulation.model.state_dict())
    return plain.eval()


def _in_layers(simulation: Simulation, met: MetWeights) -> nn.Module | str:
    """A copy with quantized layers and weights in place of those that sites change, or what needs a graph of all.

    Raises `RecipeError` for a quantizer that is not a graph.
    """
    for operation in simulation.sites.operations.table.values():
        if operation.plan.changes:
            return f"{operation.name} is changed"
    changing = [site for site in simulation.sites.table.values() if _changes(site)]
    for site in changing:
        if site.weight is None:
            return f"{_name(site)} multiplies activations"
        if met.found.get(site.name) is None or _used_otherwise(simulation, site):
            return f"{site.weight} is multiplied in parts or along two axes, is not reached, or has another use"
    plain = _copied(simulation)
    paths: dict[int, list[str]] = {}
    for path, module in plain.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    for site in changing:
        weight = met.found[site.name]
        assert weight is not None
        path, _, last = str(site.weight).rpartition(".")
        owner = plain.get_submodule(path)
        if not (site.inputs or site.standing("output") is not None or site.rotations or site.beside is not None):
            owner.register_parameter(last, nn.Parameter(weight, requires_grad=False))
            continue
        quantized = None if site.beside else _quantized_layer(owner, last, weight, site, met.calls[site.name])
        if quantized is None:
            return f"a {type(owner).__name__} ({site.name}) computes more than the product with its weight"
        for place in paths[id(owner)]:
            if not place:
                return quantized.eval()
            plain.set_submodule(place, quantized)
    return plain.eval()


def _used_otherwise(simulation: Simulation, site: Site) -> bool:
    """Tell if the parameter that is a site's weight is read elsewhere too, under the same name."""
    return len(simulation.sites.weights.uses.get(str(site.weight), ())) > 1


def _quantized_layer(layer: nn.Module, last: str, weight: Tensor, site: Site, call: Call) -> QuantizedLayer | None:
    """The layer with its quantized weight and its quantizers; None if it is more than the matmul."""
    if last != "weight" or [*layer.children()] or call.operands[call.weight or 0].shape != weight.shape:
        return None
    place = 1 - (call.weight or 0)
    layout = call.layouts[place]
    x, original = _numbers(_open(call.operands[place].shape, layout), weight), layer.get_parameter("weight")
    operands = [x, original] if place == 0 else [original, x]
    with torch.no_grad():
        result = call.run(operands)
        if not torch.equal(layer(x), result):
            return None
    changes = [
        _graph(change, tensor) if (change := _change(site, role, at)) is not None else nn.Identity()
        for role, at, tensor in (("input", layout, x), ("output", call.result, result))
    ]
    layer.weight = nn.Parameter(weight, requires_grad=False)
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


def _graph_of_all(simulation: Simulation, met: MetWeights, why: str) -> nn.Module:
    """A model as one graph, with all quantizers in it. Raises `RecipeError`, which says why a graph is needed."""
    sites, plain = simulation.sites, _copied(simulation)
    args, kwargs = _arguments(plain, simulation.example)
    recipe = {"arithmetic": "float32", "operations": simulation.recipe.operations}
    inner = simulate(plain, recipe, example=simulation.example)
    for site in sites.table.values():
        found = inner.sites.table[site.name]
        found.plan, found.rotations, found.beside = site.plan, site.rotations, site.beside
        found.fixed = copy.deepcopy(site.fixed)
        weight = met.found.get(site.name)
        if site.weight is not None and site.standing("weight") is not None:
            if weight is None or _used_otherwise(simulation, site):
                raise RecipeError(f"{site.weight} is multiplied in parts, along two axes, or has another use; skip it")
            path, _, last = site.weight.rpartition(".")
            plain.get_submodule(path).register_parameter(last, nn.Parameter(weight, requires_grad=False))
            found.fixed["weight"] = None
    shapes: Any = tuple(map(_any_size, args)) if args else {name: _any_size(value) for name, value in kwargs.items()}
    try:
        with accelerated_by(), torch.no_grad(), _grouped():
            run(plain, simulation.example)  # tables of formats are made here, and not while the model is traced
            program = torch.export.export(plain, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # of any class: the model's own code is traced
        raise RecipeError(f"{why}, and the model is not one graph: {one_line(error)}; leave it out") from None
    return program.module().requires_grad_(False)


@contextlib.contextmanager
def _grouped() -> Iterator[None]:
    """Have experts of transformers multiplied by `grouped_mm` in a graph too.

    In a graph transformers takes an operator of its own, whose products no site meets.
    """
    from transformers.integrations import moe

    library: Any = moe
    before = library.is_torchdynamo_compiling
    try:
        library.is_torchdynamo_compiling = lambda: False
        yield
    finally:
        library.is_torchdynamo_compiling = before


def _check_bits(plain: nn.Module, expected: Any, example: Any) -> None:
    """Raise `QsimError` unless a plain model gives the numbers of the simulation for the example."""
    with torch.no_grad():
        found = run(plain, example)
    try:
        torch.testing.assert_close(_tensors(found), _tensors(expected), rtol=0, atol=0, equal_nan=True)
    except AssertionError:
        raise QsimError(
            "the plain model does not give the simulation's numbers for the example: its code computes otherwise in a "
            "graph; please report it"
        ) from None


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _arguments(model: nn.Module, example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example as positional and named arguments, two rows of each tensor at least: torch opens no axis of 1."""
    if isinstance(example, Mapping):
        return (), {name: _doubled(value) for name, value in _uncached(model, example).items()}
    return tuple(map(_doubled, example if isinstance(example, tuple) else (example,))), {}


def _uncached(model: nn.Module, example: Any) -> Any:
    """The example without a cache of keys and values, which a graph does not give."""
    caches = isinstance(example, Mapping) and hasattr(getattr(model, "config", None), "use_cache")
    return {**example, "use_cache": False} if caches else example


def _doubled(value: Any) -> Any:
    single = isinstance(value, Tensor) and value.dim() and len(value) == 1
    return torch.cat([value, value]) if single else value


def _any_size(value: Any) -> Any:
    """Leave the size of each axis open, where the model's own code does; None for what is not a tensor."""
    return dict.fromkeys(range(value.dim()), torch.export.Dim.AUTO) if isinstance(value, Tensor) else None
