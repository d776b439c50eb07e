"""The suite of hook `qsim_operations`: an operation between products."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsim_core.components.component import Component
from qsim_core.errors import RecipeError
from qsim_core.operations.functions import OperationCall, read_operation
from qsim_core.operations.operation import Operation
from qsim_core.simulation.simulation import simulate
from qsim_core.testing.component import ComponentSuite, global_randomness_untouched, identical, noise

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
CALLS: dict[str, tuple[Callable[..., Tensor], tuple[Any, ...]]] = {
    "softmax": (F.softmax, (-1,)),
    "log_softmax": (F.log_softmax, (1,)),
    "layer_norm": (F.layer_norm, ((24,),)),
    "rms_norm": (F.rms_norm, ((24,),)),
    "group_norm": (F.group_norm, (3,)),
    "gelu": (F.gelu, ()),
    "silu": (F.silu, ()),
    "sigmoid": (torch.sigmoid, ()),
    "tanh": (torch.tanh, ()),
    "relu": (F.relu, ()),
    "exp": (torch.exp, ()),
    "rsqrt": (torch.rsqrt, ()),
    "reciprocal": (torch.reciprocal, ()),
}
"""A call of each kind, and its arguments after the first."""


def proper(kind: str, x: Tensor) -> Tensor:
    """Give numbers that a function takes: positive ones, and negative ones for exp, as in a softmax."""
    return -x.abs() if kind == "exp" else x.abs() + 0.2


class Computes(nn.Module):
    """One operation on numbers that its function takes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        function, arguments = CALLS[self.kind]
        return function(proper(self.kind, x), *arguments)


class OperationSuite(ComponentSuite):
    """`compute(call)` gives a result of the shape of torch's, and leaves the operands alone."""

    base: ClassVar[type[Component]] = Operation
    tolerance: ClassVar[float] = 0.25
    """The error that it may have, relative to the norm of torch's own result."""

    def calls(self, component: Any, dtype: torch.dtype = torch.float32) -> Iterator[OperationCall]:
        """The calls that the component computes."""
        met = False
        for kind, (function, arguments) in CALLS.items():
            call = read_operation(function, (proper(kind, noise(2, 6, 24, dtype=dtype)), *arguments), {})
            assert call is not None
            try:
                component.check(call)
            except RecipeError:
                continue
            met = True
            yield call
        assert met, f"{component} computes none of {', '.join(CALLS)}; override calls() with some that it does"

    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
    def test_its_result_has_the_shape_of_torchs_own(self, component: Any, dtype: torch.dtype) -> None:
        for call in self.calls(component, dtype):
            before, exact = copy.deepcopy(call.operands), call.of(call.operands)

            found = component.compute(call)

            assert found.shape == exact.shape, f"{component} gives {tuple(found.shape)} for {call.operation}"
            assert all(map(identical, call.operands, before)), f"{component} changed what it reads of {call.operation}"

    def test_its_result_is_near_torchs_own(self, component: Any) -> None:
        for call in self.calls(component):
            exact = call.of(call.operands)
            error = (component.compute(call) - exact).norm() / exact.norm()

            assert error < self.tolerance, f"{component} is off by {error:.0%} of {call.operation}"

    def test_it_gives_the_same_each_time_and_draws_no_global_random_numbers(self, component: Any) -> None:
        for call in self.calls(component):
            with global_randomness_untouched(component, "computes"):
                first, again = component.compute(call), component.compute(call)

            assert identical(first, again), f"{component} gives another {call.operation} the second time"

    def test_a_nan_is_not_hidden(self, component: Any) -> None:
        for call in self.calls(component):
            call.operands[0][0, 0, 0] = torch.nan

            assert component.compute(call)[0, 0, 0].isnan(), f"{component} makes a number of NaN in {call.operation}"

    def test_a_simulated_model_pickles_trains_and_is_restored(self, component: Any) -> None:
        for call in self.calls(component):
            model, x = Computes(call.operation), noise(2, 6, 24)
            simulation = simulate(model, {"operations": {call.operation: component}}, example=x)

            simulated = model(x)
            assert identical(pickle.loads(pickle.dumps(model))(x), simulated), f"{component} does not pickle"
            model(x.requires_grad_()).sum().backward()
            assert x.grad is not None and x.grad.isfinite().all(), f"{component} has no gradient of {call.operation}"
            simulation.restore()
            assert identical(model(x), Computes(call.operation)(x)), f"{component} leaves something behind"
