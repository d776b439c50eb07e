"""The CodeGen adapter on a directory that the test writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from architectures import build, write
from click.testing import CliRunner

from qsim_core.cli.main import main
from qsim_core.testing import AdapterSuite


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(build("CodeGen"), tmp_path / "codegen")


def test_from_the_command_line_all_but_lm_head_is_quantized(folder: Path, tmp_path: Path) -> None:
    text, record = tmp_path / "text.txt", tmp_path / "result.json"
    text.write_text("ABCDEFGHIJKLMNOPQRSTUVWXYZ" * 10)
    options = ["--precision", "w4a8", "--data", str(text), "--set", "perplexity.seqlen=64", "--json", str(record), "-q"]

    run = CliRunner().invoke(main, ["evaluate", str(folder), *options])

    assert run.exit_code == 0, run.output
    result = json.loads(record.read_text())
    assert (result["adapter"], result["metric"]) == ("codegen", "perplexity")
    assert (result["audit"]["skipped"], result["audit"]["covered"], result["audit"]["found"]) == (["lm_head"], 12, 13)


class TestCodeGen(AdapterSuite):
    text = "codegen"

    def checkpoint(self, folder: Path) -> Path:
        return write(build("CodeGen"), folder)
