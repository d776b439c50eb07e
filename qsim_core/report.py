"""What the command line shows: progress, tables, and the lines under them."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from qsim_core import evaluation
from qsim_core.bases import Run
from qsim_core.component import Component, Preset
from qsim_core.compose import catalogue, compose
from qsim_core.errors import RecipeError
from qsim_core.host import Host
from qsim_core.recipe import Recipe, read_yaml
from qsim_core.result import Result

FREE_BESIDE_A_RECORD = frozenset({"record", "device", "dry_run"})
"""The options that say nothing that a record says."""


def run(options: dict[str, Any], given: set[str], quiet: bool) -> Result | None:
    """Carry out `qsim evaluate` with its options; None after a dry run."""
    host = Host()
    before = None
    if options["record"] is not None:
        if clash := given - FREE_BESIDE_A_RECORD:
            raise RecipeError(f"--from runs a record as it is; leave {', '.join(sorted(clash))} out")
        before = Result.read(options["record"])
        recipe = evaluation.recipe_of(before, host)
        options = options | {
            "data": before.data.source,
            "limit": before.limit,
            "batch_size": before.batch_size,
            "seed": before.seed,
            "dtype": before.environment.dtype,
        }
    else:
        recipe = _recipe(options, host)
    if options["dry_run"]:
        click.echo(evaluation.Job.of(recipe, host).recipe.to_yaml(), nl=False)
        return None
    _hush_libraries()
    result = evaluation.evaluate(
        recipe,
        host=host,
        data=options["data"],
        device=options["device"],
        dtype=options["dtype"],
        run=Run(options["batch_size"], options["limit"], options["seed"], **({} if quiet else SHOWN)),
    )
    if before is not None:
        evaluation.same_data(before, result)
        for line in _differences(before, result):
            click.echo(f"Warning: {line}", err=True)
    return result


def _recipe(options: dict[str, Any], host: Host) -> Recipe:
    values = _recipe_file(options["recipe"]) if options["recipe"] is not None else {}
    texts = {role: options[role] for role in ("weights", "activations", "outputs")}
    for option, key in (("model", "model"), ("evaluator", "evaluate"), ("value_axis", "value_axis")):
        if options[option] is not None:
            values[key] = options[option]
    if options["skip"]:
        values["skip"] = [] if options["skip"] == ("none",) else list(options["skip"])
    # the evaluator and skip that an adapter chooses are filled in first, so that --set can reach them
    if options["settings"] and "evaluate" not in values:
        values["evaluate"] = str(evaluation.Job.of(Recipe.of({"model": values.get("model")}, host), host).evaluator)
    recipe = compose(host, values, options["plugins"], options["precision"], texts, options["settings"])
    if not recipe.quantizes and not recipe.transforms:
        raise RecipeError("nothing to do: say --plugin, --precision, --weights, --activations or --recipe")
    return recipe


def _recipe_file(path: Path) -> dict[str, Any]:
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is not text'}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path} is no recipe: expected keys and values like `weights: abfp(int4)`")
    Recipe.of({key: None for key in values if key not in Recipe.model_fields})  # an unknown key is an error by name
    return values


def _differences(before: Result, after: Result) -> Iterator[str]:
    """What is not the same here as when a record was made."""
    for name, plugin in before.plugins.items():
        now = after.plugins.get(name)
        if now != plugin:
            found = now.version if now else "not used"
            yield f"plugin {name!r} was {plugin.distribution} {plugin.version}, now {found}"
    for library, version in before.environment.versions.items():
        if after.environment.versions.get(library) != version:
            yield f"{library} was {version}, now {after.environment.versions.get(library)}"


def _track(items: Iterable[Any], total: int, description: str) -> Iterator[Any]:
    """Show a bar on standard error while a loop runs."""
    columns = (
        TextColumn("{task.description:18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield from progress.track(items, total=total, description=description)


def _stage(description: str) -> AbstractContextManager[Any]:
    """Show a spinner on standard error while something without a count goes on."""
    console = Console(stderr=True)
    return console.status(description) if console.is_terminal else nullcontext()


SHOWN: dict[str, Any] = {"track": _track, "stage": _stage}


def _hush_libraries() -> None:
    """transformers draws bars and logs hints of its own; a command shows qsim's."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    try:
        from transformers.utils import logging
    except ImportError:
        return
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def show(result: Result) -> None:
    """The table of one result on standard output."""
    audit, recipe = result.audit, result.recipe
    table = Table(title=result.model, title_justify="left", title_style="bold", show_header=False, min_width=60)
    table.add_column(style="dim")
    table.add_column(justify="right")
    for key in ("weights", "activations", "outputs"):
        table.add_row(key, recipe[key] or "as they are")
    for transform in recipe["transforms"]:
        table.add_row("after", transform)
    table.add_section()
    table.add_row(f"{result.environment.dtype} {result.metric}", f"{result.baseline[result.metric]:.4g}")
    table.add_row(f"simulated {result.metric}", f"[bold]{result.simulated[result.metric]:.4g}[/bold]")
    table.add_row("ratio", f"{result.ratio:.4g}")
    table.add_section()
    table.add_row("matmuls quantized", f"{audit.covered} of {audit.found}")
    table.add_row("bits per weight", _bits(audit.bits_per_weight))
    table.add_row("bits per activation", _bits(audit.bits_per_activation))
    table.add_section()
    table.add_row("seconds, baseline", f"{result.seconds['baseline']:.1f}")
    table.add_row("seconds, simulated", f"{result.seconds['simulated']:.1f}")
    table.add_row("seconds, in all", f"{result.seconds['total']:.1f}")
    console = Console(highlight=False)
    console.print(table)
    for line in _lines(result):
        console.print(f"[dim]{line}[/dim]", soft_wrap=True)


def _lines(result: Result) -> Iterator[str]:
    """What a careful reader must know beside the numbers."""
    audit = result.audit
    yield f"{result.protocol}; {result.data.name} (sha256 {result.data.sha256[:12]})"
    if result.recipe["skip"]:
        yield f"left alone: {', '.join(result.recipe['skip'])} (--skip none quantizes everything)"
    if audit.uncovered:
        yield f"not reached: {', '.join(audit.uncovered)}"
    grouped: dict[str, list[str]] = {}
    for site in audit.sites:
        for note in site.notes:
            grouped.setdefault(note, []).append(site.site)
    for note, sites in grouped.items():
        yield f"{len(sites)} site{'s' if len(sites) > 1 else ''}, like {sites[0]}: {note}"


def _bits(bits: float | None) -> str:
    return "unknown" if bits is None else f"{bits:.3g}"


def components(host: Host, name: str | None, as_json: bool) -> None:
    """Print every component, or one with its options."""
    if name is not None:
        found = host.find(name)
        rows = [row for row in catalogue(host) if row[2] is found]
    else:
        rows = catalogue(host)
    described = [_described(host, plugin, offered) for plugin, _, offered in rows]
    if as_json:
        click.echo(json.dumps(described, indent=2))
    elif name is not None:
        _show_one(described[0])
    else:
        table = Table("component", "kind", "plugin", "what it is", box=None, pad_edge=False)
        for row in described:
            table.add_row(row["name"], row["kind"], row["plugin"], row["summary"])
        Console(highlight=False).print(table)


def _described(host: Host, plugin: str, offered: type[Component] | Preset) -> dict[str, Any]:
    cls = host.class_of(offered)
    if isinstance(offered, Preset):
        text, doc, options = offered.text, offered.doc, []
    else:
        text, doc, options = None, inspect.cleandoc(offered.__doc__ or ""), list(offered.model_fields.items())
    return {
        "name": offered.name,
        "kind": cls.kind,
        "plugin": plugin,
        "stands_for": text,
        "summary": f"{text}: {doc}" if text else doc.partition("\n\n")[0].replace("\n", " "),
        "doc": doc,
        "options": [
            {
                "name": option,
                "type": _type(field.annotation),
                "default": None if field.is_required() else _default(field.default),
                "required": field.is_required(),
                "doc": field.description or "",
            }
            for option, field in options
        ],
    }


def _default(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool | None) else str(value)


def _type(annotation: Any) -> str:
    """A type as a user would say it: `format`, `whole number`, `tensor | channel | token`."""
    import types
    import typing

    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin is typing.Literal:
        return " | ".join(str(argument) for argument in arguments)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type(argument) for argument in arguments)
    if isinstance(annotation, type) and issubclass(annotation, Component):
        return annotation.kind
    names = {int: "whole number", float: "number", bool: "true | false", str: "text", type(None): "none"}
    return names.get(annotation, str(annotation))


def _show_one(row: dict[str, Any]) -> None:
    console = Console(highlight=False)
    signature = ", ".join(o["name"] if o["required"] else f"{o['name']}={o['default']}" for o in row["options"])
    console.print(f"[bold]{row['name']}[/bold]({signature})" if row["options"] else f"[bold]{row['name']}[/bold]")
    console.print(f"[dim]{row['kind']} of plugin {row['plugin']}[/dim]")
    if row["stands_for"]:
        console.print(f"\nShort for {row['stands_for']}.")
    console.print(f"\n{row['doc']}", markup=False)
    if row["options"]:
        table = Table("option", "type", "default", "meaning", box=None, pad_edge=False)
        for option in row["options"]:
            table.add_row(
                option["name"], option["type"], "" if option["required"] else option["default"], option["doc"]
            )
        console.print()
        console.print(table)
