"""All sites of one model: one mechanism that meets every matmul, in whatever code it stands.

Hooks on the model's modules keep a stack of the running modules, one stack for each thread. The outermost module
enters a `TorchFunctionMode`, which sees every call of a torch function. The operands and the result of a matmul go
through the quantizers that the recipe gives them. No module is replaced, and the model's `state_dict` stays the same.

A matmul with a weight is named by that parameter: `model.decoder.layers.0.fc1`. A weight may be computed from its
parameter in each forward: it is pruned, normalized, cast, sliced or merged. A product of two activations
is named by the running module and a count: `model.decoder.layers.0.self_attn:matmul.0`. Two products with a softmax
between them are attention, and get the aliases `…self_attn:qk` and `…self_attn:pv`.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.hooks import RemovableHandle

from qsim_core.errors import QsimError, RecipeError
from qsim_core.formats.accelerator import accelerators
from qsim_core.formats.rounding import working
from qsim_core.formats.uncompiled import resume_compiling, stop_compiling, uncompiled
from qsim_core.matmuls.attention import EXPLICIT, SOFTMAX, explicit_attention
from qsim_core.matmuls.call import Call
from qsim_core.matmuls.constants import VALUES, Constant, Constants, root
from qsim_core.matmuls.layout import POSITIONS, Layout
from qsim_core.matmuls.operators import OPS, read_call
from qsim_core.sites.arithmetic import FLOAT32, ExactArithmetic
from qsim_core.sites.call_stack import CallStack, Frame, Reusable, recomputing, reusable
from qsim_core.sites.executor import Layer, LiveExecution, SiteObserver, check_planned
from qsim_core.sites.operand import operands_of, roles_of
from qsim_core.sites.operation_sites import OperationSite, OperationSites
from qsim_core.sites.plan import Planner
from qsim_core.sites.quantized_weights import Weight, Weights
from qsim_core.sites.site import ATTENTION, Site

_DATA = {Tensor.data_ptr, Tensor.untyped_storage, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__}
MEMORY = frozenset({Tensor.data.__get__, Tensor.data.__set__, *_DATA})  # type: ignore[attr-defined]
"""The functions that give away a tensor's memory, in which values may then change while the version stays the same."""

MET = frozenset({*OPS, *EXPLICIT, *SOFTMAX, *MEMORY, torch.einsum})
"""The torch functions that a site looks at; all others run untouched."""

Compute = Callable[[Site, Call], Tensor]
"""Called with the site and the call in place of the multiplication; gives the result."""

WATCHING = ("observer", "watcher", "compute")
"""The attributes of `Sites` that hold what looks at a forward."""

_NOTED = frozenset({Tensor, nn.Parameter, tuple, list, type(None)})
"""The types of results that may be, or hold, a computed weight."""


class _Mode(TorchFunctionMode):
    def __init__(self, sites: Sites) -> None:
        super().__init__()
        self.sites = sites

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in self.sites.operations.functions and self.sites.stack.running():
            return self.sites.operations.meet(self.sites, self, function, args, kwargs or {})
        if function not in MET or not self.sites.stack.running():
            return self.sites.watch(function, args, kwargs or {})
        if function in MEMORY:
            self.sites.stack.share_nothing()
            return self.sites.watch(function, args, kwargs or {})
        if function is F.scaled_dot_product_attention and self.sites.leave_attention(*args[:3], **(kwargs or {})):
            return function(*args, **(kwargs or {}))
        if function in EXPLICIT:
            frame = self.sites.stack.frames[-1]
            before, frame.explicit = frame.explicit, True
            try:
                with self:
                    if function is F.scaled_dot_product_attention:
                        return self.sites.attend(*args, **(kwargs or {}))
                    return EXPLICIT[function](*args, **(kwargs or {}))
            finally:
                frame.explicit = before
        return self.sites.meet(function, args, kwargs or {})


class Sites:
    """Every site of one model, with its quantizers."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Planner,
        keep: bool,
        exact: Sequence[ExactArithmetic] = (),
        operations: OperationSites | None = None,
    ) -> None:
        self.recipe = recipe
        self.exact = tuple(exact)
        """The exact arithmetics that `auto` asks, in this order."""
        self.table: dict[str, Site] = {}
        self.operations = operations or OperationSites()
        self.weights = Weights(model, keep)
        self.constants = Constants(self._is_parameter)
        self._names: dict[tuple[str, int], tuple[weakref.ref[Tensor], str | None]] = {}
        self._layers: dict[str, Layer] = {}
        """The linear layers that were computed, by the path of the module."""
        self.quantizing = True
        self.observer: SiteObserver | None = None
        self.watcher: Callable[[Site, Call], None] | None = None
        self.compute: Compute | None = None
        self.checked = False
        self.told = False
        """True once it was said that the model runs uncompiled."""
        self.stack = CallStack()

    def __getstate__(self) -> dict[str, Any]:
        nothing = dict.fromkeys((*WATCHING, "stack", "constants"))
        return {**self.__dict__, **nothing, "_names": {}, "_layers": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.stack, self.constants = CallStack(), Constants(self._is_parameter)

    def attach(self, model: nn.Module, handles: list[RemovableHandle]) -> None:
        """Hook every module. The handles that remove the hooks are appended to `handles` one by one."""
        for path, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(functools.partial(self._enter, path), prepend=True))
            handles.append(module.register_forward_hook(functools.partial(self._leave, path), always_call=True))

    @functools.partial(uncompiled, inside=False)
    def _enter(self, path: str, module: nn.Module, args: Any) -> Any:
        compiling, stack = stop_compiling(), self.stack
        if compiling and not self.told:
            self.told = True
            warnings.warn("torch.compile leaves a simulated model as it is: it runs uncompiled", stacklevel=2)
        if stack.frames and not stack.running():
            stack.clear()
        if not stack.frames:
            if forward_ad._current_level >= 0:  # within `dual_level` or `torch.func.jvp`
                raise QsimError(
                    "a simulated model has no forward-mode derivatives (jvp, jacfwd); use vjp, grad or jacrev"
                )
            self.weights.begin()
            self.constants.begin(self.weights.model)
            stack.begin(_Mode(self), sys._getframe(1))
        stack.frames.append(frame := Frame(path, module, compiling=compiling))
        return self.operations.enter(self, frame, args)

    @functools.partial(uncompiled, inside=False)
    def _leave(self, path: str, module: nn.Module, args: Any, output: Any) -> Any:
        stack = self.stack
        frames = stack.frames
        if not frames or (frames[-1].module is not module and all(frame.module is not module for frame in frames)):
            return None
        while (frame := frames[-1]).module is not module:
            frames.pop()
        changed = self.operations.leave(self, frame, output)
        frames.pop()
        if not frames:
            stack.clear()
        resume_compiling(frame.compiling)
        if not frames and stack.error is not None and output is not None:  # the model caught it, and went on
            raise stack.error
        if not frames and path == "" and not self.checked and output is not None:
            self.check()
        return changed

    def check(self) -> None:
        """Raise `RecipeError` if a pattern of the recipe matches no site, or one of its quantizers reaches none."""
        self.checked = True
        self.recipe.check((site.names, site.recipe_roles) for site in self.table.values())
        self.operations.check()

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[dict[str, int]]:
        """Leave the counts of calls as they are after a block; gives those of the block by name, when it has ended."""
        before, inside = {name: site.calls for name, site in self._all()}, dict[str, int]()
        try:
            yield inside
        finally:
            for name, site in self._all():
                inside[name], site.calls = site.calls - before.get(name, 0), before.get(name, 0)

    def _all(self) -> Iterator[tuple[str, Site | OperationSite]]:
        yield from self.table.items()
        yield from self.operations.table.items()

    @property
    def watched(self) -> bool:
        """True if an observer or a watcher has to see every tensor."""
        return self.observer is not None or self.watcher is not None or self.compute is not None

    def leave_attention(self, *operands: Tensor, **named: Any) -> bool:
        """Tell if torch may compute attention by itself: nothing at its two products is quantized or watched.

        Its products are noted as met.
        """
        frame = self.stack.frames[-1]
        operands = (*operands, *(named[name] for name in ("query", "key", "value") if name in named))
        if (
            not self.quantizing
            or self.watched
            or self.operations.functions
            or any(self.constants.find(x, frame.module) for x in operands)
        ):
            return False
        first = frame.products
        sites = [self._product(frame, "matmul"), self._product(frame, "matmul")]
        for site, alias in zip(sites, ATTENTION, strict=True):
            self._alias(site, frame.path + alias, met=False)
        if any(site.rotations or site.changes_products for site in sites):
            frame.products = first
            return False
        for site in sites:
            site.calls += not recomputing()
        return True

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute attention as two products at their sites, or by an accelerator that does the same by tiles.

        Products and softmax are computed in float32 at least, whatever the dtype of the model.
        """
        kind = query.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):
            operands = [x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value)]
            with torch.autocast(kind, enabled=False):
                return self.attend(*operands, *args, **kwargs)
        dtype, (query, key, value) = query.dtype, (working(x) for x in (query, key, value))
        for accelerator in () if self.operations.functions else accelerators():
            attend = getattr(accelerator, "attend", None)
            result: Tensor | None = None if attend is None else attend(self, query, key, value, *args, **kwargs)
            if result is not None:
                return result.to(dtype)
        return explicit_attention(query, key, value, *args, **kwargs).to(dtype)

    def watch(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function that is not a matmul; note the weights that it computes, and the parameters that it reads."""
        result = function(*args, **kwargs)
        frames = self.stack.frames
        noted = type(result) in _NOTED or isinstance(result, Tensor) or function in VALUES
        if noted and frames and not torch.compiler.is_compiling():
            for parameter in self.constants.note(function, args, kwargs, result, frames[-1].module):
                self.weights.read(self._name_of(parameter) or "")
        return result

    def meet(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute a matmul with quantized operands and result, or note the products that a softmax connects."""
        if function in SOFTMAX:
            self.connect(args[0] if args else kwargs["input"])
            return self.watch(function, args, kwargs)
        stack = self.stack
        if stack.inside:
            return self.watch(function, args, kwargs)
        again = self._again(args) if function is F.linear and not kwargs else None
        compute = None if again is None else again.result
        if compute is None:
            call = read_call(function, args, kwargs)
            if call is None or not all(map(_is_dense, call.operands)):
                return self.watch(function, args, kwargs)
            self._check_plain(call)
            compute = functools.partial(self._compute, call)
        stack.inside = True
        try:
            return compute()
        except QsimError as error:
            stack.error = stack.error or error
            raise
        finally:
            stack.inside = False

    def _again(self, args: tuple[Any, ...]) -> LiveExecution | None:
        """The execution of a linear layer whose site stands as it did in an earlier call; None: it may not."""
        frame = self.stack.frames[-1]
        layer = self._layers.get(frame.path)
        if layer is None or not self.quantizing or self.watched or not _is_plain(args[0]):
            return None
        return None if self.constants.find(args[0], frame.module) is not None else layer.again(frame.module, args)

    def _check_plain(self, call: Call) -> None:
        """Raise `QsimError` for an operand that holds other tensors in the place of values.

        Under `torch.func.vmap` the inputs of a layer may be batched while nothing looks at them, but not an operand
        that may be its weight.
        """
        batched = any(map(_is_batched, call.operands))
        plain = (x for x in call.operands if not is_functorch_wrapped_tensor(x))
        if batched and (self.watched or not any(map(self._is_parameter, plain))):
            raise QsimError(
                f"a {call.operation} in {self.stack.frames[-1].path or 'the model'} runs under torch.func.vmap, which "
                f"hides its operands; compute it for each element in a loop, or for all by torch.bmm"
            )
        kinds = [type(operand.data).__name__ for operand in call.operands if is_traceable_wrapper_subclass(operand)]
        if kinds:
            raise QsimError(
                f"a {call.operation} in {self.stack.frames[-1].path or 'the model'} has an operand of class "
                f"{kinds[0]}, whose values are sharded or stored in a format; simulate the model with plain tensors"
            )

    def _check_in_place(self, frame: Frame, call: Call) -> None:
        """Raise `QsimError` for an operand that stands at the module where a parameter stood before."""
        left = (frame.full(key) for key, value in vars(frame.module).items() if any(value is x for x in call.operands))
        if name := next((name for name in left if name in self.weights.names), None):
            raise QsimError(
                f"{name} was a parameter, and a plain tensor stands in its place now; simulate the model as it is now, "
                f"and in place of FullyShardedDataParallel use fully_shard"
            )

    def _compute(self, call: Call) -> Any:
        frame = self.stack.frames[-1]
        constants = [self.constants.find(operand, frame.module) for operand in call.operands]
        if call.is_layer:
            constants[1] = constants[1] or self.constants.rows(call.operands[1])
        elif all(constants):  # it prepares a weight, like a low-rank update that is merged
            return self.watch(call.function, call.args, call.kwargs)
        weights = [self._weight_of(*operand) for operand in zip(call.operands, constants, strict=True)]
        if all(weights):  # a parameter times a parameter, such as a learned query: the last one counts as the weight
            weights = [*(None for _ in weights[:-1]), weights[-1]]
        if call.is_layer and not any(weight and (weight.owned or weight.computed) for weight in weights):
            self._check_in_place(frame, call)
        if not any(weights) and call.is_outer and call.operands[0].shape[-2:] not in frame.softmax:
            frame.products += 1  # of a longer axis it may be a matmul in another call
            return self.watch(call.function, call.args, call.kwargs)
        if call.addend is not None and self._weight_of(call.addend, None) is None:
            call = replace(call, masked=True)
        site = self._site(frame, call, next((weight for weight in weights if weight), None))
        site.over_positions = call.layouts[0].name.startswith(POSITIONS)
        site.calls += not recomputing()
        if site.rotations:
            rotated = zip(roles_of(weights), call.operands, call.layouts, strict=True)
            call = replace(call, operands=tuple(self._rotated(site, *operand) for operand in rotated))
        if site.beside is not None:
            call = replace(call, beside=site.beside(call.operands[0]))
        shown = call
        if self.watcher is not None or self.compute is not None:
            shown = replace(call, weight=roles_of(weights).index("weight") if site.weight else None)
        if self.compute is not None:
            result = self.compute(site, shown)
        elif site.in_training is not None and self.quantizing and frame.module.training:
            result = site.in_training(call, site.calls)
        else:
            result = self._execution(site, call, weights, frame.module).result()
        if self.watcher is not None:  # a call that fails is not shown, as the model may catch the error
            self.watcher(site, shown)
        if site.weight is None:
            frame.before_softmax.append((site, result.shape))
        return result

    def _execution(self, site: Site, call: Call, weights: Sequence[Weight | None], module: nn.Module) -> LiveExecution:
        shared = module, self.stack, self.weights, self.exact, self.observer
        numbers = all(operand.numel() and not operand.is_meta for operand in call.operands)
        if self.quantizing and numbers:  # where there are none, nothing is quantized
            operands = operands_of(site, call, weights, site.quantizer)
            execution = LiveExecution(site, call, operands, site.quantizer("output"), *shared)
            plain = call.function is F.linear and not call.kwargs and not self.watched
            if plain and weights[1] is not None and weights[1].owned:
                self._layers[self.stack.frames[-1].path] = Layer(execution, weights[1])
            return execution
        check_planned(site, call, weights)
        operands = operands_of(site, call, weights, lambda role: None)
        return LiveExecution(site, call, operands, None, *shared, arithmetic=FLOAT32)

    def _rotated(self, site: Site, role: str, operand: Tensor, layout: Layout) -> Tensor:
        """Rotate an operand, if its site has a rotation for its role."""
        rotation = site.rotations.get(role)
        if rotation is None:
            return operand
        if Reusable.holds(self.stack.rotated, rotation, operand):
            return self.stack.rotated.value  # type: ignore[union-attr,no-any-return]
        value: Tensor = layout.back(rotation(layout.rows(operand)))
        self.stack.rotated = reusable(rotation, operand, value, layout)
        return value

    def _weight_of(self, operand: Tensor, constant: Constant | None) -> Weight | None:
        """Find the parameter that an operand is, is a view of, or is computed from; None for any other tensor."""
        running = self.stack.frames[-1]
        origin = root(operand) if constant is None else constant.origin
        name = self._name_of(origin)
        if name is None:
            return None
        owned = origin is operand and isinstance(origin, nn.Parameter) and running.own(origin) is not None
        return Weight(name, origin, owned, computed=constant is not None and not constant.shares)

    def _name_of(self, parameter: Tensor) -> str | None:
        """The full name of a parameter; None for any other tensor.

        The running module's parameters come first, then those of the modules inside it, then those of the model.
        """
        running, outermost = self.stack.frames[-1], self.stack.frames[0]
        name = running.own(parameter)
        if name is not None or not isinstance(parameter, nn.Parameter):
            return name
        key = running.path, id(parameter)
        known = self._names.get(key)
        if known is None or known[0]() is not parameter:
            name = running.inside(parameter) or outermost.inside(parameter)
            known = self._names[key] = weakref.ref(parameter), name
        return known[1]

    def _is_parameter(self, x: Tensor) -> bool:
        """Tell if a tensor is a parameter of this model, and not one that came in from outside."""
        return self._name_of(x) is not None

    def _site(self, frame: Frame, call: Call, weight: Weight | None) -> Site:
        if weight is None:
            site = self._product(frame, call.operation)
            if call.operands[0].shape[-2:] in frame.softmax:
                self._alias(site, f"{frame.path}:pv", met=False)
                frame.softmax = ()
            return site
        site = self._named(_site_name(frame, call, weight), call.operation, weight.name)
        site.weight, site.computed = weight.name, weight.computed
        return site

    def _product(self, frame: Frame, operation: str) -> Site:
        """The site of the next product of activations in a module."""
        frame.products += 1
        return self._named(f"{frame.path}:matmul.{frame.products - 1}", operation, None)

    def _named(self, name: str, operation: str, weight: str | None) -> Site:
        if name not in self.table:
            self.table[name] = Site(name, operation, weight, self.recipe.plan([name]))
        return self.table[name]

    def connect(self, scores: Tensor) -> None:
        """Give aliases to the products that a softmax connects.

        The product before it that has the shape of the scores is `qk`, if there is exactly one. Attention sinks
        add columns to the scores. A later product whose first operand has the shape of the probabilities is `pv`.
        """
        frame = next((frame for frame in reversed(self.stack.frames) if frame.before_softmax), None)
        if frame is None:
            return
        before, frame.before_softmax, frame.softmax = frame.before_softmax, [], (scores.shape[-2:],)
        fitting = [product for product in before if product[1][-2:] == scores.shape[-2:]]
        if not fitting and len(before) == 1 and _widened(before[0][1], scores.shape):
            fitting, frame.softmax = before, (scores.shape[-2:], before[0][1][-2:])
        if len(fitting) == 1:
            self._alias(fitting[0][0], f"{frame.path}:qk", met=self.quantizing)

    def _alias(self, site: Site, alias: str, met: bool) -> None:
        """Give a site another name, and the quantizers that the recipe has for that name.

        Raises `RecipeError` if the site was already computed (`met`) with other quantizers.
        """
        if alias in site.aliases:
            return
        before = [site.planned(role) for role in ("input", "input2")]
        site.aliases.append(alias)
        plan = self.recipe.plan(site.names)
        changed = plan != site.plan
        site.plan = plan
        if met and (changed or before != [site.planned(role) for role in ("input", "input2")]):
            raise RecipeError(
                f"the recipe names {alias!r}, which is only known after a forward pass; give simulate an example"
            )


def _site_name(frame: Frame, call: Call, weight: Weight) -> str:
    """The name of a weight's site: a pruned or parametrized weight has its module's name for it, and not its parts'."""
    name, (owner, parametrized, part) = weight.name, weight.name.partition("parametrizations.")
    if weight.computed and parametrized:
        name = owner + part.partition(".")[0]
    elif weight.computed:  # torch's hooks leave the computed tensor at the module
        left = (key for key, value in vars(frame.module).items() if any(value is x for x in call.operands))
        name = next(map(frame.full, left), name)
    return name.removesuffix(".weight")


def _is_dense(operand: Tensor) -> bool:
    """Tell if an operand has rows to quantize: floating-point numbers, neither sparse nor nested."""
    return operand.is_floating_point() and operand.layout == torch.strided and not operand.is_nested


def _is_plain(x: Any) -> bool:
    """Tell quickly if an input is a tensor of numbers in memory, and not a parameter."""
    return (
        type(x) is Tensor
        and x.is_floating_point()
        and x.layout is torch.strided
        and not (x.is_nested or x.is_meta or is_functorch_wrapped_tensor(x))
        and x.numel() > 0
    )


def _is_batched(operand: Tensor) -> bool:
    """Tell if an operand is one of many, which `torch.func.vmap` computes at once."""
    while is_functorch_wrapped_tensor(operand):
        if is_batchedtensor(operand):
            return True
        operand = get_unwrapped(operand)
    return False


def functional(sites: Sites, path: str) -> Iterator[Site]:
    """The sites of the products of activations that the module at a path computes itself."""
    return (site for name, site in sites.table.items() if site.weight is None and name.rpartition(":")[0] == path)


def _widened(product: torch.Size, scores: torch.Size) -> bool:
    """Tell if scores are a product with more columns: attention sinks, which take a share of the softmax."""
    return len(product) == len(scores) > 1 and product[:-1] == scores[:-1] and product[-1] < scores[-1]
