"""The content of an export: a simulated model as encoded layers and the rest. What no file holds is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qsim_core.errors import RecipeError
from qsim_core.evaluation.adapter import LoadedModel
from qsim_core.simulation.simulation import Simulation
from qsim_core.sites.site import Site
from qsim_interop.reading.packed_weight import ACT_ORDER
from qsim_interop.writing.experts import experts
from qsim_interop.writing.layer import Layer

EXPERTS = "experts"
"""Stands among kinds of layers for weights that stack the experts of a layer."""


@dataclass(frozen=True)
class Source:
    """A simulated model, as a file may hold it."""

    loaded: LoadedModel
    simulation: Simulation
    layers: list[Layer]
    """The layers whose weights are encoded, in the order in which they were met."""

    @classmethod
    def of(cls, loaded: LoadedModel, simulation: Simulation, kinds: tuple[str, ...]) -> Source:
        """Encode the weights. Raises `RecipeError` for anything that is not in weights and inputs of layers.

        `kinds` has the classes of the layers that a format holds.
        """
        for line in _beside(simulation):
            raise RecipeError(line)
        sites = {site.weight: site for site in simulation.sites.table.values() if site.weight is not None}
        layers = []
        for name, weight in simulation.encoded().items():
            module = name.rpartition(".")[0]
            if weight.why_not:
                raise RecipeError(f"{name} cannot be encoded: {weight.why_not}; leave it out with --skip {module}")
            if weight.layout is not None and weight.layout.name == ACT_ORDER:
                raise RecipeError(
                    f"{name}: the columns of a group do not lie side by side (act-order), and such files hold groups "
                    f"that do; quantize the model with desc_act=false, or leave it out with --skip {module}"
                )
            if name in simulation.sites.weights.tied:
                raise RecipeError(f"{name} is tied to another parameter, which stays as it is; --skip {module}")
            owner = loaded.model.get_submodule(module)
            kind = "Linear" if isinstance(owner, nn.Linear) else type(owner).__name__
            if kind not in kinds and not (EXPERTS in kinds and weight.encoded.codes.dim() == 3):
                known = " and ".join(kinds)
                raise RecipeError(f"{name} belongs to a {kind}; such files hold codes of {known}: --skip {module}")
            parts = [weight] if kind in kinds else experts(loaded.model, weight)
            for part in parts:
                layers.append(Layer(part.name.rpartition(".")[0], part, sites[name].standing("input"), kind, name))
        if not layers:
            raise RecipeError("the recipe quantizes no weight, so there is nothing to pack")
        return cls(loaded, simulation, layers)

    @property
    def model(self) -> nn.Module:
        """The model, with the weights as transforms have left them."""
        return self.simulation.model

    @property
    def plain(self) -> list[str]:
        """The paths of the linear layers that are not packed."""
        packed = {layer.parameter.rpartition(".")[0] for layer in self.layers}
        linear = (name for name, module in self.model.named_modules() if isinstance(module, nn.Linear))
        return [name for name in linear if name not in packed]

    def rest(self) -> dict[str, Tensor]:
        """The tensors of the model's `state_dict` without the packed weights."""
        packed = {layer.parameter for layer in self.layers}
        return {name: tensor.cpu() for name, tensor in self.model.state_dict().items() if name not in packed}


def _beside(simulation: Simulation) -> Iterator[str]:
    """Give a line for each part of a simulation that is not a weight of a layer or the inputs of one."""
    for site in simulation.sites.table.values():
        if site.rotations:
            role, rotation = next(iter(site.rotations.items()))
            yield (
                f"a transform rotates the {role} of {site.name} in each forward ({rotation}); no file holds that, and "
                f"no transform here folds it into the weights before: leave the transform out"
            )
    if simulation.needed_beside:
        yield f"{simulation.needed_beside}, and the weights need them; no file holds that"
    for site in simulation.sites.table.values():
        yield from _beyond_weights(site)
    for operation in simulation.sites.operations.table.values():
        if operation.plan.changes:
            yield f"{operation.name} is not torch's own operation; no file holds that: leave `operations` out"


def _beyond_weights(site: Site) -> Iterator[str]:
    if site.plan.arithmetic.simulates:
        yield f"{site.name} is computed in {site.plan.arithmetic}; a file does not choose the arithmetic: leave it out"
    if site.standing("output") is not None:
        yield f"the output of {site.name} is quantized by {site.standing('output')}; files hold weights and inputs only"
    if site.weight is None and site.inputs:
        roles = sorted({site.named(role) for role in site.input_roles if site.standing(role) is not None})
        yield (
            f"{site.aliases[0] if site.aliases else site.name}: its {' and '.join(roles)} are quantized, and files "
            f"hold the inputs of layers only; say {', '.join(f'{role}: none' for role in roles)} in the recipe"
        )


def state_of(loaded: LoadedModel) -> Any:
    """The tokenizer and the processor, those of them that there are."""
    return [part for part in (loaded.tokenizer, loaded.processor) if part is not None]
