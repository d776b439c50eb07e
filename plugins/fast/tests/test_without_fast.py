"""Without this plugin everything runs, from the reference: the audit says so, and the numbers are the same."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import forked
import pytest

pytest.importorskip("transformers")
pytest.importorskip("qsim_abfp")
pytest.importorskip("qsim_zoo")

HIDDEN = """
import importlib.abc, importlib.metadata as metadata, sys

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "qsim_fast":
            raise ModuleNotFoundError(name)

installed = metadata.distributions
metadata.distributions = lambda **given: (d for d in installed(**given) if d.name != "qsim-fast")
sys.meta_path.insert(0, Hidden())
"""
RUN = """
import sys
from qsim_core.cli.main import main
main(sys.argv[1:], standalone_mode=False)
assert ("qsim_fast" in sys.modules) == {loaded}
"""


def evaluated(folder: Path, program: str, *options: str) -> dict[str, Any]:
    """The result of `qsim evaluate opt-tiny --plugin abfp`, run by a program in a process of its own."""
    path = folder / "result.json"
    short = ["--limit", "1", "--set", "perplexity.seqlen=32"]
    command = ["evaluate", "opt-tiny", "--plugin", "abfp", *short, "--json", str(path), *options]
    run = subprocess.run([*forked.python(), "-c", program, *command], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def test_the_reference_gives_the_same_perplexity_and_the_audit_says_float32(tmp_path: Path) -> None:
    for name in ("with", "without"):
        (tmp_path / name).mkdir()

    with_fast = evaluated(tmp_path / "with", RUN.format(loaded=True))
    without = evaluated(tmp_path / "without", HIDDEN + RUN.format(loaded=False))

    assert {site["arithmetic"] for site in without["audit"]["sites"]} == {"float32"}
    assert without["simulated"] == with_fast["simulated"]
