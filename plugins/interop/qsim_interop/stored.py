"""The quantization in which a checkpoint stores its weights, as the recipe that it brings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from qsim_core import Host, Recipe, RecipeError


@dataclass(frozen=True)
class StoredQuantization:
    """The quantization in which a checkpoint stores its weights, and the one that it asks for at their inputs."""

    kind: str
    """The kind of the checkpoint, like "gptq"."""
    recipe: Recipe
    """The quantizers of weights and inputs, as overrides of the layers that are stored so."""
    state: Mapping[str, Tensor] = field(default_factory=dict)
    """The static scales of the inputs, as `Simulation.state_dict` names them."""
    notes: tuple[str, ...] = ()
    """Lines about what the checkpoint asks for and the simulation does otherwise."""

    def beside(self, recipe: Recipe, name: str, host: Host) -> dict[str, Any]:
        """The keys of a recipe that change beside the stored weights of a model.

        A recipe without quantizers gets all that the checkpoint says. Another one gets the quantizers of the weights,
        and says the rest. Raises `RecipeError` for weights and transforms.
        """
        own = self.recipe.overrides
        stored = {pattern: override.weights for pattern, override in own.items() if override.weights is not None}
        others = [o.weights for pattern, o in recipe.overrides.items() if stored.get(pattern) != o.weights]
        if any(weights is not None for weights in (recipe.weights, *others)):
            raise RecipeError(
                f"the weights of {name} are quantized already, as {self.kind}; leave weights out, or take the "
                f"checkpoint that it was made from"
            )
        if recipe.transforms:
            raise RecipeError(
                f"{recipe.transforms[0]} would change weights of {name}, which are quantized already; apply it to the "
                f"checkpoint that it was made from"
            )
        if not recipe.quantizes:
            return {"overrides": own}
        said = {pattern: override.said for pattern, override in recipe.overrides.items()}
        return {
            "overrides": {
                pattern: ({"weights": stored[pattern]} if pattern in stored else {}) | said.get(pattern, {})
                for pattern in {**stored, **said}
            }
        }

    def fits(self, recipe: Recipe, host: Host) -> bool:
        """True if a recipe quantizes what the checkpoint says and no more, so that its scales belong to the sites."""
        return recipe.overrides == self.recipe.overrides and not recipe.quantizers and not recipe.operations

    def lines(self, name: str, fits: bool) -> list[str]:
        """Lines about what was stored, and about what is simulated otherwise."""
        return [
            f"its weights are stored quantized, as {self.kind}, and none is rounded again: the baseline is this "
            f"checkpoint, dequantized, with no quantizer of inputs; --baseline MODEL compares with another",
            *self.notes,
        ]
