"""Commands that other distributions add to `qsim`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from qsim_core.cli.main import main

Install = Callable[..., None]
PYTHON = sys.executable
"""A Python that has imported nothing."""

GREET = '''
import click

@click.command()
@click.option("--name", default="you", help="Whom to greet.")
def greet(name: str) -> None:
    """Say hello to somebody. The rest is for a longer help."""
    click.echo(f"hello {name}")
'''


@pytest.fixture
def install(quick_processes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """`install("greet")`: a distribution qsim-greet 1.2 whose only entry point is the command `greet`."""

    def distribution(
        name: str, source: str = GREET, dist: str = "", target: str = "greet", group: str = "qsim.commands"
    ) -> None:
        dist = dist or f"qsim-{name}"
        module = f"of_{dist.replace('-', '_')}"
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{dist.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.2\nSummary: Greetings\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}:{target}\n")
        monkeypatch.delitem(sys.modules, module, raising=False)

    monkeypatch.syspath_prepend(str(tmp_path))
    return distribution


def help_line(name: str) -> str:
    """Find the line of `qsim --help` about a command."""
    (line,) = [line for line in CliRunner().invoke(main, ["--help"]).stdout.splitlines() if line.split()[:1] == [name]]
    return " ".join(line.split()[1:])


def test_a_plugins_command_runs(install: Install) -> None:
    install("greet")

    outcome = CliRunner().invoke(main, ["greet", "--name", "Ada"])

    assert (outcome.exit_code, outcome.stdout) == (0, "hello Ada\n")


def test_a_plugins_command_has_its_own_help(install: Install) -> None:
    install("greet")

    shown = CliRunner().invoke(main, ["greet", "-h"], prog_name="qsim").stdout

    assert shown.startswith("Usage: qsim greet [OPTIONS]")
    assert "--name TEXT  Whom to greet.  [default: you]" in shown


def test_help_lists_it_with_the_first_sentence_of_its_docstring(install: Install) -> None:
    install("greet")

    assert help_line("greet") == "Say hello to somebody."


@pytest.mark.parametrize("source", ["import click\ngreet = click.Command('greet')", "this is not Python"])
def test_without_a_docstring_help_shows_the_distributions_summary(source: str, install: Install) -> None:
    install("greet", source)

    assert help_line("greet") == "Greetings"


@pytest.mark.parametrize("arguments", [["--help"], ["plugins"], ["evaluate", "--help"]])
def test_other_commands_do_not_import_it(arguments: list[str], install: Install, tmp_path: Path) -> None:
    install("greet", GREET + "\nimport pathlib; pathlib.Path(__file__).with_name('imported').touch()")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from qsim_core.cli.main import main; main({arguments!r})"
    )

    shown = subprocess.run([PYTHON, "-c", program], capture_output=True, text=True, check=True).stdout

    assert ("greet" in shown) == (arguments[0] != "evaluate")
    assert not (tmp_path / "imported").exists()


def test_a_module_in_a_package_is_described_without_importing_the_package(install: Install, tmp_path: Path) -> None:
    install("greet", target="greet")
    package = tmp_path / "packaged"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "command.py").write_text(GREET)
    (tmp_path / "qsim_greet-1.2.dist-info" / "entry_points.txt").write_text(
        "[qsim.commands]\ngreet = packaged.command:greet\n"
    )

    assert help_line("greet") == "Say hello to somebody."


def test_a_command_that_does_not_import_is_one_line_with_cause_and_remedy(install: Install) -> None:
    install("greet", "import a_library_nobody_has")

    outcome = CliRunner().invoke(main, ["greet"])

    assert (outcome.exit_code, outcome.stderr) == (
        1,
        "Error: command 'greet' (qsim-greet 1.2) does not import: ModuleNotFoundError: No module named "
        "'a_library_nobody_has'; reinstall or upgrade qsim-greet, or uninstall it\n",
    )
    assert CliRunner().invoke(main, ["--help"]).exit_code == CliRunner().invoke(main, ["plugins"]).exit_code == 0


def test_an_entry_point_that_is_not_a_command_is_one_line(install: Install) -> None:
    install("greet", "def greet(): pass")

    outcome = CliRunner().invoke(main, ["greet"])

    assert outcome.stderr == (
        "Error: command 'greet' (qsim-greet 1.2) is not a click command but function; reinstall or upgrade qsim-greet, "
        "or uninstall it\n"
    )


def test_a_name_that_two_distributions_claim_is_an_error_that_names_both(install: Install) -> None:
    install("greet")
    install("greet", dist="acme-tools")

    outcome = CliRunner().invoke(main, ["greet"])

    assert (outcome.exit_code, outcome.stderr) == (
        1,
        "Error: command 'greet' is claimed by acme-tools 1.2 and qsim-greet 1.2; uninstall all but one of them\n",
    )
    assert help_line("greet") == "(claimed by acme-tools 1.2 and qsim-greet 1.2)"


def test_a_plugin_cannot_take_a_command_of_the_core_away(install: Install) -> None:
    install("evaluate", GREET.replace("greet", "evaluate"), target="evaluate")

    used = CliRunner().invoke(main, ["evaluate", "--help"])

    assert "Say hello" not in used.stdout and "--precision" in used.stdout


def test_an_unknown_command_says_which_one_was_meant(install: Install) -> None:
    install("greet")

    outcome = CliRunner().invoke(main, ["gret"])

    assert outcome.exit_code == 2
    assert "No such command 'gret'. Did you mean 'greet'?" in outcome.stderr


def test_a_command_whose_plugin_is_missing_says_what_brings_it() -> None:
    outcome = CliRunner().invoke(main, ["knead"])

    assert outcome.exit_code == 2
    assert "No such command 'knead'; pip install 'qsim-core[all]' brings every command of qsim.\n" in outcome.stderr


def test_the_list_says_what_each_distribution_provides(install: Install) -> None:
    install("greet")
    install("quick", dist="qsim-quick", group="qsim.accelerators")

    listed = CliRunner().invoke(main, ["plugins"]).stdout.splitlines()
    records = json.loads(CliRunner().invoke(main, ["plugins", "--json"]).stdout)

    assert ["greet", "qsim-greet", "1.2", "command"] in [line.split() for line in listed]
    assert ["quick", "qsim-quick", "1.2", "accelerator"] in [line.split() for line in listed]
    assert {"name": "greet", "distribution": "qsim-greet", "version": "1.2", "provides": ["command"]} in records


def test_a_plugin_with_components_and_a_command_of_one_name_is_one_row(install: Install, tmp_path: Path) -> None:
    install("greet")
    with (tmp_path / "qsim_greet-1.2.dist-info" / "entry_points.txt").open("a") as file:
        file.write("[qsim]\ngreet = of_qsim_greet\n")

    listed = CliRunner().invoke(main, ["plugins"]).stdout.splitlines()

    assert [line.split(maxsplit=3)[3] for line in listed if line.startswith("greet")] == ["components, command"]


def completions(arguments: list[str], incomplete: str) -> list[str]:
    """List the completions that a shell gets after the arguments."""
    return [
        str(item.value)
        for item in ShellComplete(main, {}, "qsim", "_QSIM_COMPLETE").get_completions(arguments, incomplete)
    ]


def test_a_shell_completes_a_plugins_command_and_its_options(install: Install) -> None:
    install("greet")

    assert completions([], "gre") == ["greet"]
    assert completions(["greet"], "--na") == ["--name"]


def test_a_shell_completes_nothing_of_a_command_that_does_not_import(install: Install) -> None:
    install("greet", "import a_library_nobody_has")

    assert completions(["greet"], "--na") == []
