"""What there is: every component, one with its options, a format's codes."""

from __future__ import annotations

import inspect
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import torch
from rich.columns import Columns
from rich.table import Table
from rich.text import Text

from qsim_core.cli.console import console
from qsim_core.cli.progress import hush_libraries
from qsim_core.cli.recipe_options import catalogue
from qsim_core.components.component import Component, Preset, options_of
from qsim_core.components.host import Host
from qsim_core.errors import QsimError
from qsim_core.formats.format import Format
from qsim_core.structure.heads import Attention, Projection
from qsim_core.structure.structure import Refused, Structure

WIDEST = 8


def components(host: Host, name: str | None, as_json: bool) -> None:
    """Print every component, or one with its options."""
    if name is not None:
        found = host.find(name)
        rows = [row for row in catalogue(host) if row[2] is found]
    else:
        rows = catalogue(host)
    texts = [described(host, plugin, offered) for plugin, _, offered in rows]
    if as_json:
        click.echo(json.dumps(texts, indent=2))
    elif name is not None:
        _show_one(texts[0])
    else:
        table = Table("component", "kind", "plugin", "what it is", box=None, pad_edge=False)
        for row in texts:
            table.add_row(row["name"], row["kind"], row["plugin"], row["summary"])
        out = console(rows=True)
        with out.capture() as shown:
            out.print(table)
        click.echo("\n".join(line.rstrip() for line in shown.get().splitlines()))


def described(host: Host, plugin: str, offered: type[Component] | Preset) -> dict[str, Any]:
    """One component or preset in words, as `qsim components --json` prints it."""
    cls = host.class_of(offered)
    if isinstance(offered, Preset):
        text, doc, options = offered.text, offered.doc, []
    else:
        text, doc, options = None, inspect.cleandoc(offered.__doc__ or ""), list(options_of(offered).items())
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
    if isinstance(value, tuple):
        return f"[{', '.join(_default(item) for item in value)}]"
    return str(value).lower() if isinstance(value, bool | None) else str(value)


def _type(annotation: Any) -> str:
    """A type as a user would say it: `format`, `whole number`, `tensor | channel | token`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin is typing.Literal:
        return " | ".join(str(argument) for argument in arguments)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type(argument) for argument in arguments)
    if origin is tuple:
        inner = [_type(argument) for argument in arguments if argument is not ...]
        return f"list of {inner[0]}s" if ... in arguments else f"[{', '.join(inner)}]"
    if isinstance(annotation, type) and issubclass(annotation, Component):
        return annotation.kind
    names = {int: "whole number", float: "number", bool: "true | false", str: "text", Path: "file", type(None): "none"}
    return names.get(annotation, str(annotation))


def _show_one(row: dict[str, Any]) -> None:
    out = console()
    signature = ", ".join(o["name"] if o["required"] else f"{o['name']}={o['default']}" for o in row["options"])
    out.print(Text(row["name"], "bold") + Text(f"({signature})" if row["options"] else ""))
    out.print(f"{row['kind']} of plugin {row['plugin']}", style="dim")
    if row["stands_for"]:
        out.print(f"\nShort for {row['stands_for']}.")
    for paragraph in row["doc"].split("\n\n"):
        drawn = paragraph.startswith(" ")  # a list or a table: its lines stay as they are
        out.print()
        out.print(paragraph if drawn else " ".join(paragraph.split()), soft_wrap=drawn)
    if row["options"]:
        table = Table("option", "type", "default", "meaning", box=None, pad_edge=False)
        for option in row["options"]:
            table.add_row(
                option["name"], option["type"], "" if option["required"] else option["default"], option["doc"]
            )
        out.print()
        out.print(table)


def codes(host: Host, text: str, as_json: bool) -> None:
    """Print every code of a format with its value. Raises `QsimError` for one of more than 8 bits."""
    number = host.parse(text, Format)
    if number.width > WIDEST:
        raise QsimError(f"{text} has {number.width} bits; a table of codes is printed up to {WIDEST}")
    table = number.table().tolist()
    missing = "NaN" if number.has_nan else "unused"
    values = [missing if math.isnan(v) else "Inf" if v == math.inf else "-Inf" if v == -math.inf else v for v in table]
    rows = [{"code": code, "bits": f"{code:0{number.width}b}", "value": value} for code, value in enumerate(values)]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    digits = math.ceil(number.width / 4)
    lines = [f"{row['code']:0{digits}x}  {row['bits']}  {_short(row['value'])}" for row in rows]
    out = console()
    out.print(Text(str(number), "bold") + Text(f": {number.width} bits, {number.min:.9g} to {number.max:.9g}"))
    out.print(Columns(lines, padding=(0, 4), column_first=True))


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.9g}"


def structure(host: Host, model: str | None, data: str | None, as_json: bool) -> None:
    """Print what was found in a model, and what was refused and why."""
    from qsim_core.evaluation.job import DEFAULT_MODEL, Job
    from qsim_core.simulation.recipe import Recipe
    from qsim_core.simulation.simulation import simulate
    from qsim_core.structure.structure import trace
    from qsim_core.transforms.blocks import block_paths

    hush_libraries()
    job = Job.of(Recipe.of({"model": model or DEFAULT_MODEL}, host), host)
    for note in job.located.notes("float32"):
        click.echo(f"Warning: {note}", err=True)
    loaded = job.located.adapter.load(job.located.source, torch.float32)
    example = job.evaluator.example(loaded, job.data(data))
    if example is None:
        raise QsimError(f"{job.evaluator} gives no example to run; trace the model from Python")
    simulation = simulate(loaded.model, example=example)
    blocks = block_paths(loaded.model, simulation.sites.table.values())
    simulation.restore()
    declared = job.located.adapter.structure(loaded.model)
    found = trace(loaded.model, example, declared)
    if as_json:
        click.echo(json.dumps(_structure_record(found, blocks, declared), indent=2))
        return
    out = console(soft_wrap=True)
    ends = f"{blocks[0] or 'the model'} to {blocks[-1] or 'the model'}"
    out.print(Text(job.located.name, "bold") + Text(f": {len(blocks)} blocks, {ends}"))
    for title, lines, style in _sections(found, declared):
        out.print(f"\n{title}", style="bold")
        for line in lines:
            out.print(f"  {line}", style=style)


def _sections(found: Structure, declared: Any) -> Iterator[tuple[str, list[str], str]]:
    """Title, lines and style of each part of what was found."""
    marks = {group.norm: " (declared)" if declared and group.norm in declared else "" for group in found.groups}
    groups = [f"{g.norm} -> {_relative(g.norm, g.weights)}{marks[g.norm]}" for g in found.groups]
    yield "norms, and the weights that read them: ranges can be moved from one to the others", groups, ""
    pairs = []
    for pair in found.pairs:
        mark = " (scaled too)" if pair.scales else ""
        pairs.append(f"{pair.producer.removesuffix('.weight')} -> {_relative(pair.producer, pair.weights)}{mark}")
    yield "weights in pairs: channels can be permuted (of v within heads), and scaled where it says so", pairs, ""
    yield "attention", [_attention(attention) for attention in found.attention], ""
    if found.ordered:
        yield "channels that have to stay in their order", [_why(refused) for refused in found.ordered], "dim"
    yield "refused", [_why(refused) for refused in found.refused], "dim"


def _attention(attention: Attention) -> str:
    own = f"{attention.path}."
    made = {role: rows.text.removeprefix(own) for role, rows in _projections(attention).items() if rows is not None}
    parts = ", ".join(f"{role} {text}" for role, text in made.items())
    shared = f" ({attention.key_heads} of k and v)" if attention.key_heads < attention.heads else ""
    reads = _relative(attention.value.producer, [use.weight for use in attention.value.uses])
    shape = f"{attention.heads} heads of {attention.head_size}{shared}"
    return f"{attention.path}: {shape}; {parts} -> {reads or 'no weight'}"


def _why(refused: Refused) -> str:
    return f"{refused.name}: {'; '.join(refused.reasons)}"


def _projections(attention: Attention) -> dict[str, Projection | None]:
    return {"q": attention.query, "k": attention.key, "v": attention.value}


def _relative(name: str, others: list[str]) -> str:
    """Modules without the parts of their paths that they share with `name`."""
    parts, shown = name.removesuffix(".weight").split("."), []
    for other in others:
        rest = other.removesuffix(".weight").split(".")
        shared = next((i for i, (a, b) in enumerate(zip(parts, rest, strict=False)) if a != b), len(rest) - 1)
        shown.append(".".join(rest[shared:]))
    return ", ".join(shown)


def _structure_record(found: Structure, blocks: list[str], declared: Mapping[str, Any] | None) -> dict[str, Any]:
    told = declared or {}
    return {
        "blocks": blocks,
        "groups": [{"norm": g.norm, "weights": g.weights, "declared": g.norm in told} for g in found.groups],
        "pairs": [{"producer": p.producer, "weights": p.weights, "scales": p.scales} for p in found.pairs],
        "attention": [
            {
                "path": a.path,
                "heads": a.heads,
                "key_heads": a.key_heads,
                "head_size": a.head_size,
                **{role: rows and rows.producer for role, rows in _projections(a).items()},
                "outputs": [use.weight for use in a.value.uses],
            }
            for a in found.attention
        ],
        "ordered": [{"name": refused.name, "reasons": list(refused.reasons)} for refused in found.ordered],
        "refused": [{"name": refused.name, "reasons": list(refused.reasons)} for refused in found.refused],
    }
