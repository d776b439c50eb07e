"""Differential noise finetuning: `dnf(bins, seed)` trains with noise in place of the errors, distributed like them."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn

from qsim_core import Transform, hookimpl
from qsim_core.formats.random_bits import at, uniform
from qsim_core.matmuls.call import Call
from qsim_core.sites.site import Site
from qsim_core.transforms.context import Context

KEPT = 2**12
"""Differences that are kept for each site and calibration batch, spread over the output."""


class DNF(Transform):
    """Adds noise to the unquantized outputs of matmuls in training; in evaluation they are simulated.

    The noise of a site has the distribution of its errors on the calibration data. The error is Q(W) Q(x) - W x, where
    x are the inputs of the unquantized model. It includes the errors of the product's arithmetic and of rounding the
    output. The distribution is a histogram of `bins` bins that hold equally many differences each. Noise is drawn
    anew for every element, and no tensor is quantized in training. Source: Basumallik et al., arXiv 2205.06287.

    A module is in training if its attribute `training` is true; `model.train()` sets it.
    """

    name = "dnf"
    bins: int = Field(1024, ge=2, le=2**16, description="bins of each site's histogram")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the noise")

    def apply(self, model: nn.Module, context: Context) -> None:
        """Measure the errors of all sites in one pass. Raises `DataError` without calibration data."""
        differences: dict[str, list[Tensor]] = defaultdict(list)
        energies: dict[str, Tensor] = defaultdict(lambda: torch.zeros(3, dtype=torch.float64))

        def watch(site: Site, call: Call) -> None:
            if site.inputs or site.plan.output or (site.weight and site.plan.weight):
                exact, found = call.run(call.operands), context.simulated(site, call)
                apart = (found - exact).float().flatten()
                differences[site.name].append(apart[spread(apart.numel(), KEPT).to(apart.device)].cpu())
                sums = [float(values.double().square().sum()) for values in (exact, apart)]
                energies[site.name] += torch.tensor([*sums, apart.numel()])

        context.observe(watch, "differential noise")
        for name, apart in differences.items():
            if not energies[name][2]:
                context.report(name, note="left alone: no calibration sample reached it")
                continue
            levels = torch.linspace(0, 1, self.bins + 1, dtype=torch.float64)
            edges = torch.quantile(torch.cat(apart).double(), levels).float()
            noise = Noise(name, edges, self.seed)
            context.sites.table[name].in_training = noise
            signal, error, count = energies[name].tolist()
            context.report(
                name,
                before=(error / signal) ** 0.5 if signal else 0.0,
                after=(noise.power * count / signal) ** 0.5 if signal else 0.0,
                measure="relative size of the errors, and of the noise in their place,",
            )


def spread(count: int, kept: int) -> Tensor:
    """Give at most `kept` places below `count`, each once, evenly spread over every axis of a tensor of that size.

    The step from one to the next has no factor in common with the size of any axis, and is near the golden section.
    """
    step = round(count * (math.sqrt(5) - 1) / 2)
    while math.gcd(step, count) > 1:
        step += 1
    return torch.arange(min(count, kept)) * step % max(count, 1)


@dataclass(frozen=True, eq=False)
class Noise:
    """Computes a site in training. `edges` are the edges of the histogram's bins, [bins + 1], in ascending order."""

    site: str
    edges: Tensor
    seed: int

    def __call__(self, call: Call, step: int) -> Tensor:
        """Run the unquantized call, and add noise to its result."""
        result: Tensor = call.run(call.operands)
        with torch.no_grad(), at(f"{self.site}:noise", step):
            place = uniform(result, self.seed) * (len(self.edges) - 1)
            edges = self.edges.to(result.device)
            below = place.long()
            noise = torch.lerp(edges[below], edges[below + 1], place - below)
        return result + noise.to(result.dtype)

    @property
    def power(self) -> float:
        """The mean square of the noise. For a bin from a to b it is (a² + a b + b²) / 3."""
        low, high = self.edges[:-1].double(), self.edges[1:].double()
        return float(((low * low + low * high + high * high) / 3).mean())

    def __str__(self) -> str:
        return f"noise of {len(self.edges) - 1} bins"


@hookimpl
def qsim_transforms() -> list[type[Transform]]:
    return [DNF]
