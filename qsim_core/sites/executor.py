"""The one executor of a site: quantize the operands, multiply by the site's arithmetic, quantize the result.

`Execution` does this step by step from the quantizers alone. `LiveExecution` does the same inside a running model.
It reuses weights that are already quantized, shares an input between calls, uses exact arithmetics, and shows every
tensor to an observer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qsim_core.errors import RecipeError
from qsim_core.formats.coded_parameter import PARAMETERS
from qsim_core.formats.quantizer import Quantizer
from qsim_core.formats.random_bits import at
from qsim_core.matmuls.call import Call
from qsim_core.matmuls.layout import LAST, Layout
from qsim_core.quantizers.scales import Scales
from qsim_core.sites.arithmetic import FLOAT32, Arithmetic, ExactArithmetic, Lowering, QuantizedRows, lowering_of
from qsim_core.sites.call_stack import CallStack, Reusable, recomputing, reusable
from qsim_core.sites.operand import Operand, operands_of
from qsim_core.sites.quantized_weights import Weight, Weights
from qsim_core.sites.simulated_product import Product, SimulatedCall, check_arithmetic
from qsim_core.sites.site import Site

SiteObserver = Callable[[Site, str, Tensor, Tensor, Quantizer | None], None]
"""Called with the site, the role (input, input2, weight or output), the tensor before and after, and its quantizer.

If it has a method `examine(site, left, right, product)`, that is shown the `QuantizedRows` of each simulated product.
"""


class Execution(Product):
    """One call at its site: quantizes the operands, multiplies them, quantizes the result."""

    def __init__(
        self, site: Site, call: Call, operands: Sequence[Operand], output: Any, arithmetic: Arithmetic | None = None
    ) -> None:
        self.site = site
        self.arithmetic = site.plan.arithmetic if arithmetic is None else arithmetic
        self.operands = operands
        self.output = output
        """The quantizer of the result; None leaves the result as it is."""
        layouts = tuple(operand.layout for operand in operands)
        self.call = call if layouts == call.layouts else replace(call, layouts=layouts)

    def result(self) -> Tensor:
        """Compute the quantized result of the call."""
        return self.finished(self.product([self.quantized(operand) for operand in self.operands]))

    def quantized(self, operand: Operand) -> Tensor:
        """Quantize one operand."""
        if operand.quantizer is None:
            return operand.tensor
        with at(f"{self.site.name}:{operand.role}", 0 if operand.role == "weight" else self.site.calls):
            return operand.layout.back(operand.quantizer.quantize(operand.rows.detach()))

    def product(self, values: Sequence[Tensor]) -> Tensor:
        """Multiply the quantized operands. A mask is left out if the result is quantized; `finished` adds it."""
        call = self.call
        if self.arithmetic.simulates:
            call = SimulatedCall.at_site(call, self)
        if self.call.masked and self.output is not None:
            return call.multiply(*values)
        product: Tensor = call.run(values)
        return product

    def finished(self, product: Tensor) -> Tensor:
        """Quantize the result. A bias is part of it; a mask is added afterwards."""
        return product if self.output is None else self.completed(self.rounded(product))

    def rounded(self, product: Tensor) -> Tensor:
        """Quantize the product alone."""
        result = self.call.result
        with at(f"{self.site.name}:output", self.site.calls):
            rounded: Tensor = result.back(self.rounded_output(result.rows(product)))
        return rounded

    def completed(self, rounded: Tensor) -> Tensor:
        """Add the mask to the quantized product, and put the result where the call wants it."""
        kwargs = self.call.kwargs
        if self.call.masked:
            alpha, beta = kwargs.get("alpha", 1), kwargs.get("beta", 1)
            rounded = alpha * rounded if alpha != 1 else rounded
            rounded = rounded if beta == 0 else beta * self.call.addend + rounded
        return kwargs["out"].copy_(rounded) if kwargs.get("out") is not None else rounded

    def rounded_output(self, rows: Tensor) -> Tensor:
        """Quantize the rows of the result."""
        rounded: Tensor = self.output.quantize(rows.detach())
        return rounded


def known_scales(weights: Weights, operands: Sequence[Operand]) -> Scales | None:
    """Give the scales of the operands' weight if its original values are gone; None: they are there.

    Raises `RecipeError` if a transform has put the weight on its grid and has not given the scales.
    """
    for operand in operands:
        if operand.weight is None or operand.quantizer is None:
            continue
        found = weights.scales_of(operand.weight, operand.tensor, operand.layout)
        scaled = operand.quantizer.granularity not in (None, "element")
        if found is None and scaled and weights.final(operand.weight) is not None:
            raise RecipeError(f"{operand.weight.name}: a transform has quantized it and has not given its scales")
        return found
    return None


def shown_operands(site: Site, call: Call, weights: Weights, quantizer_of: Callable[[str], Any]) -> tuple[Operand, ...]:
    """The operands of a call that a watcher sees, each with the quantizer that `quantizer_of(role)` gives."""
    met = [
        weights.shown(site.weight or "", operand, site.computed) if place == call.weight else None
        for place, operand in enumerate(call.operands)
    ]
    return operands_of(site, call, met, quantizer_of)


def tried(
    site: Site,
    call: Call,
    weights: Weights,
    roles: Iterable[str] = ("input", "input2", "weight", "output"),
    *,
    change: Callable[[Any], Any] | None = None,
    arithmetic: Arithmetic | None = None,
) -> Tensor:
    """Compute a call that a watcher sees as its site would compute it, without a change to the model.

    Only the given roles are quantized; a product of which an operand is not among them is computed in float32. `change`
    gives the quantizer that takes the place of another, and `arithmetic` takes the place of the site's. A weight
    that a transform has put on its grid is taken as it is. Raises `RecipeError` where a static scale is needed: these
    are found after all transforms.
    """
    with torch.no_grad():
        return _trial(site, call, weights, roles, change, arithmetic).result()


def tried_operands(
    site: Site, call: Call, weights: Weights, roles: Iterable[str], change: Callable[[Any], Any] | None = None
) -> list[Tensor]:
    """The operands of a call that a watcher sees, as its site would multiply them; only the given roles are quantized.

    `change` gives the quantizer that takes the place of another. Raises `RecipeError` where a static scale is needed.
    """
    with torch.no_grad():
        trial = _trial(site, call, weights, roles, change)
        return [trial.quantized(operand) for operand in trial.operands]


def _trial(
    site: Site,
    call: Call,
    weights: Weights,
    roles: Iterable[str],
    change: Callable[[Any], Any] | None = None,
    arithmetic: Arithmetic | None = None,
) -> TriedExecution:
    wanted = set(roles)

    def quantizer_of(role: str) -> Any:
        if role not in wanted:
            return None
        planned = site.planned(role)
        if planned is not None and role not in site.fixed and role != "weight" and planned.needs_held_scales(role):
            raise RecipeError(f"{site.name}: the static scale of its {site.named(role)} is found after all transforms")
        quantizer = site.quantizer(role)
        return quantizer if change is None or quantizer is None else change(quantizer)

    operands = shown_operands(site, call, weights, quantizer_of)
    whole = wanted >= {operand.role for operand in operands}
    chosen = (arithmetic or site.plan.arithmetic) if whole else FLOAT32
    return TriedExecution(site, call, operands, quantizer_of("output"), chosen, weights=weights)


class TriedExecution(Execution):
    """A call under the quantizers of its site, in a model that is not quantized yet."""

    def __init__(self, *arguments: Any, weights: Weights) -> None:
        super().__init__(*arguments)
        self.weights = weights

    def quantized(self, operand: Operand) -> Tensor:
        final = operand.weight is not None and self.weights.final(operand.weight) is not None
        return operand.tensor if final else super().quantized(operand)

    def weight_scales(self) -> Scales | None:
        return known_scales(self.weights, self.operands)


class LiveExecution(Execution):
    """A call in a running model."""

    def __init__(
        self,
        site: Site,
        call: Call,
        operands: Sequence[Operand],
        output: Any,
        module: nn.Module,
        stack: CallStack,
        weights: Weights,
        exact: Sequence[ExactArithmetic],
        observer: SiteObserver | None,
        arithmetic: Arithmetic | None = None,
    ) -> None:
        super().__init__(site, call, operands, output, arithmetic)
        self.module = module
        self.stack = stack
        self.weights = weights
        self.exact = exact
        self.observer = observer
        self.lowering: Lowering | None = None
        self.planned = [one.role for one in operands], [*(one.quantizer for one in operands), output]
        """The roles of the operands; their quantizers, and that of the result."""

    def again(self, call: Call, operands: Sequence[Operand]) -> LiveExecution:
        """The execution of another call by the same quantizers."""
        other = object.__new__(type(self))
        known = other.__dict__ = self.__dict__.copy()
        known["call"], known["operands"] = call, operands
        return other

    def result(self) -> Tensor:
        """Compute the call by an exact arithmetic if one can, and note the arithmetic at the site."""
        site, self.lowering = self.site, self._plan()
        values = [] if self.lowering is not None and self.observer is None else self._values()
        lowered = None if self.lowering is None else self._lowered(self.lowering)
        if lowered is not None and self.lowering is not None:
            site.arithmetic = str(self.arithmetic) if self.arithmetic.simulates else self.lowering.arithmetic
            return self._finished_lowered(self.lowering, lowered, values)
        site.arithmetic = str(self.arithmetic) if self.arithmetic.simulates else "float32"
        values = values or self._values()
        return self.finished(self.product(values))

    def finished(self, product: Tensor) -> Tensor:
        """Quantize the result, and show it to the observer before a mask is added."""
        if self.output is None and self.observer is None:
            return product
        rounded = product if self.output is None else self.rounded(product)
        self._observe("output", product, rounded, self.call.result, self.output)
        return product if self.output is None else self.completed(rounded)

    def _plan(self) -> Lowering | None:
        """Plan an exact computation of this call; None for float32, or for an arithmetic that is simulated.

        A module in training is computed in float32. Gradient checkpointing computes its forward again, with gradients,
        and must get the same numbers. An observer of simulated products is shown what `multiply` gets.
        """
        if self.module.training or self.call.masked or self.call.beside is not None:
            return None
        if self.arithmetic.simulates and self.examine is not None:
            return None
        return lowering_of(self.arithmetic, self.exact, self.call, *self.planned)

    def _values(self) -> list[Tensor]:
        return [self.quantized(operand) for operand in self.operands]

    def quantized(self, operand: Operand) -> Tensor:
        """Quantize one operand: a weight once for all calls, an input once for the consecutive calls that share it."""
        if operand.weight is not None:
            return self._weight(operand)
        return operand.tensor if operand.quantizer is None and self.observer is None else self._input(operand)

    def weight_scales(self) -> Scales | None:
        return known_scales(self.weights, self.operands)

    def weight_rows(self, operand: Operand, values: Tensor) -> QuantizedRows | None:
        if operand.weight is None or operand.quantizer is None:
            return None
        return self.weights.rows(operand.weight, operand.tensor, operand.layout, operand.quantizer, values)

    @property
    def examine(self) -> Callable[[QuantizedRows, QuantizedRows, Tensor], None] | None:
        examine = getattr(self.observer, "examine", None)
        return None if examine is None or recomputing() else functools.partial(examine, self.site)

    def _weight(self, operand: Operand) -> Tensor:
        quantizer, weight = operand.quantizer, operand.weight
        assert weight is not None
        before, value = None, operand.tensor
        self.weights.met(weight, operand.layout)
        if quantizer is not None:
            if self.observer is not None and not self.weights.overwritten(weight):
                before = operand.tensor.detach()
                before = before.clone() if self.weights.will_overwrite(weight) else before
            training = self.module.training
            with at(f"{self.site.name}:weight", self.site.calls if training else 0):
                value = self.weights.quantized(
                    weight,
                    operand.tensor,
                    operand.layout,
                    quantizer,
                    training,
                    self.lowering,
                    keep_scales=self.arithmetic.simulates,
                )
        if self.observer is not None:
            self._observe("weight", value if before is None else before, value, operand.layout, quantizer)
        return value

    def _input(self, operand: Operand) -> Tensor:
        """Quantize an input. The input of the call just before (as q, k and v share one) is not quantized again.

        A result that drew random numbers is not shared: each site draws its own, with and without gradients.
        """
        quantizer, value = operand.quantizer, operand.tensor
        if quantizer is not None:
            stack = self.stack
            if operand.layout is LAST and Reusable.holds(stack.quantized, quantizer, operand.tensor):
                value = stack.quantized.value  # type: ignore[union-attr]
            else:
                with at(f"{self.site.name}:{operand.role}", self.site.calls) as place:
                    value = operand.layout.back(self._rows(operand, quantizer))
                    last = None if place.drawn else reusable(quantizer, operand.tensor, value, operand.layout)
                stack.quantized = last
        if self.observer is not None:
            self._observe(operand.role, operand.tensor, value, operand.layout, quantizer)
        return value

    def _rows(self, operand: Operand, quantizer: Any) -> Tensor:
        rows: Tensor = operand.rows
        if torch.is_grad_enabled():
            quantized: Tensor = quantizer(rows)
            return quantized
        alone = len(self.operands) == 2 and self.observer is None  # an einsum may have more operands
        out = self.stack.memory_like(self.site, "quantized", rows) if alone else None
        into: Tensor = quantizer(rows) if out is None else quantizer.quantize_into(rows, out)
        return into

    def _lowered(self, lowering: Lowering) -> Tensor | None:
        """Compute the product by the exact arithmetic; None if it is not exact for these operands."""
        taken: list[Any] = []
        for place, operand in enumerate(self.operands):
            if operand.weight is not None:
                self.weights.met(operand.weight, operand.layout)
                given = operand.weight, operand.tensor, operand.layout, operand.quantizer, lowering
                taken.append(self.weights.lowered(*given, keep_scales=self.arithmetic.simulates))
                continue
            key, last = lowering.of(place), self.stack.lowered
            if operand.layout is LAST and Reusable.holds(last, key, operand.tensor):
                taken.append(last.value)  # type: ignore[union-attr]
            else:
                memory = self.stack.memory(self.site, "lowered")
                taken.append(lowering.take(place, operand.rows, memory))
                self.stack.lowered = reusable(key, operand.tensor, taken[-1], operand.layout)
        return None if any(operand is None for operand in taken) else lowering.product(self.call, *taken)

    def _finished_lowered(self, lowering: Lowering, lowered: Tensor, values: Sequence[Tensor]) -> Tensor:
        if not lowering.rounds:
            return self.finished(lowered)
        if self.observer is not None:  # the exact product is already rounded to the output's format
            self._observe("output", self.call.run(values), lowered, self.call.result, self.output)
        return lowered

    def rounded_output(self, rows: Tensor) -> Tensor:
        """Quantize the rows of the result, in their own memory where no other code has seen them."""
        seen = self.observer is not None or self.arithmetic.simulates or torch._C._len_torch_dispatch_stack() > 0
        if seen or torch.is_grad_enabled():
            rounded: Tensor = self.output(rows)
        else:
            rounded = self.output.quantize_into(rows, rows)
        return rounded

    def _observe(self, role: str, before: Tensor, after: Tensor, layout: Layout, quantizer: Any) -> None:
        if self.observer is not None and not recomputing():
            rows = layout.rows(before.detach())
            self.observer(self.site, role, rows, rows if after is before else layout.rows(after.detach()), quantizer)


class Layer:
    """A linear layer with a weight of its own as a call found it: a plan for later calls, without that call's tensors.

    It holds while the same objects stand at the module and at the site.
    """

    def __init__(self, execution: LiveExecution, weight: Weight) -> None:
        self.site, self.plan, self.fixed = execution.site, execution.site.plan, dict(execution.site.fixed)
        self.name, self.attribute = weight.name, weight.name.rpartition(".")[2]
        (self.input, self.of_input, self.quantizer), (self.role, self.of_weight, self.rounding) = (
            (one.role, one.layout, one.quantizer) for one in execution.operands
        )
        self.call = execution.call.again((), ())
        self.execution = execution.again(self.call, ())

    def again(self, module: nn.Module, args: tuple[Any, ...]) -> LiveExecution | None:
        """The execution of a call of these arguments; None if something is not as it was."""
        site, tensors = self.site, args[:2]
        x, weight = tensors
        if (
            type(weight) not in PARAMETERS
            or weight is not module._parameters.get(self.attribute)
            or module is not self.execution.module
            or site.plan is not self.plan
            or not self._fixed_as_before()
            or site.rotations
            or site.beside is not None
            or site.in_training is not None
        ):
            return None
        site.calls += not recomputing()
        operands = (
            Operand(self.input, x, self.of_input, self.quantizer),
            Operand(self.role, tensors[1], self.of_weight, self.rounding, Weight(self.name, tensors[1], True)),
        )
        return self.execution.again(self.call.again(args, tensors), operands)

    def _fixed_as_before(self) -> bool:
        now, before = self.site.fixed, self.fixed
        return len(now) == len(before) and (not now or all(now.get(role) is one for role, one in before.items()))


def check_planned(site: Site, call: Call, weights: Sequence[Weight | None]) -> None:
    """Raise `RecipeError` if the site's arithmetic cannot multiply its planned formats, before anything is quantized.

    A product of activations is checked when it is computed, as it may still get an alias and with it another plan.
    """
    if site.plan.arithmetic.simulates and site.weight is not None:
        check_arithmetic(site.plan.arithmetic, site, call, operands_of(site, call, weights, site.planned))
