"""Damping of weights that swing between two values of their grid. Importing this imports transformers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from qsim_core.formats.quantizer import SiteQuantizer
from qsim_core.matmuls.call import Call
from qsim_core.matmuls.layout import Layout, layout_of
from qsim_core.simulation.simulation import Simulation
from qsim_core.sites.site import Site
from qsim_core.transforms.forward import as_in_evaluation, call


class Damping(TrainerCallback):  # type: ignore[misc]
    """Pulls each quantized weight w towards the value Q(w) to which it is rounded.

    The gradient of λ Σ (w - Q(w))² is added before each step, with Q(w) held, and nothing outside of the range. λ rises
    from 0 to `strength` as half a cosine. Source: Nagel et al., arXiv 2203.08807, equations 6 and 7.
    """

    def __init__(self, simulation: Simulation, strength: float) -> None:
        self.simulation, self.strength = simulation, strength
        self.places: dict[str, tuple[Layout, SiteQuantizer]] = {}
        """For weights by name, the layout of the rows that share scales, and the quantizer."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Find the weights that are multiplied as a whole, by the simulation's example."""
        model = self.simulation.model

        def watch(site: Site, call: Call) -> Tensor:
            quantizer = site.standing("weight")
            if site.weight in self.simulation.sites.weights.names and quantizer is not None and call.weight is not None:
                parameter = model.get_parameter(site.weight)
                layout = layout_of(parameter, call.operands[call.weight], call.layouts[call.weight])
                if layout is not None and not site.computed:
                    self.places[site.weight] = layout, quantizer
            result: Tensor = call.exact()
            return result

        with torch.no_grad(), self.simulation.unquantized(watch), as_in_evaluation(model):
            call(model, self.simulation.example)

    @torch.no_grad()
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Add the gradients, after those of the loss were clipped."""
        strength = self.strength * 0.5 * (1 - math.cos(math.pi * state.global_step / max(state.max_steps, 1)))
        for name, (layout, quantizer) in self.places.items():
            parameter = self.simulation.model.get_parameter(name)
            if parameter.grad is not None:
                rows = layout.rows(parameter.detach())
                error, passes = rows - quantizer.quantize(rows), quantizer.passes(rows)
                error = error if passes is None else error.where(passes, 0.0)
                parameter.grad += 2 * strength * layout.back(error)
