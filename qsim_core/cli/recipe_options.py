"""The recipe that the command line's options and a recipe file describe.

Options change what the file says, in this order. Each `--plugin` brings the component that bears the name: a quantizer
becomes the scheme of weights and activations, a transform is appended. `--precision` changes the widths. `--weights`,
`--activations` and `--outputs` name a quantizer exactly. `--static` gives activations static scales. `--set` changes
one option of a component that the recipe has by then.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from qsim_core.cli.progress import SHOWN
from qsim_core.components.component import Component, Preset, components_in, explain, no_option, options_of, read_value
from qsim_core.components.host import Host
from qsim_core.errors import PluginError, RecipeError, did_you_mean, natural_order, with_article
from qsim_core.evaluation.adapter import Adapter
from qsim_core.evaluation.data import Calibration
from qsim_core.evaluation.evaluator import Evaluator
from qsim_core.evaluation.job import Job
from qsim_core.evaluation.locate import RECORD
from qsim_core.files import place, read_text
from qsim_core.formats.format import Format
from qsim_core.formats.quantizer import Quantizer
from qsim_core.quantizers.calibrators import Calibrator
from qsim_core.quantizers.standard_schemes import Cast, Tensorwise
from qsim_core.simulation.recipe import Recipe, read_yaml
from qsim_core.simulation.work import Hardware
from qsim_core.transforms.run import Run
from qsim_core.transforms.transform import Transform

ROLES = ("weights", "activations", "outputs")
KEYS = {
    "model": "model",
    "evaluator": "evaluate",
    "value_axis": "value_axis",
    "arithmetic": "arithmetic",
    "kv_cache": "kv_cache",
}
"""Options that stand for one key of a recipe each, and the key."""
SIMULATED_WIDTH = 32
"""The width that `--precision` does not round to: simulation computes in float32."""
OUTPUT_WIDTH = 16
"""The width of outputs under `--plugin`, where nothing else is said of them."""
LARGEST_RECIPE = 1 << 20
"""Bytes of the largest recipe."""
HOW_TO_NAME: dict[type[Component], str] = {
    Format: "say --weights {name}, --activations {name} or --outputs {name}",
    Quantizer: "say --weights {name}, --activations {name} or --outputs {name}",
    Calibrator: "say --static {name}",
    Evaluator: "say --evaluator {name}",
    Adapter: "it is found by itself for the models it knows, and needs no --plugin",
}
"""The options that choose a component which `--plugin` does not choose."""


def recipe_of(options: Mapping[str, Any], host: Host, alone: bool = False) -> Recipe:
    """The recipe of a command with the options `RECIPE`. Raises a `QsimError`.

    The evaluator that goes with the model is filled in for `--set`, which may name it. With `alone` a model that is
    named may go without a recipe.
    """
    texts = {role: options[role] for role in ROLES}
    recipe = compose(
        host, values_of(options), options["plugins"], options["precision"], texts, static=options["static"]
    )
    if options["settings"] and recipe.evaluate is None:
        recipe = recipe.model_copy(update={"evaluate": Job.of(recipe, host).evaluator})
    for setting in options["settings"]:
        recipe = with_setting(host, recipe, setting)
    said = recipe.model is not None and (alone or (place(recipe.model) / RECORD).is_file())
    if not recipe.quantizes and not recipe.transforms and not said:
        raise RecipeError("nothing to do: say --plugin, --precision, --weights, --activations or --recipe")
    return recipe


def values_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a recipe that a file and options name; what `compose` takes beside them is left out."""
    values = read_recipe_file(options["recipe"]) if options["recipe"] is not None else {}
    values |= {key: options[option] for option, key in KEYS.items() if options[option] is not None}
    if options["operations"] is not None:
        values["operations"] = read_yaml(options["operations"], "--operations")
    if options["skip"]:
        values["skip"] = [] if options["skip"] == ("none",) else list(options["skip"])
    return values


def notes_of(options: Mapping[str, Any], recipe: Recipe, host: Host) -> list[str]:
    """A line for each option whose format is in the scheme of a `--plugin`, and not in the usual one."""
    notes = []
    for role in ROLES:
        if options[role] is None or not options["plugins"]:
            continue
        alone, here = getattr(Recipe.of({role: options[role]}, host), role), getattr(recipe, role)
        if type(alone) is not type(here):
            notes.append(f"--{role} {options[role]} beside --plugin means {here}; say --{role} '{alone}' for that one")
    return notes


def calibration_of(options: Mapping[str, Any]) -> Calibration:
    """The calibration data that the options `CALIBRATION` name."""
    return Calibration(*(options[f"calibration_{key}"] for key in ("data", "samples", "seqlen", "seed")))


def run_of(options: Mapping[str, Any], quiet: bool) -> Run:
    """The run that the options `DATA` and `COMPUTATION` describe, and `KEPT` where a command has them."""
    described = {field.name: options[field.name] for field in fields(Run) if field.name in options}
    return Run(**described, **({} if quiet else SHOWN))


def hardware_of(texts: Iterable[str], host: Host, products_only: bool = False) -> list[Hardware]:
    """The hardware that `--on` names: by texts, or by YAML files that hold a name and its options."""
    found = [
        _described(Path(text), host) if text.endswith((".yaml", ".yml")) else host.parse(text, Hardware)
        for text in texts
    ]
    return [one.products_only() for one in found] if products_only else found


def _described(path: Path, host: Host) -> Hardware:
    """The hardware in a YAML file. Raises `RecipeError`."""
    values = read_yaml(read_text(path, RecipeError, LARGEST_RECIPE), str(path))
    (name, options), *others = values.items() if isinstance(values, dict) and values else [("", None)]
    if others or not isinstance(options, dict):
        raise RecipeError(f"{path} is no hardware: expected one name and its options, like `NAME: {{OPTION: VALUE}}`")
    found = host.find(str(name), Hardware)
    cls = host.class_of(found)
    if unknown := options.keys() - options_of(cls).keys():
        raise RecipeError(f"{path}: {no_option(cls, str(min(unknown, key=str)))}")
    try:
        if isinstance(found, Preset):
            return host.parse(str(name), Hardware).replace(**options)  # type: ignore[no-any-return]
        return cls.model_validate(options, context={"host": host})  # type: ignore[return-value]
    except ValidationError as error:
        raise RecipeError(f"{path}: {explain(error)}") from None


def read_recipe_file(path: Path) -> dict[str, Any]:
    """The keys and values of a recipe file. Raises `RecipeError`."""
    values = read_yaml(read_text(path, RecipeError, LARGEST_RECIPE), str(path))
    if not isinstance(values, dict):
        raise RecipeError(f"{path} is not a recipe: expected keys and values like `weights: block(int4, 64)`")
    if "schema_version" in values:
        raise RecipeError(f"{path} is a result, not a recipe; --from {path} runs it again")
    return values


def compose(
    host: Host,
    values: Mapping[str, Any],
    plugins: Iterable[str] = (),
    precision: str | None = None,
    texts: Mapping[str, str | None] | None = None,
    static: str | None = None,
) -> Recipe:
    """The recipe of a file's `values`, changed by the options in the order that the module names."""
    chosen, named = _with_plugins(host, dict(values), plugins)
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
            number = None if text in ("none", "float32") else host.parse(text, Quantizer)
            chosen[role] = None if number is None else _in_scheme(role, number, scheme)
    if named is not None and "outputs" not in chosen:
        chosen["outputs"] = format_of_width(host, OUTPUT_WIDTH)
        if chosen["outputs"] is None:
            raise RecipeError(f"--plugin {named.name}: no format of {OUTPUT_WIDTH} bits is installed; say --outputs")
    if static is not None:
        chosen["activations"] = _static(host, chosen.get("activations"), static)
    recipe = Recipe.of(chosen, host)
    if recipe.transforms and not recipe.quantizes:
        raise RecipeError("a transform alone quantizes nothing; say --weights or --precision with it")
    return recipe


def _with_plugins(
    host: Host, chosen: dict[str, Any], plugins: Iterable[str]
) -> tuple[dict[str, Any], Quantizer | None]:
    """The values changed by each `--plugin`, and the quantizer that one of them brings."""
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
        elif isinstance(component, Transform):
            chosen["transforms"] = [*chosen.get("transforms", ()), component]
        else:
            chosen["evaluate"] = component
    return chosen, named


def bearing_name(host: Host, plugin: str) -> Component:
    """The component that bears its plugin's name, or the transform of that name of another plugin.

    Raises `PluginError` if there is neither, and lists the others.
    """
    if plugin not in host.plugins:
        transforms = host.offers(Transform)
        if plugin in transforms:
            found: Component = host.parse(plugin, Transform)
            return found
        if hint := _other_option(host, plugin):
            raise PluginError(hint)
        raise PluginError(f"no plugin {plugin!r} is installed{did_you_mean(plugin, {*host.plugins, *transforms})}")
    offers = host.load(plugin)
    fitting = [item for item in offers.items() if item.name == plugin]
    made: Any = host.parse(f"{plugin}.{plugin}") if fitting else None
    if isinstance(made, Quantizer | Transform | Evaluator):
        return made
    if hint := _other_option(host, plugin):
        raise PluginError(hint)
    names = ", ".join(sorted((item.name for item in offers.items()), key=natural_order)) or "nothing"
    raise PluginError(
        f"{offers.plugin} has no quantizer, transform or evaluator called {plugin!r}, so --plugin cannot say what to "
        f"do with it; it offers: {names}"
    )


def _other_option(host: Host, name: str) -> str:
    """The option that chooses a component which `--plugin` cannot choose. Empty if there is no such component."""
    for kind, how in HOW_TO_NAME.items():
        if name in host.offers(kind):
            return f"{name!r} is {with_article(kind.__name__.lower())}: {how.format(name=name)}"
    return ""


def _precision(host: Host, precision: str, scheme: Quantizer | None) -> dict[str, Any]:
    """`w4a8` as quantizers: integers in the scheme that was named, else in the usual one; other formats as a cast."""
    found = re.fullmatch(r"w(\d+)a(\d+)", precision.lower())
    if not found:
        raise RecipeError(f"--precision is written w4a8: the bits of weights and of activations, not {precision!r}")
    chosen: dict[str, Any] = {}
    for role, digits in zip(("weights", "activations"), found.groups(), strict=True):
        if int(digits) == SIMULATED_WIDTH:
            chosen[role] = None
            continue
        number = format_of_width(host, int(digits))
        if number is None:
            raise RecipeError(
                f"--precision {precision}: {role} may have {_widths(_by_width(host))} bits, or {SIMULATED_WIDTH} for "
                f"float32, not {int(digits)}{host.not_looked_at()}"
            )
        chosen[role] = _in_scheme(role, number, scheme) if number.is_integer else Cast(element=number)
    return chosen


def format_of_width(host: Host, bits: int) -> Format | None:
    """The format of the preset that stands for this width. None without one; raises `RecipeError` for several."""
    presets = _by_width(host).get(bits, [])
    if len(presets) > 1:
        raise RecipeError(
            f"{' and '.join(presets)} both stand for {bits} bits; say --weights, --activations and --outputs"
        )
    return host.parse(presets[0], Format) if presets else None


def _by_width(host: Host) -> dict[int, list[str]]:
    """The presets that stand for a width, with their plugins."""
    declared: dict[int, list[str]] = {}
    for name, found in host.offers(Format).items():
        for offer in found:
            if offer.stands_for_bits is not None:
                declared.setdefault(offer.stands_for_bits, []).append(f"{offer.plugin}.{name}")
    return declared


def _widths(declared: Collection[int]) -> str:
    """Numbers as `2 to 8 and 16`; a run of numbers is written by its ends."""
    runs: list[list[int]] = []
    for width in sorted(declared):
        if runs and width == runs[-1][-1] + 1:
            runs[-1].append(width)
        else:
            runs.append([width])
    return " and ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs) or "no"


def _static(host: Host, activations: Any, calibrator: str) -> Quantizer:
    """One static scale for each tensor in the format of the activations, chosen by a calibrator."""
    quantizer = host.parse(activations, Quantizer) if isinstance(activations, str) else activations
    element = quantizer if isinstance(quantizer, Format) else getattr(quantizer, "element", None)
    if not isinstance(element, Format):
        raise RecipeError(
            f"--static {calibrator}: no format of activations to give static scales; say --precision with it"
        )
    symmetric = getattr(quantizer, "symmetric", True)
    return Tensorwise(element=element, symmetric=symmetric, static=True, range=host.parse(calibrator, Calibrator))


def _in_scheme(role: str, quantizer: Quantizer, scheme: Quantizer | None) -> Quantizer:
    """A quantizer as it is; a format of weights or activations in the scheme that a plugin brings, if one does."""
    if scheme is None or role == "outputs" or not isinstance(quantizer, Format):
        return quantizer
    return scheme.replace(element=quantizer) if "element" in type(scheme).model_fields else quantizer


def with_setting(host: Host, recipe: Recipe, setting: str) -> Recipe:
    """The recipe with one option changed in every component of that name: `block.n=128`."""
    target, equals, text = setting.partition("=")
    name, dot, option = target.strip().rpartition(".")
    if not (equals and dot and name and option):
        raise RecipeError(f"--set is written COMPONENT.OPTION=VALUE, like block.n=128, not {setting!r}")
    known = {component.name for component in components_in(recipe)}
    if name not in known:
        raise RecipeError(f"--set {setting}: the recipe has no component {name!r}{did_you_mean(name, known)}")

    def change(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: change(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return tuple(change(item) for item in value)
        if isinstance(value, Component):
            return changed_component(value)
        if not isinstance(value, BaseModel):
            return value
        parts = {key: change(getattr(value, key)) for key in value.model_fields_set}
        return value.model_copy(update=parts)

    def changed_component(component: Component) -> Component:
        fields = type(component).model_fields
        parts = {key: change(getattr(component, key)) for key in fields}
        if component.name == name:
            if option not in fields:
                raise RecipeError(no_option(type(component), option))
            parts[option] = read_value(text.strip(), fields[option].annotation)
        elif all(part is getattr(component, key) for key, part in parts.items()):
            return component  # nothing in it changed, so it keeps its preset's name
        return type(component).model_validate(parts, context={"host": host})

    try:
        changed: Recipe = change(recipe)
    except ValidationError as error:
        raise RecipeError(f"--set {setting}: {explain(error)}") from None
    return changed
