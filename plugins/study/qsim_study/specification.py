"""A study in text: models times recipes, as cells.

A grid under `vary` gives every combination of its values. `recipes` names some recipes by hand. `where` and `except`
keep and drop combinations. All that a cell is made of stands in it: two cells that say the same are the same cell.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from qsim_core import ModelError, QsimError, Recipe, RecipeError
from qsim_core.cli.recipe_options import ROLES, compose, with_setting
from qsim_core.components.component import explain
from qsim_core.components.host import Host
from qsim_core.errors import did_you_mean
from qsim_core.evaluation.data import check_source
from qsim_core.evaluation.job import Job
from qsim_core.files import read_text
from qsim_core.simulation.recipe import read_yaml
from qsim_study.cell import Cell, Circumstances

MANY = 10_000
"""A study of more cells has to be asked for."""
LARGEST_FILE = 1 << 20
"""Bytes of the largest study file."""
Condition = dict[str, Any]


class Specification(BaseModel):
    """Everything that a study says. The keys of `Circumstances` hold for all cells that do not vary them."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    name: str = Field("study", description="the study's name, which its report shows")
    models: tuple[str, ...] = Field((), description="directories, hub names, or names of models that a plugin brings")
    recipe: dict[str, Any] = Field(default={}, description="what all recipes have in common")
    recipes: dict[str, dict[str, Any]] = Field(default={}, description="recipes by name; keys as in a recipe file")
    vary: dict[str, list[Any]] = Field(
        default={},
        description="key -> values; a key of a recipe, an option such as abfp.n, model, or a key of the circumstances",
    )
    where: list[Condition] = Field(
        default=[], description="conditions of which a cell must meet one: key -> value, or list of values"
    )
    without: list[Condition] = Field(default=[], alias="except", description="conditions of which a cell meets none")
    circumstances: Circumstances = Field(
        default_factory=Circumstances, description="data, limit, seed, calibration, dtype and device of all cells"
    )

    @field_validator("models", mode="before")
    @classmethod
    def _some_models(cls, models: Any) -> Any:
        return (models,) if isinstance(models, str) else models

    @field_validator("vary", mode="before")
    @classmethod
    def _some_values(cls, vary: Any) -> Any:
        if not isinstance(vary, Mapping):
            return vary
        return {key: [value] if isinstance(value, str | int | float) else value for key, value in vary.items()}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """A specification from plain data. Raises `RecipeError` with the first thing that is wrong."""
        if not isinstance(values, Mapping):
            raise RecipeError(f"a study is a mapping of keys to values, not {type(values).__name__}")
        known = [*(field.alias or name for name, field in cls.model_fields.items()), *Circumstances.model_fields]
        for key in values:
            if key not in known and key != "without":
                raise RecipeError(f"a study has no key {str(key)!r}{did_you_mean(str(key), known)}")
        for key in ("models", "recipes"):
            if key in values and not values[key]:
                raise RecipeError(f"study: {key} has no values")
        inside = {key: values[key] for key in values if key in Circumstances.model_fields}
        rest = {key: value for key, value in values.items() if key not in inside}
        try:
            return cls.model_validate({"circumstances": inside} | rest)
        except ValidationError as error:
            raise RecipeError(f"study: {explain(error)}") from None

    @classmethod
    def read(cls, path: Path) -> Self:
        """A specification from a YAML file; without a name it has the file's. Raises `RecipeError`."""
        values = read_yaml(read_text(path, RecipeError, LARGEST_FILE), f"study {path}")
        if values is None:
            raise RecipeError(f"study {path} is empty")
        if isinstance(values, dict):  # YAML 1.1 reads the key `on` as true
            values = {"name": path.stem} | {"on" if key is True else key: value for key, value in values.items()}
        return cls.of(values)

    def said(self) -> dict[str, Any]:
        """Give what was said as plain data, which `of` reads back."""
        values = self.model_dump(mode="json", by_alias=True, exclude_unset=True)
        return {**values.pop("circumstances", {}), **values}

    @property
    def size(self) -> int:
        """The number of combinations, before `where` and `except`."""
        return len(self._models) * len(self._named) * math.prod(map(len, self._grid.values()))

    @property
    def _grid(self) -> dict[str, list[Any]]:
        return {key: values for key, values in self.vary.items() if key != "model"}

    @property
    def _models(self) -> list[str | None]:
        return [*self.models, *map(str, self.vary.get("model", ()))] or [self.recipe.get("model")]

    @property
    def _named(self) -> list[str]:
        return [*self.recipes] or [""]

    def cells(self, host: Host, many: bool = False) -> list[Cell]:
        """Every cell, those of one model together. Raises `RecipeError` for a cell that is wrong, or
        stands twice, and for more than 10,000 combinations unless `many`.

        Models are not looked at: where one is missing, its cells fail, and others run.
        """
        if self.size > MANY and not many:
            raise RecipeError(f"{self.size:,} cells are many; allow them with --yes, or vary less")
        for key, values in self.vary.items():
            if not values:
                raise RecipeError(f"vary: {key} has no values")
        for condition in (*self.where, *self.without):
            for key in condition:
                if key not in (known := [*self.vary, "model", "recipe"]):
                    raise RecipeError(f"a condition names {key!r}, which does not vary{did_you_mean(key, known)}")
        found: dict[str, Cell] = {}
        for varied in self._combinations():
            cell = self._cell(varied, host)
            same = found.setdefault(cell.model_dump_json(exclude={"varied"}), cell)
            if same is not cell:
                raise RecipeError(f"two cells are the same: {same.label} and {cell.label}")
        if not found:
            raise RecipeError("no cell meets `where` and `except`")
        return [*found.values()]

    def _combinations(self) -> Iterator[dict[str, Any]]:
        """The values of each combination that meets the conditions, by key; those that a study names once too."""
        for model, name, *values in itertools.product(self._models, self._named, *self._grid.values()):
            varied = {"model": model, "recipe": name, **dict(zip(self._grid, values, strict=True))}
            kept = not self.where or any(_meets(varied, condition) for condition in self.where)
            if kept and not any(_meets(varied, condition) for condition in self.without):
                yield varied

    def _cell(self, varied: dict[str, Any], host: Host) -> Cell:
        """The cell of one combination: first the recipe's own keys, then options inside its components."""
        told = {key: _text(value) for key, value in varied.items() if value is not None and value != ""}
        circumstances = self.circumstances.model_dump()
        values = {**self.recipe, **self.recipes.get(varied["recipe"], {})}
        settings = list(values.pop("set", ()))
        for key in self._grid:
            if key in Circumstances.model_fields:
                circumstances[key] = varied[key]
            elif "." in key:
                settings.append(f"{key}={told[key]}")
            else:
                values[key] = varied[key]
        values["model"] = varied["model"]
        try:
            recipe = _recipe(values, settings, host)
            around = Circumstances.model_validate(circumstances)
            for source in filter(None, (around.data, around.calibration_data)):
                check_source(source)
        except ValidationError as error:
            raise RecipeError(f"{_label(told)}{explain(error)}") from None
        except QsimError as error:
            raise RecipeError(f"{_label(told)}{error}") from None
        record = recipe.record() | ({"evaluate": str(recipe.evaluate)} if recipe.evaluate is not None else {})
        return Cell(model=varied["model"], recipe=record, circumstances=around, varied=told)


SHORT = ("plugin", "precision", "static")
"""Keys that mean what the options of that name do, beside those of a recipe and `set`."""


def _recipe(values: dict[str, Any], settings: list[str], host: Host) -> Recipe:
    """The recipe of a cell, as the options of `qsim evaluate` would make it."""
    plugins, precision, static = (values.pop(key, None) for key in SHORT)
    plugins = [plugins] if isinstance(plugins, str) else plugins or []
    texts = {role: _text(values.pop(role)) for role in ROLES if plugins and role in values}
    recipe = compose(host, values, plugins, precision, texts, static=static)
    if settings and recipe.evaluate is None:
        with contextlib.suppress(ModelError):  # the cell will say so
            recipe = recipe.model_copy(update={"evaluate": Job.of(recipe, host).evaluator})
    for setting in settings:
        recipe = with_setting(host, recipe, setting)
    return recipe


def _label(told: Mapping[str, str]) -> str:
    return "".join((", ".join(f"{key}={value}" for key, value in told.items()), ": " if told else ""))


def _meets(varied: dict[str, Any], condition: Condition) -> bool:
    """Tell if a combination has each value of a condition, or one of a list of values."""
    return all(
        _text(varied[key]) in map(_text, wanted if isinstance(wanted, list) else [wanted])
        for key, wanted in condition.items()
    )


def _text(value: Any) -> str:
    """A value as it is written on a command line: a list as its parts in brackets."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    return {"None": "none", "True": "true", "False": "false"}.get(str(value), str(value))
