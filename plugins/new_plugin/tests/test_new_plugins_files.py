"""`qsim new-plugin` says what to do next, and what cannot be written is one line. tests/test_new_plugin.py runs the plugins."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qsim_core.cli.main import main


def new_plugin(kind: str, name: str, *options: object) -> Result:
    return CliRunner().invoke(main, ["new-plugin", kind, name, *map(str, options)])


def test_what_to_do_next_is_said(tmp_path: Path) -> None:
    said = new_plugin("quantizer", "my_format", "--directory", tmp_path).stdout

    assert said.splitlines() == [
        f"{tmp_path}/my_format/README.md",
        f"{tmp_path}/my_format/pyproject.toml",
        f"{tmp_path}/my_format/qsim_my_format.py",
        f"{tmp_path}/my_format/tests/test_my_format.py",
        "",
        f"Next: pip install -e '{tmp_path}/my_format[testing]' && pytest {tmp_path}/my_format",
        "Then: qsim evaluate --weights my_format",
    ]


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        (
            "quantizer",
            "My-Format",
            "'My-Format' cannot be a plugin's name: lowercase letters, digits and single _, like my_format",
        ),
        (
            "quantizer",
            "class",
            "'class' cannot be a plugin's name: lowercase letters, digits and single _, like my_format",
        ),
        (
            "quantizer",
            "none",
            "'none' cannot be a plugin's name: lowercase letters, digits and single _, like my_format",
        ),
        ("quantizer", "core", "plugin 'core' (qsim-core 0.1.0) is installed already; choose another name"),
        ("quantizer", "channel", "plugin 'core' (qsim-core 0.1.0) offers a quantizer 'channel' already"),
        ("transform", "there", "there is there already; choose another name or --directory"),
    ],
)
def test_what_cannot_be_written_is_one_line(
    kind: str, name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()

    outcome = new_plugin(kind, name)

    assert (outcome.exit_code, outcome.stderr) == (1, f"Error: {message}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
