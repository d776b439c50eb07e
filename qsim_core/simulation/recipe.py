"""The recipe: the whole description of one simulated precision.

A recipe says which quantizer stands at which site. A bare number format means the usual scheme of its place:
weights `channel(F)`, activations `token(F)`, outputs `cast(F)`. Patterns are shell globs over site names; `*`
crosses dots and colons, and where several match, the last one written wins.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from qsim_core.components.component import Component, explain
from qsim_core.errors import RecipeError, did_you_mean
from qsim_core.evaluation.evaluator import Evaluator
from qsim_core.formats.format import Format
from qsim_core.formats.quantizer import Quantizer
from qsim_core.quantizers.standard_schemes import Cast, Channel, Token
from qsim_core.sites.plan import Plan
from qsim_core.transforms.transform import Transform


def _in_scheme(scheme: type[Component]) -> AfterValidator:
    def wrap(quantizer: Quantizer | None) -> Any:
        return scheme.model_validate({"element": quantizer}) if isinstance(quantizer, Format) else quantizer

    return AfterValidator(wrap)


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Weights = Annotated[Quantizer | None, _in_scheme(Channel)]
Activations = Annotated[Quantizer | None, _in_scheme(Token)]
Outputs = Annotated[Quantizer | None, _in_scheme(Cast)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class Override(_Strict):
    """What is different at the sites that a pattern names; what is left out stays as it was."""

    weights: Weights = None
    activations: Activations = None
    outputs: Outputs = None


class Recipe(_Strict):
    """Quantizers for weights, activations and outputs, transforms in order, and the exceptions.

    Everywhere a component stands in Python, its text does in YAML and JSON.
    """

    model: str | None = Field(None, description="a directory, a hub name, or a model of the zoo")
    weights: Weights = Field(None, description="quantizer of every weight")
    activations: Activations = Field(None, description="quantizer of every input of a matmul")
    outputs: Outputs = Field(None, description="quantizer of every result of a matmul")
    value_axis: Literal["tokens", "head"] = Field(
        "tokens",
        description="along which axis v's scales are shared: tokens, the reduction axis of PV, which sees later "
        "tokens, or head, which does not",
    )
    path: Literal["auto", "float32", "int8", "bf16", "blockwise", "tf32", "fp8"] = Field(
        "auto",
        description="in which arithmetic a product may be computed that is exact in it: whichever is fastest here, or "
        "this one (int8, bf16, on GPUs blockwise too); float32 for all; GPUs' tf32 and fp8, whose sums are not "
        "float32's, only where they are named",
    )
    transforms: tuple[Transform, ...] = Field((), description="methods that rewrite the model first, in this order")
    skip: Annotated[tuple[str, ...] | None, BeforeValidator(_several)] = Field(
        None, description="patterns of sites to leave alone; none: the adapter's"
    )
    overrides: dict[str, Override] = Field(default_factory=dict, description="pattern -> what is different there")
    evaluate: Evaluator | None = Field(None, description="the evaluator; none: the adapter's")

    @classmethod
    def of(cls, values: Any, host: Any = None) -> Recipe:
        """A recipe from plain data; a recipe is one. Raises `RecipeError` or `SpecError` with the first thing wrong."""
        if isinstance(values, cls):
            return values
        _check_keys("a recipe", values, cls)
        overrides = values.get("overrides")
        for pattern, override in overrides.items() if isinstance(overrides, dict) else ():
            if not isinstance(override, Override):
                _check_keys(f"the override of {pattern!r}", override, Override)
        try:
            return cls.model_validate(values, context={"host": host})
        except ValidationError as error:
            raise RecipeError(f"recipe: {explain(error)}") from None

    @classmethod
    def from_yaml(cls, text: str, host: Any = None) -> Recipe:
        """A recipe from YAML (or JSON, which is YAML too)."""
        return cls.of(read_yaml(text), host)

    def to_yaml(self) -> str:
        """The recipe as YAML, what is not said left out; `from_yaml` reads it back."""
        values = self.model_dump(mode="json", exclude_defaults=True)
        if self.overrides:  # an override's None says "leave alone", so it must stay
            values["overrides"] = {p: o.model_dump(mode="json", exclude_unset=True) for p, o in self.overrides.items()}
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)

    @property
    def quantizes(self) -> bool:
        """Whether any quantizer is named at all."""
        named: list[Recipe | Override] = [self, *self.overrides.values()]
        return any(r.weights or r.activations or r.outputs for r in named)

    @property
    def has_static(self) -> bool:
        """Whether a quantizer of activations or outputs wants static scales, or any wants scales to learn."""
        named: list[Recipe | Override] = [self, *self.overrides.values()]
        return self.learns or any(getattr(q, "static", False) for r in named for q in (r.activations, r.outputs))

    @property
    def learns(self) -> bool:
        """Whether a quantizer trains its scales."""
        named: list[Recipe | Override] = [self, *self.overrides.values()]
        return any(getattr(q, "learns", False) for r in named for q in (r.weights, r.activations, r.outputs))

    def plan(self, names: Iterable[str]) -> Plan:
        """The quantizers of the matmul that goes by these names (its own and its aliases)."""
        names = list(names)
        if any(matches(pattern, names) for pattern in self.skip or ()):
            return Plan(skipped=True)
        chosen: dict[str, Quantizer | None] = {
            "weights": self.weights,
            "activations": self.activations,
            "outputs": self.outputs,
        }
        for pattern, override in self.overrides.items():
            if matches(pattern, names):
                chosen |= {key: getattr(override, key) for key in override.model_fields_set}
        return Plan(chosen["weights"], chosen["activations"], chosen["outputs"])

    def patterns(self) -> list[str]:
        return [*(self.skip or ()), *self.overrides]

    def check_patterns(self, names: Iterable[Iterable[str]]) -> None:
        """Raise `RecipeError` for a pattern that matches none of these matmuls, given by all their names."""
        everything = [list(group) for group in names]
        for pattern in self.patterns():
            if not any(matches(pattern, group) for group in everything):
                known = [name for group in everything for name in group]
                raise RecipeError(f"pattern {pattern!r} matches no site{did_you_mean(pattern, known)}")


def _check_keys(what: str, values: Any, of: type[_Strict]) -> None:
    """Raise `RecipeError` for what is no mapping, and for a key that there is not."""
    if not isinstance(values, dict):
        raise RecipeError(f"{what} is a mapping of keys to values, not {type(values).__name__}")
    for key in values:
        if key not in of.model_fields:
            raise RecipeError(f"{what} has no key {str(key)!r}{did_you_mean(str(key), of.model_fields)}")


class _OnceEach(yaml.SafeLoader):
    """A mapping that has a key twice would silently lose the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and names.count(key.value) > 1:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} stands there twice", problem_mark=key.start_mark
                )
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


def read_yaml(text: str) -> Any:
    """YAML as plain data. Raises `RecipeError` with line and column where it is none."""
    try:
        return yaml.load(text, _OnceEach)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise RecipeError(f"recipe is not YAML: {error.problem or error.context}{where}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe is not YAML: {' '.join(str(error).split())}") from None


def matches(pattern: str, names: Iterable[str]) -> bool:
    """Whether a shell glob matches any of the names, case and all."""
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)
