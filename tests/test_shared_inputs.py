"""An input that several matmuls have is quantized once, in memory that is used again, and without a visible effect."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import qsim_core as qsim


def test_a_gradient_is_that_of_what_was_computed() -> None:
    """A tensor that was quantized without a gradient is not used again where a gradient is recorded."""

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, y: Tensor, alone: bool = False) -> Tensor:
            if alone:
                return self.b(x)  # type: ignore[no-any-return]
            with torch.no_grad():
                self.a(x)
            out: Tensor = self.b(x)
            with torch.no_grad():
                self.c(y)
            return out

    model, found = Half().eval(), []
    qsim.simulate(model, qsim.Recipe.of({"weights": "int8", "activations": "token(int8)", "arithmetic": "float32"}))
    for alone in (False, True):
        x, y = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1)).unbind()
        x.requires_grad_()
        model.zero_grad()
        model(x, y, alone).sum().backward()
        found.append((model.b.weight.grad.clone(), x.grad.clone()))  # type: ignore[union-attr]

    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


class Twice(nn.Module):
    """Three operands, of which one is a weight, between two products whose input is the same."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
        self.eval()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        first = F.linear(y, self.weight)
        both = torch.einsum("bi,bi,oi->bo", y, x, self.weight)
        return first + both + F.linear(y, self.weight)


def test_inputs_that_are_needed_together_do_not_share_their_memory() -> None:
    x, y = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1))
    model = Twice()
    qsim.simulate(model, weights="int8", activations="token(int8)")

    with torch.no_grad():
        found = model(x, y)

    own = model(x, y).detach()  # where gradients are recorded, all is in memory of its own
    assert torch.allclose(found, own, atol=1e-5)


def test_what_is_quantized_for_one_model_is_not_touched_by_another() -> None:
    class Meanwhile(Twice):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            first = F.linear(y, self.weight)
            other(x)
            return first + F.linear(y, self.weight)

    other, model = nn.Linear(8, 8).eval(), Meanwhile()
    x, y = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1))
    for each in (other, model):
        qsim.simulate(each, qsim.Recipe.of({"weights": "int8", "activations": "token(int8)", "arithmetic": "float32"}))

    with torch.no_grad():
        found = model(x, y)

    assert torch.equal(found, model(x, y).detach())


def test_a_dispatch_mode_may_keep_the_quantized_tensors() -> None:
    class Keeping(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket is torch.ops.aten.addmm:
                seen.append((args[1], args[1].clone()))
            return func(*args, **(kwargs or {}))

    seen: list[tuple[Tensor, Tensor]] = []
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3))).eval()
    qsim.simulate(model, qsim.Recipe.of({"weights": "int8", "activations": "token(int8)", "arithmetic": "float32"}))

    with torch.no_grad(), Keeping():
        model(torch.randn(8, 64))

    assert len(seen) == 3 and all(torch.equal(x, then) for x, then in seen)
