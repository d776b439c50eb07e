"""The recipe: the whole description of one simulated precision.

A recipe says which quantizer stands at which site. A bare number format means the usual scheme of its place:
weights `channel(F)`, activations `token(F)`, outputs `cast(F)`. Patterns are shell globs over site names; `*`
crosses dots and colons, and where several match, the last one written wins.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Sequence
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from qsim_core.components.component import Component, explain
from qsim_core.components.hook_validation import base_of, kind_of
from qsim_core.components.syntax import Node
from qsim_core.errors import RecipeError, did_you_mean, one_line, with_article
from qsim_core.formats.format import Format
from qsim_core.formats.quantizer import Quantizer
from qsim_core.operations.operation import Operation
from qsim_core.quantizers.standard_schemes import Cast, Channel, Token
from qsim_core.sites.arithmetic import AUTO, Arithmetic
from qsim_core.sites.plan import Plan
from qsim_core.transforms.transform import Transform


def _in_scheme(scheme: type[Component]) -> AfterValidator:
    def wrap(quantizer: Quantizer | None) -> Any:
        return scheme.model_validate({"element": quantizer}) if isinstance(quantizer, Format) else quantizer

    return AfterValidator(wrap)


def _of_hook(hook: str) -> tuple[Any, ...]:
    """Accept a component of this hook, or its text."""

    def build(value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, str | Node):
            return base_of(hook).model_validate(value, context=info.context)
        if value is not None and getattr(value, "hook", "") != hook:
            raise ValueError(f"expected {with_article(kind_of(hook))} or its text, found {value!r}")
        return value

    return (BeforeValidator(build),)


def _unless_none(value: Any) -> Any:
    """Read the texts `none`, `float32` and `fp32`, in which simulation computes, as no quantizer."""
    return None if value in ("none", "float32", "fp32") else value


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Weights = Annotated[Quantizer | None, BeforeValidator(_unless_none), _in_scheme(Channel)]
Activations = Annotated[Quantizer | None, BeforeValidator(_unless_none), _in_scheme(Token)]
Outputs = Annotated[Quantizer | None, BeforeValidator(_unless_none), _in_scheme(Cast)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


ROLES = ("queries", "keys", "probabilities", "values")
"""The operands of attention, which may have quantizers of their own."""
MOVED = {"path": "arithmetic"}
"""Keys of earlier versions and the keys that took their place."""


class _Quantizers(_Strict):
    """The quantizers of the sites that a recipe, or one of its overrides, speaks of."""

    weights: Weights = Field(None, description="quantizer of every weight")
    activations: Activations = Field(None, description="quantizer of every input of a matmul")
    outputs: Outputs = Field(None, description="quantizer of every result of a matmul")
    queries: Activations = Field(None, description="quantizer of attention's queries; not said: that of activations")
    keys: Activations = Field(None, description="quantizer of attention's keys; not said: that of activations")
    probabilities: Activations = Field(
        None, description="quantizer of attention's probabilities; not said: that of activations"
    )
    values: Activations = Field(None, description="quantizer of attention's values; not said: that of activations")
    arithmetic: Arithmetic = Field(
        AUTO,
        description="how products are multiplied and added up: auto, the fastest way that gives float32's numbers; "
        "float32; the name of an exact one; or a device's own arithmetic",
    )

    @model_validator(mode="before")
    @classmethod
    def _of_the_cache(cls, values: Any) -> Any:
        """Read `kv_cache: F` as `keys: F` and `values: F`."""
        if not isinstance(values, dict) or "kv_cache" not in values:
            return values
        rest = {key: value for key, value in values.items() if key != "kv_cache"}
        if twice := sorted({"keys", "values"} & rest.keys()):
            raise ValueError(f"kv_cache says keys and values; leave {twice[0]} out")
        return {**rest, "keys": values["kv_cache"], "values": values["kv_cache"]}

    @property
    def said(self) -> dict[str, Any]:
        """The quantizers, and the arithmetic, that were given."""
        return {key: getattr(self, key) for key in (*QUANTIZERS, "arithmetic") if key in self.model_fields_set}

    @property
    def quantizers(self) -> list[Any]:
        """Every quantizer that is named."""
        return [quantizer for key in QUANTIZERS if (quantizer := getattr(self, key)) is not None]


QUANTIZERS = ("weights", "activations", "outputs", *ROLES)


REACHED = {
    "weights": {"weight"},
    "activations": {"input", *ROLES},
    "outputs": {"output"},
    **{role: {role} for role in ROLES},
}
"""A key of a recipe, and the roles of which at least one must get a quantizer."""


class Override(_Quantizers):
    """The differences at the sites that a pattern names; a key that is left out stays as it was."""


class OperationChange(_Strict):
    """The change of an operation between products; a text stands for its implementation."""

    input: Activations = Field(None, description="quantizer of what it reads, with rows along the last axis")
    output: Outputs = Field(None, description="quantizer of its result")
    implementation: Operation | None = Field(None, description="the way in which it is computed; none: torch's own")

    @model_validator(mode="before")
    @classmethod
    def _of_text(cls, values: Any) -> Any:
        return values if isinstance(values, dict) else {"implementation": values}

    @model_validator(mode="after")
    def _without_static(self) -> OperationChange:
        for quantizer in (self.input, self.output):
            if quantizer is not None and quantizer.needs_held_scales("input"):
                raise ValueError(f"{quantizer} needs static scales, which operations do not have")
        return self


class Recipe(_Quantizers):
    """Quantizers for weights, activations and outputs, transforms in order, and the exceptions.

    Everywhere a component stands in Python, its text does in YAML and JSON.
    """

    model: str | None = Field(None, description="a directory, a hub name, or the name of a model that a plugin brings")
    value_axis: Literal["tokens", "head"] = Field(
        "tokens",
        description="along which axis v's scales are shared: tokens, the reduction axis of PV, which sees later "
        "tokens, or head, which does not",
    )
    transforms: tuple[Transform, ...] = Field((), description="methods that rewrite the model first, in this order")
    skip: Annotated[tuple[str, ...] | None, BeforeValidator(_several)] = Field(
        None, description="patterns of sites to leave alone; none: the adapter's"
    )
    overrides: dict[str, Override] = Field(default_factory=dict, description="pattern -> what is different there")
    operations: dict[str, OperationChange] = Field(
        default_factory=dict,
        description="pattern -> what is different at operations between products: of a kind, such as softmax, norm, "
        "activation, gelu, add, or of an operation's site",
    )
    evaluate: Annotated[Component | None, *_of_hook("qsim_evaluators")] = Field(
        None, description="the evaluator; none: the adapter's"
    )

    @classmethod
    def of(cls, values: Any, host: Any = None) -> Recipe:
        """A recipe from plain data; a recipe is one. Raises `RecipeError` or `SpecError` with the first thing wrong."""
        if isinstance(values, cls):
            return values
        _check_keys("a recipe", values, cls)
        operations = values.get("operations")
        for pattern, change in operations.items() if isinstance(operations, dict) else ():
            if isinstance(change, dict):
                _check_keys(f"the operation {pattern!r}", change, OperationChange)
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
        """Write the recipe as YAML, without what is not said; `from_yaml` reads it back."""
        said = self.model_dump(mode="json", exclude_defaults=True)
        values = {key: said[key] for key in ("model", *said) if key in said}
        values |= {key: None for key in ROLES if key in self.model_fields_set and getattr(self, key) is None}
        values |= {key: by_pattern for key, by_pattern in self._by_pattern().items() if by_pattern}
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)

    def record(self) -> dict[str, Any]:
        """Give the recipe as plain data for a result: every key, but for unsaid operations and attention's roles."""
        unsaid = {key for key in ROLES if key not in self.model_fields_set} | {"operations"}
        record = self.model_dump(mode="json", exclude={"model", "evaluate", *unsaid})
        by_pattern = self._by_pattern()
        return record | (by_pattern if self.operations else {"overrides": by_pattern["overrides"]})

    def _by_pattern(self) -> dict[str, dict[str, Any]]:
        """Give overrides and operations as plain data, with what each says: an override's None means "leave alone"."""
        overrides = {p: one.model_dump(mode="json", exclude_unset=True) for p, one in self.overrides.items()}
        operations = {p: one.model_dump(mode="json", exclude_defaults=True) for p, one in self.operations.items()}
        return {"overrides": overrides, "operations": operations}

    @property
    def parts(self) -> list[_Quantizers]:
        """The recipe and its overrides."""
        return [self, *self.overrides.values()]

    @property
    def quantizes(self) -> bool:
        """True if any quantizer is named at all."""
        return bool(self.operations) or any(part.quantizers for part in self.parts)

    @property
    def has_static(self) -> bool:
        """True if a quantizer of activations or outputs needs static scales, or any needs scales to train."""
        held = (
            quantizer.needs_held_scales("weight" if key == "weights" else "input")
            for part in self.parts
            for key in QUANTIZERS
            if (quantizer := getattr(part, key)) is not None
        )
        return any(held)

    @property
    def learns(self) -> bool:
        """True if a quantizer trains its scales."""
        return any(quantizer.learns for part in self.parts for quantizer in part.quantizers)

    def plan(self, names: Iterable[str]) -> Plan:
        """Plan the matmul that has these names (its own and its aliases)."""
        names = list(names)
        if any(matches(pattern, names) for pattern in self.skip or ()):
            return Plan(value_axis=self.value_axis, skipped=True)
        said = self.said
        for pattern, override in self.overrides.items():
            if matches(pattern, names):
                said |= override.said
        inputs = said.get("activations")
        of_attention: dict[str, Any] = {role: said.get(role, inputs) for role in ROLES}
        return Plan(
            weight=said.get("weights"),
            input=inputs,
            output=said.get("outputs"),
            **of_attention,
            arithmetic=said.get("arithmetic", AUTO),
            value_axis=self.value_axis,
            own=frozenset(said.keys() & {*ROLES}),
        )

    def patterns(self) -> list[str]:
        """The patterns of sites: those to leave alone, and those of overrides."""
        return [*(self.skip or ()), *self.overrides]

    def check(self, matmuls: Iterable[tuple[Sequence[str], Collection[str]]]) -> None:
        """Raise `RecipeError` for a pattern that matches none of these matmuls, or a quantizer that reaches none.

        Each matmul is given by all its names, and the roles that it has.
        """
        met = [(names, roles, self.plan(names)) for names, roles in matmuls]
        for pattern in self.patterns():
            if not any(matches(pattern, names) for names, _, _ in met):
                known = [name for names, _, _ in met for name in names]
                raise RecipeError(f"pattern {pattern!r} matches no site{did_you_mean(pattern, known)}")
        for where, part in {"": self, **self.overrides}.items():
            here = [(roles, plan) for names, roles, plan in met if not where or matches(where, names)]
            for key, reached in REACHED.items():
                found = any(
                    getattr(plan, role) is not None for roles, plan in here for role in reached.intersection(roles)
                )
                if getattr(part, key) is not None and not found:
                    place = f"overrides {where!r}: " if where else ""
                    raise RecipeError(f"{place}{key}: {getattr(part, key)} reached no site of this model")


def _check_keys(what: str, values: Any, of: type[_Strict]) -> None:
    """Raise `RecipeError` unless the values are a mapping whose keys all exist."""
    if not isinstance(values, dict):
        raise RecipeError(f"{what} is a mapping of keys to values, not {type(values).__name__}")
    for key in values:
        if key in MOVED:
            raise RecipeError(f"{what} has no key {key!r} any more; it is called {MOVED[key]!r} now")
        known = [*of.model_fields, *(["kv_cache"] if issubclass(of, _Quantizers) else [])]
        if key not in known:
            raise RecipeError(f"{what} has no key {str(key)!r}{did_you_mean(str(key), known)}")


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

    def construct_yaml_int(self, node: Any) -> int:
        number: int = super().construct_yaml_int(node)
        if number.bit_length() > 64:
            raise ValueError("a whole number has more than 64 bits")
        return number


_OnceEach.add_constructor("tag:yaml.org,2002:int", _OnceEach.construct_yaml_int)


def read_yaml(text: str, what: str = "recipe") -> Any:
    """Read YAML as plain data. Raises `RecipeError` with line and column for text, `what` it is, that is not YAML."""
    try:
        loader = _OnceEach(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _size(node, {})
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise RecipeError(f"{what} is not YAML: {error.problem or error.context}{where}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{what} is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise RecipeError(f"{what} is not YAML for qsim: it is nested too deep") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # of a tag such as !!int, or of a date
        raise RecipeError(f"{what} is not YAML: a value cannot be read: {one_line(error)}") from None


def _size(node: yaml.Node, known: dict[yaml.Node, int]) -> int:
    """Count the values below a node, those behind an alias each time. Raises `RecipeError` if there are too many."""
    if node not in known:
        known[node] = LARGEST  # of a node that holds itself
        pairs = node.value if isinstance(node, yaml.CollectionNode) else ()
        below = [part for pair in pairs for part in (pair if isinstance(pair, tuple) else (pair,))]
        known[node] = 1 + sum(_size(part, known) for part in below)
    if known[node] > LARGEST:
        raise RecipeError(f"a recipe has at most {LARGEST} values, those behind aliases counted each time")
    return known[node]


LARGEST = 10_000
"""The number of values in a recipe; one for each layer of a large model would be a tenth of them."""


def matches(pattern: str, names: Iterable[str]) -> bool:
    """Tell if a shell glob matches any of the names, with their case."""
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)
