"""Plugins written for qsim 0.1 load and run, or one line says what has moved where.

`plugins_0_1` holds the examples of 0.1's documentation, byte for byte. Each is built and installed as a wheel.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import forked
import pytest
from wheels import build, unpack

import qsim_core as qsim
from qsim_core.moved import moved

PLUGINS = Path(__file__).parent / "plugins_0_1"
Program = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """`run("-c", …)`: Python in an environment with a wheel of each plugin; deprecations are shown."""
    folder = tmp_path_factory.mktemp("plugins_0_1")
    shutil.copytree(PLUGINS, folder / "sources")  # building leaves files behind
    build(sorted((folder / "sources").iterdir()), folder / "wheels")
    installed = unpack((folder / "wheels").glob("*.whl"), folder / "installed")
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}

    def program(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [*forked.python(), "-W", "always::DeprecationWarning", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)

    return program


def test_every_plugin_is_there_as_a_wheel(run: Program) -> None:
    program = """
import qsim_core
names = ("agreement", "clip", "deviations", "gpt2", "powers")
print(*(str(qsim_core.Host().plugins[name]) for name in names), sep="; ")
"""

    outcome = run("-c", program)

    assert outcome.stdout == (
        "plugin 'agreement' (qsim-agreement 0.1.0); plugin 'clip' (qsim-clip 0.1.0); "
        "plugin 'deviations' (qsim-deviations 0.1.0); plugin 'gpt2' (qsim-gpt2 0.1.0); "
        "plugin 'powers' (qsim-powers 0.1.0)\n"
    ), outcome.stderr


def test_a_quantizer_a_calibrator_and_a_transform_of_0_1_run(run: Program) -> None:
    program = """
import torch, qsim_core
print(qsim_core.parse("powers(3)")(torch.tensor([0.3, -0.9, 5.0, 0.01])).tolist())

low, high = qsim_core.parse("deviations(1)").range(torch.tensor([[-1.0, 1.0, 7.0, 7.0]]), None, None)
print(low.item(), high.item())

model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False))
model[0].weight.data = torch.diag(torch.tensor([4.0, 0.0, 0.0, 0.0]))
qsim_core.simulate(model, transforms=["clip(at=2)"], weights="tensor(int8)", calibration=[torch.ones(2, 4)])
print(model[0].weight.max().item())
"""

    outcome = run("-c", program)

    assert outcome.stdout.splitlines() == ["[0.25, -1.0, 1.0, 0.0]", "-1.0 5.0", "2.0"], outcome.stderr


def test_an_evaluator_of_0_1_runs(run: Program, small: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Return the number of items in a container. " * 20)
    options = ["--evaluator", "agreement", "--precision", "w8a8", "--data", str(text), "--limit", "2", "--quiet"]

    outcome = run("-m", "qsim_core", "evaluate", str(small), *options, "--json", str(tmp_path / "result.json"))

    assert outcome.returncode == 0, outcome.stderr
    result = qsim.Result.read(tmp_path / "result.json")
    assert (result.baseline["agreement"], result.plugins["agreement"].version) == (1.0, "0.1.0")


def test_a_module_that_has_moved_is_a_deprecation_warning_that_names_the_new_ones(run: Program) -> None:
    outcome = run("-c", "import qsim_core; qsim_core.Host().load('clip')")

    warnings = [line.partition("DeprecationWarning: ")[2] for line in outcome.stderr.splitlines() if "Warning" in line]
    assert warnings == [
        "qsim_core.context has moved to qsim_core.transforms.context, qsim_core.transforms.report and "
        "qsim_core.matmuls.dispatch",
        "qsim_core.ops has moved to qsim_core.matmuls.call, qsim_core.matmuls.layout and qsim_core.matmuls.operators",
        "qsim_core.running has moved to qsim_core.sites.call_stack and qsim_core.sites.site",
    ]
    assert "qsim_clip.py:9: DeprecationWarning" in outcome.stderr, "it points at the plugin's import"


def test_a_module_that_has_left_the_core_is_one_line(run: Program) -> None:
    outcome = run("-c", "import qsim_core; qsim_core.Host().load('gpt2')")

    assert outcome.returncode == 1
    assert outcome.stderr.splitlines()[-1] == (
        "qsim_core.errors.PluginError: plugin 'gpt2' (qsim-gpt2 0.1.0) does not import: ImportError: qsim_core.pretrained "
        "has moved to qsim_transformers.pretrained (pip install qsim-transformers); reinstall or upgrade qsim-gpt2, or "
        "uninstall it"
    )


def test_a_module_that_is_a_package_now_has_its_old_names(monkeypatch: pytest.MonkeyPatch) -> None:
    package = importlib.import_module("qsim_core.simulation")
    monkeypatch.delitem(vars(package), "simulate", raising=False)  # it may have been found before

    with pytest.warns(DeprecationWarning, match=r"^qsim_core.simulation has moved to qsim_core.simulation.simulation$"):
        from qsim_core.simulation import simulate

    assert simulate is qsim.simulate


def test_evaluate_of_the_package_is_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    package = importlib.import_module("qsim_core.evaluation")
    monkeypatch.delitem(vars(package), "evaluate", raising=False)  # it may have been found before

    with pytest.warns(DeprecationWarning):
        from qsim_core.evaluation import evaluate

    assert evaluate is qsim.evaluate


@pytest.mark.parametrize(
    ("old", "name", "now"),
    [
        ("fixed", "Fixed", "StaticScheme"),
        ("forms", "Form", "Lowering"),
        ("blocks", "Watcher", "MatmulWatcher"),
        ("dispatch", "Watcher", "OperatorWatcher"),
    ],
)
def test_a_name_that_has_another_name_now_is_found(
    old: str, name: str, now: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, f"qsim_core.{old}", raising=False)
    with pytest.warns(DeprecationWarning):
        module = importlib.import_module(f"qsim_core.{old}")

    assert getattr(module, name) is getattr(importlib.import_module(moved()[old][0]), now)


def test_a_name_that_never_was_is_an_ordinary_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "qsim_core.ops", raising=False)

    with (
        pytest.warns(DeprecationWarning),
        pytest.raises(ImportError, match="^cannot import name 'Nothing' from 'qsim_"),
    ):
        from qsim_core.ops import Nothing  # noqa: F401
    with pytest.raises(ModuleNotFoundError, match="^No module named 'qsim_core.nothing'$"):
        import qsim_core.nothing  # noqa: F401


@pytest.mark.parametrize("old", moved())
def test_the_new_places_of_a_module_are_there(old: str) -> None:
    missing = [place for place in moved()[old] if importlib.util.find_spec(place) is None]

    assert missing == []
