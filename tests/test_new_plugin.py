"""The plugins of `qsim new-plugin`, and the examples of the docs, are installed from their files and pass their suites."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import forked
import pytest
from click.testing import CliRunner
from wheels import build, unpack

from qsim_core.cli.main import main

ROOT = Path(__file__).parent.parent
EXAMPLES = {
    "powers": "quantizer",
    "fibonacci": "format",
    "squares": "scheme",
    "deviations": "calibrator",
    "saturating": "arithmetic",
    "shares": "operation",
    "multipliers": "hardware",
    "clip": "transform",
    "gpt2": "adapter",
    "agreement": "evaluator",
}
KINDS = list(EXAMPLES.values())
OF_ITS_OWN = {
    "squares": {"pyproject.toml", "tests/test_squares.py"},
    "gpt2": {"pyproject.toml", "tests/test_gpt2.py"},
    "saturating": {"pyproject.toml"},
}
"""Example -> the files that differ from those of a new plugin, by what it depends on."""
Program = Callable[..., "subprocess.CompletedProcess[str]"]


def new_plugin(kind: str, name: str, directory: Path) -> str:
    outcome = CliRunner().invoke(main, ["new-plugin", kind, name, "--directory", str(directory)])
    assert outcome.exit_code == 0, outcome.output
    return outcome.stdout


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources: one new plugin of each kind, and a copy of the examples."""
    sources = tmp_path_factory.mktemp("sources")
    for kind in KINDS:
        new_plugin(kind, f"new_{kind}", sources)
    for name in EXAMPLES:
        shutil.copytree(ROOT / "docs" / "examples" / name, sources / name)
    return sources


@pytest.fixture(scope="module")
def run(plugins: Path, tmp_path_factory: pytest.TempPathFactory) -> Program:
    """`run("-m", "pytest", …)`: Python with these plugins installed, besides those of this environment."""
    wheels = tmp_path_factory.mktemp("wheels")
    build(sorted(plugins.iterdir()), wheels)
    installed = unpack(wheels.glob("*.whl"), tmp_path_factory.mktemp("environment"))
    environment = {
        **os.environ,
        "PYTHONPATH": str(installed),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # they rewrite what the fork has imported
    }

    def program(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [*forked.python(), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=plugins)

    return program


@pytest.mark.parametrize(
    "names",
    [[f"new_{kind}" for kind in KINDS], pytest.param([*EXAMPLES], marks=pytest.mark.slow)],
    ids=["new", "examples"],
)
def test_every_suite_is_green(names: list[str], run: Program, plugins: Path) -> None:
    """One plugin of each kind, in one process; a warning is an error."""
    tests = [str(path) for name in names for path in sorted((plugins / name).rglob("test_*.py"))]
    options = ["-q", "-W", "error", "-p", "no:cacheprovider", "--import-mode=importlib"]

    outcome = run("-m", "pytest", *options, *tests)

    assert outcome.returncode == 0, outcome.stdout[-4000:] + outcome.stderr
    assert len({Path(test).parents[1] for test in tests}) == len(KINDS)


def test_a_new_plugin_is_used_as_the_page_says(run: Program) -> None:
    page = (ROOT / "docs" / "plugins.md").read_text()
    create, install, use = re.findall(r"^\$ (.*)$", page, re.MULTILINE)

    outcome = run("-m", "qsim_core", *use.split()[1:], "--limit", "1", "--quiet", "--json", "-")

    assert outcome.returncode == 0, outcome.stderr
    result = json.loads(outcome.stdout)
    assert (result["recipe"]["weights"], result["recipe"]["activations"]) == ("powers(5)", "powers(5)")
    assert (create, install) == (
        "qsim new-plugin quantizer powers",
        "pip install -e 'powers[testing]' && pytest powers",
    )
    assert result["plugins"]["powers"] == {"distribution": "qsim-powers", "version": "0.1.0"}


def test_a_family_that_an_installed_plugin_loads_needs_no_adapter(tmp_path: Path) -> None:
    outcome = CliRunner().invoke(main, ["new-plugin", "adapter", "mistral", "--directory", str(tmp_path)])

    assert outcome.stderr == "Error: plugin 'llama' (qsim-llama 0.1.0) loads 'mistral' models already\n"


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_a_new_plugin_with_another_module(name: str, tmp_path: Path) -> None:
    new_plugin(EXAMPLES[name], name, tmp_path)
    ours = {"README.md", "pyproject.toml", f"tests/test_{name}.py"} - OF_ITS_OWN.get(name, set())

    for file in ours:
        assert (ROOT / "docs" / "examples" / name / file).read_text() == (tmp_path / name / file).read_text(), file


@pytest.mark.parametrize("name", ["powers", "fibonacci", "squares", "saturating", "shares"])
def test_a_quantizer_a_format_a_scheme_an_arithmetic_and_an_operation_take_at_most_twenty_lines(name: str) -> None:
    assert len((ROOT / "docs" / "examples" / name / f"qsim_{name}.py").read_text().splitlines()) <= 20
