"""`qsim new-plugin KIND NAME`: a distribution to start from, whose conformance suite is green as it stands."""

from __future__ import annotations

import keyword
import re
from pathlib import Path

import click

from qsim_core.errors import QsimError, with_article
from qsim_core.version import __version__

USES = {
    "quantizer": "qsim evaluate --weights $name",
    "format": "qsim evaluate --weights $name --activations $name",
    "scheme": "qsim evaluate --plugin $name",
    "calibrator": "qsim evaluate --precision w4a8 --static $name",
    "arithmetic": "qsim evaluate --precision w8a8 --arithmetic $name",
    "operation": "qsim evaluate --precision w8a8 --operations 'softmax: $name'",
    "hardware": "qsim evaluate --precision w8a8 --on $name",
    "transform": "qsim evaluate --precision w4a16 --plugin $name",
    "adapter": "qsim evaluate DIRECTORY --precision w8a8 --data INPUTS.safetensors",
    "evaluator": "qsim evaluate --precision w4a8 --evaluator $name --data TEXT",
}
"""Kind -> the command that uses a new plugin."""
NEEDS = {"adapter": ["safetensors>=0.4"], "operation": ["qsim-nonlinear{versions}"]}
"""The distributions that a plugin needs besides the core; those of qsim in the same `versions`."""
SUITES = dict.fromkeys(("format", "scheme"), "QuantizerSuite")
"""Kinds whose conformance suite is that of a more general kind."""


def write(kind: str, name: str, directory: Path) -> Path:
    """Write the distribution `directory/NAME` and give its path. Raises `QsimError`, and writes nothing then."""
    from importlib.resources import files
    from string import Template

    _check(name)
    target = directory / name
    if target.exists():
        raise QsimError(f"{target} is there already; choose another name or --directory")
    major, minor, _ = __version__.split(".")
    versions = f">={major}.{minor},<{major}.{int(minor) + 1}"
    needs = [need.format(versions=versions) for need in ("qsim-core{versions}", *NEEDS.get(kind, []))]
    words = {
        "name": name,
        "Name": "".join(part.title() for part in name.split("_")),
        "kind": kind,
        "A_kind": with_article(kind).capitalize(),
        "Suite": SUITES.get(kind, f"{kind.title()}Suite"),
        "dependencies": ", ".join(f'"{need}"' for need in needs),
    }
    words["use"] = Template(USES[kind]).substitute(words)
    parts = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        f"qsim_{name}.py": f"{kind}.py",
        f"tests/test_{name}.py": "test_adapter.py" if kind == "adapter" else "test.py",
    }
    templates = files(__name__) / "templates"
    texts = {file: (templates / f"{source}.template").read_text(encoding="utf-8") for file, source in parts.items()}
    try:
        (target / "tests").mkdir(parents=True)
        for file, text in texts.items():
            (target / file).write_text(Template(text).substitute(words), encoding="utf-8")
    except OSError as error:
        raise QsimError(f"{target} cannot be written: {error.strerror or error}") from None
    return target


def _check(name: str) -> None:
    """Raise `QsimError` for a name that cannot be one, or that something installed has."""
    from qsim_core.components.host import installed
    from qsim_core.components.syntax import CONSTANTS
    from qsim_core.evaluation.adapter import Adapter

    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or keyword.iskeyword(name) or name in CONSTANTS:
        raise QsimError(f"{name!r} cannot be a plugin's name: lowercase letters, digits and single _, like my_format")
    host = installed()
    if name in host.plugins:
        raise QsimError(f"{host.plugins[name]} is installed already; choose another name")
    for offer in host.offers().get(name, []):
        kind = with_article(host.class_of(host.get(offer)).kind)
        raise QsimError(f"{host.plugins[offer.plugin]} offers {kind} {name!r} already")
    for found in host.offers(Adapter).values():
        for offer in found:
            if name in offer.families:
                raise QsimError(f"{host.plugins[offer.plugin]} loads {name!r} models already")


@click.command("new-plugin")
@click.argument("kind", type=click.Choice(list(USES)))
@click.argument("name")
@click.option(
    "--directory", type=click.Path(path_type=Path), default=".", metavar="DIR", help="Where to write it; default: here."
)
def new_plugin(kind: str, name: str, directory: Path) -> None:
    """Write a plugin to start from: the distribution NAME with a working component and its tests."""
    from string import Template

    target = write(kind, name, directory)
    for file in sorted(path for path in target.rglob("*") if path.is_file()):
        click.echo(file)
    click.echo(f"\nNext: pip install -e '{target}[testing]' && pytest {target}")
    click.echo(f"Then: {Template(USES[kind]).substitute(name=name)}")
