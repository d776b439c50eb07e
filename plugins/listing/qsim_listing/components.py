"""`qsim components`: every component, one with its options, a format's codes."""

from __future__ import annotations

import inspect
import json
import math
import types
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qsim_core.errors import QsimError, natural_order

if TYPE_CHECKING:
    from qsim_core.components.component import Component, Preset
    from qsim_core.components.host import Host

WIDEST = 8
"""Bits of the widest format whose codes are listed."""


@click.command()
@click.argument("name", required=False)
@click.option("--table", is_flag=True, help="Print every code of the number format NAME and its value.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def components(name: str | None, table: bool, as_json: bool) -> None:
    """List every component, or show NAME with its options.

    With --table NAME may be any format's text, like 'float(3, 4)'.
    """
    from qsim_core.components.host import installed

    if not table:
        show_components(installed(), name, as_json)
    elif name is None:
        raise click.UsageError("--table needs the NAME of a number format, like e4m3")
    else:
        show_codes(installed(), name, as_json)


def show_components(host: Host, name: str | None, as_json: bool) -> None:
    """Print every component, or one with its options."""
    from rich.table import Table

    from qsim_core.cli.console import console

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


def catalogue(host: Host, kind: type[Component] | None = None) -> list[tuple[str, str, type[Component] | Preset]]:
    """Every component that loads: (plugin, name, class or preset), in the order of plugins and names."""
    from qsim_core.components.component import Preset

    rows = [(plugin, name, offered) for name, found in host.components(kind).items() for plugin, offered in found]
    return sorted(rows, key=lambda row: (natural_order(row[0]), isinstance(row[2], Preset), natural_order(row[1])))


def described(host: Host, plugin: str, offered: type[Component] | Preset) -> dict[str, Any]:
    """One component or preset in words, as `qsim components --json` prints it."""
    from qsim_core.components.component import Preset, options_of

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
    from qsim_core.components.component import Component

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
    from rich.table import Table
    from rich.text import Text

    from qsim_core.cli.console import console

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


def show_codes(host: Host, text: str, as_json: bool) -> None:
    """Print every code of a format with its value. Raises `QsimError` for one of more than 8 bits."""
    from rich.columns import Columns
    from rich.text import Text

    from qsim_core.cli.console import console
    from qsim_core.formats.format import Format

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
