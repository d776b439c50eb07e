"""The sites of operations between products: each is named by its module, its kind and a count.

`model.layers.0.self_attn:softmax.0` is the first softmax that this module computes itself. The sites are there only if
a recipe names operations, and then all of them are listed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qsim_core.errors import RecipeError
from qsim_core.formats.quantizer import Function, Quantizer, straight_through
from qsim_core.formats.random_bits import at
from qsim_core.matmuls.layout import LAST
from qsim_core.operations.functions import KINDS, PRODUCTS, ROTARY, OperationCall, read_operation
from qsim_core.operations.operation import Operation
from qsim_core.operations.written_out import parts_of, written_out
from qsim_core.sites.call_stack import Frame, recomputing
from qsim_core.sites.plan import OperationPlan, Planner

OperationObserver = Callable[["OperationSite", str, Tensor, Tensor, Quantizer | None], None]
"""Called with the site, the role (input, implementation or output), the tensor before and after, and its quantizer."""


@dataclass
class OperationSite:
    """One operation of a module."""

    name: str
    kinds: tuple[str, ...]
    plan: OperationPlan
    calls: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Its own name, and those of its kinds."""
        return self.name, *self.kinds


class OperationSites:
    """The sites of all operations of one model."""

    def __init__(self, planner: Planner) -> None:
        self.planner = planner
        self.functions = frozenset({*KINDS, *PRODUCTS} if planner.names_operations else ())
        """The torch functions that are looked at."""
        self.table: dict[str, OperationSite] = {}
        self.observer: OperationObserver | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "observer": None}

    def read(
        self, frame: Frame, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], constant: Callable[..., Any]
    ) -> OperationCall | None:
        """Read a call as an operation on activations; None if it is not one.

        `constant(x, module)` gives what a tensor is computed from, if that is parameters alone.
        """
        call = read_operation(function, args, kwargs)
        if call is not None and call.operation == "add":
            call = None if frame.explicit else _sum(frame, call)
        if call is None or any(isinstance(x, nn.Parameter) for x in call.operands):
            return None
        read = call.operands[:1] if call.kinds == ROTARY else call.operands
        return None if read and all(constant(x, frame.module) for x in read) else call

    def site(self, frame: Frame, call: OperationCall) -> OperationSite:
        """Give the site of a module's next operation of this kind.

        Raises `RecipeError` if the operation cannot be computed as the recipe plans it.
        """
        kind = call.operation
        frame.operations[kind] += 1
        name = f"{frame.path}:{kind}.{frame.operations[kind] - 1}"
        if name not in self.table:
            site = self.table[name] = OperationSite(name, call.kinds, OperationPlan())
            site.plan = self.planner.plan_operation(site.names, frame.around)
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

    def compute(
        self, frame: Frame, site: OperationSite, call: OperationCall, watch: Callable[..., Any], mode: TorchFunctionMode
    ) -> Any:
        """Compute an operation as its site plans it.

        `watch` calls a torch function. Inside `mode` the functions of a written-out form meet their own sites.
        """
        plan, given = site.plan, call.operands
        quantized = self._shown if call.operation in ("softmax", "log_softmax") else self._quantized
        operands = [quantized(site, "input", x, plan.input) for x in given]
        if call.in_place:
            operands = [x.clone() if x is original else x for x, original in zip(operands, given, strict=True)]
        call = replace(call, operands=tuple(operands))
        if plan.implementation is not None:
            result = self._implemented(site, call, plan.implementation)
        elif self._has_inner(frame, site, call):
            result = self._written_out(frame, site, call, mode)
        else:
            result = replace(call, function=lambda *args, **kwargs: watch(call.function, args, kwargs)).run(operands)
        result = self._quantized(site, "output", result, plan.output)
        return given[0].copy_(result) if call.in_place else result

    def changes(self, frame: Frame, site: OperationSite, call: OperationCall) -> bool:
        """Tell if an operation, or a function inside it, is computed in another way than torch's."""
        return site.plan.changes or self._has_inner(frame, site, call)

    def meet(self, frame: Frame, site: OperationSite, call: OperationCall, mode: TorchFunctionMode) -> None:
        """Find the sites inside an operation, in a forward that changes no number."""
        if self._has_inner(frame, site, call):
            self._written_out(frame, site, call, mode)

    def _written_out(self, frame: Frame, site: OperationSite, call: OperationCall, mode: TorchFunctionMode) -> Tensor:
        frame.around = site.names
        try:
            with mode:
                return written_out(call, {})
        finally:
            frame.around = ()

    def _has_inner(self, frame: Frame, site: OperationSite, call: OperationCall) -> bool:
        """Tell if a function of one number inside this operation is computed in another way."""
        parts = ((f"{frame.path}:{part}.0", *KINDS[getattr(torch, part)]) for part in parts_of(call))
        return any(self.planner.plan_operation(names, site.names).changes for names in parts)

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
        hidden = _hidden(x)
        return torch.where(hidden, x, self._quantized(site, role, x.masked_fill(hidden, 0.0), quantizer))

    def _quantized(self, site: OperationSite, role: str, x: Tensor, quantizer: Quantizer | None) -> Tensor:
        if quantizer is None:
            return x
        with at(f"{site.name}:{role}", site.calls):
            found: Tensor = quantizer(x) if torch.is_grad_enabled() else quantizer.quantize(x)
        self._observe(site, role, x, found, quantizer)
        return found

    def _observe(self, site: OperationSite, role: str, before: Tensor, after: Tensor, quantizer: Any) -> None:
        if self.observer is not None and not recomputing():
            self.observer(site, role, before.detach(), after.detach(), quantizer)


def _sum(frame: Frame, call: OperationCall) -> OperationCall | None:
    """Read a sum of two activations: as part of a rotary embedding, as a residual addition, or as neither.

    A residual addition has operands with rows of one length, in a module that has others inside. It does not add a mask
    to scores, and neither operand was just multiplied by another activation.
    """
    left, right = call.operands
    first, second = (frame.factors(x) for x in (left, right))
    plain = call.function.__name__ == "add" and "alpha" not in call.kwargs
    if first is not None and second is not None and plain:
        (x, cosine), (turned, sine) = first, second
        halves = x._base is not None and x._base is turned._base  # of a rotation whose other half is a difference
        if not halves and _is_rotation(cosine, sine):
            operands = x, cosine, turned, sine
            places, layouts = tuple(range(4)), (LAST,) * 4
            return OperationCall(_rotated, operands, {}, operands, layouts, places, operation="rotary", kinds=ROTARY)
    if first is not None or second is not None or any(not x.is_meta and bool(_hidden(x).any()) for x in call.operands):
        return None  # a recurrence, or a mask
    rows = left.dim() > 1 < right.dim() and left.shape[-1] == right.shape[-1] > 1
    scores = [shape[-2:] for site, shape in frame.before_softmax if not site.is_value_product]
    masks = any(x.shape[-2:] in scores for x in call.operands)
    return call if rows and not masks and any(frame.module.children()) else None


def _hidden(x: Tensor) -> Tensor:
    """Tell which scores, or terms of a mask, hide a position: -Inf, or half the lowest number and below."""
    return x <= torch.finfo(x.dtype).min / 2


def _rotated(x: Tensor, cosine: Tensor, turned: Tensor, sine: Tensor) -> Tensor:
    """Rotate pairs of channels: x cos + turned sin, where `turned` holds the other channel of each pair, signed."""
    return x * cosine + turned * sine


def _is_rotation(cosine: Tensor, sine: Tensor) -> bool:
    """Tell if two factors are the cosines and sines of angles, up to one common factor."""
    if cosine.shape != sine.shape or cosine.is_meta:
        return False
    radius = cosine.detach().float().square() + sine.detach().float().square()
    most = radius.max()
    return bool(most > 0) and bool((radius.min() - most).abs() <= most / 32)
