"""Constants: the tensors of a forward that code has computed from a model's parameters and buffers alone.

The weight of a product is often computed from a parameter: it is pruned, normalized, cast, sliced, scaled or merged. A
function mode shows every call of torch to `Constants`. They follow what is made of parameters, whatever function does
it, and tell which parameters are read by other code than a matmul.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qsim_core.snapshots import has_memory

_SHAPED = {torch.ones_like, torch.zeros_like, torch.full_like, torch.empty_like}
_NEW = {Tensor.new_ones, Tensor.new_zeros, Tensor.new_full, Tensor.new_empty}
LIKE = frozenset(_SHAPED | _NEW)
"""The functions that take no values from their first argument, but a shape, a dtype or a device."""
MADE = frozenset({torch.ones, torch.zeros, torch.eye, torch.full, torch.empty, torch.tensor, *LIKE})
"""The functions that make a constant of numbers alone."""
AS = frozenset({Tensor.to, Tensor.type_as, Tensor.view_as, Tensor.reshape_as, Tensor.expand_as})
"""The functions that take values from their first argument alone."""
CHOOSE = frozenset({torch.Tensor.__getitem__, torch.index_select, torch.Tensor.index_select})
"""The functions that take matrices out of a stack: the weights of the experts that a token is sent to."""
_ARRAYS = {Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.tolist}
_SCALARS = {Tensor.item, Tensor.__float__, Tensor.__int__, Tensor.__bool__}
VALUES = frozenset(_ARRAYS | _SCALARS)
"""The functions that give a tensor's values to code outside of torch."""
_NUMBERS = torch.empty(0)
"""The origin of a constant of numbers alone."""
_REGISTERED = frozenset({"_parameters", "_buffers", "_modules"})
"""The attributes of a module that hold what is registered."""


class Constant(NamedTuple):
    """One constant."""

    origin: Tensor
    """The largest parameter that it is computed from; without one, a buffer."""
    shares: bool
    """True if it is the parameter, or lies in the parameter's memory."""


class Constants:
    """The constants of one model. They are held by weak references."""

    def __init__(self, is_parameter: Callable[[Tensor], bool]) -> None:
        self._is_parameter = is_parameter
        self._read: dict[int, weakref.ref[Tensor]] = {}
        self._made: dict[int, tuple[weakref.ref[Tensor], Constant]] = {}
        self._rows: dict[int, tuple[weakref.ref[Tensor], Constant]] = {}
        """The rows of a matrix that an activation has chosen: a weight for a layer, activations elsewhere."""
        self._begun = False

    def begin(self, model: nn.Module) -> None:
        """Note the plain tensors that stand at modules, by themselves or in lists and mappings, at the first forward.

        A tensor that a later forward leaves there is an activation.
        """
        if not self._begun:
            self._begun = True
            for module in model.modules():
                plain = [value for name, value in vars(module).items() if name not in _REGISTERED]
                for x in tree_leaves(plain):
                    if type(x) is Tensor:
                        self._keep(self._made, x, _NUMBERS)

    def find(self, x: Tensor, module: nn.Module) -> Constant | None:
        """Find what a constant is computed from; None for any other tensor. `module` is the running one."""
        base = root(x)
        if type(base) is not Tensor and isinstance(base, nn.Parameter):
            return Constant(base, shares=True) if self._is_parameter(base) else None
        made = self._made.get(id(x))
        if made is not None and made[0]() is x:
            return made[1]
        own = module._buffers and any(buffer is base for buffer in module._buffers.values())
        return Constant(base, shares=False) if own else None

    def rows(self, x: Tensor) -> Constant | None:
        """Find the parameter whose rows were chosen, such as the words that a sampled softmax scores."""
        chosen = self._rows.get(id(x))
        return chosen[1] if chosen is not None and chosen[0]() is x else None

    def note(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, module: nn.Module
    ) -> Iterable[Tensor]:
        """Note the result of a call, if it is a constant; give the parameters that this is the first to read."""
        values = args[:1] if function in AS else (*args[function in LIKE :], *kwargs.values())
        if not module._buffers and self._is_usual(function, values):
            return ()
        given = [(x, self.find(x, module)) for x in _tensors(values)]
        found = [constant for _, constant in given if constant is not None]
        if not found and (given or function not in MADE):
            return ()
        changed = (given[0][0], result) if _in_place(function) else (result,)
        results = [x for x in _tensors(changed) if type(x._base) is not nn.Parameter]
        if len(found) == len(given) or (function in CHOOSE and any(one.origin.dim() > 2 for one in found)):
            origin = max((one.origin for one in found), key=_rank, default=_NUMBERS)
            for x in results:
                self._keep(self._made, x, origin)
        elif function in CHOOSE and given[0][1] is not None:
            for x in results:
                self._keep(self._rows, x, given[0][1].origin)
        elif self._made:
            for x in results:
                self._made.pop(id(x), None)
        if function not in VALUES and not results:
            return ()
        return [one.origin for one in found if self._is_read_first(one.origin, results)]

    def _is_read_first(self, origin: Tensor, results: list[Tensor]) -> bool:
        """Tell if results hold values of a parameter that was not known to be read; note that it is."""
        if not isinstance(origin, nn.Parameter) or self._was_read(origin):
            return False
        if results and all(x.is_meta or _share(x, origin) for x in results):  # offloading makes meta tensors of weights
            return False
        self._read[id(origin)] = weakref.ref(origin)
        return True

    def _is_usual(self, function: Any, values: Iterable[Any]) -> bool:
        """Tell quickly if a call computes with an activation, and with no parameter that was not read before."""
        activation, parameter = False, False
        for x in values:
            if type(x) is Tensor:
                if id(x) in self._made or type(x._base) is nn.Parameter:
                    return False
                activation = True
            elif type(x) is nn.Parameter:
                if function in CHOOSE or not self._was_read(x):
                    return False
                parameter = True
            elif isinstance(x, Tensor) or (isinstance(x, list | tuple) and any(isinstance(y, Tensor) for y in x)):
                return False
        return activation or not (parameter or function in MADE)

    def _was_read(self, origin: Tensor) -> bool:
        known = self._read.get(id(origin))
        return known is not None and known() is origin

    @staticmethod
    def _keep(made: dict[int, tuple[weakref.ref[Tensor], Constant]], x: Tensor, origin: Tensor) -> None:
        key = id(x)
        made[key] = weakref.ref(x, lambda _: made.pop(key, None)), Constant(origin, _share(x, origin))


def root(x: Tensor) -> Tensor:
    """The tensor of which another one is a view; a parameter is a view of none.

    Torch makes a parameter of a tensor of a class of its own as a view of that tensor.
    """
    base = x._base
    return x if base is None or (type(x) is not Tensor and isinstance(x, nn.Parameter)) else base


def _rank(origin: Tensor) -> tuple[bool, int]:
    """Order what a constant is computed from: parameters before buffers, the larger before the smaller."""
    return isinstance(origin, nn.Parameter), origin.numel()


def _in_place(function: Any) -> bool:
    """Tell if a function changes its first argument: `add_`, `__setitem__`, `__iadd__`."""
    name = function.__name__
    return name.startswith(("__set", "__i")) or (name.endswith("_") and not name.endswith("__"))


def _share(x: Tensor, other: Tensor) -> bool:
    """Tell if two tensors lie in the same memory."""
    there = has_memory(x) and has_memory(other) and x.data_ptr() != 0
    return there and x.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among values, and among the elements of lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (one for one in value if isinstance(one, Tensor))
