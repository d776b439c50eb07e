"""Clipping of weights, block by block: `clip(at=2.5)`."""

from __future__ import annotations

from pydantic import Field
from torch import nn

import qsim_core as qsim
from qsim_core.matmuls.call import Call
from qsim_core.sites.site import Site


class Clip(qsim.Transform):
    """Cuts every weight at a multiple of its root mean square, if the calibration data reach it."""

    name = "clip"
    at: float = Field(1.5, gt=0, description="where to cut, in root mean squares")

    def apply(self, model: nn.Module, context: qsim.Context) -> None:
        for block in context.blocks():
            peaks: dict[str, float] = {}

            def watch(site: Site, call: Call, peaks: dict[str, float] = peaks) -> None:
                peaks[site.weight] = max(peaks.get(site.weight, 0.0), float(call.input.abs().max()))

            block.observe(watch)
            for weight in context.weights():
                if weight.name in peaks:
                    limit = float(self.at * weight.parameter.square().mean().sqrt())
                    weight.parameter.clamp_(-limit, limit)
                    context.report(weight.name, note=f"cut at {limit:.3g}, inputs up to {peaks[weight.name]:.3g}")


@qsim.hookimpl
def qsim_transforms() -> list[type[qsim.Transform]]:
    return [Clip]
