"""Scales that a site holds: static scales, and scales that are trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qsim_core.quantizers.learned_steps import LearnedScheme, LearnedSteps
from qsim_core.quantizers.scheme import Scheme
from qsim_core.quantizers.static_scale import StaticScheme
from qsim_core.sites.site import Site


def hold(model: nn.Module, site: Site, role: str, scheme: Scheme, scale: Tensor, zero: Tensor | None) -> StaticScheme:
    """Put a scheme with its scales [B, 1], or [..., B, 1] for a weight, at a site of a model.

    A scheme that learns its scales starts its training from these.
    """
    where = f"{site.name} ({site.named(role)})"
    with torch.inference_mode(False):  # a training may follow
        scale, zero = scale.detach().clone(), None if zero is None else zero.detach().clone()
    fixed = StaticScheme(scheme, scale, zero, where)
    if scheme.learns:
        step = nn.Parameter(scale)
        owner, _, name = site.weight.rpartition(".") if site.weight else site.name.rpartition(":")
        LearnedSteps.register(model.get_submodule(owner), f"{name}:{role}", step)
        fixed = LearnedScheme(scheme, step, zero, where, of_weight=role == "weight")
    site.fixed[role] = fixed
    return fixed
