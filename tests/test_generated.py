"""The pages of `docs/generate.py` agree with the code, and a changed public name has a line in the changelog."""

from __future__ import annotations

import hashlib
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import qsim_core as qsim
from qsim_core.cli.main import main

ROOT = Path(__file__).parent.parent
MADE: dict[str, Any] = runpy.run_path(str(ROOT / "docs" / "generate.py"))
PAGES: dict[str, str] = MADE["pages"]()


def unreleased() -> str:
    """The changelog's first section."""
    return re.split(r"^## ", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_what_the_code_says(page: str) -> None:
    assert (ROOT / "docs" / page).read_text() == PAGES[page], "run: python docs/generate.py"


def test_pages_depend_on_no_terminal_and_no_optional_library() -> None:
    program = (
        "import sys, runpy, hashlib\n"
        "for name in ('lm_eval', 'transformers', 'diffusers', 'datasets', 'accelerate'): sys.modules[name] = None\n"
        f"pages = runpy.run_path({str(ROOT / 'docs' / 'generate.py')!r})['pages']()\n"
        "print(hashlib.sha256(repr(pages).encode()).hexdigest())"
    )
    narrow = {**os.environ, "COLUMNS": "40", "NO_COLOR": "1", "PYTHONHASHSEED": "7"}

    digest = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=narrow
    ).stdout

    assert digest == hashlib.sha256(repr(PAGES).encode()).hexdigest() + "\n"


@pytest.mark.parametrize("command", sorted({**main.commands, **MADE["commands_of_plugins"]()}))
def test_every_option_that_help_shows_is_on_the_page(command: str) -> None:
    (section,) = re.findall(rf"^## `qsim {command}`\n(.*?)(?=^## |\Z)", PAGES["cli.md"], re.MULTILINE | re.DOTALL)
    shown = CliRunner().invoke(main, [command, "--help"]).stdout

    options = set(re.findall(r"^ +(?:-\w, )?(--[\w-]+)", shown, re.MULTILINE))
    assert options == set(re.findall(r"^\| `(?:-\w, )?(--[\w-]+)", section, re.MULTILINE))


def test_every_component_is_on_the_page_with_every_option(host: qsim.Host) -> None:
    headings = re.findall(r"^#### `(\w+)|^\| `(\w+)` \| `", PAGES["components.md"], re.MULTILINE)
    plugins = {path.name for path in (ROOT / "plugins").iterdir()} | {"core"}

    named = {name for heading in headings for name in heading if name}
    assert named >= {n for n, found in host.components().items() if found[0][0] in plugins}
    assert "| `n` | whole number | `64` | elements of a vector that share a scale; " in PAGES["components.md"]


def imports(text: str) -> set[tuple[str, str]]:
    """Every (module of the core, name) that a text imports, or writes out in backticks."""
    found = re.findall(r"^ *from (qsim_core[\w.]*) import ([\w, ]+)$", text, re.MULTILINE)
    written = re.findall(r"`(qsim_core(?:\.[a-z_]+)+)\.(\w+)", text)
    pairs = {(home, name) for home, names in [*found, *written] for name in names.split(", ")}
    return {(home, name) for home, name in pairs if not is_module(f"{home}.{name}")}


def is_module(name: str) -> bool:
    return (ROOT / name.replace(".", "/")).with_suffix(".py").exists()


WRITTEN_FOR_AUTHORS = [
    *(ROOT / "plugins" / "new_plugin" / "qsim_new_plugin" / "templates").iterdir(),
    *(ROOT / "docs" / "examples").rglob("*.py"),
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / "plugins").glob("*/README.md"),
    ROOT / "README.md",
]


def test_what_pages_and_new_plugins_import_is_public() -> None:
    names = {
        pair for path in WRITTEN_FOR_AUTHORS for pair in imports(path.read_text().replace("$Suite", "TransformSuite"))
    }
    public = {(home, name) for home, names in MADE["FOR_AUTHORS"].items() for name in names}

    assert ("qsim_core.formats.rounding", "working") in names
    assert names <= public


def test_the_public_names_are_those_of_the_changelog() -> None:
    digest = MADE["digest"]()

    assert f"`{digest}`" in unreleased(), (
        "a public name was added, renamed, or has another signature (the difference is in docs/api.md): say it in "
        f"CHANGELOG.md under **Public names**, put `{digest}` there, and run: python docs/generate.py"
    )


def renamed(model: Any, recipes: Any = None) -> qsim.Simulation:
    raise NotImplementedError


def told_otherwise(text: str, host: qsim.Host | None = None) -> Any:
    """Another docstring."""


told_otherwise.__annotations__ = dict(qsim.parse.__annotations__)


@pytest.mark.parametrize(
    ("name", "value", "changes"),
    [
        ("simulate", renamed, True),
        ("__all__", [*qsim.__all__, "installed"], True),
        ("__all__", [name for name in qsim.__all__ if name != "Run"], True),
        ("parse", told_otherwise, False),
    ],
)
def test_the_digest_changes_with_names_and_signatures_alone(
    name: str, value: Any, changes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = MADE["digest"]()
    monkeypatch.setattr(qsim, "installed", qsim.Host, raising=False)
    monkeypatch.setattr(qsim, name, value, raising=False)

    assert (MADE["digest"]() != before) is changes
