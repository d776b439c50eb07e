"""The directory of a model that was trained under a recipe: the files of `save_pretrained`, and two more.

`qsim.json` names the recipe, `sites.safetensors` holds the state of the sites. `qsim evaluate DIR` reads both.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError
from qsim_cache.sealing import SEAL, damaged

from qsim_core.components.component import explain
from qsim_core.errors import ModelError
from qsim_core.evaluation.locate import RECORD
from qsim_core.files import read_text, writing
from qsim_core.simulation.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

STATE = "sites.safetensors"
PAST = ("model", "transforms", "evaluate")
"""The keys of the recipe that do not apply to a trained model any more; its transforms are in the weights by now."""


class Trained(BaseModel):
    """The record of the training of the model in a directory."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int = 1
    base: str = Field(description="the model that was trained")
    recipe: dict[str, Any] = Field(description="as text, what it was trained under; transforms came first")
    evaluator: str
    data: str | None = Field(None, description="what it is evaluated on, as --data says it; none: the base's own")
    _directory: Path = PrivateAttr(default=Path())

    @classmethod
    def of(cls, directory: Path) -> Trained:
        """The record in a directory.

        Raises `ModelError` if it cannot be read, or if a file is not as the training has written it.
        """
        path = directory / RECORD
        if (directory / SEAL).exists() and (wrong := damaged(directory, RECORD)):
            raise ModelError(
                f"{directory} is not what its training has written: {wrong[0]} is damaged, changed or not finished; go "
                f"on with --resume, copy it again, or remove {SEAL} if you changed it"
            )
        try:
            found = cls.model_validate_json(read_text(path, ModelError))
        except ValidationError as error:
            raise ModelError(f"{path} is no record of a training: {explain(error)}") from None
        found._directory = directory
        return found

    def write(self, directory: Path) -> None:
        """Write it into a directory, whole or not at all."""
        with writing(directory / RECORD) as file:
            file.write(self.model_dump_json(indent=2).encode() + b"\n")

    def simulated(self, host: Any) -> dict[str, Any]:
        """The part of the recipe that the model still runs under, built by a host."""
        recipe = Recipe.of(self.recipe, host)
        return {key: getattr(recipe, key) for key in recipe.model_fields_set if key not in PAST}

    @property
    def state(self) -> Mapping[str, Tensor]:
        """The state of the sites. Raises `ModelError`."""
        return read_state(self._directory / STATE)

    def beside(self, recipe: Recipe, name: str, host: Any) -> dict[str, Any]:
        """The keys of a recipe without quantizers and transforms that it leaves to the training's; none of another."""
        if recipe.quantizes or recipe.transforms:
            return {}
        return {key: value for key, value in self.simulated(host).items() if key not in recipe.model_fields_set}

    def lines(self, name: str, fits: bool) -> list[str]:
        """A line for the reader of a result under another recipe."""
        return [] if fits else [f"{name} was trained under another recipe; what its sites learned is left aside"]

    def fits(self, recipe: Recipe, host: Any) -> bool:
        """True if a recipe has the quantizers of the training, so that the saved state belongs to its sites."""
        known = Recipe.of(self.simulated(host), host)
        here, there = ({**one.record(), "arithmetic": None} for one in (recipe, known))
        return here == there


def write_state(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write the state of the sites, whole or not at all. Raises `QsimError`."""
    from safetensors.torch import save

    with writing(path) as file:
        file.write(save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}))


def read_state(path: Path) -> dict[str, Tensor]:
    """The state of the sites. Raises `ModelError`."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        found: dict[str, Tensor] = load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read {path}, what the sites hold: {' '.join(str(error).split())[:160]}") from None
    return found
