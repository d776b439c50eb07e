"""Bias correction: `bias_correction()` takes the mean error of rounded weights out of the outputs."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn

from qsim_core import RecipeError, Transform, hookimpl
from qsim_core.matmuls.call import Call
from qsim_core.sites.site import Site
from qsim_core.transforms.context import Context
from qsim_core.transforms.offload import editing


@dataclass
class Sums:
    """Over all outputs of one layer, in float64: errors [channels], their squares, and the outputs' squares."""

    error: Tensor | float = 0.0
    squares: float = 0.0
    signal: float = 0.0
    count: int = 0

    def add(self, exact: Tensor, quantized: Tensor) -> None:
        """Count outputs [rows, channels] in."""
        error = (quantized - exact).double()
        self.error = self.error + error.sum(0)
        self.squares += float(error.square().sum())
        self.signal += float(exact.double().square().sum())
        self.count += len(exact)


class BiasCorrection(Transform):
    """Subtracts from each bias the mean, over the calibration data, of what quantizing adds to the layer's outputs.

    b = b - E[Q(W) x - W x], channel by channel; with `activations`, b = b - E[Q(W) Q(x) - W x]. The inputs x are those
    of the model before quantization. Source: Nagel et al., arXiv 1906.04721, section 4.2, measured as in appendix D.

    A layer without a bias, or whose weight another transform has put on its grid, is left alone and reported.
    """

    name = "bias_correction"
    activations: bool = Field(False, description="correct for rounded inputs too")

    def apply(self, model: nn.Module, context: Context) -> None:
        """Correct every bias beside a quantized weight, in one pass. Raises `DataError` without calibration data."""
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        biases = {}
        for weight in context.weights():
            bias = weight.name.removesuffix("weight") + "bias"
            if weight.name in context.sites.weights.pinned:
                context.report(weight.name, note="left alone: its weight lies on its grid already")
            elif not weight.name.endswith("weight") or bias not in shapes:
                context.report(weight.name, note="left alone: it has no bias of its own")
            else:
                biases[weight.site.name] = bias
                if self.activations and not _input_is_known(weight.site):
                    raise RecipeError(
                        f"{self} comes before the static scale of {weight.site.name} is known; leave activations out"
                    )
        sums: dict[str, Sums] = defaultdict(Sums)
        in_parts: set[str] = set()
        roles = ("weight", "input") if self.activations else ("weight",)

        def watch(site: Site, call: Call) -> None:
            if site.name in biases:
                exact = call.result.rows(call.run(call.operands))
                quantized = call.result.rows(context.simulated(site, call, roles))
                if exact.shape[-1:] == shapes[biases[site.name]]:
                    sums[site.name].add(*(torch.atleast_2d(found).flatten(0, -2) for found in (exact, quantized)))
                else:
                    in_parts.add(site.name)

        context.observe(watch, "bias correction")
        for site, bias in biases.items():
            if site in in_parts:
                context.report(bias, note="left alone: its weight is used in parts")
                continue
            if site not in sums or not sums[site].count:
                context.report(bias, note="left alone: no calibration sample reached it")
                continue
            found = sums[site]
            with editing(model, bias) as parameters:
                parameter, mean = parameters[bias], found.error / found.count
                assert isinstance(mean, Tensor)
                parameter.copy_(parameter.double() - mean.to(parameter.device))
            left = found.squares - found.count * float(mean.square().sum())
            context.report(
                bias,
                before=_ratio(found.squares, found.signal),
                after=_ratio(left, found.signal),
                measure="relative error of the outputs",
            )


def _input_is_known(site: Site) -> bool:
    """Tell if the quantizer of a site's input has all that it needs before static scales are found."""
    planned = site.planned("input")
    return planned is None or "input" in site.fixed or not planned.needs_held_scales("input")


def _ratio(error: float, signal: float) -> float:
    return (max(error, 0.0) / signal) ** 0.5 if signal else 0.0


@hookimpl
def qsim_transforms() -> list[type[Transform]]:
    return [BiasCorrection]
