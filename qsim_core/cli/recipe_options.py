"""From the command line's options to a recipe.

Plugins are named in order and each brings the component that bears its name: a quantizer becomes the scheme of
weights and activations, a transform is appended. `--precision` then changes the widths, `--weights`,
`--activations` and `--outputs` say it exactly, and `--set` changes one option of a component that is there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from qsim_core.components.component import Component, Preset, components_in, explain, no_option, read_value
from qsim_core.components.host import Host
from qsim_core.errors import PluginError, RecipeError, did_you_mean, with_article
from qsim_core.evaluation.adapter import Adapter
from qsim_core.evaluation.evaluator import Evaluator
from qsim_core.formats.format import Format
from qsim_core.formats.quantizer import Quantizer
from qsim_core.quantizers.calibrators import Calibrator
from qsim_core.quantizers.standard_schemes import Tensorwise
from qsim_core.simulation.recipe import Recipe
from qsim_core.transforms.transform import Transform

PLUGIN_OUTPUTS = "fp.bf16"
SAID: dict[type[Component], str] = {
    Format: "say --weights {name}, --activations {name} or --outputs {name}",
    Quantizer: "say --weights {name}, --activations {name} or --outputs {name}",
    Calibrator: "say --static {name}",
    Evaluator: "say --evaluator {name}",
    Adapter: "it is found by itself for the models it knows, and needs no --plugin",
}
"""How components are chosen that `--plugin` does not choose."""
WIDE = {"16": "cast(fp.bf16)", "32": None}
"""Widths that name no integers: 16 is bfloat16 and 32 the float32 that is simulated in."""

WIDTHS = range(2, 16)
"""Bits of the others, which are integers."""


def compose(
    host: Host,
    values: Mapping[str, Any],
    plugins: Iterable[str] = (),
    precision: str | None = None,
    texts: Mapping[str, str | None] | None = None,
    settings: Iterable[str] = (),
    static: str | None = None,
) -> Recipe:
    """A recipe from a file's `values`, changed by the options in the order given above."""
    chosen: dict[str, Any] = dict(values)
    named: Quantizer | None = None
    for plugin in plugins:
        component = bearing_name(host, plugin)
        if isinstance(component, Quantizer):
            if named is not None:
                raise RecipeError(
                    f"--plugin {named.name} and --plugin {plugin} both bring a quantizer of everything; name one of "
                    f"them, or say --weights and --activations"
                )
            named = component
            chosen |= {"weights": component, "activations": component}
            chosen.setdefault("outputs", PLUGIN_OUTPUTS)
        elif isinstance(component, Transform):
            chosen["transforms"] = [*chosen.get("transforms", ()), component]
        else:
            chosen["evaluate"] = component
    scheme = None if isinstance(named, Format) else named
    if precision is not None:
        if named is not None and (scheme is None or "element" not in type(scheme).model_fields):
            raise RecipeError(
                f"--precision {precision}: {named.name} has no width to change; leave --precision out, or say "
                f"--weights and --activations"
            )
        chosen |= _precision(host, precision, scheme)
    for role, text in (texts or {}).items():
        if text is not None:
            chosen[role] = None if text == "none" else _in_scheme(host, role, text, scheme)
    recipe = Recipe.of(chosen, host)
    if static is not None:
        recipe = _static(host, recipe, static)
    if recipe.transforms and not recipe.quantizes:
        raise RecipeError("a transform alone quantizes nothing; say --weights or --precision with it")
    for setting in settings:
        recipe = _set(host, recipe, setting)
    return recipe


def bearing_name(host: Host, plugin: str) -> Component:
    """The component that bears its plugin's name. Raises `PluginError`, listing what there is, if none does."""
    if plugin not in host.plugins and (said := _said_otherwise(host, plugin)):
        raise PluginError(said)
    offers = host.load(plugin)
    fitting = [item for item in offers.items() if item.name == plugin]
    made: Any = host.parse(f"{plugin}.{plugin}") if fitting else None
    if isinstance(made, Quantizer | Transform | Evaluator):
        return made
    if said := _said_otherwise(host, plugin):
        raise PluginError(said)
    names = ", ".join(sorted(item.name for item in offers.items())) or "nothing"
    raise PluginError(
        f"{offers.plugin} has no quantizer, transform or evaluator called {plugin!r}, so --plugin cannot say what to "
        f"do with it; it offers: {names}"
    )


def _said_otherwise(host: Host, name: str) -> str:
    """How a component that no plugin is called after, or that is of another kind, is said; empty if there is none."""
    for kind, how in SAID.items():
        if name in host.components(kind):
            return f"{name!r} is {with_article(kind.__name__.lower())}: {how.format(name=name)}"
    return ""


def _precision(host: Host, precision: str, scheme: Quantizer | None) -> dict[str, Any]:
    """`w4a8` as quantizers: integers of that width in the scheme that was named, else in the usual ones."""
    found = re.fullmatch(r"w(\d+)a(\d+)", precision.lower())
    if not found:
        raise RecipeError(f"--precision is written w4a8: the bits of weights and of activations, not {precision!r}")
    chosen: dict[str, Any] = {}
    for role, bits in zip(("weights", "activations"), found.groups(), strict=True):
        if bits not in WIDE and int(bits) not in WIDTHS:
            raise RecipeError(
                f"--precision {precision}: {role} may have {WIDTHS[0]} to {WIDTHS[-1]} bits, 16 for bfloat16 or 32 for "
                f"float32, not {int(bits)}"
            )
        chosen[role] = WIDE[bits] if bits in WIDE else _in_scheme(host, role, f"int.int{int(bits)}", scheme)
    return chosen


def _static(host: Host, recipe: Recipe, calibrator: str) -> Recipe:
    """Activations under one static scale for each tensor, chosen by a calibrator; weights stay as they are."""
    element = getattr(recipe.activations, "element", None)
    if not isinstance(element, Format):
        raise RecipeError(
            f"--static {calibrator}: no format of activations to give static scales; say --precision with it"
        )
    range_ = host.parse(calibrator, Calibrator)
    symmetric = getattr(recipe.activations, "symmetric", True)
    tensor = Tensorwise(element=element, symmetric=symmetric, static=True, range=range_)
    values = {key: getattr(recipe, key) for key in recipe.model_fields_set}
    return Recipe.of({**values, "activations": tensor}, host)


def _in_scheme(host: Host, role: str, text: str, scheme: Quantizer | None) -> Quantizer:
    """A quantizer from text; a bare format is put into the scheme that a plugin named, if one did."""
    quantizer: Quantizer = host.parse(text, Quantizer)
    if scheme is None or role == "outputs" or not isinstance(quantizer, Format):
        return quantizer
    return scheme.replace(element=quantizer) if "element" in type(scheme).model_fields else quantizer


def _set(host: Host, recipe: Recipe, setting: str) -> Recipe:
    """`abfp.n=128`: that option of every component of that name, wherever it stands in the recipe."""
    target, equals, text = setting.partition("=")
    name, dot, option = target.strip().rpartition(".")
    if not (equals and dot and name and option):
        raise RecipeError(f"--set is written COMPONENT.OPTION=VALUE, like abfp.n=128, not {setting!r}")
    known = {component.name for component in components_in(recipe)}
    if name not in known:
        raise RecipeError(f"--set {setting}: the recipe has no component {name!r}{did_you_mean(name, known)}")

    def change(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: change(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return tuple(change(item) for item in value)
        if not isinstance(value, BaseModel):
            return value
        fields = type(value).model_fields
        said = fields if isinstance(value, Component) else value.model_fields_set
        parts = {key: change(getattr(value, key)) for key in said}
        if isinstance(value, Component) and value.name == name:
            if option not in fields:
                raise RecipeError(no_option(type(value), option))
            parts[option] = read_value(text.strip(), fields[option].annotation)
        elif all(part is getattr(value, key) for key, part in parts.items()):
            return value  # nothing in it changed, so it keeps its preset's name
        return type(value).model_validate(parts, context={"host": host})

    try:
        changed: Recipe = change(recipe)
    except ValidationError as error:
        raise RecipeError(f"--set {setting}: {explain(error)}") from None
    return changed


def catalogue(host: Host, kind: type[Component] | None = None) -> list[tuple[str, str, type[Component] | Preset]]:
    """Every component that loads: (plugin, name, class or preset), in the order of kinds, plugins and names."""
    rows = [(plugin, name, offered) for name, found in host.components(kind).items() for plugin, offered in found]
    return sorted(rows, key=lambda row: (row[0], isinstance(row[2], Preset), row[1]))
