"""A job: a recipe with everything filled in, and the model, evaluator and data that it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch

from qsim_core.components.host import Host
from qsim_core.errors import DataError, QsimError, RecipeError, SpecError, did_you_mean, one_line
from qsim_core.evaluation.adapter import LoadedModel, check_plain
from qsim_core.evaluation.data import Calibration, Data
from qsim_core.evaluation.evaluator import Evaluator
from qsim_core.evaluation.locate import Located, default_model, locate
from qsim_core.simulation.recipe import Recipe
from qsim_core.transforms.run import Run

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
LONGEST_NAME = 255
"""Bytes of a file's name at most."""
DISPATCHED = ("auto", "disk")
"""Devices for which the adapter places the weights."""


@dataclass(frozen=True)
class Job:
    """A recipe with everything filled in, and the model and evaluator that were found for it: ready to run."""

    recipe: Recipe
    located: Located
    evaluator: Evaluator
    as_stored: bool = False
    """True if the checkpoint was trained or quantized under this recipe: then it has the state of the sites."""

    @classmethod
    def of(cls, recipe: Recipe, host: Host) -> Job:
        """Find the recipe's model, and fill in what `at` does. Raises `ModelError` and `RecipeError`."""
        return cls.at(locate(default_model(host) if recipe.model is None else recipe.model, host), recipe, host)

    @classmethod
    def at(cls, located: Located, recipe: Recipe, host: Host) -> Job:
        """Fill in model, evaluator and skipped sites from the adapter of a model. Raises `RecipeError`."""
        adapter = located.adapter
        evaluator = cast("Evaluator | None", recipe.evaluate) or _evaluator(located, host)
        skip = adapter.skip if recipe.skip is None else recipe.skip
        said = {key: getattr(recipe, key) for key in recipe.model_fields_set}
        filled = {**said, "model": located.name, "skip": skip}
        stored = located.stored
        if stored is not None:
            filled |= stored.beside(recipe, located.name, host)
        complete = Recipe.of({**filled, "evaluate": evaluator}, host)
        return cls(complete, located, evaluator, stored is not None and stored.fits(complete, host))

    def data(self, source: str | None, beside: Located | None = None) -> Data:
        """The data named by `source`, else the evaluator's own, the model's, or those of the model to compare with.

        Raises `DataError` if there are none.
        """
        if source is not None:
            return self.evaluator.read(_name(source))
        trained = self.located.trained
        if trained is not None and trained.data is not None:
            return self.evaluator.read(trained.data)
        found = self.evaluator.default_data()
        for located in (self.located, beside):
            if found is None and located is not None and located.data is not None:
                found = located.data()
        if found is None:
            raise DataError(f"{self.located.name} comes without data; name some with --data")
        return found

    def state(self) -> Mapping[str, torch.Tensor] | None:
        """The state of the sites that the model brings for this recipe: of its training, or of its checkpoint."""
        return self.located.stored.state if self.as_stored and self.located.stored else None

    def notes(self, dtype: str) -> list[str]:
        """Lines for the reader of a result: how the model was found and loaded, and in which dtype it is computed."""
        return self.located.notes(dtype, self.as_stored)

    def calibration(self, given: Calibration) -> Data | None:
        """The data for transforms and static scales, if the recipe has any. Raises `DataError` if none are named."""
        if self.as_stored or (not self.recipe.transforms and not self.recipe.has_static):
            return None
        return self.calibration_data(given, str([*self.recipe.transforms, "a static scale"][0]))

    def batches(self, loaded: LoadedModel, seen: Data | None, given: Calibration, run: Run) -> list[Any] | None:
        """The batches of the calibration, drawn by its own seed or the run's; None without data. Raises `DataError`."""
        if seen is None:
            return None
        seed = run.seed if given.seed is None else given.seed
        return self.evaluator.calibration(loaded, seen, given.samples, given.length, seed)

    def calibration_data(self, given: Calibration, needing: str) -> Data:
        """The data for calibration. Raises `DataError` if none are named, and says what needs them."""
        if given.source is not None:
            return self.evaluator.read(_name(given.source), split="train")
        if self.located.calibration is not None:
            return self.located.calibration()
        found = self.evaluator.default_data()
        if found is None:
            raise DataError(
                f"{needing} needs calibration data, and {self.located.name} comes without; name some with "
                f"--calibration-data"
            )
        return found


def load(located: Located, device: str, dtype: str) -> LoadedModel:
    """Load a model onto a device. Raises `QsimError`."""
    if device in DISPATCHED:
        loaded = located.adapter.load_dispatched(located.source, DTYPES[dtype], device)
        check_plain(loaded.model)
        return loaded
    loaded = located.adapter.load(located.source, DTYPES[dtype])
    check_plain(loaded.model)
    try:
        loaded.model.to(device)
    except RuntimeError as error:  # there is no room
        raise QsimError(f"device {device!r} cannot be used: {one_line(error)}") from None
    return loaded


def check_machine(device: str, dtype: str) -> None:
    """Raise `QsimError` unless numbers of this dtype can be computed on this device and read back."""
    if dtype not in DTYPES:
        raise QsimError(f"no dtype {dtype!r}{did_you_mean(dtype, DTYPES)}")
    if device in DISPATCHED:
        return
    try:
        torch.ones(1, dtype=DTYPES[dtype], device=device).add(1).item()
    except Exception as error:  # of any class, as the device's library likes
        raise QsimError(f"device {device!r} cannot be used: {one_line(error)}") from None


def _evaluator(located: Located, host: Host) -> Evaluator:
    """The evaluator of a named model, or the choice of its adapter. Raises `RecipeError` if there is none."""
    text = located.evaluator or located.adapter.evaluator_of(located.source)
    if text is None:
        raise RecipeError(f"adapter {located.adapter} names no evaluator; say which with `evaluate:`")
    try:
        return host.parse(text, Evaluator)  # type: ignore[no-any-return]
    except SpecError as error:
        known = ", ".join(host.offers(Evaluator)) or "none"
        raise RecipeError(
            f"{located.name} is evaluated by {text!r}, and no evaluator of that name is installed (there are: "
            f"{known}); install one, or say another with `evaluate:`"
        ) from error


def _name(source: str) -> str:
    """The name of data. Raises `DataError` for a text in its place."""
    if "\n" in source or any(len(part.encode()) > LONGEST_NAME for part in source.split("/")):
        raise DataError(
            f"data are named by a file or a data set, not by a text of {len(source)} characters; save the text"
        )
    return source
