"""The sites of operations between products at work: which operations a module computes, and how each is computed."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qsim_core import Operation, OperationCall, Quantizer, Recipe, RecipeError
from qsim_core.errors import did_you_mean
from qsim_core.formats.quantizer import Function, straight_through
from qsim_core.formats.random_bits import at
from qsim_core.matmuls.attention import SOFTMAX
from qsim_core.operations.functions import KINDS, read_operation
from qsim_core.simulation.recipe import matches
from qsim_core.sites.call_stack import Frame, recomputing
from qsim_core.sites.operation_sites import OperationSite, OperationSites
from qsim_core.sites.plan import OperationPlan
from qsim_core.sites.sites import Sites
from qsim_nonlinear.module_state import Running
from qsim_nonlinear.sums import DIFFERENCES, JOINS, PRODUCTS, ROTARY, hidden, read_join, read_sum
from qsim_nonlinear.written_norms import WrittenNorms
from qsim_nonlinear.written_out import parts_of, written_out


class ComputedOperations(OperationSites):
    """The sites of all operations of one model under a recipe that names some."""

    functions: ClassVar[frozenset[Any]] = frozenset({*KINDS, *PRODUCTS, *DIFFERENCES, *JOINS})

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self._norms = WrittenNorms()

    def enter(self, sites: Sites, frame: Frame, args: tuple[Any, ...]) -> tuple[Tensor] | None:
        call = self._norms.read(frame.module, args)
        if call is None:
            return None
        site, running = self._site(frame, call), Running.of(frame)
        running.around = site.names
        if sites.quantizing and site.plan.input is not None:
            call = replace(call, operands=(self._quantized(site, "input", call.input, site.plan.input),))
        running.norm = site, call
        return None if call.input is args[0] else (call.input,)

    def leave(self, sites: Sites, frame: Frame, output: Any) -> Tensor | None:
        if Running.of(frame).norm is None or not isinstance(output, Tensor):
            return None
        site, call = Running.of(frame).norm  # type: ignore[misc]
        self._show(site, call, output)
        if not sites.quantizing or not site.plan.changes:
            return None
        if site.plan.implementation is not None:
            output = self._implemented(site, call, site.plan.implementation).to(output.dtype)
        return self._quantized(site, "output", output, site.plan.output)

    def meet(
        self, sites: Sites, mode: TorchFunctionMode, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        frame = sites.stack.frames[-1]
        if function in SOFTMAX:
            sites.connect(args[0] if args else kwargs["input"])
        if function in PRODUCTS:
            result = sites.watch(function, args, kwargs)
            if len(args) == 2 and all(type(x) is Tensor for x in args):
                Running.of(frame).remember(result, (args[0], args[1]))
            return result
        call = _read(sites, frame, function, args, kwargs)
        if call is None or self._is_unchanged_part(frame, call):
            result = sites.watch(function, args, kwargs)
            Running.of(frame).remember_half("sub" if function in DIFFERENCES else "add", args, result)
            return result
        site = self._site(frame, call)
        if not sites.quantizing and self._has_inner(frame, site, call):
            _written_out(frame, site, call, mode)  # the functions inside get their sites
        if not sites.quantizing or not (site.plan.changes or self._has_inner(frame, site, call)):
            result = sites.watch(function, args, kwargs)
        else:
            result = self._compute(sites, frame, site, call, mode)
        self._show(site, call, result)
        return result

    def check(self) -> None:
        known = list(dict.fromkeys(name for site in self.table.values() for name in site.names))
        for pattern in self.recipe.operations:
            if not matches(pattern, known):
                kinds = [name for name in known if ":" not in name] or ["none"]
                hint = did_you_mean(pattern, known) or f"; this model has {', '.join(sorted(kinds))}"
                raise RecipeError(f"operations: {pattern!r} matches no operation{hint}")

    def _plan(self, names: Iterable[str], around: Collection[str]) -> OperationPlan:
        """Plan the operation that has these names: its own, and those of its kinds.

        `around` are the names of the operation in whose written-out form it stands. A pattern that matches these means
        that operation, and not what is inside.
        """
        said: dict[str, Any] = {}
        names = list(names)
        for pattern, change in self.recipe.operations.items():
            if matches(pattern, names) and not matches(pattern, around):
                said |= {key: getattr(change, key) for key in change.model_fields_set}
        return OperationPlan(**said)

    def _site(self, frame: Frame, call: OperationCall) -> OperationSite:
        """Give the site of a module's next operation of this kind.

        Raises `RecipeError` if the operation cannot be computed as the recipe plans it.
        """
        kind, running = call.operation, Running.of(frame)
        running.counts[kind] += 1
        name = f"{frame.path}:{kind}.{running.counts[kind] - 1}"
        if name not in self.table:
            site = self.table[name] = OperationSite(name, call.kinds, OperationPlan())
            site.plan = self._plan(site.names, running.around)
            if site.plan.implementation is not None:
                try:
                    site.plan.implementation.check(call)
                except RecipeError as error:
                    raise RecipeError(f"{name}: {site.plan.implementation} does not compute {kind}: {error}") from None
            if site.plan.input is not None and not call.operands:
                raise RecipeError(
                    f"{name}: {kind} reads no activation that {site.plan.input} could quantize; say output"
                )
        self.table[name].calls += not recomputing()
        return self.table[name]

    def _compute(
        self, sites: Sites, frame: Frame, site: OperationSite, call: OperationCall, mode: TorchFunctionMode
    ) -> Any:
        """Compute an operation as its site plans it."""
        plan, given = site.plan, call.operands
        quantized = self._shown if call.operation in ("softmax", "log_softmax") else self._quantized
        operands = [quantized(site, "input", x, plan.input) for x in given]
        if call.in_place:
            operands = [x.clone() if x is original else x for x, original in zip(operands, given, strict=True)]
        call = replace(call, operands=tuple(operands))
        if plan.implementation is not None:
            result = self._implemented(site, call, plan.implementation)
        elif self._has_inner(frame, site, call):
            result = _written_out(frame, site, call, mode)
        else:
            own = replace(call, function=lambda *args, **kwargs: sites.watch(call.function, args, kwargs))
            result = own.run(operands)
        result = self._quantized(site, "output", result, plan.output)
        return given[0].copy_(result) if call.in_place else result

    def _is_unchanged_part(self, frame: Frame, call: OperationCall) -> bool:
        """Tell if a call is a part of another operation, and is computed as torch does it."""
        running = Running.of(frame)
        names = f"{frame.path}:{call.operation}.{running.counts[call.operation]}", *call.kinds
        return bool(running.around) and not self._plan(names, running.around).changes

    def _has_inner(self, frame: Frame, site: OperationSite, call: OperationCall) -> bool:
        """Tell if a function of one number inside this operation is computed in another way."""
        parts = ((f"{frame.path}:{part}.0", *KINDS[getattr(torch, part)]) for part in parts_of(call))
        return any(self._plan(names, site.names).changes for names in parts)

    def _implemented(self, site: OperationSite, call: OperationCall, operation: Operation) -> Tensor:
        """Compute an operation in a device's way, with the gradient of torch's own."""
        exact = call.of(call.operands)
        with torch.no_grad(), at(f"{site.name}:implementation", site.calls):
            value = operation.compute(call)
        if value.shape != exact.shape:
            raise RecipeError(f"{site.name}: {operation} gave shape {tuple(value.shape)} for {tuple(exact.shape)}")
        value = value.to(exact.dtype)
        self._observe(site, "implementation", exact, value, None)
        if torch.is_grad_enabled() and exact.requires_grad:
            return straight_through(exact, Function(call=torch.clone), value)
        return value

    def _shown(self, site: OperationSite, role: str, x: Tensor, quantizer: Quantizer | None) -> Tensor:
        """Quantize scores, of which those that a mask hides stay hidden, and count for no scale."""
        if quantizer is None:
            return x
        away = hidden(x)
        return torch.where(away, x, self._quantized(site, role, x.masked_fill(away, 0.0), quantizer))

    def _quantized(self, site: OperationSite, role: str, x: Tensor, quantizer: Quantizer | None) -> Tensor:
        if quantizer is None:
            return x
        with at(f"{site.name}:{role}", site.calls):
            found: Tensor = quantizer(x) if torch.is_grad_enabled() else quantizer.quantize(x)
        self._observe(site, role, x, found, quantizer)
        return found

    def _show(self, site: OperationSite, call: OperationCall, result: Any) -> None:
        if self.watcher is not None and isinstance(result, Tensor):
            self.watcher(site, call, result)

    def _observe(self, site: OperationSite, role: str, before: Tensor, after: Tensor, quantizer: Any) -> None:
        if self.observer is not None and not recomputing():
            self.observer(site, role, before.detach(), after.detach(), quantizer)


def _read(
    sites: Sites, frame: Frame, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> OperationCall | None:
    """Read a call as an operation on activations; None if it is not one."""
    if function in JOINS:
        return read_join(frame, function, args, kwargs)
    call = read_operation(function, args, kwargs)
    if call is not None and call.operation == "add":
        call = None if frame.explicit else read_sum(frame, call)
    if call is None or any(isinstance(x, nn.Parameter) for x in call.operands):
        return None
    read = call.operands[:1] if call.kinds == ROTARY else call.operands
    return None if read and all(sites.constants.find(x, frame.module) for x in read) else call


def _written_out(frame: Frame, site: OperationSite, call: OperationCall, mode: TorchFunctionMode) -> Tensor:
    """Compute an operation by its written-out form. Inside `mode` the functions in it meet their own sites."""
    running = Running.of(frame)
    running.around = site.names
    try:
        with mode:
            return written_out(call, {})
    finally:
        running.around = ()
