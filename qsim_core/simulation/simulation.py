"""Put quantizers at a model's sites, look at what they do, and take them away again."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qsim_core.components.discovery import added
from qsim_core.components.host import Host, installed
from qsim_core.errors import CalibrationWarning, QsimError, RecipeError
from qsim_core.matmuls.call import Call
from qsim_core.quantizers.scales import Scales
from qsim_core.simulation import site_state, static_calibration
from qsim_core.simulation.audit import Audit, measured_audit
from qsim_core.simulation.closed_modules import check_open
from qsim_core.simulation.module_text import ModuleText
from qsim_core.simulation.recipe import Recipe
from qsim_core.simulation.work import Hardware, Product, SiteWork, WorkCounter
from qsim_core.sites.arithmetic import Auto, ExactArithmetic
from qsim_core.sites.executor import SiteObserver, tried
from qsim_core.sites.operation_sites import OperationSites
from qsim_core.sites.site import Site
from qsim_core.sites.sites import Compute, Sites
from qsim_core.snapshots import digest
from qsim_core.transforms.applying import apply_transforms, left_behind, needed_beside
from qsim_core.transforms.context import Context
from qsim_core.transforms.encoded_weights import EncodedWeight, WeightEncoder
from qsim_core.transforms.forward import Example, as_in_evaluation, call, check_numbers
from qsim_core.transforms.offload import at_hand
from qsim_core.transforms.offload import state as state_of
from qsim_core.transforms.padding import masks_inside, unpadded
from qsim_core.transforms.report import LayerReport
from qsim_core.transforms.run import Run


class Simulation:
    """A model whose matmuls run in another precision, until `restore`."""

    def __init__(self, model: nn.Module, recipe: Recipe, keep: bool, exact: Sequence[ExactArithmetic] = ()) -> None:
        self.model = model
        self.recipe = recipe
        self.keep = keep
        self.example: Example = None
        self.sites = Sites(model, recipe, keep, exact, operation_sites(recipe))
        self._handles: list[RemovableHandle] = []
        self._before_transforms: dict[str, Tensor] = {}
        self._left = ""
        self.needed_beside = ""
        self.hooks_left = 0
        """Things that transforms have left, without which the changed weights compute something else; or empty."""
        self.reports: list[LayerReport] = []
        """The reports of the transforms, layer by layer."""
        self.warnings: list[str] = []
        """Doubts about static scales and about what transforms did, each with its site."""
        self.cached: list[str] = []
        """The parts that an earlier run with this work directory had computed."""

    def _attach(self) -> None:
        self.sites.attach(self.model, self._handles)
        for path, module in self.model.named_modules():
            if "extra_repr" not in vars(module):
                vars(module)["extra_repr"] = ModuleText(self.sites, path, module)

    def audit(
        self, example: Example = None, on: Iterable[Hardware] = (), observer: SiteObserver | None = None
    ) -> Audit:
        """List every matmul with its quantizers and their error, measured on one batch.

        The batch is `example`, or the one that `simulate` was given. Without a batch the audit lists what has been
        met so far and measures nothing. `on` has hardware, for which the audit says what the batch costs. `observer`
        is called with each tensor of the batch: the site, the role, the rows before and after the quantizer, and the
        quantizer or None. Raises `QsimError` after `restore`.
        """
        if not self._handles:
            raise QsimError("there is nothing to audit: this simulation was restored")
        batch = self.example if example is None else example
        if batch is None:
            return measured_audit(self.sites, None)
        texts, _ = unpadded(self.model, [batch])
        with as_in_evaluation(self.model):
            found = measured_audit(self.sites, lambda: [call(self.model, text) for text in texts], observer)
        return found.model_copy(update={"costs": {str(one): one.price(self, batch) for one in on}})

    def products(self, example: Example = None) -> dict[str, list[Product]]:
        """Count the products of each site by size, in a forward in which nothing is quantized.

        No number is looked at, so the model may be on torch's `meta` device. Attention counts as its two products.
        """
        counter = self._counted(example)
        return {name: counter.products(name) for name in self.sites.table}

    def work(self, example: Example = None) -> list[SiteWork]:
        """Count the work of each site as `products` does, with the bits of operands and results under the recipe."""
        return list(self._counted(example).work(self.sites.table.values(), self._dtype))

    @property
    def _dtype(self) -> torch.dtype:
        """The dtype of the model's parameters."""
        return next((x.dtype for x in self.model.parameters() if x.is_floating_point()), torch.get_default_dtype())

    def _counted(self, example: Example) -> WorkCounter:
        counter, batch = WorkCounter(), self.example if example is None else example
        if batch is None:
            raise QsimError("there is nothing to count: give an example")
        self._run(batch, watcher=counter)
        return counter

    def _run(self, batch: Example, quantizing: bool = False, **watchers: Any) -> None:
        """Run the model on one batch, as in an evaluation. `watchers` are attributes of the sites meanwhile."""
        with self._at_sites(quantizing, **watchers), as_in_evaluation(self.model):
            call(self.model, batch)

    @contextlib.contextmanager
    def _at_sites(self, quantizing: bool = False, **watchers: Any) -> Iterator[None]:
        """Inside, sites quantize or not, show what they meet to `watchers`, and count no call."""
        vars(self.sites).update(watchers, quantizing=quantizing)
        try:
            with self.sites.uncounted():
                yield
        finally:
            vars(self.sites).update(dict.fromkeys(watchers), quantizing=True)

    @contextlib.contextmanager
    def unquantized(self, compute: Compute) -> Iterator[None]:
        """Forwards of the model as it is inside; `compute(site, call)` gives the result of every matmul of the sites.

        `call.exact()` is the result as it is; `tried(site, call, …)` computes the call under the recipe.
        """
        with self._at_sites(compute=compute):
            yield

    def tried(
        self, site: Site, call: Call, *, change: Callable[[Any], Any] | None = None, arithmetic: Any = None
    ) -> Tensor:
        """Compute a call that `unquantized` shows under the recipe, on its operands as they are.

        `change` gives the quantizer that takes the place of another; `arithmetic` takes the place of the site's.
        """
        return tried(site, call, self.sites.weights, change=change, arithmetic=arithmetic)

    def state_dict(self) -> dict[str, Tensor]:
        """Gather what the sites hold beside the recipe: static scales, learned steps, zero points, counts of calls.

        Raises `QsimError` if a transform has left something there that cannot be saved: rotations, hooks, or weights
        that are final.
        """
        if self._left:
            raise QsimError(f"{self._left}; a model that trains cannot be saved with it")
        return site_state.gather(self.sites)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Give the sites what `state_dict` gathered under the same recipe. Raises `QsimError` if it does not fit."""
        site_state.spread(self.model, self.sites, state)

    def refresh(self) -> None:
        """Quantize every weight anew at its next use.

        A change of a weight is noticed by itself in each forward, by a sample that has elements of all rows and
        columns. Single elements that were written through `parameter.data` may not be among them.
        """
        self.sites.weights.refresh()

    def folded_state_dict(self) -> tuple[dict[str, Tensor], list[str]]:
        """Give a copy of the model's `state_dict` with weights quantized, and the names of the weights that were left.

        Left are tied weights, which other modules use too, and weights that are multiplied along two axes. Left are
        also weights that are kept in another memory, and layers that the example does not reach. Raises `QsimError`
        without an example, and if a transform has left rotations or hooks that the weights need.
        """
        if self.needed_beside:
            raise QsimError(f"{self.needed_beside}, and the weights need them; they cannot be saved alone")
        if self.example is None:
            raise QsimError("give simulate an example: it tells which weights are multiplied")
        self.refresh()
        with as_in_evaluation(self.model):
            call(self.model, self.example)  # every quantized weight is at hand then
        return self.sites.weights.folded_into(self.model.state_dict(), self._weights_to_quantize())

    def encoded(self) -> dict[str, EncodedWeight]:
        """Give each weight that the recipe quantizes, by name, as codes, scales and zero points.

        `decode()` of a weight is what its site multiplies, bit for bit: of one that a transform has quantized too, and
        of the experts of a layer. A weight that cannot be encoded has the reason as `why_not`. Raises `QsimError`
        without an example.
        """
        if self.example is None:
            raise QsimError("give simulate an example: it tells which weights are multiplied")
        self.refresh()
        encoder = WeightEncoder(self.model, self.sites)
        self._run(self.example, quantizing=True, watcher=encoder.watch, observer=encoder)
        unmet = self._weights_to_quantize() - encoder.found.keys()
        return encoder.found | {name: EncodedWeight(name, why_not="the example does not reach it") for name in unmet}

    def _weights_to_quantize(self) -> set[str]:
        """Name the weights that the recipe quantizes, those of layers of the same classes that were not met too."""
        there = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        sites = (site for site in self.sites.table.values() if site.weight in there)
        met = {site.weight: site.quantizer("weight") for site in sites if site.weight}
        places = {name: name.rpartition(".") for name in met}
        kinds = {(type(self.model.get_submodule(path)), last) for path, _, last in places.values()}
        kinds -= {(nn.Embedding, "weight")}
        alike = {
            f"{path}.{last}" if path else last
            for path, module in self.model.named_modules()
            for last in module._parameters
            if (type(module), last) in kinds
        }
        unmet = (name for name in alike - met.keys() if self.recipe.plan([name.removesuffix(".weight")]).weight)
        return {*unmet, *(name for name, quantizer in met.items() if quantizer is not None)}

    def restore(self) -> nn.Module:
        """Take everything away: the model is what it was, bit for bit.

        Parameters that were trained, and that no transform had changed, stay trained. Raises `QsimError` after
        `keep=False`.
        """
        if not self.keep:
            raise QsimError("this simulation was made with keep=False: the original weights are gone; load them again")
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for module in list(self.model.modules()):
            if isinstance(vars(module).get("extra_repr"), ModuleText):
                del vars(module)["extra_repr"]
            module._modules.pop(site_state.STEPS, None)
        before, self._before_transforms = self._before_transforms, {}
        with torch.no_grad():
            for path, module in self.model.named_modules() if before else ():
                with at_hand(module, inside=False):
                    for name, tensor in [*module.named_parameters(path, False), *module.named_buffers(path, False)]:
                        if name in before:
                            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                                tensor.copy_(before[name])
        return self.model

    def __enter__(self) -> Simulation:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()

    def _discover(self, example: Example) -> None:
        """Run the example with every quantizer off, so that all sites are known; check the recipe against them."""
        self.example = example
        self.sites.checked = True
        self._run(example)
        try:
            self.sites.check()
        except RecipeError as error:
            with self._at_sites():
                outside = self.audit().uncovered
            if not outside:
                raise
            more = ", …" if len(outside) > 3 else ""
            raise RecipeError(f"{error}; products that have no site: {', '.join(outside[:3])}{more}") from None

    def _transform(self, batches: list[Example] | None, run: Run, declared: Mapping[str, Sequence[str]] | None) -> None:
        """Apply the recipe's transforms, and keep their reports and warnings."""
        if not self.recipe.transforms:
            return
        contexts = [
            Context(self.model, self.sites, batches, run, str(transform), self.example, declared, self._handles)
            for transform in self.recipe.transforms
        ]
        hooks = len(self._handles)
        self.sites.quantizing = False
        try:
            apply_transforms(zip(self.recipe.transforms, contexts, strict=True), self.model, self.sites)
        finally:
            self.sites.quantizing = True
        before = self._before_transforms
        for name, tensor in state_of(self.model):  # what no transform has changed may be trained, and stays so
            if name in before and digest([("", before[name])]) == digest([("", tensor)]):
                del before[name]
        self.hooks_left = len(self._handles) - hooks
        self._left = left_behind(self.sites, self.hooks_left)
        self.needed_beside = needed_beside(self.sites, self.hooks_left)
        self.reports += [report for context in contexts for report in context.reports]
        self.warnings += [warning for context in contexts for warning in context.warnings]

    def _fix(self, batches: list[Example] | None, run: Run) -> None:
        """Choose static scales, if any are needed, in one pass of the unquantized model over the calibration data.

        Scales that are trained start from the example where there are no calibration data.
        """
        if not batches and self.recipe.learns and self.example is not None:
            batches, _ = unpadded(self.model, [self.example])
        if not batches or not self.recipe.has_static:
            return
        wanted = static_calibration.wanted(self.sites.table.values())
        entry = None
        if run.store and not self.recipe.transforms and not self.recipe.learns:  # these leave things at sites
            entry = run.store.statistics(self.model, self.recipe.value_axis, wanted, batches)
        found, learning = None if entry is None else entry.get(), static_calibration.Learning()
        if found is not None:
            self.cached.append("statistics")
        else:
            fitter = self._gather(batches, run)
            found, learning = fitter.statistics(), fitter.weights
            if entry is not None and found.keys() <= {(name, role) for name, role, _ in wanted}:
                entry.put(found)  # of a site that the example has not met, its fingerprint knows nothing
        self.warnings += static_calibration.fix(self.model, self.sites.table, found, learning)

    def _gather(self, batches: list[Example], run: Run) -> static_calibration.Fitter:
        """Run the calibration data through the model as it is, and gather what passes the places that need scales."""
        fitter = static_calibration.Fitter()
        for place, batch in enumerate(run.track(batches, len(batches), "static scales")):
            fitter.next_batch(place)
            self._run(batch, observer=fitter)
        for site in self.sites.table.values():
            site.calls = 0
        return fitter


def simulate(
    model: nn.Module,
    recipe: Recipe | Mapping[str, Any] | None = None,
    *,
    weights: Any = None,
    activations: Any = None,
    outputs: Any = None,
    kv_cache: Any = None,
    arithmetic: Any = None,
    skip: Any = None,
    overrides: Mapping[str, Any] | None = None,
    example: Example = None,
    transforms: Iterable[Any] | None = None,
    calibration: Iterable[Example] | None = None,
    structure: Mapping[str, Sequence[str]] | None = None,
    state: Mapping[str, Tensor] | None = None,
    final: Mapping[str, Scales | EncodedWeight | None] | None = None,
    keep: bool = True,
    run: Run | None = None,
    host: Any = None,
    meanwhile: Callable[[], Any] | None = None,
) -> Simulation:
    """Simulate `model`, in place, with quantizers at every matmul's sites.

    Give a `recipe`, or its parts. `weights`, `activations`, `outputs` and `kv_cache` (attention's keys and values) are
    quantizers, their text, or plain callables tensor -> tensor. `arithmetic` is a component or its text. `skip` has
    patterns of sites, `overrides` are given by pattern. `transforms` are applied in their order. Without any of these
    the sites are put in place and nothing is quantized.

    `calibration` holds batches for transforms and static scales, each like an example; positions that an
    `attention_mask` hides are left out. A warning names a mask that the model makes inside, whose positions count.
    `structure` declares the weights that read a norm (norm's path -> names of weights), where tracing does not find
    them. `state`, the `state_dict` of a simulation, holds the static scales. `final` names weights that lie on their
    grids already, with their codes, the scales of their rows, or None: none is rounded again. `run` shows progress.

    An `example` is a mapping of keyword arguments, a tuple of positional ones, or one argument. With it all sites are
    known at once, else after the first forward; a pattern that matches no site is then an error. `keep=False`
    overwrites the weights instead of holding a second copy, and gives up `restore`. `meanwhile` is called with the
    model as it is, once its matmuls are known and the recipe fits them.

    Raises `RecipeError` or `SpecError` for what cannot be done, and leaves the model as it was. With `keep=False`
    changes of the transforms before the one that failed stay.
    """
    parts = {
        "weights": weights,
        "activations": activations,
        "outputs": outputs,
        "kv_cache": kv_cache,
        "arithmetic": arithmetic,
        "overrides": overrides,
    }
    given = {key: value for key, value in parts.items() if value is not None}
    if skip is not None:
        given["skip"] = skip if isinstance(skip, str) else tuple(skip)
    if transforms is not None:
        given["transforms"] = tuple(transforms)
    if recipe is not None and given:
        raise RecipeError(f"give a recipe or its parts, not both (here: recipe and {', '.join(given)})")
    if not isinstance(recipe, Recipe):
        recipe = Recipe.of(dict(recipe or given), host)
    check_open(model)
    if any(isinstance(vars(module).get("extra_repr"), ModuleText) for module in model.modules()):
        raise QsimError("this model is simulated already; restore() it first")
    simulation = Simulation(model, recipe, keep, exact_arithmetics(recipe, host))
    try:
        simulation._attach()
        for name, known in (final or {}).items():
            scales, stored = (known.scales, known) if isinstance(known, EncodedWeight) else (known, None)
            simulation.sites.weights.pin(name, model.get_parameter(name), scales, stored=stored)
        batches = None
        if calibration is not None:
            batches, notes = unpadded(model, calibration)
            simulation.warnings += notes
        if example is None and batches:
            example = batches[0]
        if recipe.transforms or recipe.has_static:
            check_numbers(example, *(batches or []))
        if example is not None:
            with masks_inside(model, example) as notes:
                simulation._discover(example)
            simulation.warnings += notes if batches else []
        if meanwhile is not None:
            for handle in simulation._handles:
                handle.remove()
            meanwhile()
            simulation._attach()
        if recipe.transforms and keep:
            simulation._before_transforms = {name: parameter.clone() for name, parameter in state_of(model)}
        simulation._transform(batches, run or Run(), structure)
        if state is None:
            simulation._fix(batches, run or Run())
        elif example is None:
            raise RecipeError("what sites held belongs to sites that are known; give simulate an example with state")
        else:
            simulation.load_state_dict(state)
        for line in simulation.warnings:
            warnings.warn(line, CalibrationWarning, stacklevel=2)
    except BaseException:
        simulation.keep = True  # nothing has been folded yet
        simulation.restore()
        raise
    return simulation


def exact_arithmetics(recipe: Recipe, host: Host | None) -> list[ExactArithmetic]:
    """The exact arithmetics that `auto` asks, in their order; none where no site asks them.

    They are those of installed plugins that are accelerators too, and those of registered plugins.
    """
    named = [part.arithmetic for part in recipe.parts]
    if not any(isinstance(one, Auto) or one.narrow_sums for one in named):
        return []
    made: list[Any] = [found() for found in (host or installed()).classes_without_search(ExactArithmetic)]
    return sorted((one for one in made if one.automatic), key=lambda one: (one.order, one.name))


def operation_sites(recipe: Recipe) -> OperationSites:
    """The sites of operations between products, which a plugin computes; none where the recipe names no operation."""
    if not recipe.operations:
        return OperationSites()
    made: OperationSites = added("operation_sites", "computes operations between products")(recipe)
    return made
