"""The first commands of a user: they are fast, and work in terminals, pipes and shells."""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import forked
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

import qsim_core
from qsim_core.cli.main import main
from qsim_core.cli.plugin_commands import load_command, plugin_commands

HEAVY = ("torch", "transformers", "numpy", "rich", "yaml", "qsim_int", "qsim_zoo")


def imported_by(program: str) -> set[str]:
    code = f"import sys\n{program}\nprint(' '.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["plugins"],
        ["plugins", "--json"],
        ["cache", "--json"],
        ["evaluate", "-h"],
        ["finetune", "-h"],
        ["quantize", "-h"],
    ],
)
def test_help_and_the_list_of_plugins_import_nothing_heavy(arguments: list[str]) -> None:
    modules = imported_by(f"from qsim_core.cli.main import main; main({arguments!r}, standalone_mode=False)")

    assert modules.isdisjoint(HEAVY)


def test_importing_the_core_imports_nothing_heavy() -> None:
    assert imported_by("import qsim_core; from qsim_core import hookimpl, Host").isdisjoint(HEAVY)


def test_looking_a_component_up_imports_no_transformers() -> None:
    assert imported_by("import qsim_core; qsim_core.parse('abfp(int4)')").isdisjoint({"transformers", "datasets"})


def test_every_public_name_is_there() -> None:
    assert all(getattr(qsim_core, name) is not None for name in qsim_core.__all__)
    assert set(qsim_core.__all__) <= set(dir(qsim_core))
    with pytest.raises(AttributeError, match="module 'qsim_core' has no attribute 'Quantiser'"):
        qsim_core.Quantiser  # noqa: B018


def qsim(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    """qsim in a process of its own, with pipes for standard output and standard error."""
    return subprocess.run([sys.executable, "-m", "qsim_core", *arguments], capture_output=True, text=True, **options)  # type: ignore[call-overload,no-any-return]


def test_qsim_alone_shows_its_help_and_says_that_nothing_was_asked() -> None:
    run = qsim()

    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == qsim("--help").stdout


def every_command() -> dict[str, click.Command]:
    """The core's commands and those of the plugins that are installed."""
    of_plugins = {name: load_command(command.plugin) for name, command in plugin_commands().items()}
    return {**of_plugins, **main.commands}


COMMANDS = every_command()


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_a_help_that_says_what_each_option_does(command: str) -> None:
    long, short = (CliRunner().invoke(main, [command, option]) for option in ("--help", "-h"))

    assert (long.exit_code, long.stdout) == (0, short.stdout)
    assert all(p.help for p in COMMANDS[command].params if isinstance(p, click.Option))
    assert COMMANDS[command].help


def test_the_version_comes_with_those_of_every_plugin() -> None:
    lines = CliRunner().invoke(main, ["--version"]).stdout.splitlines()

    assert re.fullmatch(rf"qsim {re.escape(qsim_core.__version__)}, Python 3\.\d+\.\d+\S*, torch \d\S+", lines[0])
    assert ["abfp", "qsim-abfp", qsim_core.__version__, "components"] in [line.split() for line in lines[1:]]
    assert {line.split()[0] for line in lines[1:]} >= {*qsim_core.Host().plugins, "fast"}


def completions(words: str, shell: str = "bash") -> list[str]:
    """List the completions that a shell gets when Tab is pressed after the last word."""
    several = len(words.split(" ")) - 1
    environment = {
        **os.environ,
        "_QSIM_COMPLETE": f"{shell}_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": words.split(" ")[-1] if shell == "fish" else str(several),
    }
    program = (
        "import sys; from qsim_core.cli.main import main\ntry: main(prog_name='qsim')\nfinally: print(*sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    *lines, modules = run.stdout.splitlines()
    assert set(modules.split()).isdisjoint(HEAVY), "Tab must be answered at once"
    return lines


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("qsim comp", ["plain,components"]),
        ("qsim evaluate --prec", ["plain,--precision"]),
        ("qsim evaluate --plugin smo", ["plain,smoothquant"]),
        ("qsim evaluate --value-axis h", ["plain,head"]),
        ("qsim evaluate my", ["dir,my"]),
        ("qsim evaluate --data te", ["file,te"]),
        ("qsim evaluate --recipe re", ["file,re"]),
        ("qsim evaluate --json re", ["file,re"]),
        ("qsim quantize in", ["file,in"]),
    ],
)
def test_a_shell_completes_commands_options_plugins_and_files(words: str, offered: list[str]) -> None:
    assert completions(words) == offered


def test_zsh_is_told_which_distribution_a_plugin_is_of() -> None:
    assert completions("qsim evaluate --plugin smo", "zsh") == ["plain", "smoothquant", "qsim-smoothquant"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_is_told_how_to_ask(shell: str) -> None:
    if shell == "bash" and shutil.which("bash") is None:
        pytest.skip("click asks bash for its version")

    script = qsim(env={**os.environ, "_QSIM_COMPLETE": f"{shell}_source"}).stdout

    assert f"_QSIM_COMPLETE={shell}_complete" in script


def test_bash_takes_the_completion() -> None:
    if shutil.which("bash") is None or shutil.which("qsim") is None:
        pytest.skip("needs bash, and qsim on the path")
    script = 'eval "$(_QSIM_COMPLETE=bash_source qsim)"; COMP_WORDS=(qsim evalu); COMP_CWORD=1; _qsim_completion qsim'

    run = subprocess.run(["bash", "-c", f"{script}; echo ${{COMPREPLY[0]}}"], capture_output=True, text=True)

    assert (run.returncode, run.stdout, run.stderr) == (0, "evaluate\n", "")


TEXT = str(Path(__file__).parent.parent / "README.md")
SHOWN: dict[str, list[str]] = {
    "help": ["evaluate", "--help"],
    "an error": ["evaluate", "--plugin", "abpf"],
    "a list": ["components"],
    "one component": ["components", "abfp"],
    "codes": ["components", "e4m3", "--table"],
    "a structure": ["structure"],
    "a file's tensors, with a bar": ["quantize", "w.safetensors", "out.safetensors", "--weights", "int8"],
    "a result, with bars and spinners": [
        "evaluate",
        "SMALL",
        *["--precision", "w4a8", "--static", "mse", "--calibration-samples", "2", "--limit", "2"],
        *["--data", TEXT, "--calibration-data", TEXT],
    ],
}


def shown(what: str, small: Path) -> list[str]:
    """The arguments of a command, on a small model."""
    return [str(small) if word == "SMALL" else word for word in SHOWN[what]]


@pytest.mark.parametrize("what", SHOWN)
def test_a_pipe_gets_text_without_escape_codes(what: str, small: Path, tmp_path: Path) -> None:
    save_file({"layer.weight": torch.ones(4, 4)}, tmp_path / "w.safetensors")

    command = [*forked.python(), "-m", "qsim_core", *shown(what, small)]
    environment = {**os.environ, "TERM": "xterm-256color"}

    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)

    assert run.returncode == (what == "an error")
    assert "\x1b" not in run.stdout + run.stderr
    assert run.stderr.count("\n") == (what == "an error")


def on_a_terminal(arguments: list[str], environment: dict[str, str]) -> str:
    """Give everything that a terminal receives."""
    leader, follower = pty.openpty()
    clean = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    environment = {**clean, "TERM": "xterm-256color", **environment}
    run = subprocess.Popen(
        [*forked.python(), "-m", "qsim_core", *arguments], stdout=follower, stderr=follower, env=environment
    )
    os.close(follower)
    sent = b""
    try:
        while part := os.read(leader, 65536):
            sent += part
    except OSError:  # Linux reports so that the other end was closed
        pass
    os.close(leader)
    assert run.wait() == 0
    return sent.decode()


STYLE = re.compile(r"\x1b\[[\d;]*m")
"""Select Graphic Rendition: colours, bold, dim."""


@pytest.mark.parametrize("what", ["one component", "a result, with bars and spinners"])
def test_a_terminal_gets_styles_unless_no_color_is_set(what: str, small: Path) -> None:
    styled, plain = (on_a_terminal(shown(what, small), environment) for environment in ({}, {"NO_COLOR": "1"}))

    assert STYLE.search(styled)
    assert not STYLE.search(plain)
    assert ("\x1b" in plain) == ("bars" in what)  # a bar moves the cursor, and that is not a colour
