"""Learned step sizes: scales that a site holds and an optimizer trains (LSQ, Esser et al., arXiv 1902.08153).

They are parameters of the model, so that every trainer finds them. They lie in submodules that do not save them: the
model's `state_dict` stays the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qsim_core.formats.quantizer import laid_out_as
from qsim_core.formats.rounding import working
from qsim_core.quantizers.scheme import divisor_of
from qsim_core.quantizers.static_scale import StaticScheme
from qsim_core.simulation.site_state import STEPS
from qsim_core.sites.site import Site


class LearnedSteps(nn.Module):
    """The learned steps of one module's sites, as its child: in `parameters()` and not in `state_dict()`."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        pass

    def extra_repr(self) -> str:
        return ", ".join(self._parameters)

    @classmethod
    def register(cls, module: nn.Module, name: str, step: nn.Parameter) -> None:
        """Add a step to the parameters of a module, under a name."""
        if STEPS not in module._modules:
            module.add_module(STEPS, cls())
        module.get_submodule(STEPS).register_parameter(name.replace(".", "/"), step)


@dataclass(frozen=True, eq=False)
class LearnedScheme(StaticScheme):
    """A scheme with the steps that its site trains: `scale` is [B, 1] for activations, [..., B, 1] for a weight.

    The gradient of a step is the sum of the paper's equation 3 over the values that share the step, times
    1 / sqrt(N * max). Here max is the format's largest value (section 2.2). N is the number of values of a weight that
    share the step. For an activation it is the number of features of one row that do, for any number of rows. The
    rounding of the scale itself has the gradient of the identity. The magnitude of a negative step is used.
    """

    of_weight: bool = False

    @property
    def by_rows(self) -> bool:
        return True

    @property
    def learns(self) -> bool:
        """True if the steps are trained, and not frozen."""
        return self.scale.requires_grad

    def bits_per_element(self, shape: torch.Size) -> float | None:
        """Count the bits of an element as the scheme does for a weight; an activation's scales add no bits."""
        return self.scheme.bits_per_element(shape) if self.of_weight else float(self.scheme.element.width)

    def __call__(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (x.requires_grad or self.learns) and x.numel():
            result: Tensor = _LearnedStep.apply(x, self.scale, self)  # type: ignore[no-untyped-call]
            return result
        return self.quantize(x)

    def share(self, x: Tensor) -> float:
        """The number N of values that share a step: of a whole weight, or of one row of an activation."""
        if self.of_weight:
            return x.numel() / self.scale.numel()
        block = self.scheme.granularity
        return min(block, x.shape[-1]) if isinstance(block, int) else x.shape[-1]

    def held_for(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        scale, zero = super().held_for(x)
        return self.scheme.rounded_scale(scale.detach().abs()), zero


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, learned: LearnedScheme) -> Tensor:
        """Quantize `x`; keep where its gradient is 1, and the derivative of each value by its step."""
        scheme = learned.scheme
        blocks = scheme.split(working(x))
        scale, zero = (part if part is None else part.to(blocks.dtype) for part in learned.held_for(x))
        assert scale is not None
        rounded, divisor = scheme.round_at(blocks, scale, zero), divisor_of(scale)
        inside = scheme.passes_at(x, scale, zero, "lsq")
        slope = torch.where(scheme.split(inside), rounded - blocks, rounded) / divisor
        ctx.save_for_backward(inside, slope, step)
        ctx.learned = learned
        ctx.factor = 1 / math.sqrt(learned.share(x) * scheme.coded.max)
        return laid_out_as(x, scheme.join(rounded, x))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        inside, slope, step = ctx.saved_tensors
        blocks = ctx.learned.scheme.split(working(gradient))
        of_step = (blocks * slope).sum(-1, keepdim=True).sum_to_size(step.shape)
        of_step = (of_step * ctx.factor * torch.where(step < 0, -1.0, 1.0)).to(step.dtype)
        return torch.where(inside, gradient, 0.0), of_step, None


def learned_scheme(fixed: StaticScheme, site: Site, role: str, model: nn.Module) -> LearnedScheme:
    """Let the scales of a site's static scheme be trained, from their values on: they are parameters of the model."""
    step = nn.Parameter(fixed.scale)
    owner, _, name = site.weight.rpartition(".") if site.weight else site.name.rpartition(":")
    LearnedSteps.register(model.get_submodule(owner), f"{name}:{role}", step)
    return LearnedScheme(fixed.scheme, step, fixed.zero, fixed.where, of_weight=role == "weight")
