"""The context of a transform: the model's matmuls, calibration data and blocks, and reports of what it did."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qsim_core.errors import DataError, ModelError
from qsim_core.formats.quantizer import Quantizer, straight_through
from qsim_core.matmuls.call import Call
from qsim_core.quantizers.scales import Scales
from qsim_core.sites.executor import tried, tried_operands
from qsim_core.sites.site import Site
from qsim_core.sites.sites import Sites
from qsim_core.transforms.blocks import Block, MatmulWatcher, Originals, walk
from qsim_core.transforms.encoded_weights import EncodedWeight, WeightEncoder
from qsim_core.transforms.forward import as_in_evaluation, call
from qsim_core.transforms.report import LayerReport
from qsim_core.transforms.run import Run
from qsim_core.transforms.store import Blocks

ACTIVATIONS = ("input", "input2")
"""The roles of the operands that are not weights."""


@dataclass(frozen=True)
class MatmulWeight:
    """A weight that a matmul multiplies by, and the quantizer that its site has for it."""

    model: nn.Module
    site: Site
    name: str
    """The parameter's full name."""
    quantizer: Quantizer

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as it is now: of an offloaded module it is another one each time."""
        return self.model.get_parameter(self.name)


class Context:
    """One transform at work on a model whose sites are known and quantize nothing meanwhile."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sites,
        batches: Sequence[Any] | None,
        run: Run,
        name: str,
        example: Any = None,
        declared: Mapping[str, Sequence[str]] | None = None,
        handles: list[RemovableHandle] | None = None,
    ) -> None:
        self.model = model
        self.sites = sites
        self.run = run
        self.name = name
        self.reports: list[LayerReport] = []
        self.warnings: list[str] = []
        self._batches = batches
        self._example = example
        self.declared = declared
        """For norms by path, the weights that read them, as `simulate(…, structure=…)` was given them."""
        self.hints: dict[str, None] = {}
        """Texts for the message of a transform that changes nothing."""
        self.handles = [] if handles is None else handles
        """Of hooks that a transform leaves in the model; `restore` takes them away."""

    @property
    def example(self) -> Any:
        """One batch: the one that `simulate` was given, or the first of the calibration data."""
        return self.batches[0] if self._example is None else self._example

    @property
    def all_sites(self) -> Iterable[Site]:
        """Every site of the model, in the order in which they were met."""
        return self.sites.table.values()

    def look(self, watch: MatmulWatcher) -> None:
        """Run the example through the model once, and show `watch` every matmul."""
        with self.watching(watch, 0), as_in_evaluation(self.model):
            call(self.model, self.example)

    @property
    def batches(self) -> Sequence[Any]:
        """The calibration data: inputs of the model, batch by batch. Raises `DataError` without any."""
        if not self._batches:
            raise DataError(
                f"{self.name} needs calibration data; give simulate(…, calibration=batches), or --calibration-data"
            )
        return self._batches

    def weights(self) -> list[MatmulWeight]:
        """Every weight that the recipe quantizes, in the order in which the model multiplies by them."""
        known = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        found = [
            MatmulWeight(self.model, site, site.weight, site.standing("weight"))
            for site in self.sites.table.values()
            if site.weight in known and site.weight is not None and site.standing("weight") is not None
        ]
        if not found:
            self.hint("the recipe quantizes no weight")
        return found

    def encoded(self) -> dict[str, EncodedWeight]:
        """Give each weight that the recipe quantizes as codes, scales and zero points, as it would be stored now.

        Weights that the example does not reach are left out. So are those of sites that are not known yet.
        """
        encoder = WeightEncoder(self.model, self.sites)
        self.look(encoder.meet)
        return encoder.found

    def observe(self, watch: MatmulWatcher, description: str) -> None:
        """Run all calibration data through the model once, and show `watch` every matmul."""
        for index, batch in enumerate(self.run.track(self.batches, len(self.batches), description)):
            with self.watching(watch, index), as_in_evaluation(self.model):
                call(self.model, batch)

    def simulated(
        self, site: Site, call: Call, roles: Iterable[str] = ("input", "input2", "weight", "output")
    ) -> Tensor:
        """Compute a matmul that a watcher is shown under the recipe, on its operands as they are now.

        Raises `RecipeError` where the recipe wants a static scale: those are found after all transforms.
        """
        return tried(site, call, self.sites.weights, roles)

    def with_quantized_inputs(self, site: Site, call: Call) -> Call:
        """Give a call that a watcher is shown the operands that the recipe makes of its inputs; its weight stays.

        Raises `RecipeError` where the recipe wants a static scale.
        """
        return replace(call, operands=tuple(tried_operands(site, call, self.sites.weights, ACTIVATIONS)))

    @contextmanager
    def quantized_activations(self, on: bool = True) -> Iterator[None]:
        """Inside, forwards quantize inputs and outputs of matmuls under the recipe, or nothing; weights stay.

        Raises `RecipeError` in a forward where the recipe wants a static scale.
        """

        def rounded(site: Site, call: Call) -> Any:
            roles = (*ACTIVATIONS, "output")
            plain = all(site.standing(role) is None for role in roles)
            found = call.exact() if plain else self.simulated(site, call, roles)
            return found if plain or not torch.is_grad_enabled() else straight_through(call.exact(), None, found)

        before, self.sites.compute = self.sites.compute, rounded if on else None
        try:
            yield
        finally:
            self.sites.compute = before

    @contextmanager
    def watching(self, watch: MatmulWatcher, sample: int) -> Iterator[None]:
        """Inside, `watch` is shown every matmul. Raises `DataError` or `ModelError` where an operand has NaN or Inf."""

        def checked(site: Site, call: Call) -> None:
            for place, operand in enumerate(call.operands):
                if not _finite(operand):
                    if place == call.weight:
                        raise ModelError(f"the weight of {site.name} holds NaN or Inf")
                    raise DataError(f"calibration batch {sample} brings NaN or Inf to {site.name}; leave it out")
            watch(site, call)

        before, self.sites.watcher = self.sites.watcher, checked
        try:
            yield
        finally:
            self.sites.watcher = before

    def blocks(self, originals: bool = False) -> Iterator[Block]:
        """The model's blocks in order, each with the inputs that the blocks before it, as changed by now, give it.

        With `originals`, `block.original` is the block as it is when this is called, with the inputs that it has now.
        """
        return walk(self, Originals(self) if originals else None)

    def recall(self, index: int, block: nn.Module) -> bool:
        """Tell if an earlier run has finished this block; if so, restore what that run left, reports and pins too."""
        said = None if self._checkpoint is None else self._checkpoint.restore(index, block)
        if said is not None:
            for name in said["pinned"]:
                scales, of_scales = (known and Scales(*known) for known in said["scales"][name])
                weights = self.sites.weights
                weights.pin(name, self.model.get_parameter(name), scales, of_scales, weights.stored(name))
            self.reports = [LayerReport.model_validate(report) for report in said["reports"]]
            self.warnings = said["warnings"]
        return said is not None

    def remember(self, index: int, block: nn.Module) -> None:
        """Keep a finished block for a later run, where there is a work directory."""
        if self._checkpoint is not None:
            reports = [report.model_dump() for report in self.reports]
            weights = self.sites.weights
            scales = {name: [known and tuple(known) for known in weights.known(name)] for name in weights.pinned}
            said = {"pinned": sorted(weights.pinned), "scales": scales, "reports": reports, "warnings": self.warnings}
            self._checkpoint.save(index, block, said)

    @functools.cached_property
    def _checkpoint(self) -> Blocks | None:
        """Made before the first block is changed: it is found again by the model as it was."""
        if self.run.store is None:
            return None
        seen = [*self.batches, self._example]
        texts = self.sites.recipe.to_yaml(), self.name, repr(self.declared), str(self.run.seed)
        return self.run.store.blocks(self.model, seen, self.sites.recipe, *texts)

    def pin(self, weight: MatmulWeight, scales: Scales | None = None, of_scales: Scales | None = None) -> None:
        """Declare that a weight lies on its quantizer's grid: it is final and is not rounded again.

        With the scales, and zero points, of its rows [N, B] its products take the faster paths too, and it can be
        encoded. `of_scales` are the scales of these scales.
        """
        self.sites.weights.pin(weight.name, weight.parameter, scales, of_scales)

    def report(self, layer: str, **what: Any) -> None:
        """Say what was done to a layer; it goes into the result."""
        self.reports.append(LayerReport(transform=self.name, layer=layer, **what))

    def warn(self, layer: str, text: str) -> None:
        """Say that something was done to a layer that can hardly be right; it goes into the result and is shown."""
        self.warnings.append(f"{layer} {text}")

    def hint(self, text: str) -> None:
        """Add a text to the message that is raised if the transform changes nothing: where a user may look next."""
        self.hints.setdefault(text)

    @contextmanager
    def timed(self) -> Iterator[Callable[[], float]]:
        """Gives a function that says how many seconds have passed."""
        start = time.perf_counter()
        yield lambda: time.perf_counter() - start


def _finite(x: Tensor) -> bool:
    """Tell if a tensor holds neither NaN nor Inf. Either would be in the sum, which takes less time."""
    with torch._C.DisableTorchFunction():  # a sum of a weight is no use of it
        return (x.element_size() > 1 and bool(x.sum().isfinite())) or bool(x.isfinite().all())
