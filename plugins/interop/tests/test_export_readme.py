"""The lines of the README that export a model do what they say."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from qsim_core.cli.main import main

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
SECTION = README[README.index("\n## Export\n") :]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_commands_of_the_readme_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for plugin in ("gptq", "opt", "zoo"):
        pytest.importorskip(f"qsim_{plugin}")
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^    qsim (.+)$", SECTION, re.MULTILINE)

    runs = [CliRunner().invoke(main, shlex.split(command)) for command in commands]

    assert [run.exit_code for run in runs] == [0] * len(commands), [run.output for run in runs]
    assert runs[1].output.endswith("nothing found wrong\n")
