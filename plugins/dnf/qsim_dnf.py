"""Differential noise finetuning: `dnf(bins, seed)` trains with noise as large as the errors, in place of the errors."""

from __future__ import annotations

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
"""Differences of one site that are kept of each calibration batch, evenly spread over its output."""


class DNF(Transform):
    """In training every output of a matmul is that of the model as it is, plus noise; in evaluation all is simulated.

    The noise of a site has the distribution of what simulating adds to its outputs on the calibration data. That is
    Q(W) Q(x) - W x for the inputs x of the model as it is, with the site's arithmetic and its quantized output. The
    distribution is a histogram of `bins` bins that hold equally many differences each. The noise is drawn anew for
    every element, and nothing is quantized for it. Source: Basumallik et al., arXiv 2205.06287.

    A module is in training if its own `training` says so: `model.train()`.
    """

    name = "dnf"
    bins: int = Field(1024, ge=2, le=2**16, description="of a site's histogram")
    seed: int = Field(0, ge=0, lt=2**64, description="of the noise")

    def apply(self, model: nn.Module, context: Context) -> None:
        """Find each site's noise in one pass. Raises `DataError` without calibration data."""
        differences: dict[str, list[Tensor]] = defaultdict(list)
        energies: dict[str, Tensor] = defaultdict(lambda: torch.zeros(3, dtype=torch.float64))

        def watch(site: Site, call: Call) -> None:
            if site.inputs or site.plan.output or (site.weight and site.plan.weight):
                exact, found = call.run(call.operands), context.simulated(site, call)
                apart = (found - exact).float().flatten()
                differences[site.name].append(apart[:: -(-apart.numel() // KEPT)].cpu())
                sums = [float(values.double().square().sum()) for values in (exact, apart)]
                energies[site.name] += torch.tensor([*sums, apart.numel()])

        context.observe(watch, "differential noise")
        for name, apart in differences.items():
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


@dataclass(frozen=True, eq=False)
class Noise:
    """The noise of a site in training. `edges` are those of the bins, [bins + 1], in ascending order."""

    site: str
    edges: Tensor
    seed: int

    def __call__(self, call: Call, step: int) -> Tensor:
        """The call as it is, and noise on its result."""
        result: Tensor = call.run(call.operands)
        with torch.no_grad(), at(f"{self.site}:noise", step):
            place = uniform(result, self.seed) * (len(self.edges) - 1)
            edges = self.edges.to(result.device)
            below = place.long()
            noise = torch.lerp(edges[below], edges[below + 1], place - below)
        return result + noise.to(result.dtype)

    @property
    def power(self) -> float:
        """The mean square: of a bin from a to b it is (a² + a b + b²) / 3."""
        low, high = self.edges[:-1].double(), self.edges[1:].double()
        return float(((low * low + low * high + high * high) / 3).mean())

    def __str__(self) -> str:
        return f"noise of {len(self.edges) - 1} bins"


@hookimpl
def qsim_transforms() -> list[type[Transform]]:
    return [DNF]
