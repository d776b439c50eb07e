"""Where tensors are quantized: one mechanism that meets every matmul, wherever its code stands.

Hooks on the model's modules keep a stack, one for each thread, of who is running. The outermost of them enters
a `TorchFunctionMode`, which sees every call of a torch function: a matmul's operands and result go through the
quantizers that the recipe has for them. No module is replaced and nothing enters the model's `state_dict`.

A matmul is named by the parameter that is its weight, `model.decoder.layers.0.fc1`, or, where both operands are
computed, by the running module and a count, `model.decoder.layers.0.self_attn:matmul.0`. Two products with a
softmax between them are attention and get the aliases `…self_attn:qk` and `…self_attn:pv`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from qsim_core.errors import RecipeError
from qsim_core.fast import lowering
from qsim_core.fast.tiled_attention import attend
from qsim_core.formats.quantizer import Quantizer
from qsim_core.formats.random_bits import at
from qsim_core.matmuls.attention import EXPLICIT, SOFTMAX
from qsim_core.matmuls.call import Call
from qsim_core.matmuls.layout import LAST, SECOND_LAST, Layout
from qsim_core.matmuls.operators import OPS, read_call
from qsim_core.quantizers.stacked import Stacked
from qsim_core.simulation.recipe import Recipe
from qsim_core.sites.call_stack import Frame, Last, Thread, last_of, recomputing, widened
from qsim_core.sites.device_products import multiplied
from qsim_core.sites.lowered import Form
from qsim_core.sites.quantized_weights import Weight, Weights
from qsim_core.sites.site import Site

MET = frozenset({*OPS, *EXPLICIT, *SOFTMAX, torch.einsum})
Observer = Callable[[Site, str, Tensor, Tensor, Quantizer | None], None]
"""Called with site, role (input, input2, weight or output), the tensor before and after, and what quantized it."""


class _Mode(TorchFunctionMode):
    def __init__(self, sites: Sites) -> None:
        super().__init__()
        self.sites = sites

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function not in MET or not self.sites.thread.running():
            return function(*args, **(kwargs or {}))
        if function in EXPLICIT:
            with self:
                if function is F.scaled_dot_product_attention:
                    return attend(self.sites, *args, **(kwargs or {}))
                return EXPLICIT[function](*args, **(kwargs or {}))
        return self.sites.meet(function, args, kwargs or {})


class Sites:
    """Every site of one model, and the quantizers there."""

    def __init__(self, model: nn.Module, recipe: Recipe, keep: bool) -> None:
        self.recipe = recipe
        self.table: dict[str, Site] = {}
        self.weights = Weights(model, keep)
        self.quantizing = True
        self.observer: Observer | None = None
        self.watcher: Callable[[Site, Call], None] | None = None
        self.checked = False
        self.thread = Thread()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "thread": None, "observer": None, "watcher": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.thread = Thread()

    def attach(self, model: nn.Module, handles: list[RemovableHandle]) -> None:
        """Hook every module; the handles, put into a list as they come, take the hooks away again."""
        for path, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(functools.partial(self._enter, path)))
            handles.append(module.register_forward_hook(functools.partial(self._leave, path), always_call=True))

    def _enter(self, path: str, module: nn.Module, args: Any) -> None:
        thread = self.thread
        if thread.stack and not thread.running():
            thread.clear()
        if not thread.stack:
            thread.caller = sys._getframe(1)
            thread.mode = _Mode(self)
            thread.mode.__enter__()  # type: ignore[no-untyped-call]
        thread.stack.append(Frame(path, module))

    def _leave(self, path: str, module: nn.Module, args: Any, output: Any) -> None:
        thread = self.thread
        if not any(frame.module is module for frame in thread.stack):
            return
        while thread.stack.pop().module is not module:
            pass
        if not thread.stack:
            thread.clear()
            if path == "" and not self.checked and output is not None:
                self.checked = True
                self.recipe.check_patterns(site.names for site in self.table.values())

    def meet(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute a matmul with its operands and result quantized, and remember what a softmax connects."""
        if function in SOFTMAX:
            self._connect(args[0] if args else kwargs["input"])
            return function(*args, **kwargs)
        call = read_call(function, args, kwargs)
        thread = self.thread
        if call is None or thread.inside or not all(operand.is_floating_point() for operand in call.operands):
            return function(*args, **kwargs)
        thread.inside = True
        try:
            return self._compute(call)
        finally:
            thread.inside = False

    def _compute(self, call: Call) -> Any:
        frame = self.thread.stack[-1]
        weights = [self._weight_of(operand) for operand in call.operands]
        if all(weights):  # a learned query times a weight: one of the two is the input
            weights = [*(None for _ in weights[:-1]), weights[-1]]
        site = self._site(frame, call, next((weight for weight in weights if weight), None))
        site.calls += not recomputing()
        roles = [
            "weight" if weight else "input2" if i and not site.weight else "input" for i, weight in enumerate(weights)
        ]
        if site.rotations:
            turned = zip(roles, call.operands, call.layouts, strict=True)
            call = replace(call, operands=tuple(self._rotated(site, *operand) for operand in turned))
        if self.watcher is not None:
            self.watcher(site, replace(call, weight=roles.index("weight") if site.weight else None))
        if site.in_training is not None and self.quantizing and frame.module.training:
            result = site.in_training(call, site.calls)
        else:
            result = self._quantized(site, call, roles, weights)
        if site.weight is None:
            frame.before_softmax.append((site, result.shape))
        return result

    def _quantized(self, site: Site, call: Call, roles: list[str], weights: list[Weight | None]) -> Tensor:
        """The result of a call whose operands, and itself, are quantized; and the path that it took."""
        if self.recipe.value_axis == "head" and site.is_value_product:
            layouts = (LAST if role == "input2" else at for role, at in zip(roles, call.layouts, strict=True))
            call = replace(call, layouts=tuple(layouts))
        form = self._form(site, call, roles)
        operands: list[Tensor] = []
        if form is None or self.observer is not None:
            operands = self._operands(site, call, roles, weights, form)
        lowered = None if form is None else self._lowered(site, call, weights, form)
        if lowered is None and not operands:
            operands = self._operands(site, call, roles, weights, form)
        site.path = "float32" if form is None or lowered is None else form.path
        call = multiplied(site, call, roles, self.recipe.value_axis, self.quantizing)
        return self._output(site, call, operands, lowered)

    def _form(self, site: Site, call: Call, roles: list[str]) -> Form | None:
        """The form that the operands take for another arithmetic than float32's, if that is exact and faster."""
        if not self.quantizing or self.thread.stack[-1].module.training:
            return None  # checkpointing computes a forward again, with gradients, and must find the same numbers
        if call.addend is not None and self._weight_of(call.addend) is None:
            return None
        quantizers = [self._quantizer(site, role) for role in (*roles, "output")]
        return lowering.choose(self.recipe.path, call, roles, quantizers)

    def _operands(
        self, site: Site, call: Call, roles: list[str], weights: list[Weight | None], form: Form | None
    ) -> list[Tensor]:
        """The operands' values, quantized."""
        training = self.thread.stack[-1].module.training
        alone = len(roles) == 2  # an einsum may have more operands
        return [
            self._input(site, role, operand, layout, alone)
            if weight is None
            else self._weight(site, weight, operand, layout, training, form)
            for role, operand, weight, layout in zip(roles, call.operands, weights, call.layouts, strict=True)
        ]

    def _lowered(self, site: Site, call: Call, weights: list[Weight | None], form: Form) -> Tensor | None:
        """The product in the other arithmetic; None where that is not exact for these operands."""
        taken: list[Any] = []
        for place, (operand, layout, weight) in enumerate(zip(call.operands, call.layouts, weights, strict=True)):
            if weight is not None:
                self.weights.met(weight, layout, self.thread.stack[-1].module)
                taken.append(self.weights.lowered(weight, operand, layout, site.quantizer("weight"), form))
                continue
            key, last = form.of(place), self.thread.lowered
            if layout is LAST and Last.holds(last, key, operand):
                taken.append(last.value)  # type: ignore[union-attr]
            else:
                with self.thread.own_memory(site, form.quantizers[place], "lowered"):
                    taken.append(form.take(place, layout.rows(operand)))
                self.thread.lowered = last_of(key, operand, taken[-1], layout)
        return None if any(operand is None for operand in taken) else form.product(call, *taken)

    def _quantizer(self, site: Site, role: str) -> Any:
        return site.quantizer(role) if self.quantizing else None

    def _weight(
        self, site: Site, weight: Weight, operand: Tensor, layout: Layout, training: bool, form: Form | None
    ) -> Tensor:
        quantizer, before, value = self._quantizer(site, "weight"), operand, operand
        if quantizer is not None and operand.dim() == 3 and layout in (LAST, SECOND_LAST) and not quantizer.by_rows:
            quantizer = Stacked(each=quantizer)  # experts: what scales are shared over ends with each of them
        self.weights.met(weight, layout, self.thread.stack[-1].module)
        if quantizer is not None:
            if self.observer is not None and not self.weights.overwritten(weight):
                before = operand.detach().clone()  # it may be about to be overwritten
            with at(f"{site.name}:weight", site.calls if training else 0):
                value = self.weights.quantized(weight, operand, layout, quantizer, training, form)
        self._observe(site, "weight", before, value, layout, quantizer)
        return value

    def _rotated(self, site: Site, role: str, operand: Tensor, layout: Layout) -> Tensor:
        """The operand after the rotation that the site has for its role, if it has one."""
        rotation = site.rotations.get(role)
        if rotation is None:
            return operand
        if Last.holds(self.thread.rotated, rotation, operand):
            return self.thread.rotated.value  # type: ignore[union-attr,no-any-return]
        value = layout.back(rotation(layout.rows(operand)))
        self.thread.rotated = last_of(rotation, operand, value, layout)
        return value

    def _input(self, site: Site, role: str, operand: Tensor, layout: Layout, alone: bool) -> Tensor:
        """The operand quantized; one that the call before this had too (q, k and v's) is not computed again, unless
        numbers are drawn for it: those are every site's own, with a gradient and without."""
        quantizer, value = self._quantizer(site, role), operand
        if quantizer is not None:
            if layout is LAST and Last.holds(self.thread.quantized, quantizer, operand):
                value = self.thread.quantized.value  # type: ignore[union-attr]
            else:
                mine = quantizer if alone and self.observer is None else None
                with at(f"{site.name}:{role}", site.calls) as place, self.thread.own_memory(site, mine, "quantized"):
                    value = layout.back(quantizer(layout.rows(operand)))
                    last = None if place.drawn else last_of(quantizer, operand, value, layout)
                self.thread.quantized = last
        self._observe(site, role, operand, value, layout, quantizer)
        return value

    def _output(self, site: Site, call: Call, operands: list[Tensor], lowered: Tensor | None) -> Tensor:
        """The result quantized, a bias in it but not a mask: what is added to a product of activations comes after."""
        quantizer = self._quantizer(site, "output")
        if quantizer is None:
            result: Tensor = call.run(operands) if lowered is None else lowered
            self._observe(site, "output", result, result, call.result, None)
            return result
        if lowered is not None and site.path == "bf16" and not lowered.is_cuda:  # it is rounded already
            if self.observer is not None:
                self._observe(site, "output", call.run(operands), lowered, call.result, quantizer)
            return lowered
        masked = call.addend is not None and self._weight_of(call.addend) is None
        product = lowered
        if product is None:
            product = call.multiply(*operands) if masked else call.run(operands)
        with at(f"{site.name}:output", site.calls):
            rounded = call.result.back(quantizer(call.result.rows(product)))
        self._observe(site, "output", product, rounded, call.result, quantizer)
        if masked:
            alpha, beta = call.kwargs.get("alpha", 1), call.kwargs.get("beta", 1)
            rounded = alpha * rounded if alpha != 1 else rounded
            rounded = rounded if beta == 0 else beta * call.addend + rounded
        return call.kwargs["out"].copy_(rounded) if call.kwargs.get("out") is not None else rounded

    def _observe(
        self, site: Site, role: str, before: Tensor, after: Tensor, layout: Layout, quantizer: Quantizer | None
    ) -> None:
        if self.observer is not None and not recomputing():
            rows = layout.rows(before.detach())
            self.observer(site, role, rows, rows if after is before else layout.rows(after.detach()), quantizer)

    def _weight_of(self, operand: Tensor) -> Weight | None:
        """The parameter that an operand is, or is a view of: the running module's first, else any of the model's."""
        base = operand if operand._base is None else operand._base
        running, outermost = self.thread.stack[-1], self.thread.stack[0]
        name = running.own(base)
        owned = name is not None and base is operand and isinstance(base, nn.Parameter)
        if name is None and isinstance(base, nn.Parameter):
            name = running.inside(base) or outermost.inside(base)
        return None if name is None else Weight(name, base, owned)

    def _site(self, frame: Frame, call: Call, weight: Weight | None) -> Site:
        if weight is not None:
            name = weight.name.removesuffix(".weight")
        else:
            name = f"{frame.path}:matmul.{frame.products}"
            frame.products += 1
        if name not in self.table:
            self.table[name] = Site(name, call.operation, weight.name if weight else None, self.recipe.plan([name]))
        site = self.table[name]
        if weight is None and call.operands[0].shape[-2:] in frame.softmax:
            self._alias(site, f"{frame.path}:pv", met=False)
            frame.softmax = ()
        return site

    def _connect(self, scores: Tensor) -> None:
        """A softmax: the one product of its shape before it is QK (sinks add columns); the next one may be PV."""
        frame = next((frame for frame in reversed(self.thread.stack) if frame.before_softmax), None)
        if frame is None:
            return
        before, frame.before_softmax, frame.softmax = frame.before_softmax, [], (scores.shape[-2:],)
        fitting = [product for product in before if product[1][-2:] == scores.shape[-2:]]
        if not fitting and len(before) == 1 and widened(before[0][1], scores.shape):
            fitting, frame.softmax = before, (scores.shape[-2:], before[0][1][-2:])
        if len(fitting) == 1:
            self._alias(fitting[0][0], f"{frame.path}:qk", met=self.quantizing)

    def _alias(self, site: Site, alias: str, met: bool) -> None:
        """Another name for a site, and the quantizers that the recipe has under it."""
        if alias in site.aliases:
            return
        site.aliases.append(alias)
        plan = self.recipe.plan(site.names)
        if met and plan != site.plan:
            raise RecipeError(
                f"the recipe names {alias!r}, which is only known after a forward pass; give simulate an example"
            )
        site.plan = plan


def functional(sites: Sites, path: str) -> Iterator[Site]:
    """The sites of the products that a module computes itself."""
    return (site for name, site in sites.table.items() if site.weight is None and name.rpartition(":")[0] == path)
