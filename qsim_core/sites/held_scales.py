"""Scales that a site holds: static ones, and those that training changes."""

from __future__ import annotations

from torch import Tensor, nn

from qsim_core.quantizers.learned_steps import LearnedScheme, LearnedSteps
from qsim_core.quantizers.scheme import Scheme
from qsim_core.quantizers.static_scale import StaticScheme
from qsim_core.sites.site import Site


def hold(model: nn.Module, site: Site, role: str, scheme: Scheme, scale: Tensor, zero: Tensor | None) -> StaticScheme:
    """Put a scheme with its scales at a model's site, for good or, where it learns them, to start from."""
    where = f"{site.name} ({role})"
    fixed = StaticScheme(scheme, scale, zero, where)
    if scheme.learns:
        step = nn.Parameter(scale.detach().clone())
        owner, _, what = site.weight.rpartition(".") if site.weight else site.name.rpartition(":")
        LearnedSteps.register(model.get_submodule(owner), f"{what}:{role}", step)
        fixed = LearnedScheme(scheme, step, zero, where, of_weight=role == "weight")
    site.fixed[role] = fixed
    return fixed
