"""`qsim plugins --check` looks at every installed plugin, command and accelerator, and names what cannot be used."""

from __future__ import annotations

from collections.abc import Iterator

import forked
import pytest
from click.testing import CliRunner, Result

from qsim_core.cli.main import main

HALVES = """
import qsim_core as qsim

class Halves(qsim.Quantizer):
    "Multiples of one half."
    name = "halves"
    def quantize(self, x):
        return (x * 2).round() / 2

@qsim.hookimpl
def qsim_quantizers():
    return [Halves, qsim.Preset("int99", "int(99)")]
"""
GREET = """
import click

@click.command()
def greet():
    "Say hello."
"""
WRONG = """
class Wrong:
    def quantize(self, quantizer, x, scales=None, out=None):
        return x * 2 if str(quantizer) == "int8" else None

wrong = Wrong()
"""
FAULTY = [
    ("qsim", "acme", "qsim-acme", "raise RuntimeError('broken')", "acme"),
    ("qsim", "core", "taker", HALVES, "core"),
    ("qsim", "presets", "qsim-presets", HALVES, "presets"),
    ("qsim.commands", "evaluate", "qsim-evaluate", GREET, "evaluate:greet"),
    ("qsim.commands", "greet", "qsim-greet", GREET, "greet:greet"),
    ("qsim.commands", "greet", "acme-tools", GREET, "tools:greet"),
    ("qsim.commands", "one", "qsim-one", "one = 1", "one:one"),
    ("qsim.commands", "two", "qsim-two", "import a_library_nobody_has", "two:two"),
    ("qsim.accelerators", "wrong", "qsim-wrong", WRONG, "wrong:wrong"),
]
"""The entry-point group, name and distribution of each fault, its source, and where the entry point leads."""


def check() -> Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.executable", forked.executable())
        return CliRunner().invoke(main, ["plugins", "--check"])


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Result]:
    """The check of an environment with one distribution for each fault."""
    folder = tmp_path_factory.mktemp("site-packages")
    for group, name, distribution, source, entry in FAULTY:
        module, _, attribute = entry.partition(":")
        (folder / f"faulty_{module}.py").write_text(source)
        info = folder / f"{distribution.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        target = f"faulty_{module}:{attribute}" if attribute else f"faulty_{module}"
        (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {target}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield check()


def warnings(result: Result, beginning: str) -> list[str]:
    """The warnings with this beginning, each up to its advice."""
    lines = [line.removeprefix("Warning: ").partition("; ")[0] for line in result.stderr.splitlines()]
    return [line for line in lines if line.startswith(beginning)]


@pytest.mark.slow  # the README of qsim-listing runs the same command, and asks for exit code 0
def test_what_is_installed_here_is_clean() -> None:
    result = check()

    assert (result.exit_code, result.stderr) == (0, "")


def test_the_exit_code_is_1_and_each_faulty_distribution_fails(faulty: Result) -> None:
    rows = [line.split() for line in faulty.stdout.splitlines()]

    assert faulty.exit_code == 1
    assert [row[:2] for row in rows if row[-1] == "fails"] == sorted([name, dist] for _, name, dist, _, _ in FAULTY)


def test_plugins_that_cannot_be_used_are_named(faulty: Result) -> None:
    assert warnings(faulty, "plugin") == [
        "plugin 'acme' (qsim-acme 1.2) does not import: RuntimeError: broken",
        "plugin 'core' (taker 1.2): the name 'core' is qsim's own",
        "plugin 'presets' (qsim-presets 1.2): preset 'int99' cannot be built: int: bits should be less than or "
        "equal to 16, not 99 (character 5 of 'int(99)')",
    ]


def test_commands_that_cannot_be_run_are_named(faulty: Result) -> None:
    assert warnings(faulty, "command") == [
        "command 'evaluate' (qsim-evaluate 1.2) cannot be run: `qsim evaluate` is a command of qsim-core",
        "command 'greet' is claimed by acme-tools 1.2 and qsim-greet 1.2",
        "command 'one' (qsim-one 1.2) is not a click command but int",
        "command 'two' (qsim-two 1.2) does not import: ModuleNotFoundError: No module named 'a_library_nobody_has'",
    ]


def test_an_accelerator_that_differs_is_named_with_the_quantizer(faulty: Result) -> None:
    assert warnings(faulty, "accelerator")[0].startswith("accelerator wrong: int8, of float32: ")
